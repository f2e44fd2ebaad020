"""Divide a method's parameters into groups for the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn


def weight_decay_groups(module: nn.Module, exempt: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Split the trainable parameters into those with weight decay and those without.

    Biases, norms and other one-dimensional parameters never decay. Neither do parameters whose last name is in `exempt`
    (the position embedding and class token of TS-CAM and SCM).

    Returns:
        two groups for an optimizer, with `name` and `params`, and `weight_decay` = 0 in the second.
    """
    last = set(exempt)
    names = [name for name, _ in module.named_parameters() if name.rsplit(".", 1)[-1] in last]
    groups = param_groups_weight_decay(module, weight_decay=1.0, no_weight_decay_list=names)
    found = {group["weight_decay"]: group["params"] for group in groups}
    # There are always both, in this order, because checkpoints hold the optimizer's state in it.
    return [
        {"name": "decay", "params": found.get(1.0, [])},
        {"name": "no_decay", "params": found.get(0.0, []), "weight_decay": 0.0},
    ]


def fine_tuning_groups(
    module: nn.Module, new: Callable[[str], bool], new_lr_factor: float, bias_lr_factor: float, decay_biases: bool
) -> list[dict[str, Any]]:
    """Group the trainable parameters to fine-tune a convolutional network. New layers and biases learn faster.

    Args:
        module: the module with the parameters.
        new: says whether the parameter of a name belongs to a new layer.
        new_lr_factor, bias_lr_factor: factors of the optimizer's learning rate. Both act on the biases of new layers.
        decay_biases: whether weight decay acts on biases and other one-dimensional parameters, as in released code.

    Returns:
        groups for an optimizer, with `name`, `params`, `lr_factor`, and `weight_decay` = 0 in groups without decay.
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
