"""The progress bar."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from wsolkit.methods.base import WSOLModule
from wsolkit.training.loss_log import LossLog


class Progress(RichProgressBar):
    """Lightning's progress bar, drawn four times a second. At the default of ten, it takes several percent of a step.

    It shows the last logged loss, because a newer one would make every step wait for the device.

    Args:
        console_kwargs: arguments of rich's console, or None for the default.
    """

    def __init__(self, console_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(refresh_rate=4, console_kwargs=console_kwargs)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the last logged loss."""
        assert isinstance(pl_module, WSOLModule)
        shown = pl_module.attached(LossLog).shown if trainer.training else {}
        return {"loss": shown["loss"]} if "loss" in shown else {}
