"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from wsolkit.errors import ConfigError


def weight_decay_groups(module: nn.Module, exempt: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Split trainable parameters into those that decay, as the optimizer's setting says, and those that do not.

    Biases, norms and other one-dimensional parameters never decay; nor do parameters whose last name is in `exempt`
    (the position embedding and class token of TS-CAM and SCM).

    Returns:
        two groups for an optimizer: `name`, `params`, and `weight_decay` = 0 in the second.
    """
    last = set(exempt)
    names = [name for name, _ in module.named_parameters() if name.rsplit(".", 1)[-1] in last]
    groups = param_groups_weight_decay(module, weight_decay=1.0, no_weight_decay_list=names)
    found = {group["weight_decay"]: group["params"] for group in groups}
    # Always both and in this order, in which checkpoints hold the optimizer's state.
    return [
        {"name": "decay", "params": found.get(1.0, [])},
        {"name": "no_decay", "params": found.get(0.0, []), "weight_decay": 0.0},
    ]


def fine_tuning_groups(
    module: nn.Module, new: Callable[[str], bool], new_lr_factor: float, bias_lr_factor: float, decay_biases: bool
) -> list[dict[str, Any]]:
    """Group trainable parameters as convolutional networks are fine-tuned: new layers, and biases, learn faster.

    Args:
        new: whether the parameter of a name is of a new layer.
        new_lr_factor, bias_lr_factor: factors of the optimizer's learning rate; both act on a new layer's biases.
        decay_biases: whether weight decay acts on biases and other one-dimensional parameters, as in released code.

    Returns:
        groups for an optimizer: `name`, `params`, `lr_factor`, and `weight_decay` = 0 where there is none.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_new, is_bias = new(name), name.endswith("bias")
        decays = decay_biases or parameter.ndim > 1
        factor = (new_lr_factor if is_new else 1.0) * (bias_lr_factor if is_bias else 1.0)
        kind = ("new_" if is_new else "") + ("bias" if is_bias else "weight") + ("" if decays else "_no_decay")
        group = groups.setdefault(kind, {"name": kind, "params": [], "lr_factor": factor})
        group["params"].append(parameter)
        if not decays:
            group["weight_decay"] = 0.0
    return list(groups.values())


def build_optimizer(
    create: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """An optimizer over groups, each with the optimizer's learning rate times its `lr_factor`, if it has one.

    Raises:
        ConfigError: the optimizer does not take its settings.
    """
    try:
        optimizer = create(groups)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"optimizer: {error}") from error
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_factor", 1.0)
    return optimizer


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
