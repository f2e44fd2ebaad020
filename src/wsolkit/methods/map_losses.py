"""Losses of score maps that need no label: how much of an image a map covers, and how certain it is.

SAT (Wu et al., ICCV 2023) has the batch area and the normalization loss. ORNet (Xie et al., ICCV 2021) has the weighted
entropy. Both papers compare with the losses of others, so several methods can take each of them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

Filter = Literal["released", "gaussian", "none"]


def smoothing_kernel(name: Filter, sigma: float) -> Tensor:
    """Return the 3×3 filter [1, 1, 3, 3] of the normalization loss, which sums to 1.

    Args:
        name: "released" is the fixed kernel of the released code, "gaussian" a sampled Gaussian, "none" no filter.
        sigma: the standard deviation of "gaussian", in patches.
    """
    if name == "none":
        weights = torch.tensor([0.0, 1.0, 0.0])
    elif name == "gaussian":
        weights = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * sigma**2))
        weights = weights / weights.sum()
    else:
        # The filter is separable. Products of these two numbers are 0.80544 (centre), 0.04601 (edge), 0.00263 (corner).
        edge = 0.05126832
        weights = torch.tensor([edge, 1 - 2 * edge, edge])
    return torch.outer(weights, weights)[None, None]


def global_mean(values: Tensor) -> Tensor:
    """Return the mean over the batches of all processes, which must be equally large, as a scalar.

    Its gradient is the gradient of this process's share, scaled up. DDP averages gradients over processes, and so gets
    the gradient of the global mean.
    """
    mean = values.mean()
    if not (distributed.is_available() and distributed.is_initialized()):
        return mean
    total = mean.detach().clone()
    distributed.all_reduce(total)
    return mean + (total / distributed.get_world_size() - mean.detach())


def batch_area_loss(maps: Tensor, area_prior: float) -> Tensor:
    """Compute |mean of the maps over the whole batch − λ| (Eqn. 7).

    Args:
        maps: localization maps [B, H, W] in [0, 1].
        area_prior: λ, the expected share of an image that an object covers.
    """
    return (global_mean(maps) - area_prior).abs()


def image_area_loss(maps: Tensor, area_prior: float) -> Tensor:
    """Compute the ablation of Table 13, which draws the area of each map [B, H, W] to λ by itself."""
    return (maps.mean(dim=(1, 2)) - area_prior).abs().mean()


def normalization_loss(maps: Tensor, kernel: Tensor) -> Tensor:
    """Compute the mean of M*(1 − M*). M* are maps [B, H, W] smoothed by [1, 1, 3, 3] with zero padding (Eqn. 8)."""
    smooth = F.conv2d(maps[:, None], kernel.to(maps), padding=1)
    return (smooth * (1 - smooth)).mean()


def weighted_entropy_loss(maps: Tensor, mean: float, deviation: float) -> Tensor:
    """Compute the entropy of maps, weighed by a Gaussian of their values, as a scalar.

    It draws uncertain values towards 0 or 1, and leaves certain ones alone:

        L = −mean of g(p) · [p log p + (1 − p) log(1 − p)],    g(p) = exp(−(p − μ)² / (2 σ²))

    The gradient flows through g as well.

    Args:
        maps: [B, H, W] in [0, 1].
        mean, deviation: μ and σ.
    """
    with torch.autocast(maps.device.type, enabled=False):  # In half precision, 1 − p would drown in rounding.
        p = maps.float()
        epsilon = torch.finfo(torch.float32).eps
        entropy = p * (p + epsilon).log() + (1 - p) * (1 - p + epsilon).log()
        return -(torch.exp(-((p - mean) ** 2) / (2 * deviation**2)) * entropy).mean()
