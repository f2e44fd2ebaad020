"""Let each process of a run compute with the images of all processes, for losses and memories of the global batch.

A process of W has every W-th part of the global batch: the images, or the pairs of images, at the places rank,
rank + W, and so on. On a single process, these functions change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def _count() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gathered(values: Tensor) -> Tensor:
    """Put the rows of all processes together: [B, …] → [W·B, …], in the order of the global batch.

    The gradient of this process's rows is scaled up by W. If all processes compute the same loss of the result, the
    mean of their gradients, which DDP takes, is the gradient of this loss.
    """
    count = _count()
    if count == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(count)]
    distributed.all_gather(parts, values.detach().contiguous())
    # The difference is 0, and only its gradient counts.
    parts[distributed.get_rank()] = values.detach() + count * (values - values.detach())
    return torch.stack(parts, dim=1).flatten(0, 1)  # W × [B, …] → [B, W, …] → [W·B, …]


def summed(values: Tensor) -> Tensor:
    """Add the values of all processes. The result has no gradient."""
    total = values.detach().clone()
    if _count() > 1:
        distributed.all_reduce(total)
    return total


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Compute the mean Σ w v / Σ w over the images of all processes, as a scalar. It is 0 where all weights are 0.

    Each process returns its own share, scaled so that the mean over the processes is the weighted mean.

    Args:
        values: [n].
        weights: [n], not negative and without a gradient.
    """
    total = summed(weights.sum())
    return _count() * (values * weights).sum() / total.masked_fill(total == 0, 1)
