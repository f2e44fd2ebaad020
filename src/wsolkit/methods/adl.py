"""ADL: attention-based dropout layer (Choe & Shim, CVPR 2019).

A layer without parameters stands at some places in a convolutional network. In training it computes the attention a
[B, H, W], the mean of the channels of its input, and multiplies the input by one of two maps:

    drop mask       [a < γ · max_u a_u]      hides the most telling part of the object
    importance map  sigmoid(a)               shows it the more

With a probability r it takes the drop mask, by one draw for each layer and batch. Gradients pass through the importance
map, and not through the drop mask. In evaluation the layer does nothing. The score maps are those of CAM.

The paper has γ = 0.8 and r = 0.75. The code of Choe et al. (CVPR 2020) has the searched values of the recipes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.methods.cam import CAMModule, CAMNetwork, Form, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.erasing import below_peak
from wsolkit.types import TrainingBatch


def drop_mask(feature: Tensor, threshold: float) -> Tensor:
    """Return 0 at the most active positions of feature maps and 1 elsewhere.

    Args:
        feature: [B, D, H, W].
        threshold: γ. A position is kept if the mean of its channels is below γ times the largest one of the image.

    Returns:
        [B, 1, H, W], which carries no gradient.
    """
    return below_peak(feature, threshold).to(feature.dtype)


def importance_map(feature: Tensor) -> Tensor:
    """Compute the sigmoid [B, 1, H, W] of the mean of the channels of feature maps [B, D, H, W]."""
    return feature.mean(dim=1, keepdim=True).sigmoid()


class AttentionDropout(nn.Module):
    """The layer, which keeps the shape [B, D, H, W].

    Args:
        drop_rate: r, the probability of the drop mask.
        threshold: γ.
    """

    def __init__(self, drop_rate: float, threshold: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.threshold = threshold

    def forward(self, feature: Tensor) -> Tensor:
        """Multiply feature maps [B, D, H, W] by one of the two maps in training."""
        if not self.training:
            return feature
        drops = torch.rand((), device=feature.device) < self.drop_rate
        return feature * torch.where(drops, drop_mask(feature, self.threshold), importance_map(feature))


class ADLNetwork(CAMNetwork):
    """A CAM network with the layers.

    Args:
        places: the stages of the backbone after which the layers stand. "head" stands for the end of the head.
        drop_rate, threshold: see `AttentionDropout`.
        network: see `CAMNetwork`.

    Raises:
        ConfigError: there is no such place.
    """

    def __init__(
        self, *network: Any, places: Sequence[str], drop_rate: float, threshold: float, **settings: Any
    ) -> None:
        super().__init__(*network, **settings)
        if "head" in places and not len(self.head):
            raise ConfigError("method.places names the head, which method.head_channels=[] leaves empty: leave it out")
        self.dropout = nn.ModuleList(AttentionDropout(drop_rate, threshold) for _ in places)
        for place, layer in zip(places, self.dropout, strict=True):
            before = self.head if place == "head" else self.backbone.stages[self.backbone.places(place)[-1]]
            # A hook leaves the names of the weights as they are.
            before.register_forward_hook(functools.partial(_apply, layer))


def _apply(layer: nn.Module, module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return layer(output)  # type: ignore[no-any-return]


class ADL(CAMModule):
    """ADL in training and evaluation.

    Args:
        places: see `ADLNetwork`.
        drop_rate, threshold: see `AttentionDropout`.
        form: see `CAMNetwork`.
        head: see `HeadSettings`.

    Raises:
        ConfigError: a setting is out of its range, or there is no such place.
    """

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        places: Sequence[str],
        drop_rate: float,
        threshold: float,
        form: Form,
        **head: Unpack[HeadSettings],
    ) -> None:
        for name, value in (("drop_rate", drop_rate), ("threshold", threshold)):
            if not 0 <= value <= 1:
                raise ConfigError(f"method.{name}={value}: expected a share from 0 to 1")
        network = functools.partial(ADLNetwork, places=places, drop_rate=drop_rate, threshold=threshold)
        super().__init__(backbone, num_classes, form, head, network)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy."""
        return {"loss": classification_loss(self(batch["image"]), batch)}
