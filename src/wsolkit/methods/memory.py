"""Keep a vector for each class over a training, which moves towards what the images of the class show."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def move_memory(
    memory: Tensor, visits: Tensor, rows: Tensor, values: Tensor, weight: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Move rows of a memory, m ← (1 − w) m + w v, one value after the other.

    Args:
        memory: m [C, D].
        visits: how often each row has moved so far [C], float32.
        rows: the row that each value moves, int64 [n].
        values: v [n, D].
        weight: returns w for the number of visits [n] that a row had before.

    Returns:
        the new memory and visits. What was given stays.

    >>> import torch
    >>> from wsolkit.methods.memory import move_memory
    >>> memory, visits = torch.zeros(2, 1), torch.zeros(2)
    >>> rows, values = torch.tensor([0, 0, 0]), torch.tensor([[1.0], [2.0], [6.0]])
    >>> move_memory(memory, visits, rows, values, lambda visits: 1 / (visits + 1))  # a running mean
    (tensor([[3.],
            [0.]]), tensor([3., 0.]))
    """
    with torch.autocast(memory.device.type, enabled=False):
        same = rows[:, None] == rows  # [n, n]
        later = same.triu(diagonal=1)  # [i, j]: whether value j moves the row of value i, after it
        weights = weight(visits[rows] + later.sum(dim=0))  # w of each value, at its turn
        left = torch.where(later, 1 - weights, 1).prod(dim=1)  # what later values leave of each value
        kept = torch.where(same, 1 - weights, 1).prod(dim=1, keepdim=True)  # and what all leave of the old row
        moved = kept * memory[rows] + (same * (weights * left)) @ values.float()
        new_memory, new_visits = memory.clone(), visits.clone()
        new_memory[rows] = moved  # Values of one row write the same.
        new_visits[rows] = visits[rows] + same.sum(dim=1)
        return new_memory, new_visits
