"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from wsolkit.errors import ConfigError
from wsolkit.methods.base import WSOLModule


class Schedule:
    """Learning-rate factor as a function of the epoch.

    Args:
        name: "constant"; "step": ×gamma at each milestone; "cosine": half a cosine from 1 to `final`.
        warmup_epochs: epochs of linear warm-up from 0 before it.
        milestones: epochs at which "step" decays, counted from 0.
        gamma: factor of each step.
        final: factor at which "cosine" ends.
    """

    def __init__(
        self,
        name: Literal["constant", "step", "cosine"],
        warmup_epochs: float,
        milestones: Sequence[int],
        gamma: float,
        final: float,
    ) -> None:
        if warmup_epochs < 0:
            raise ConfigError(f"schedule.warmup_epochs is {warmup_epochs}, expected 0 or more")
        self.name = name
        self.warmup_epochs = warmup_epochs
        self.milestones = tuple(milestones)
        self.gamma = gamma
        self.final = final

    def __call__(self, epoch: float, epochs: float) -> float:
        """Factor at a (fractional) epoch of a run of `epochs` epochs."""
        if epoch < self.warmup_epochs:
            return epoch / self.warmup_epochs
        if self.name == "step":
            return math.prod(self.gamma for milestone in self.milestones if epoch >= milestone)
        if self.name == "cosine":
            progress = min(1.0, (epoch - self.warmup_epochs) / max(epochs - self.warmup_epochs, 1e-9))
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0


@dataclass(frozen=True)
class Optimization:
    """Makes the optimizer of a module, and the schedule that steps with it.

    create: parameter groups → optimizer; schedule: the factor of its learning rates.
    """

    create: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    schedule: Schedule

    def optimizer(self, module: WSOLModule) -> torch.optim.Optimizer:
        """An optimizer over the module's groups, each with the optimizer's learning rate times its `lr_factor`, if any.

        Raises:
            ConfigError: the optimizer does not take its settings.
        """
        try:
            optimizer = self.create(module.parameter_groups())
        except (ValueError, TypeError) as error:
            raise ConfigError(f"optimizer: {error}") from error
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_factor", 1.0)
        return optimizer

    def __call__(self, module: WSOLModule) -> dict[str, Any]:
        """The optimizer and the schedule of a module, as Lightning takes them."""
        trainer = module.trainer

        def factor(step: int) -> float:
            # Not `trainer.estimated_stepping_batches`: that starts to load data, before a resumed run knows its epoch.
            steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) if step else 1
            return self.schedule(step / steps, trainer.max_epochs or 1)

        optimizer = self.optimizer(module)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}
