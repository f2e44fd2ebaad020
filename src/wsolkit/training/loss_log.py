"""Log the losses of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, distributed


class LossLog(Callback):
    """Logs the losses of every `log_every_n_steps`-th step, and the mean of each loss over an epoch.

    It does not use Lightning's `log`, which would wait for the device in every step to update the progress bar. A
    checkpoint holds the sums of the current epoch.

    Attributes:
        shown: the last logged losses, for the progress bar.
    """

    def __init__(self) -> None:
        self.shown: dict[str, float] = {}
        self._sums = LossSums()
        self._logged_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start after the step at which the run is resumed, because its losses are in the log already."""
        self._logged_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the losses of the step, if it is due."""
        self.log_step(trainer)

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a batch, which are scalars."""
        self._sums.add(losses)

    def log_step(self, trainer: Trainer) -> None:
        """Log the losses of the last step once, if it is due.

        If the step accumulated gradients over several batches, it logs the losses of the last one.
        """
        step = trainer.global_step
        if step == self._logged_step or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self._logged_step = step
        self.shown = self._sums.latest()
        row = {f"{logged_name(name)}_step": value for name, value in self.shown.items()}
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": float(trainer.current_epoch)} | row, step=step - 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean of each loss over the epoch."""
        sums = self._sums.over_processes(pl_module.device)
        means = {f"{logged_name(name)}_epoch": (total / count).float() for name, (total, count) in sums.items()}
        self._sums = LossSums()
        pl_module.log_dict(means, logger=False)
        # It logs at once, because Lightning would do so after it has written the checkpoint.
        for logger in trainer.loggers:
            row = {"epoch": float(trainer.current_epoch)} | {name: mean.item() for name, mean in means.items()}
            logger.log_metrics(row, step=trainer.global_step - 1)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the sums of this epoch over all processes to a checkpoint."""
        checkpoint.setdefault("wsolkit", {})["losses"] = self._sums.over_processes(pl_module.device)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the sums of the epoch's first steps from a checkpoint."""
        # The sums are over all processes already, so only the first process takes them.
        sums: dict[str, Tensor] = checkpoint["wsolkit"]["losses"]
        self._sums = LossSums(sums if trainer.is_global_zero else {name: torch.zeros(2) for name in sums})


class LossSums:
    """Sums the losses of an epoch on the device. Lightning's own sums would be missing in checkpoints.

    Args:
        sums: the sums of the epoch's first steps, as `over_processes` returns them.
    """

    def __init__(self, sums: Mapping[str, Tensor] | None = None) -> None:
        sums = sums or {}
        self._names = tuple(sums)
        self._sum = torch.tensor([float(total) for total, _ in sums.values()], dtype=torch.float64)
        self._count = max((int(count) for _, count in sums.values()), default=0)
        self._latest = self._sum

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a batch, which are scalars."""
        self._latest = torch.stack([value.detach().float() for value in losses.values()])
        if tuple(losses) == self._names:
            latest = _precise(self._latest)
            self._sum = latest + self._sum.to(latest)
            self._count += 1
        else:  # This is the first batch of an epoch, or a resumed run has other loss terms.
            self._names, self._sum, self._count = tuple(losses), _precise(self._latest), 1

    def latest(self) -> dict[str, float]:
        """Return the losses of the last batch. This waits for the device."""
        return dict(zip(self._names, self._latest.tolist(), strict=True))

    def over_processes(self, device: torch.device) -> dict[str, Tensor]:
        """Return the sum and the count [2] of each loss in this epoch over all processes.

        Args:
            device: the device on which the processes exchange them.
        """
        sums = torch.stack([self._sum, torch.full_like(self._sum, self._count)], dim=1)  # [losses, 2]
        sums = (sums.float() if device.type == "mps" else sums).to(device)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        return dict(zip(self._names, sums.unbind(), strict=True))


def _precise(values: Tensor) -> Tensor:
    """Return float64 values, whose mean is the same in any order of summation. Apple's GPUs have float32 only."""
    return values if values.device.type == "mps" else values.double()


def logged_name(term: str) -> str:
    """Return the logged name of a value of `losses`: `train/…` for a loss term, and `method/…` for anything else."""
    return f"{'train' if term.startswith('loss') else 'method'}/{term}"
