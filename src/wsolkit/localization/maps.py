"""From score maps at the network's resolution to localization maps in [0, 1] at the evaluation's."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def min_max(maps: Tensor) -> Tensor:
    """Scale each map [..., H, W] to [0, 1] over space; a constant map becomes 0."""
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    return (maps - low) / span.masked_fill(span == 0, 1)


def upsample(maps: Tensor, size: int, interpolation: Literal["bicubic", "bilinear"]) -> Tensor:
    """Resize maps [B, H, W] to [B, size, size], corners not aligned (as OpenCV does)."""
    return F.interpolate(maps[:, None], size=(size, size), mode=interpolation, align_corners=False)[:, 0]
