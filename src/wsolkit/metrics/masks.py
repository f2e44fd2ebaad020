"""Pixel metrics with masks: PxAP (Choe et al., CVPR 2020) and peak IoU."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from wsolkit.metrics.baselines import BASELINES
from wsolkit.metrics.functional import (
    peak_iou,
    pixel_average_precision,
    pixel_histogram,
    pixel_iou,
    precision_recall,
)

PIXEL_BINS = 1000
SIZE_BINS = 20


class PixelAveragePrecision(Metric):
    """PxAP: the area under the pixel precision-recall curve, pooled over all images.

    The state is a histogram of scores [2, n + 2]. It does not grow with the data set, and sums across processes.

    Args:
        num_thresholds: the number n of bins in [0, 1).

    >>> import torch
    >>> from wsolkit.metrics import PixelAveragePrecision
    >>> metric = PixelAveragePrecision()
    >>> metric.update(torch.tensor([[[0.9, 0.6, 0.1]]]), torch.tensor([[[1, 0, 0]]], dtype=torch.uint8))
    >>> metric.compute().item()
    100.0
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
        self.histogram += pixel_histogram(score_maps, masks, self.num_thresholds).sum(0).to(self.histogram.device)

    def compute(self) -> Tensor:
        """Return PxAP in [0, 100], a float64 scalar. It is NaN if no pixel is on an object."""
        return pixel_average_precision(self.histogram)


class PeakIoU(PixelAveragePrecision):
    """The best pooled IoU of thresholded maps with the masks, and its threshold."""

    def compute(self) -> Tensor:
        """Return [peak IoU in [0, 100], its threshold on a scale of 0 to 255], float64."""
        return torch.stack(peak_iou(self.histogram))


class MaskEvaluation(Metric):
    """Mask metrics of a method, and of the baselines, under one protocol. The state is histograms with a fixed size.

    Args:
        num_rows: the number of score maps that are compared with the same masks. The method's comes first.
    """

    histogram: Tensor
    iou_by_size: Tensor

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.add_state("histogram", torch.zeros(num_rows, 2, PIXEL_BINS + 2, dtype=torch.int64), dist_reduce_fx="sum")
        by_size = torch.zeros(PIXEL_BINS, SIZE_BINS, SIZE_BINS, dtype=torch.int64)
        self.add_state("iou_by_size", by_size, dist_reduce_fx="sum")

    def update(self, histograms: Tensor) -> None:
        """Count a batch with histograms [rows, B, 2, bins] of its images, see `pixel_histogram`."""
        self.histogram += histograms.sum(dim=1)
        method = histograms[0]
        objects, pixels = method[:, 1].sum(dim=1), method.sum(dim=(1, 2))
        method, share = method[objects > 0], (objects / pixels)[objects > 0]  # [b, 2, bins], [b]
        # float32 is enough, since half a bin is far wider than its rounding. Some devices have no float64.
        above = method.flip(-1).cumsum(-1).flip(-1)[..., :PIXEL_BINS].float()
        iou = above[:, 1] / (above[:, 1, :1] + above[:, 0])  # [b, τ]
        row = (share * SIZE_BINS).long().clamp(max=SIZE_BINS - 1)[:, None]
        column = (iou * SIZE_BINS).long().clamp(max=SIZE_BINS - 1)
        threshold = torch.arange(PIXEL_BINS, device=iou.device)
        places = ((threshold * SIZE_BINS + row) * SIZE_BINS + column).flatten()
        self.iou_by_size.view(-1).scatter_add_(0, places, torch.ones_like(places))

    def compute(self) -> dict[str, Tensor]:
        """Return metrics of the method, and those of the baselines as `<baseline>/<metric>`, or {} without masks.

        pxap and peak_iou are in [0, 100], and peak_threshold is on a scale of 0 to 255. The curves have 1,000
        thresholds. mask_iou_by_size has the number of images by the object's share of the image [20] and the IoU at the
        peak's threshold [20].
        """
        values: dict[str, Tensor] = {}
        if not int(self.histogram.sum()):
            return values
        for name, histogram in zip(("", *(f"{name}/" for name in BASELINES)), self.histogram, strict=False):
            values[f"{name}pxap"] = pixel_average_precision(histogram)
            values[f"{name}peak_iou"], values[f"{name}peak_threshold"] = peak_iou(histogram)
        curves = (pixel_iou(self.histogram[0]), *precision_recall(self.histogram[0]))
        for name, curve in zip(("pixel_iou", "precision", "recall"), curves, strict=True):
            values[f"curves/{name}"] = curve[:PIXEL_BINS]
        values["curves/pixel_threshold"] = 255 * torch.arange(PIXEL_BINS).double() / PIXEL_BINS
        peak = round(float(values["peak_threshold"]) * PIXEL_BINS / 255)
        values["mask_iou_by_size"] = self.iou_by_size[peak].cpu().double()
        return values
