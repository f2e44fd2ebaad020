"""Pixel metrics against masks: PxAP (Choe et al., CVPR 2020) and peak IoU."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from wsolkit.metrics.functional import peak_iou, pixel_average_precision, pixel_histogram


class PixelAveragePrecision(Metric):
    """PxAP: area under the pixel precision-recall curve pooled over all images.

    The state is a histogram of scores [2, n + 2]: it does not grow with the data set and sums across processes.

    Args:
        num_thresholds: n, number of bins in [0, 1).
    """

    histogram: Tensor

    def __init__(self, num_thresholds: int = 1000) -> None:
        super().__init__()
        self.num_thresholds = num_thresholds
        self.add_state("histogram", torch.zeros(2, num_thresholds + 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, score_maps: Tensor, masks: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            score_maps: [B, H, W] in [0, 1].
            masks: [B, H, W] uint8: 0 background, 1 object, 255 ignored.

        Raises:
            ValueError: shapes differ, or scores leave [0, 1].
        """
        if score_maps.shape != masks.shape:
            raise ValueError(f"score maps {tuple(score_maps.shape)} and masks {tuple(masks.shape)} must have one shape")
        if score_maps.numel() and not bool(((score_maps >= 0) & (score_maps <= 1)).all()):
            raise ValueError("score maps leave [0, 1] or hold NaN: min-max them first")
        self.histogram += pixel_histogram(score_maps, masks, self.num_thresholds).to(self.histogram.device)

    def compute(self) -> Tensor:
        """PxAP in [0, 100], float64 scalar; NaN where no pixel is on an object."""
        return pixel_average_precision(self.histogram)


class PeakIoU(PixelAveragePrecision):
    """Best pooled IoU of thresholded maps with the masks, and the threshold where it is."""

    def compute(self) -> Tensor:
        """[peak IoU in [0, 100], its threshold on a scale of 0 to 255], float64."""
        return torch.stack(peak_iou(self.histogram))
