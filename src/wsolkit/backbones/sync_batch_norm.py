"""BatchNorm over the images of all processes: on GPUs PyTorch's, which refuses CPUs; on those what is written here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, distributed, nn


def synchronise(network: nn.Module, device: torch.device) -> nn.Module:
    """Have every BatchNorm layer of a network, timm's with an activation included, see the images of all processes.

    Frozen layers stay as they are, and so do the names of weights.

    Args:
        network: any module; use what is returned.
        device: where it will run.
    """
    if device.type != "cpu":
        converted: nn.Module = convert_sync_batchnorm(network)
        return converted
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.forward = functools.partial(_forward, layer, layer.forward)  # type: ignore[method-assign]
    return network


def _forward(layer: nn.BatchNorm2d, alone: Callable[[Tensor], Tensor], feature: Tensor) -> Tensor:
    """Feature map [B, D, H, W] → normalised over B, H, W of all processes, whose batches are equally large."""
    if not (layer.training and distributed.is_initialized()):
        return alone(feature)
    processes = distributed.get_world_size()
    values = feature.float()
    mean = _Sum.apply(values.mean(dim=(0, 2, 3))) / processes
    centred = values - mean[:, None, None]
    variance = _Sum.apply(centred.square().mean(dim=(0, 2, 3))) / processes
    count = processes * feature.numel() // feature.shape[1]
    with torch.no_grad():  # as PyTorch does; no layer of timm is without running statistics
        layer.num_batches_tracked += 1  # type: ignore[assignment, operator]
        layer.running_mean.lerp_(mean, layer.momentum)  # type: ignore[union-attr, arg-type]
        layer.running_var.lerp_(variance * count / (count - 1), layer.momentum)  # type: ignore[union-attr, arg-type]
    scale = layer.weight * (variance + layer.eps).rsqrt()
    normalised = (centred * scale[:, None, None] + layer.bias[:, None, None]).to(feature.dtype)
    return layer.act(layer.drop(normalised)) if isinstance(layer, BatchNormAct2d) else normalised  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    """Over processes; a gradient is the sum of those of all processes, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient.contiguous())
