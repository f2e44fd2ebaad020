"""Run layers a second time with constant weights, so that only their input learns from the second pass."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.func import functional_call


def with_constant_weights(layers: nn.Module, *inputs: Any) -> Any:
    """Run layers on other inputs than in their own pass, with weights that get no gradient.

    In training, BatchNorm normalises the batch by itself, and its running statistics stay those of the own pass.

    Args:
        layers: the layers, in training or evaluation mode.
        inputs: what they take. The gradient reaches it.

    Returns:
        what the layers return.

    >>> import torch
    >>> from wsolkit.methods.constant_weights import with_constant_weights
    >>> layer, given = torch.nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    >>> with_constant_weights(layer, given).sum().backward()
    >>> layer.weight.grad is None, torch.equal(given.grad, layer.weight)
    (True, True)
    """
    constants = {name: parameter.detach() for name, parameter in layers.named_parameters()}
    statistics = {name: buffer.clone() for name, buffer in layers.named_buffers()}
    return functional_call(layers, constants | statistics, inputs)
