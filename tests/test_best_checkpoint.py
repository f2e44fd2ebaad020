"""The best checkpoint: weights that other metrics choose, and training that ends when nothing improves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from wsolkit.training.checkpointing import BestCheckpoint, LastCheckpoint


class Scripted(LightningModule):
    """Its weights are the number of the epoch, and its metrics follow a script."""

    def __init__(self, localization: Sequence[float], accuracy: Sequence[float]) -> None:
        super().__init__()
        self.head, self.classifier = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self._scripts = {"val/localization": localization, "val/accuracy": accuracy}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.head.fill_(self.current_epoch)
            self.classifier.fill_(self.current_epoch)
        return 0 * (self.head + self.classifier).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        for name, values in self._scripts.items():
            self.log(name, torch.tensor(values[self.current_epoch]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(folder: Path, module: Scripted, epochs: int, resume: Path | None = None, **options: Any) -> Trainer:
    best = BestCheckpoint(folder, "val/localization", resume, **options)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[best, LastCheckpoint(folder, None, None, requeue=False)],
    )
    loader: DataLoader[Tensor] = DataLoader([torch.zeros(1)])  # type: ignore[arg-type]
    trainer.fit(module, loader, loader, ckpt_path=resume, weights_only=True)
    return trainer


def epochs_in(folder: Path, name: str = "best.ckpt") -> tuple[float, float]:
    state = torch.load(folder / name, weights_only=True)["state_dict"]
    return float(state["head"]), float(state["classifier"])


APART = {"classifier": "val/accuracy"}


def test_parts_come_from_the_epochs_that_were_best_for_them(tmp_path: Path) -> None:
    fit(tmp_path, Scripted([1, 3, 2, 0], [5, 6, 9, 7]), 4, apart=APART)
    assert epochs_in(tmp_path) == (1, 2)
    assert epochs_in(tmp_path, "last.ckpt") == (3, 3)


def test_best_part_stays_when_the_rest_improves_later(tmp_path: Path) -> None:
    fit(tmp_path, Scripted([1, 2, 4], [9, 6, 5]), 3, apart=APART)
    assert epochs_in(tmp_path) == (2, 0)


def test_resumed_run_joins_the_parts_of_both_runs(tmp_path: Path) -> None:
    scripts = [1.0, 3.0, 2.0, 0.0], [9.0, 6.0, 5.0, 7.0]
    fit(tmp_path, Scripted(*scripts), 2, apart=APART)
    fit(tmp_path, Scripted(*scripts), 4, tmp_path / "last.ckpt", apart=APART)
    assert epochs_in(tmp_path) == (1, 0)


def test_training_ends_when_neither_metric_improves(tmp_path: Path) -> None:
    """The last better value is the accuracy of epoch 2, and two validations without one follow."""
    module = Scripted([5, 4, 3, 2, 1, 9], [1, 1, 2, 2, 2, 2])
    trainer = fit(tmp_path, module, 6, apart=APART, patience=2)
    assert trainer.current_epoch == 5
    assert epochs_in(tmp_path) == (0, 2)


def test_training_without_patience_goes_on(tmp_path: Path) -> None:
    assert fit(tmp_path, Scripted([5, 4, 3], [1, 1, 1]), 3, apart=APART).current_epoch == 3
