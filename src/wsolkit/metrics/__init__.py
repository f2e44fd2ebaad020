"""Metrics for weakly supervised localization: torchmetrics classes with fixed-size state, on top of pure functions."""

from wsolkit.metrics.boxes import MaxBoxAccuracy
from wsolkit.metrics.classification import TopKAccuracy
from wsolkit.metrics.masks import PeakIoU, PixelAveragePrecision

__all__ = ["MaxBoxAccuracy", "PeakIoU", "PixelAveragePrecision", "TopKAccuracy"]
