"""EIL: erasing integrated learning (Mai et al., CVPR 2020).

After a stage of the backbone, the positions whose channel mean is at least γ times the largest one are set to 0. The
map as it is and the erased map go through the same later layers, and both have to show the class:

    L = CE(plain, y) + w · mean over the stages of CE(erased, y)

The hard mask carries no gradient. Logits and score maps are those of CAM on the plain branch. MEIL is the same with
several stages, each of which has an erased branch of its own.

The released code weighs both losses alike (w = 1). The paper has w as a setting. The released code has modules for
MEIL and does not use them, so the mean over the stages is chosen here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.methods.cam import CAMModule, Form, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.erasing import below_peak, keep
from wsolkit.types import TrainingBatch


def erase(feature: Tensor, threshold: float) -> Tensor:
    """Set the most active positions of feature maps [B, D, H, W] to 0.

    Args:
        feature: the feature maps.
        threshold: γ. A position is kept if the mean of its channels is below γ times the largest one of the image.
    """
    return keep(feature, below_peak(feature, threshold))


class EIL(CAMModule):
    """EIL and MEIL, in training and evaluation.

    Args:
        stages: the stages of the backbone after which the map is erased: one for EIL, several for MEIL.
        threshold: γ, see `erase`.
        erased_weight: w.
        form: see `CAMNetwork`.
        head: see `HeadSettings`.

    Raises:
        ConfigError: the backbone does not have a stage, none is given, or γ is out of its range.
    """

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        stages: Sequence[str],
        threshold: float,
        erased_weight: float,
        form: Form,
        **head: Unpack[HeadSettings],
    ) -> None:
        if not stages:
            raise ConfigError("method.stages=[]: name a stage of the backbone, or several for MEIL")
        if not 0 < threshold <= 1:
            raise ConfigError(f"method.threshold={threshold}: expected a share of the maximum, above 0 and up to 1")
        for stage in stages:
            backbone.places(stage)  # A missing stage raises an error here.
        super().__init__(backbone, num_classes, form, head)
        self.stages = tuple(stages)
        self.erased_weight = erased_weight
        self.erase = functools.partial(erase, threshold=threshold)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy of the plain branch and the mean one of the erased branches, without its weight."""
        network = self.network
        feature, erased = network.features_and_changed(batch["image"], self.stages, self.erase)
        losses = {
            "loss_cls": classification_loss(network.logits(feature), batch),
            "loss_erased": torch.stack([classification_loss(network.logits(one), batch) for one in erased]).mean(),
        }
        return {"loss": losses["loss_cls"] + self.erased_weight * losses["loss_erased"], **losses}
