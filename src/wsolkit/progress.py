"""The progress bar."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from wsolkit.methods.base import WSOLModule


class Progress(RichProgressBar):
    """Lightning's bar, with the loss as it was last logged: a newer one would have to be waited for in every step."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Lightning's hook."""
        assert isinstance(pl_module, WSOLModule)
        return {"loss": pl_module.shown["loss"]} if "loss" in pl_module.shown else {}
