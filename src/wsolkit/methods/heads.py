"""Make the layers that methods put on convolutional networks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from torch import nn


def convolutional_head(widths: Sequence[int], dropout: float) -> nn.Sequential:
    """Make 3×3 convolutions, each with a ReLU.

    Args:
        widths: the number of channels at first and after each convolution.
        dropout: the probability of dropout before each convolution and at the end. With 0 there are no such layers.
    """
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        layers += [nn.Dropout(dropout)] if dropout else []
        layers += [nn.Conv2d(width, following, kernel_size=3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []))


def draw_xavier(layers: Iterable[nn.Module]) -> None:
    """Draw the weights of convolutions anew, uniform as Glorot & Bengio have it, with biases 0."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
