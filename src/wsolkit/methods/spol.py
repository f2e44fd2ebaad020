"""SPOL: shallow feature-aware pseudo supervised object localization (Wei et al., CVPR 2021).

Maps of three depths of a network are multiplied, so that only what all of them show is left. With the maps X_3, X_4 and
X_5 of ResNet50's layer2, layer3 and layer4, their gate vector v, and 1×1 convolutions W:

    v   = product over i of ReLU(BN(W_i · GAP(X_i)))                       128 channels
    o_i = ReLU(BN(W'_i · (X_i · sigmoid(W''_i · v))))                      128 channels each
    P   = o_3 · o_4 · o_5,                                                 the deeper two enlarged to the size of X_3

Three steps hand over files:

1. `stage=cam` learns the class from class maps A(F) = ReLU(W_c · F + b), whose spatial mean gives the logits p(F):

       L = ½ [CE(p(o_5), y) + CE(p(P), softmax(p(o_5)))],    or CE(p(P), y) alone

   The gradient does not pass the second loss's target. The score map of a class is A_c(P).
2. `python -m wsolkit.pseudo_masks` turns the map of each training image into a mask, see `pseudo_mask`.
3. `stage=segment` learns the masks with the same body and one map S = sigmoid(W_s · P), by binary cross-entropy on the
   pixels that the mask calls object or background. S is the score map of all classes. The model of any checkpoint
   decides the class.

The released code has all three, and shares one convolution W_c between the two losses of the first stage. Chosen here:
gates and reductions have no biases, S is enlarged to the mask before the loss, and `pseudo_mask` fills its regions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.cam import CAMModule, CAMNetwork, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.maps import choose_classes
from wsolkit.methods.other_model import check_classes, logits_of
from wsolkit.types import Classes, Localization, Mask, TrainingBatch

Stage = Literal["cam", "segment"]

_IGNORED = 255


def pseudo_mask(
    score_map: npt.NDArray[np.float32],
    size: int,
    band: Sequence[float],
    least_pixels: int,
    shrink: float,
    threshold: float,
    background: float,
) -> Mask:
    """Turn a score map into a mask of what is surely object and what is surely background.

    The map is enlarged and divided by its maximum: m. Connected values within a band form regions. Each region of
    enough pixels, filled, gets a Gaussian with its mean and its covariance, both weighted by m, and the covariance
    divided by `shrink`. g is the maximum of these Gaussians, whose peaks are 1.

    Args:
        score_map: [h, w]. Negative values count as 0.
        size: the side of the mask.
        band: the lowest and the highest value of m in a region.
        least_pixels: the smallest number of pixels of a region.
        shrink: see above.
        threshold: a pixel is object if m or g exceeds it.
        background: a pixel is background if m is below this, and g does not make it object.

    Returns:
        [size, size], uint8: 0 background, 1 object, 255 neither. A map without a positive value is all background.
    """
    enlarged = cv2.resize(score_map.astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR).clip(min=0)
    m = enlarged / max(float(enlarged.max()), np.finfo(np.float32).tiny)
    within = ((m >= band[0]) & (m <= band[1])).astype(np.uint8)
    outlines, _ = cv2.findContours(within, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    surely = m > threshold
    for outline in outlines:
        region = cv2.drawContours(np.zeros_like(within), [outline], -1, 1, cv2.FILLED) > 0
        if np.count_nonzero(region) >= least_pixels:
            surely |= _gaussian(m * region, shrink) > threshold
    return np.select([surely, m < background], [1, 0], _IGNORED).astype(np.uint8)


def _gaussian(weights: npt.NDArray[np.float32], shrink: float) -> npt.NDArray[np.float64]:
    """Compute a Gaussian [H, W] with the mean and the divided covariance of positions, weighted by a map [H, W]."""
    places = np.indices(weights.shape).reshape(2, -1)
    share = weights.astype(np.float64).ravel()
    share = share / share.sum()
    apart = places - (places * share).sum(axis=1, keepdims=True)
    covariance = (apart * share) @ apart.T / shrink
    inverse = np.linalg.inv(covariance + 1e-6 * np.eye(2))  # A region may be a line.
    distance = np.einsum("in,ij,jn->n", apart, inverse, apart)
    return np.asarray(np.exp(-distance / 2).reshape(weights.shape))


class SPOLNetwork(CAMNetwork):
    """A network that classifies, or segments, the product of its maps of three depths.

    Args:
        places: three stages of the backbone, from shallow to deep.
        width: the number of channels of their reduced maps.
        dropout: the probability of dropout before the last convolution.
        segmenter: whether the last convolution makes one map and no class maps.
        classifier: the model that then decides the class, which is not trained.
        network: see `CAMNetwork`.
    """

    passes = ("features", "features_and_stages", "all_parts")

    def __init__(
        self,
        *network: Any,
        places: Sequence[str],
        width: int,
        dropout: float,
        segmenter: bool,
        classifier: WSOLModule | None,
    ) -> None:
        super().__init__(*network)
        widths = self.backbone.widths(places)
        self.places = tuple(places)

        def reduction(before: int) -> nn.Sequential:
            layers = (nn.Conv2d(before, width, kernel_size=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            return nn.Sequential(*layers)

        self.gates = nn.ModuleList(reduction(before) for before in widths)
        self.openings = nn.ModuleList(nn.Conv2d(width, after, kernel_size=1) for after in widths)
        self.reductions = nn.ModuleList(reduction(before) for before in widths)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(width, 1 if segmenter else self.classifier.out_channels, kernel_size=1)
        self.other = classifier

    def all_parts(self, image: Tensor, stages: Sequence[str] = ()) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Compute P and o_5 [B, D, h, w] of images [B, 3, H, W], and the maps after stages of the backbone."""
        _, found = self.backbone.maps(image, [*self.places, *stages])
        maps = found[: len(self.places)]
        pooled = [layer(one.mean(dim=(2, 3), keepdim=True)) for one, layer in zip(maps, self.gates, strict=True)]
        gate = functools.reduce(torch.mul, pooled)
        opened = [one * opening(gate).sigmoid() for one, opening in zip(maps, self.openings, strict=True)]
        reduced = [layer(one) for one, layer in zip(opened, self.reductions, strict=True)]
        size = reduced[0].shape[-2:]
        reduced = [
            one if one.shape[-2:] == size else F.interpolate(one, size=size, mode="bilinear", align_corners=True)
            for one in reduced
        ]
        return functools.reduce(torch.mul, reduced), reduced[-1], found[len(self.places) :]

    def features(self, image: Tensor) -> Tensor:
        """Compute P [B, D, h, w] of an image [B, 3, H, W]."""
        return self.all_parts(image)[0]

    def features_and_stages(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute P [B, D, h, w], and a feature map [B, D, h', w'] of each stage that the post-process needs."""
        product, _, stages = self.all_parts(image, self._stages)
        return product, stages

    def logits(self, feature: Tensor) -> Tensor:
        """Compute logits [B, C] from P or o_5 [B, D, h, w]."""
        return self.class_maps(self.dropout(feature)).relu().mean(dim=(2, 3))

    def score_maps(self, feature: Tensor, classes: Tensor | None) -> Tensor:
        """Compute the score maps A_c(P) [B, K, h, w] of classes [B, K]."""
        return self.class_maps(feature, classes).relu()

    def mask(self, feature: Tensor) -> Tensor:
        """Compute the logits of S [B, h, w] from P [B, D, h, w], float32."""
        return self.class_maps(self.dropout(feature))[:, 0]


class SPOL(CAMModule):
    """SPOL in training and evaluation.

    Args:
        stage: "cam" or "segment".
        classifier: for the stage "segment", the checkpoint of the model that decides the class, or its description.
        models: the model of this checkpoint, as `classifier`.
        places, width, dropout: see `SPOLNetwork`.
        deep_target: whether P learns what o_5 predicts, and o_5 learns the class. Otherwise P learns the class.
        head: see `HeadSettings`.

    Raises:
        ConfigError: the settings do not go together, or the classifier does not fit.
    """

    network: SPOLNetwork
    model_settings: ClassVar[Sequence[str]] = ("classifier",)

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        stage: Stage,
        classifier: str | Mapping[str, Any] | None,
        models: Mapping[str, WSOLModule],
        places: Sequence[str],
        width: int,
        dropout: float,
        deep_target: bool,
        **head: Unpack[HeadSettings],
    ) -> None:
        _check(stage, classifier, head)
        own = models.get("classifier")
        check_classes("classifier", own, num_classes)
        make = functools.partial(
            SPOLNetwork, places=places, width=width, dropout=dropout, segmenter=stage == "segment", classifier=own
        )
        super().__init__(backbone, num_classes, "maps_first", head, make)
        self.deep_target = deep_target
        self.segments = self.maps_are_probabilities = stage == "segment"
        self.targets = ("train_masks",) if self.segments else ()

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [B, C] of a normalised image [B, 3, H, W]."""
        other = self.network.other
        return self.network(image) if other is None else logits_of(other, image, self.description)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the losses of the stage."""
        product, deep, _ = self.network.all_parts(batch["image"])
        if self.segments:
            return {"loss": mask_loss(self.network.mask(product), batch["pseudo_mask"])}
        logits = self.network.logits(product)
        if not self.deep_target:
            return {"loss": classification_loss(logits, batch)}
        teacher = self.network.logits(deep)
        losses = {
            "loss_deep": classification_loss(teacher, batch),
            "loss_product": F.cross_entropy(logits, teacher.detach().softmax(dim=1)),
        }
        return {"loss": (losses["loss_deep"] + losses["loss_product"]) / 2, **losses}

    @torch.no_grad()
    def localize(self, image: Tensor, classes: Classes = None) -> Localization:
        """Localize as `WSOLModule.localize` says, with one map per class, or with the same map in the second stage."""
        network = self.network
        product, _, stages = network.all_parts(image, network._stages)
        logits = self(image) if self.segments else network.logits(product)
        chosen = choose_classes(classes, logits)
        maps = network.mask(product).sigmoid()[:, None] if self.segments else network.score_maps(product, chosen)
        refined = network.refined(maps, image, product, stages, chosen, network.places[0])
        count = 1 if chosen is None else chosen.shape[1]
        return Localization(logits, refined.expand(-1, count, -1, -1) if self.segments else refined)

    def inside(self, image: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return the parts of a class's map, see `CAMNetwork.inside`. The second stage has none."""
        return {} if self.segments else super().inside(image, classes)


def mask_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Compute the binary cross-entropy of maps, as a scalar, on the pixels that are object or background.

    Args:
        logits: the logits of maps [B, h, w], which are enlarged to the size of the masks.
        mask: [B, H, W], uint8: 0 background, 1 object, 255 neither.
    """
    enlarged = F.interpolate(logits[:, None], size=mask.shape[-2:], mode="bilinear", align_corners=True)[:, 0]
    known = mask != _IGNORED
    return F.binary_cross_entropy_with_logits(enlarged, (mask == 1).float(), weight=known.float())


def _check(stage: Stage, classifier: str | Mapping[str, Any] | None, head: HeadSettings) -> None:
    """Check that the settings go together.

    Raises:
        ConfigError: they do not.
    """
    if stage == "cam" and classifier is not None:
        raise ConfigError("method.classifier belongs to the second stage: add method.stage=segment")
    if stage == "segment" and classifier is None:
        raise ConfigError(
            "method.stage=segment finds the object and no class: give method.classifier=PATH, the checkpoint of any "
            "classifier of the same data set, such as that of method.stage=cam"
        )
    if head["head_channels"] or head["keep_classifier"] is not None:
        raise ConfigError(
            "method=spol classifies the product of three maps: set method.head_channels=[] method.keep_classifier=null"
        )
    if head["postprocess"] is not None and head["postprocess"].sees_network:
        raise ConfigError(
            "method=spol classifies the product of three maps, so a post-process cannot take gradients at one of them: "
            "choose another postprocess, or none"
        )
