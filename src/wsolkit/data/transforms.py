"""Image transforms that carry boxes and masks along. The only file that knows albumentations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or importing it asks the network for news

import albumentations as A
import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor

from wsolkit.errors import ConfigError
from wsolkit.types import Boxes, Image, Mask


class Transformed(NamedTuple):
    """image [3, S, S] float32, normalised; boxes [n, 4] in its pixels, both corners inside; mask [S, S] or None."""

    image: Tensor
    boxes: Boxes
    mask: Mask | None


class Resize(A.Resize):  # type: ignore[misc]
    """Resize images as the papers do: bilinear with antialiasing (PIL's). Masks take the nearest pixel."""

    def apply(self, img: Image, **params: Any) -> Image:
        """Resize an image [H, W, 3]."""
        if img.shape[:2] == (self.height, self.width):
            return img
        resized = PIL.Image.fromarray(img).resize((self.width, self.height), PIL.Image.Resampling.BILINEAR)
        return np.asarray(resized)


class Transform:
    """From an image as read to what a network takes.

    Args:
        resize: side in pixels to which images are scaled first, whatever their aspect ratio.
        image_size: side of the result; training cuts it out at a random place, evaluation from the centre.
        train: also flip horizontally at random.
        mean, std: of the backbone's pretraining, for values in [0, 1].

    Raises:
        ConfigError: `image_size` exceeds `resize`.
    """

    def __init__(self, resize: int, image_size: int, train: bool, mean: Sequence[float], std: Sequence[float]) -> None:
        if image_size > resize:
            raise ConfigError(
                f"cannot cut {image_size} pixels out of an image resized to {resize}: dataset.resize is too small"
            )
        crop = A.RandomCrop if train else A.CenterCrop
        steps: list[Any] = [Resize(resize, resize)]
        steps += [crop(image_size, image_size)] if image_size < resize else []
        steps += [A.HorizontalFlip(p=0.5)] if train else []
        # Boxes shrunk below a pixel, or cropped away, are dropped.
        box_params = A.BboxParams(format="pascal_voc", label_fields=[], clip=True, min_width=1, min_height=1)
        # Masks may come in another size than their image: the first step resizes both, each from its own pixels.
        self._compose = A.Compose(steps, bbox_params=box_params, is_check_shapes=False)
        self._scale = np.float32(1 / (255 * np.asarray(std, np.float32)))
        self._shift = np.float32(-np.asarray(mean, np.float32) / np.asarray(std, np.float32))

    def __call__(self, image: Image, boxes: Boxes, mask: Mask | None, seed: int) -> Transformed:
        """Apply the transform; equal seeds give equal results, in any process and any order.

        Args:
            image: [H, W, 3].
            boxes: [n, 4] in its pixels, both corners inside.
            mask: [h, w] of the same proportions, or None.
            seed: of the random choices.
        """
        self._compose.set_random_seed(seed)
        edges = boxes + np.array([0, 0, 1, 1])  # corners inside → edges, which is what scaling is exact for
        edges = np.minimum(edges, [image.shape[1], image.shape[0]] * 2).astype(np.float64)
        given: dict[str, Any] = {"image": image, "bboxes": edges} | ({} if mask is None else {"mask": mask})
        out = self._compose(**given)
        pixels = out["image"].astype(np.float32) * self._scale + self._shift
        moved = np.round(np.asarray(out["bboxes"]).reshape(-1, 4)).astype(np.int64) - np.array([0, 0, 1, 1])
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return Transformed(tensor, moved, None if mask is None else np.ascontiguousarray(out["mask"]))


def denormalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.uint8]:
    """A normalised image [3, H, W] as pixels [H, W, 3]."""
    pixels = image.detach().cpu().float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
