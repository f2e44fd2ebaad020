"""Memories of classes beside a loop over values."""

from __future__ import annotations

import torch

from wsolkit.methods.memory import move_memory


def test_rows_move_one_value_after_the_other() -> None:
    torch.manual_seed(0)
    memory, visits, values = torch.randn(4, 3), torch.tensor([0.0, 7.0, 2.0, 1.0]), torch.randn(6, 3)
    rows = torch.tensor([1, 0, 1, 2, 1, 0])
    expected, counts = memory.clone(), visits.clone()
    for row, value in zip(rows, values, strict=True):
        weight = torch.exp(-0.1 * counts[row])
        expected[row] = (1 - weight) * expected[row] + weight * value
        counts[row] += 1
    found, found_visits = move_memory(memory, visits, rows, values, lambda count: torch.exp(-0.1 * count))
    torch.testing.assert_close(found, expected)
    assert torch.equal(found_visits, counts)
