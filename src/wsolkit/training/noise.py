"""Seed the noise of each training step: dropout and stochastic depth."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from wsolkit.data.seeding import derive_seed


class StepNoise(Callback):
    """Seeds the noise of each step from the run's seed, the step and the rank. A resumed run then draws the same noise.

    Args:
        seed: the seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the noise of a step."""
        seed = derive_seed(self.seed, trainer.global_step, batch_idx, trainer.global_rank)
        if pl_module.device.type == "cpu":
            # torch.manual_seed takes a millisecond longer, because it also prepares for a GPU.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
