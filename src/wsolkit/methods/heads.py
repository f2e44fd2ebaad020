"""Make the layers that methods put on convolutional networks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

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


Initialisation = Literal["default", "xavier", "normal"]

_NORMAL_DEVIATION = 0.02  # BAS (Wu et al., CVPR 2022, released code) has it for VGG16.


def initialise(layers: Iterable[nn.Module], how: Initialisation) -> None:
    """Draw the weights of convolutions anew.

    Args:
        layers: layers, of which other kinds stay as they are.
        how: "default" leaves PyTorch's own. "xavier" is uniform, as Glorot & Bengio have it, and "normal" has the
            standard deviation 0.02. Both set biases to 0.
    """
    for layer in layers:
        if not isinstance(layer, nn.Conv2d) or how == "default":
            continue
        if how == "xavier":
            nn.init.xavier_uniform_(layer.weight)
        else:
            nn.init.normal_(layer.weight, std=_NORMAL_DEVIATION)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
