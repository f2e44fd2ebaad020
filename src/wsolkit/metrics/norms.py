"""Compare the norms of features on objects and on background: the histogram of Kim et al. (CVPR 2022, Fig. A2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from wsolkit.types import Boxes, EvaluationBatch

NORM_BINS = 50


def box_mask(boxes: Boxes, image_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Say which positions of a feature map have their centre in a box, bool [h, w].

    Args:
        boxes: [n, 4] in pixels of the image, with both corners inside.
        image_size: the width and height of the image.
        grid: h and w.
    """
    y, x = ((torch.arange(count) + 0.5) * side / count for count, side in zip(grid, image_size[::-1], strict=True))
    inside = torch.zeros(grid, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes.tolist():
        inside |= ((y >= y0) & (y < y1 + 1))[:, None] & ((x >= x0) & (x < x1 + 1))
    return inside


class NormHistogram(Metric):
    """Histograms of feature norms on background and objects, from masks, or from boxes if there are none.

    The state is [2, bins]. It does not grow with the data set, and sums across processes.
    """

    histogram: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("histogram", torch.zeros(2, NORM_BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, norms: Tensor, batch: EvaluationBatch) -> None:
        """Count the positions of a batch.

        Args:
            norms: [B, h, w] in [0, 1].
            batch: the ground truth. An image without any does not count.
        """
        grid = (norms.shape[-2], norms.shape[-1])
        bins = (norms * NORM_BINS).long().clamp(0, NORM_BINS - 1)
        mask = batch["mask"]
        for row, boxes in enumerate(batch["boxes"]):
            if mask is not None:
                region = F.interpolate(mask[row][None, None], grid, mode="nearest")[0, 0]
            elif len(boxes):
                width, height = batch["size"][row].tolist()
                region = box_mask(boxes, (width, height), grid)
            else:
                continue
            region = region.to(bins.device)
            for kind in (0, 1):
                chosen = bins[row][region == kind]
                self.histogram[kind] += torch.bincount(chosen, minlength=NORM_BINS).to(self.histogram.device)

    def compute(self) -> dict[str, Tensor]:
        """Return the percentage of positions in each bin, `norms/background` and `norms/object`, or {} if empty."""
        if not self.histogram.any():
            return {}
        shares = 100 * self.histogram.double() / self.histogram.sum(dim=1, keepdim=True).clamp(min=1)
        return {"norms/background": shares[0], "norms/object": shares[1]}
