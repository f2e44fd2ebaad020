"""Find images for which a network gives values that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

_NUM_NAMED = 5
_NO_IMAGE = torch.iinfo(torch.int64).max


class NotFinite(Metric):
    """Counts images with logits or score maps that are not finite, and notes the positions of the first ones.

    The state has a fixed size and sums across processes.
    """

    count: Tensor
    first: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("first", torch.full((_NUM_NAMED,), _NO_IMAGE), dist_reduce_fx=_lowest)

    def update(self, finite: Tensor, index: Tensor) -> None:
        """Count a batch: whether each image has finite values, bool [B], and its position in the split [B]."""
        self.count += (~finite).sum()
        self.first = _lowest(torch.cat([self.first, index.masked_fill(finite, _NO_IMAGE)]))

    def compute(self) -> dict[str, Tensor]:
        """Return `not_finite`, and positions as `not_finite_images`, filled up with −1. Return {} if all are finite."""
        if not int(self.count):
            return {}
        named = self.first.masked_fill(self.first == _NO_IMAGE, -1)
        return {"not_finite": self.count.cpu().double(), "not_finite_images": named.cpu().double()}


def _lowest(positions: Tensor) -> Tensor:
    return positions.flatten().sort().values[:_NUM_NAMED]
