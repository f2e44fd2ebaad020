"""Erase the most telling positions of feature maps, so that a network has to look at the rest of the object."""

from __future__ import annotations

import torch
from torch import Tensor


def below_peak(feature: Tensor, threshold: float) -> Tensor:
    """Find the positions of feature maps that are not among the most active ones.

    Args:
        feature: [B, D, H, W].
        threshold: γ. A position counts if the mean of its channels is below γ times the largest one of the image.

    Returns:
        bool [B, 1, H, W], which carries no gradient.
    """
    activity = feature.detach().mean(dim=1, keepdim=True, dtype=torch.float32)  # [B, D, H, W] → [B, 1, H, W]
    return activity < threshold * activity.amax(dim=(2, 3), keepdim=True)


def keep(feature: Tensor, kept: Tensor) -> Tensor:
    """Set the positions of feature maps [B, D, H, W] to 0 that are not kept, bool [B, 1, H, W]."""
    return feature * kept.to(feature.dtype)
