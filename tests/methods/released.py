"""Reference arrays that released code made, reduced ones of this project and the full ones beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import GOLDEN


class Released:
    """The arrays of one method, as float32, int64 or bool tensors."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.arrays = dict(arrays)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> Tensor:
        array = torch.from_numpy(np.asarray(self.arrays[name]))
        return array.float() if array.is_floating_point() else array

    def number(self, name: str) -> float:
        return float(self.arrays[name])

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The arrays whose names begin so, by the rest of their names."""
        return {name.removeprefix(prefix): self[name] for name in self.arrays if name.startswith(prefix)}


def read(method: str, request: pytest.FixtureRequest) -> Released:
    """The "reduced" or the "full" arrays of a method, as the parameter of a fixture says."""
    folder = GOLDEN
    if request.param == "full":
        shared: Path = request.getfixturevalue("shared")
        folder = shared / "golden"
    return Released(folder / "second_tier" / f"{method}.npz")


def error(found: Tensor | None, stored: Tensor) -> float:
    """The distance as a share of what is stored."""
    assert found is not None
    assert found.shape == stored.shape
    return float((found.detach() - stored).norm() / stored.norm())
