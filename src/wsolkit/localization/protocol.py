"""The rules of an evaluation, as data: a protocol is a YAML file in `conf/protocol`, named beside its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from wsolkit.errors import ConfigError
from wsolkit.localization.boxes import Select
from wsolkit.localization.maps import min_max, upsample
from wsolkit.types import Boxes


@dataclass(frozen=True)
class Protocol:
    """How score maps and ground truth are brought together.

    Args:
        resolution: side of the square in pixels to which maps and ground truth are scaled.
        interpolation: of the maps, before min-max.
        select: which outlines become boxes: the one of "largest" area, or "all" of them.
        iou_thresholds: δ; a box is right if its IoU with some ground-truth box is at least δ.
        num_thresholds: size of the grid of thresholds τ.
    """

    resolution: int
    interpolation: Literal["bicubic", "bilinear"]
    select: Select
    iou_thresholds: Sequence[float]
    num_thresholds: int

    def __post_init__(self) -> None:
        if self.resolution < 1 or self.num_thresholds < 1:
            raise ConfigError("a protocol's resolution and num_thresholds must be 1 or more")
        if 0.5 not in self.iou_thresholds:
            raise ConfigError(f"a protocol's iou_thresholds must contain 0.5, got {list(self.iou_thresholds)}")

    def localization_maps(self, maps: Tensor) -> Tensor:
        """Raw score maps [B, h, w] → localization maps [B, R, R] in [0, 1], float32."""
        return min_max(upsample(maps.float(), self.resolution, self.interpolation))

    def scale_boxes(self, boxes: Boxes, width: int, height: int) -> Boxes:
        """Ground-truth boxes [n, 4] in pixels of the original image → in pixels of the square, truncated."""
        scaled = np.asarray(boxes) * self.resolution // np.array([width, height, width, height])
        return np.asarray(scaled, np.int64)
