"""Compute top-k classification accuracy."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from wsolkit.metrics.functional import in_top_k


class TopKAccuracy(Metric):
    """The percentage of images whose label is among the k highest logits (or all classes, if there are fewer)."""

    correct: Tensor
    total: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Count a batch with logits [B, C] and label [B]."""
        self.correct += in_top_k(logits, label, self.k).sum()
        self.total += len(label)

    def compute(self) -> Tensor:
        """Return the percentage from 0 to 100, a float64 scalar."""
        return 100 * self.correct.cpu().double() / self.total.cpu()
