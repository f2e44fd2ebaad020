"""Cut a network's input from an evaluation batch, by the rules of a protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wsolkit.localization.maps import central_crop, ten_crops
from wsolkit.types import EvaluationBatch

if TYPE_CHECKING:
    from wsolkit.localization.protocol import Input


def network_input(batch: EvaluationBatch, way: Input) -> tuple[Tensor, Tensor | None]:
    """Return the network's input [B, 3, S, S] for a batch, and the masks of that part [B, S, S]."""
    if way == "resize":
        return batch["image"], batch["mask"]
    uncropped, mask = _uncropped(batch), batch["uncropped_mask"]
    size = batch["image"].shape[-1]
    return central_crop(uncropped, size), None if mask is None else central_crop(mask, size)


def ten_crop_probabilities(batch: EvaluationBatch, classify: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean of the softmax over four corners, the centre, and their mirror images, [B, C].

    It is NaN for an image with logits that are not finite.
    """
    crops = ten_crops(_uncropped(batch), batch["image"].shape[-1])
    logits = torch.stack([classify(crop).float() for crop in crops])  # [10, B, C]
    finite = logits.isfinite().all(dim=0).all(dim=1, keepdim=True)
    return logits.softmax(dim=2).mean(dim=0).masked_fill(~finite, torch.nan)


def _uncropped(batch: EvaluationBatch) -> Tensor:
    uncropped = batch["uncropped"]
    if uncropped is None:
        raise ValueError(
            "a protocol crops its input, but the batch has no 'uncropped' images, which WSOLDataModule makes"
        )
    return uncropped
