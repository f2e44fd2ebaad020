"""CutMix (Yun et al., ICCV 2019).

In training, a batch is permuted, and a rectangle of each permuted image is pasted over the same place of the image.
The sides of the rectangle are √(1 − λ) of the image's, with λ ~ Beta(β, β), its centre is uniform over the image, and
the image cuts it. λ then becomes the share of the image that is left, and both labels count by their shares:

    L = λ · CE(y) + (1 − λ) · CE(y_π)

The method only changes images and the classification loss. `method=cutmix` is CAM that trains on such images, and
`augment=cutmix` mixes the images of any other method. Terms of its loss that depend on the map of the true class use
the label of the image itself.

The released code rounds half a side down, so that a rectangle with an odd side loses a pixel. This code does so, too.
It draws the rectangle on the CPU, so that a GPU does not have to wait for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wsolkit.errors import ConfigError
from wsolkit.methods.classification import mixed_cross_entropy
from wsolkit.types import TrainingBatch

__all__ = ["CutMix", "Rectangle", "mixed_cross_entropy", "paste", "rectangle"]

Rectangle = tuple[int, int, int, int]
"""Top, left, bottom and right in pixels. Bottom and right lie outside of it."""


def rectangle(height: int, width: int, lam: float, row: int, column: int) -> Rectangle:
    """Return the rectangle with sides of √(1 − λ) of an image's, cut at its borders.

    Args:
        height, width: of the image, in pixels.
        lam: λ in [0, 1].
        row, column: the centre.

    >>> from wsolkit.methods.cutmix import rectangle
    >>> rectangle(10, 20, lam=0.75, row=4, column=19)
    (2, 14, 6, 20)
    """
    ratio = math.sqrt(1 - lam)
    vertical, horizontal = int(height * ratio) // 2, int(width * ratio) // 2  # Half the sides, rounded down.
    return (
        max(int(row) - vertical, 0),
        max(int(column) - horizontal, 0),
        min(int(row) + vertical, height),
        min(int(column) + horizontal, width),
    )


def paste(image: Tensor, permutation: Tensor, rectangle: Rectangle) -> tuple[Tensor, float]:
    """Paste a rectangle of other images over the same place of each image.

    Args:
        image: [B, 3, H, W].
        permutation: the index [B] of the image to paste from.
        rectangle: see `Rectangle`.

    Returns:
        the mixed images [B, 3, H, W], and the share of each that is its own.
    """
    top, left, bottom, right = (int(side) for side in rectangle)
    mixed = image.clone()
    mixed[:, :, top:bottom, left:right] = image[permutation, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (image.shape[-2] * image.shape[-1])


class CutMix:
    """Mixes the images of a training batch, whose labels then count by their shares of the image.

    Args:
        beta: β of the distribution of λ.
        probability: the probability of a batch to be mixed.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(self, beta: float, probability: float) -> None:
        if not beta > 0:
            raise ConfigError(f"augment.beta={beta}: expected a positive number, such as 1")
        if not 0 <= probability <= 1:
            raise ConfigError(f"augment.probability={probability}: expected 0 to 1")
        self.beta = beta
        self.probability = probability

    def __call__(self, batch: TrainingBatch) -> TrainingBatch:
        """Return the batch with mixed images, `pasted_label` and `own_share`."""
        image, label = batch["image"], batch["label"]
        height, width = image.shape[-2:]
        box = self._draw(height, width)
        if box is None:
            return batch
        permutation = torch.randperm(len(image), device=image.device)
        mixed, share = paste(image, permutation, box)
        return {
            **batch,
            "image": mixed,
            "pasted_label": label[permutation],
            "own_share": torch.full((), share, device=image.device),
        }

    def _draw(self, height: int, width: int) -> Rectangle | None:
        """Draw the rectangle of a batch, or None for a batch that stays as it is."""
        if torch.rand(()).item() >= self.probability:
            return None
        lam = torch.distributions.Beta(self.beta, self.beta).sample().item()
        row, column = (int(torch.randint(side, ()).item()) for side in (height, width))
        return rectangle(height, width, lam, row, column)
