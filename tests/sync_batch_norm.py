"""BatchNorm over the images of all processes on CPUs, which PyTorch's own refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, distributed, nn


def synchronise(network: nn.Module) -> None:
    """Have every BatchNorm layer of a network see the images of all processes; frozen layers stay as they are."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.forward = functools.partial(_forward, layer, layer.forward)  # type: ignore[method-assign]


def _forward(layer: nn.BatchNorm2d, alone: Callable[[Tensor], Tensor], feature: Tensor) -> Tensor:
    """Normalise a feature map [B, D, H, W] over B, H, W of all processes, whose batches are equally large."""
    if not (layer.training and distributed.is_initialized()):
        return alone(feature)
    processes = distributed.get_world_size()
    values = feature.float()
    mean = _Sum.apply(values.mean(dim=(0, 2, 3))) / processes
    centred = values - mean[:, None, None]
    variance = _Sum.apply(centred.square().mean(dim=(0, 2, 3))) / processes
    count = processes * feature.numel() // feature.shape[1]
    with torch.no_grad():  # PyTorch does the same. All layers of timm have running statistics.
        layer.num_batches_tracked += 1  # type: ignore[assignment, operator]
        layer.running_mean.lerp_(mean, layer.momentum)  # type: ignore[union-attr, arg-type]
        layer.running_var.lerp_(variance * count / (count - 1), layer.momentum)  # type: ignore[union-attr, arg-type]
    scale = layer.weight * (variance + layer.eps).rsqrt()
    normalised = (centred * scale[:, None, None] + layer.bias[:, None, None]).to(feature.dtype)
    return layer.act(layer.drop(normalised)) if isinstance(layer, BatchNormAct2d) else normalised  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    """Sums over processes. Its gradient is the sum of the gradients of all processes, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient.contiguous())
