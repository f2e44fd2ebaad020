"""The progress bar."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from wsolkit.methods.base import WSOLModule
from wsolkit.training.loss_log import LossLog


class Progress(RichProgressBar):
    """Lightning's bar, drawn four times a second instead of a hundred, which cost several percent of a step.

    It has the loss as it was last logged: a newer one would have to be waited for in every step.

    Args:
        console_kwargs: of rich's console, if not the usual one.
    """

    def __init__(self, console_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(refresh_rate=4, console_kwargs=console_kwargs)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Lightning's hook."""
        assert isinstance(pl_module, WSOLModule)
        shown = pl_module.attached(LossLog).shown if trainer.training else {}
        return {"loss": shown["loss"]} if "loss" in shown else {}
