"""SPG: self-produced guidance (Zhang et al., ECCV 2018).

Branch A is a classifier with CAMs. Three more branches predict for each pixel whether it belongs to the object: B1 and
B2 from the maps after two stages of the backbone, and C from the last map. They learn from each other's certain pixels
(seeds), one after the other, at the size of the image:

    seeds of a map m with (high, low):  object where m > high, background where m < low, the rest does not count
    B2 learns from the seeds of A's map of the true class, scaled to [0, 1]
    B1 learns from the seeds of sigmoid(B2)
    C  learns from the seeds of the mean of sigmoid(B1) and sigmoid(B2)

    L = CE(A, y) + BCE(B2) + BCE(B1) + BCE(C), each BCE over its seeds; seeds carry no gradient

The score map of a class is A's. B1 and B2 share their last two layers. If fewer than 30 pixels exceed `high`, those
above 0.7 times the maximum count, and background overrides object, as in the released code.

That code leaves the dropout of branch A on in evaluation, which is a mistake. This code leaves it off. A batch without
any seed has the loss 0 here, and NaN there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.cam import CAMModule, CAMNetwork, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.heads import Initialisation, convolutional_head, initialise
from wsolkit.methods.maps import select_maps
from wsolkit.methods.seeds import seed_loss, seeds
from wsolkit.types import TrainingBatch

__all__ = ["SPG", "SPGNetwork", "pixel_losses", "seeds"]


def pixel_losses(
    maps: Tensor,
    label: Tensor,
    logits_b1: Tensor,
    logits_b2: Tensor,
    logits_c: Tensor,
    thresholds: Sequence[Sequence[float]] | Tensor,
    size: Sequence[int],
) -> dict[str, Tensor]:
    """Compute the losses of the three pixel branches.

    Args:
        maps: the class maps [B, C, h, w] of branch A, which get no gradient.
        label: the true classes [B].
        logits_b1, logits_b2, logits_c: the logits [B, 1, ·, ·] of the branches, at any size.
        thresholds: (high, low) of the seeds that B2, B1 and C learn from, in this order.
        size: (H, W), at which the branches are compared.

    Returns:
        the scalars `loss_b2`, `loss_b1` and `loss_c`.
    """

    def enlarged(values: Tensor) -> Tensor:  # [B, 1, ·, ·] → [B, H, W]
        resized = F.interpolate(values.float(), size=(int(size[0]), int(size[1])), mode="bilinear", align_corners=False)
        return resized[:, 0]

    of_b2, of_b1, of_c = ((float(high), float(low)) for high, low in thresholds)
    attention = min_max(enlarged(select_maps(maps.detach(), label[:, None])))
    b1, b2, c = (enlarged(logits) for logits in (logits_b1, logits_b2, logits_c))
    return {
        "loss_b2": seed_loss(b2, seeds(attention, *of_b2)),
        "loss_b1": seed_loss(b1, seeds(b2.sigmoid(), *of_b1)),
        "loss_c": seed_loss(c, seeds((b1.sigmoid() + b2.sigmoid()) / 2, *of_c)),
    }


class Seeds(TypedDict):
    """The thresholds [high, low] of the seeds that each branch learns from."""

    b2: Sequence[float]
    b1: Sequence[float]
    c: Sequence[float]


class SPGNetwork(CAMNetwork):
    """A CAM network, which is branch A, with three pixel branches.

    Args:
        stages: the stages of the backbone that B1 and B2 start from.
        pixel_channels: the width of the pixel branches.
        dropout: see `CAMNetwork`.
        init: how the pixel branches are drawn, see `initialise`.
        network: see `CAMNetwork`.
    """

    passes = ("features", "features_and_stages", "all_branches")

    def __init__(
        self, *network: Any, stages: Sequence[str], pixel_channels: int, dropout: float, init: Initialisation
    ) -> None:
        super().__init__(*network, dropout=dropout)
        self.pixel_stages = tuple(stages)
        width = pixel_channels
        b1, b2 = (convolutional_head([first, width], dropout=0.0) for first in self.backbone.widths(stages))
        self.b1, self.b2 = b1, b2
        self.b_shared = nn.Sequential(*convolutional_head([width, width], 0.0), nn.Conv2d(width, 1, kernel_size=1))
        last = self.classifier.in_channels
        self.c = nn.Sequential(*convolutional_head([last, width], 0.0), nn.Conv2d(width, 1, kernel_size=1))
        initialise((*self.b1, *self.b2, *self.b_shared, *self.c), init)

    def all_branches(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the class maps [B, C, h, w] of A, and the logits [B, 1, ·, ·] of B1, B2 and C."""
        last, (first, second) = self.backbone.maps(image, self.pixel_stages)
        feature = self.head(last)
        b1, b2 = self.b_shared(self.b1(first)), self.b_shared(self.b2(second))
        return self.class_maps(feature), b1, b2, self.c(feature)


class SPG(CAMModule):
    """SPG in training and evaluation.

    Args:
        stages: see `SPGNetwork`.
        pixel_channels: see `SPGNetwork`.
        dropout: see `CAMNetwork`.
        seeds: the thresholds of `pixel_losses`.
        head: see `HeadSettings`, for branch A. `head_init` counts for all branches.

    Raises:
        ConfigError: thresholds or stages are wrong.
    """

    network: SPGNetwork

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        stages: Sequence[str],
        pixel_channels: int,
        dropout: float,
        seeds: Seeds,
        **head: Unpack[HeadSettings],
    ) -> None:
        if len(stages) != 2:
            raise ConfigError(f"method.stages={list(stages)}: expected two stages of the backbone, for B1 and for B2")
        pairs = [seeds["b2"], seeds["b1"], seeds["c"]]
        for name, pair in zip(("b2", "b1", "c"), pairs, strict=True):
            if len(pair) != 2 or not 0 <= pair[1] <= pair[0] <= 1:
                raise ConfigError(f"method.seeds.{name}={list(pair)}: expected [high, low] with 0 <= low <= high <= 1")
        network = functools.partial(
            SPGNetwork,
            stages=stages,
            pixel_channels=pixel_channels,
            dropout=dropout,
            init=head["head_init"],
        )
        super().__init__(backbone, num_classes, "maps_first", head, network)
        self.thresholds = tuple((float(high), float(low)) for high, low in pairs)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy and the losses of the pixel branches. A's map is that of the image's own label."""
        image, label = batch["image"], batch["label"]
        maps, b1, b2, c = self.network.all_branches(image)
        losses = {
            "loss_cls": classification_loss(maps.mean(dim=(2, 3)), batch),
            **pixel_losses(maps, label, b1, b2, c, self.thresholds, image.shape[-2:]),
        }
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}
