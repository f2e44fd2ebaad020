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
    """Computes the learning-rate factor of an epoch.

    Args:
        name: "constant"; "step" multiplies by `gamma` at each milestone; "cosine" follows half a cosine from 1 to
            `final`.
        warmup_epochs: the number of epochs in which the factor first rises linearly from 0.
        milestones: the epochs, counted from 0, at which "step" decays.
        gamma: the factor of each step.
        final: the factor at which "cosine" ends.
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
        """Return the factor at a (fractional) epoch of a run of `epochs` epochs."""
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

    `create` makes an optimizer from parameter groups. `schedule` gives the factor of its learning rates.
    """

    create: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    schedule: Schedule

    def optimizer(self, module: WSOLModule) -> torch.optim.Optimizer:
        """Return an optimizer of the module's parameter groups.

        Each group gets the optimizer's learning rate, multiplied by the group's `lr_factor` if it has one.

        Raises:
            ConfigError: the optimizer does not accept its settings.
        """
        try:
            optimizer = self.create(module.parameter_groups())
        except (ValueError, TypeError) as error:
            raise ConfigError(f"optimizer: {error}") from error
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_factor", 1.0)
        return optimizer

    def __call__(self, module: WSOLModule) -> dict[str, Any]:
        """Return the optimizer and the schedule of a module in the form that Lightning expects."""
        trainer = module.trainer

        def factor(step: int) -> float:
            # `trainer.estimated_stepping_batches` would start to load data before a resumed run knows its epoch.
            steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) if step else 1
            return self.schedule(step / steps, trainer.max_epochs or 1)

        optimizer = self.optimizer(module)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}
