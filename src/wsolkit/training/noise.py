"""The noise of each training step: dropout, stochastic depth."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from wsolkit.data.seeding import derive_seed


class StepNoise(Callback):
    """Seeds the noise of each step by seed, step and rank, so that a resumed run draws what an unbroken one drew.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed a step."""
        seed = derive_seed(self.seed, trainer.global_step, batch_idx, trainer.global_rank)
        if pl_module.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # the other takes a millisecond to note it for a GPU to come
        else:
            torch.manual_seed(seed)
