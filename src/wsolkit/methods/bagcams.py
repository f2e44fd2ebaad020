"""BagCAMs: bagging regional classification activation maps (Zhu et al., ECCV 2022), for any trained CNN.

The gradients g of a class's score at a feature map F [D, N] turn the classifier of the whole image into one classifier
for each position. The map averages what all of these regional classifiers say about a position:

    map_i = Σ_d ReLU( mean_j(g_dj F_dj + 1) · g_di F_di ),    g = ∂ log(z_y) / ∂F

z_y is the logit of the class. F may be the map after any stage of the network, also one that is finer than the last.
On their way back, ReLUs let no negative gradient pass. Nothing is trained.

The logarithm needs a positive logit. Where a logit is not positive, this code takes its own gradient instead, which was
chosen here. (The released code gives NaN there.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError


class Classifier(Protocol):
    """A network whose gradients BagCAMs takes, see `wsolkit.methods.cam.CAMNetwork`."""

    backbone: CNN

    def classified(self, last: Tensor) -> Tensor:
        """Compute the map that is classified from the backbone's last map."""

    def logits(self, feature: Tensor) -> Tensor:
        """Compute the logits [B, C] of a map that is classified."""


def bag_map(feature: Tensor, gradient: Tensor) -> Tensor:
    """Compute maps from features and gradients of one class, each [B, D, H, W].

    Returns:
        [B, H, W], not normalised, 0 or more.
    """
    product = feature.float() * gradient.float()
    weight = (product + 1).mean(dim=(2, 3), keepdim=True)
    return (weight * product).relu().sum(dim=1)


def guided_gradients(network: Classifier, image: Tensor, stage: str, classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the feature map after a stage, and the gradients of classes there. It also works in inference mode.

    Args:
        network: the network, in evaluation mode.
        image: [B, 3, H, W].
        stage: a stage of the backbone.
        classes: [B, K], or None for all classes.

    Returns:
        features [B, D, h, w] and gradients [B, K, D, h, w], of the logarithm of positive logits and of other logits
        themselves.
    """
    before, after = network.backbone.split(stage)
    with torch.inference_mode(False), torch.enable_grad(), _guided(after, network):
        with torch.no_grad():
            feature = before(image.clone()).clone()
        feature.requires_grad_()
        logits = network.logits(network.classified(after(feature)))
        own = logits if classes is None else logits.gather(1, classes.clone())
        score = torch.where(own > 0, torch.where(own > 0, own, 1).log(), own)
        gradients = [
            torch.autograd.grad(score[:, place].sum(), feature, retain_graph=True)[0] for place in range(own.shape[1])
        ]
    return feature.detach(), torch.stack(gradients, dim=1)


@contextmanager
def _guided(*parts: Any) -> Iterator[None]:
    """Make ReLUs let no negative gradient pass towards their input."""
    relus = {layer for part in parts for layer in part.modules() if isinstance(layer, nn.ReLU | nn.ReLU6)}
    in_place = {layer: layer.inplace for layer in relus}
    hooks = [layer.register_full_backward_hook(_without_negative) for layer in relus]
    try:
        for layer in relus:
            layer.inplace = False  # PyTorch's hooks do not work with changes in place.
        yield
    finally:
        for layer, before in in_place.items():
            layer.inplace = before
        for hook in hooks:
            hook.remove()


def _without_negative(
    layer: nn.Module, entering: Sequence[Tensor | None], leaving: object
) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else gradient.clamp(min=0) for gradient in entering)


@dataclass(frozen=True)
class BagCAMs:
    """BagCAMs as a post-process. It replaces the maps of the network.

    Args:
        stage: the stage of the backbone at whose map the gradients are taken.
    """

    networks: ClassVar[str] = "convolutional networks"
    backbones: ClassVar[tuple[type[nn.Module], ...]] = (CNN,)
    sees_network: ClassVar[bool] = True

    stage: str

    @property
    def stages(self) -> Sequence[str]:
        """Return the stage, which the backbone must have."""
        return (self.stage,)

    def __call__(self, maps: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Refuse maps alone.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("postprocess=bagcams needs the gradients of a network, and cannot refine maps alone")

    def from_network(self, network: Classifier, image: Tensor, classes: Tensor | None) -> Tensor:
        """Compute the maps [B, K, h, w] of classes [B, K], or of all classes for None, of images [B, 3, H, W]."""
        feature, gradients = guided_gradients(network, image, self.stage, classes)
        return torch.stack([bag_map(feature, gradient) for gradient in gradients.unbind(dim=1)], dim=1)
