"""Take the certain positions of a map as seeds, from which another part of a network learns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

_FEWEST = 30  # SPG (Zhang et al., ECCV 2018, released code): with fewer pixels above the threshold, it takes another.
_OF_PEAK = 0.7  # That threshold, as a share of the maximum.


def seeds(attention: Tensor, high: float, low: float) -> tuple[Tensor, Tensor]:
    """Divide maps into object, background and an uncertain rest.

    If fewer than 30 pixels of a map exceed `high`, those above 0.7 times its maximum are the object instead. A pixel
    that is both is background.

    Args:
        attention: maps [B, H, W] in [0, 1].
        high: a pixel above it belongs to the object.
        low: a pixel below it belongs to the background.

    Returns:
        object and background, bool [B, H, W], which carry no gradient.
    """
    attention = attention.detach()
    above = attention > high
    peak = attention > _OF_PEAK * attention.amax(dim=(1, 2), keepdim=True)
    few = above.sum(dim=(1, 2), keepdim=True) < _FEWEST
    background = attention < low
    return torch.where(few, peak, above) & ~background, background


def seed_loss(logits: Tensor, seeds: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the mean binary cross-entropy of logits over the seeds of a batch, or 0 if it has none.

    The batch is that of all processes: the mean of what they return is the loss of the global batch.

    Args:
        logits: [B, H, W].
        seeds: object and background, bool [B, H, W].
    """
    inside, background = seeds
    known = inside | background
    each = F.binary_cross_entropy_with_logits(logits.float(), inside.float(), reduction="none")
    count = _mean_over_processes(known.sum().float())
    return (each * known).sum() / count.masked_fill(count == 0, 1)


def _mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a number over all processes, without a gradient."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
