"""CALM: class activation latent mapping (Kim et al., ICCV 2021).

The position z of what tells the class is a hidden variable. Two 1×1 convolutions of the last feature map give class
maps f [B, C, H, W] and an attention a = ReLU(·) [B, H, W], and with them

    p(y | z) = softmax over the classes of f_z,    p(z) = a_z / Σ a,    p(y, z) = p(y | z) p(z),    p(y) = Σ_z p(y, z)

Two losses train it. CALM-ML maximises the likelihood. CALM-EM replaces it by the expectation over the positions that
the network believes in:

    L_ML = −log p(y),    L_EM = −Σ_z p(z | x, y) log p(y, z),    where p(z | x, y) = p(y, z) / p(y) is constant

log p(y) are the logits. The score map of a class is p(y, z) ("joint"), p(z | x, y) ("posterior") or log p(y, z)
("log_joint"). Joint and posterior differ by the factor p(y), which min-max removes, so boxes and masks are the same.
The released evaluation does not scale maps. It takes joint maps in [0, 1], and thresholds from 1e-7 to 1 that are
evenly spaced on a logarithmic scale. "log_joint" with evenly spaced thresholds comes closest to it.

As in the released code, Σ a is a constant for the gradient. There, an attention that is 0 everywhere gives NaN. This
code adds an epsilon, and starts the bias of the attention at 1, so that no image begins without attention.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.methods.cam import CAMModule, CAMNetwork, HeadSettings
from wsolkit.methods.classification import over_labels
from wsolkit.methods.maps import select_maps
from wsolkit.types import TrainingBatch

Map = Literal["joint", "posterior", "log_joint"]

_ATTENTION_EPSILON = 1e-12  # Chosen here.
_POSTERIOR_EPSILON = 1e-10  # The released code has these two values.
_PRIOR_EPSILON = 1e-8


def prior(attention: Tensor) -> Tensor:
    """Compute p(z) [B, H, W] of an attention [B, H, W] ≥ 0. Its sum is a constant for the gradient."""
    total = attention.float().sum(dim=(1, 2), keepdim=True)
    return attention.float() / (total.detach() + _ATTENTION_EPSILON)


def joint(class_maps: Tensor, attention: Tensor) -> Tensor:
    """Compute p(y, z).

    Args:
        class_maps: f [B, C, H, W], before the softmax.
        attention: a [B, H, W], after the ReLU.

    Returns:
        [B, C, H, W], which sums to 1 over classes and positions.
    """
    return class_maps.float().softmax(dim=1) * prior(attention)[:, None]


def log_marginal(class_maps: Tensor, attention: Tensor) -> Tensor:
    """Compute log p(y) [B, C], the logits. The arguments are those of `joint`."""
    total = joint(class_maps, attention).sum(dim=(2, 3))
    return total.clamp(min=torch.finfo(total.dtype).tiny).log()


def marginal_loss(class_maps: Tensor, attention: Tensor, label: Tensor) -> Tensor:
    """Compute L_ML as a scalar. The arguments are those of `joint`, and true classes [B]."""
    return -log_marginal(class_maps, attention).gather(1, label[:, None]).mean()


def expectation_loss(class_maps: Tensor, attention: Tensor, label: Tensor) -> Tensor:
    """Compute L_EM as a scalar. The arguments are those of `joint`, and true classes [B]."""
    own = label[:, None]
    at = prior(attention)  # [B, H, W]
    conditional = select_maps(class_maps.float().log_softmax(dim=1), own)[:, 0]  # [B, C, H, W] → [B, H, W]
    with torch.no_grad():
        both = conditional.exp() * at
        posterior = both / (both.sum(dim=(1, 2), keepdim=True) + _POSTERIOR_EPSILON)
    log_prior = torch.where(at < _PRIOR_EPSILON, at + _PRIOR_EPSILON, at).log()
    return -(posterior * (conditional + log_prior)).sum(dim=(1, 2)).mean()


class CALMNetwork(CAMNetwork):
    """A CAM network with an attention. `map` is the score map, and `network` is what `CAMNetwork` takes."""

    passes = ("features", "features_and_stages", "maps_and_attention")

    def __init__(self, *network: Any, map: Map) -> None:
        super().__init__(*network)
        self.map: Map = map
        self.attention = nn.Conv2d(self.classifier.in_channels, 1, kernel_size=1)
        assert self.attention.bias is not None
        nn.init.ones_(self.attention.bias)

    def maps_and_attention(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute f [B, C, h, w] and a [B, h, w] from an image [B, 3, H, W]."""
        return self._parts(self.features(image))

    def _parts(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        return self.class_maps(feature), self.attention(feature).float().relu()[:, 0]

    def logits(self, feature: Tensor) -> Tensor:
        """Compute the logits log p(y) [B, C] from F [B, D, h, w]."""
        return log_marginal(*self._parts(feature))

    def score_maps(self, feature: Tensor, classes: Tensor | None) -> Tensor:
        """Compute score maps [B, C, h, w], or [B, K, h, w] of classes [B, K], from F [B, D, h, w]."""
        maps, attention = self._parts(feature)
        both = select_maps(joint(maps, attention), classes)
        if self.map == "posterior":
            return both / (both.sum(dim=(2, 3), keepdim=True) + _POSTERIOR_EPSILON)
        return both if self.map == "joint" else (both + _PRIOR_EPSILON).log()


class CALM(CAMModule):
    """CALM in training and evaluation.

    Args:
        objective: "marginal" is CALM-ML, and "expectation" is CALM-EM.
        map: the score map: see above.
        head: see `HeadSettings`.
    """

    network: CALMNetwork

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        objective: Literal["marginal", "expectation"],
        map: Map,
        **head: Unpack[HeadSettings],
    ) -> None:
        super().__init__(backbone, num_classes, "maps_first", head, functools.partial(CALMNetwork, map=map))
        self.objective = objective

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the loss."""
        loss = marginal_loss if self.objective == "marginal" else expectation_loss
        maps, attention = self.network.maps_and_attention(batch["image"])
        return {"loss": over_labels(functools.partial(loss, maps, attention), batch)}
