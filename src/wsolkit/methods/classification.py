"""Compute the classification loss of a training batch. All methods share it, so all can train on CutMix."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from wsolkit.types import TrainingBatch


def mixed_cross_entropy(logits: Tensor, label: Tensor, pasted_label: Tensor, share: Tensor | float) -> Tensor:
    """Compute λ · CE(y) + (1 − λ) · CE(y_π), the mean over a batch, as a scalar.

    Args:
        logits: [B, C].
        label: the labels y [B] of the images themselves.
        pasted_label: the labels y_π [B] of the images that a part was pasted from.
        share: λ, the share of each image that is its own, in [0, 1].
    """
    own, pasted = F.cross_entropy(logits, label), F.cross_entropy(logits, pasted_label)
    return share * own + (1 - share) * pasted


def classification_loss(logits: Tensor, batch: TrainingBatch) -> Tensor:
    """Compute the cross-entropy of logits [B, C], or `mixed_cross_entropy` if parts of other images were pasted."""
    if "pasted_label" not in batch:
        return F.cross_entropy(logits, batch["label"])
    return mixed_cross_entropy(logits, batch["label"], batch["pasted_label"], batch["own_share"])
