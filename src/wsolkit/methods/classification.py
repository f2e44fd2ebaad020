"""Compute the classification loss of a training batch. All methods share it, so all can train on CutMix."""

from __future__ import annotations

import functools
from collections.abc import Callable

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
    return share * F.cross_entropy(logits, label) + (1 - share) * F.cross_entropy(logits, pasted_label)


def over_labels(loss: Callable[[Tensor], Tensor], batch: TrainingBatch) -> Tensor:
    """Compute a loss of the batch's labels [B], or λ · loss(y) + (1 − λ) · loss(y_π) if parts were pasted."""
    own = loss(batch["label"])
    if "pasted_label" not in batch:
        return own
    return batch["own_share"] * own + (1 - batch["own_share"]) * loss(batch["pasted_label"])


def classification_loss(logits: Tensor, batch: TrainingBatch) -> Tensor:
    """Compute the cross-entropy of logits [B, C], or `mixed_cross_entropy` if parts of other images were pasted."""
    return over_labels(functools.partial(F.cross_entropy, logits), batch)
