"""What a run shows while it goes on and when it has ended: in W&B, TensorBoard and the CSV log."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_commands import TINY
from wsolkit import load_config
from wsolkit.methods.base import WSOLModule
from wsolkit.train import train


def rows(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's log: what was logged at a step."""
    with (folder / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_speed_and_memory_are_logged_with_the_losses(tmp_path: Path) -> None:
    train(load_config(*TINY, "trainer.max_epochs=2", "trainer.log_every_n_steps=2"), tmp_path)
    logged = [row for row in rows(tmp_path) if "speed/images_per_second" in row]
    assert [row["step"] for row in logged] == [1, 3, 5]
    for row in logged:
        assert "train/loss_step" in row
        assert 1 < row["speed/images_per_second"] < 1e5
        assert 0.1 < row["memory/process_gib"] < 100


class Reads(TorchDispatchMode):
    """Notes the step of each read of a tensor's value, for which a GPU would have to finish what it has to do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module: WSOLModule | None = None
        self.steps: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.module and self.module.trainer.training:
            self.steps.append(self.module.trainer.global_step)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sat", "scm", "bridging_gap"])
def test_steps_between_two_logs_read_nothing_from_the_device(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress bar included. SGD, because AdamW counts its steps in tensors that are on the CPU anyway."""
    reads, start = Reads(), WSOLModule.on_train_batch_start

    def begin(self: WSOLModule, batch: Any, batch_idx: int) -> None:
        reads.module = self
        start(self, batch, batch_idx)

    monkeypatch.setattr(WSOLModule, "on_train_batch_start", begin)
    settings = ("optimizer=sgd", "trainer.max_epochs=1", "dataset.batch_size=4", "trainer.log_every_n_steps=5")
    own = ["method.fine_tuning.new_from=layer4", "method.warmup_epochs=0"] if method == "bridging_gap" else []
    with reads:
        train(load_config(*TINY, *settings, "trainer.enable_progress_bar=true", f"method={method}", *own), tmp_path)
    assert set(reads.steps) == {5, 10, 12}  # every fifth step, and the end of the epoch
