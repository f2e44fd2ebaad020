"""PSOL: pseudo supervised object localization (Zhang et al., CVPR 2020).

Localization and classification are two tasks for two networks. Three steps hand over files:

1. DDT (Wei et al., Pattern Recognition 2019) makes a pseudo box for each training image, class by class, on the feature
   maps F_i [D, H, W] of a frozen network. With the mean m of all positions of the class, and its first principal
   component v:

       P_i(u) = v · (F_i(u) − m),    box_i = the box around the largest 8-connected component of {u: P_i(u) > 0}

   An image without a positive value gets a box around all of it. `python -m wsolkit.pseudo_boxes` does this. Boxes from
   any other source are as good.
2. A regressor learns the boxes, as (x, y, w, h) in shares of the image:

       box = sigmoid(Linear(ReLU(Linear(GAP(F))))),    loss = 50 · mean (box − pseudo box)²

3. A separate classifier decides the class: the model of any checkpoint ("PSOL-Sep" in the paper). Without one, a linear
   layer on GAP(F) learns the class beside the box, and shares the backbone ("PSOL-Joint", from memory of the paper).

The score map of all classes is 1 inside the box and 0 outside, at the size of the network's input. So every protocol
draws this box at every threshold.

The sign of a principal component is arbitrary, and the released code takes whatever its library returns. Here, the mean
of P over the central half of the images is positive. An image without a pseudo box adds 0 to the loss. Both are chosen
here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.localization.boxes import BoxRule, Levels, regions
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.cam import CAMModule, CAMNetwork, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.maps import choose_classes
from wsolkit.methods.other_model import check_classes, logits_of
from wsolkit.types import Classes, Localization, TrainingBatch

_LARGEST = BoxRule("most_pixels", "inclusive", "image")


class PrincipalDirection:
    """The mean and the first principal component of feature vectors, which come in parts.

    It keeps sums in double precision, so its memory does not grow with the number of images.
    """

    def __init__(self) -> None:
        self._count, self._central_count = 0, 0
        self._sum: Tensor | float = 0.0
        self._central_sum: Tensor | float = 0.0
        self._products: Tensor | float = 0.0

    def add(self, features: Tensor) -> None:
        """Add feature maps [N, D, H, W]."""
        height, width = features.shape[-2:]
        vectors = features.double().movedim(1, -1)  # [N, D, H, W] → [N, H, W, D]
        central = vectors[:, height // 4 : height - height // 4, width // 4 : width - width // 4].flatten(0, 2)
        vectors = vectors.flatten(0, 2)
        self._count, self._central_count = self._count + len(vectors), self._central_count + len(central)
        self._sum = self._sum + vectors.sum(dim=0)
        self._central_sum = self._central_sum + central.sum(dim=0)
        self._products = self._products + vectors.mT @ vectors

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the mean [D] and the component [D], in double precision.

        The component points to where the central half of the images is. If this leaves the sign open, the largest entry
        is positive.
        """
        assert isinstance(self._sum, Tensor)
        assert isinstance(self._central_sum, Tensor)
        assert isinstance(self._products, Tensor)
        mean = self._sum / self._count
        covariance = self._products / self._count - torch.outer(mean, mean)
        component = torch.linalg.eigh(covariance).eigenvectors[:, -1]  # Eigenvalues ascend.
        central = component @ (self._central_sum / self._central_count - mean)
        largest = component[component.abs().argmax()]
        return mean, component * torch.where(central == 0, largest, central).sign()


def project(features: Tensor, mean: Tensor, component: Tensor) -> Tensor:
    """Project feature maps [N, D, H, W] on a component [D], after subtracting a mean [D]: [N, H, W], float32."""
    return (torch.einsum("ndhw,d->nhw", features.double(), component) - mean @ component).float()


def projection(features: Tensor) -> Tensor:
    """Project the feature maps of one class on their first principal component (DDT).

    Args:
        features: the maps [N, D, H, W] of all images of the class.

    Returns:
        P [N, H, W], with a positive mean over the central half of the images.
    """
    direction = PrincipalDirection()
    direction.add(features)
    return project(features, *direction.compute())


def pseudo_box(projection: Tensor) -> tuple[float, float, float, float]:
    """Draw a box around the largest 8-connected component of the positive positions. The first of equal ones counts.

    Args:
        projection: P [H, W].

    Returns:
        x, y, w, h as shares of the image. If nothing is positive, it is the whole image.

    >>> import torch
    >>> from wsolkit.methods.psol import pseudo_box
    >>> pseudo_box(torch.tensor([[-1.0, 2.0, -1.0, 0.0], [-1.0, -1.0, 3.0, 0.0]]))
    (0.25, 0.0, 0.5, 1.0)
    """
    height, width = projection.shape
    positive = (projection > 0).cpu().numpy().astype(np.uint8)
    found = regions(Levels(positive, np.zeros(1, np.int64), 2), _LARGEST, "largest").boxes
    x0, y0, x1, y1 = found[0].tolist() if len(found) else (0, 0, width - 1, height - 1)
    return x0 / width, y0 / height, (x1 + 1 - x0) / width, (y1 + 1 - y0) / height


def box_maps(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Draw boxes as maps that are 1 inside and 0 outside.

    Args:
        boxes: x, y, w, h in shares of the image [B, 4]. What exceeds the image is cut off.
        size: the height and the width of the maps.

    Returns:
        [B, H, W], float32, with at least one position inside.

    >>> import torch
    >>> from wsolkit.methods.psol import box_maps
    >>> box_maps(torch.tensor([[0.25, 0.0, 0.5, 0.5]]), (2, 4))
    tensor([[[0., 1., 1., 0.],
             [0., 0., 0., 0.]]])
    """

    def inside(first: Tensor, extent: Tensor, count: int) -> Tensor:
        start = (first * count).round().clamp(0, count - 1)
        end = torch.maximum(((first + extent) * count).round(), start + 1)
        places = torch.arange(count, device=boxes.device)
        return (places >= start[:, None]) & (places < end[:, None])

    x, y, width, height = boxes.float().unbind(dim=1)
    rows, columns = inside(y, height, size[0]), inside(x, width, size[1])
    return (rows[:, :, None] & columns[:, None]).float()


def box_loss(boxes: Tensor, pseudo_boxes: Tensor) -> Tensor:
    """Compute the mean squared error of boxes [B, 4], as a scalar. An image whose pseudo box is NaN adds 0."""
    known = pseudo_boxes.isfinite().all(dim=1, keepdim=True)
    return torch.where(known, boxes - pseudo_boxes.nan_to_num(), 0).square().mean()


class PSOLNetwork(CAMNetwork):
    """A network that regresses a box, and classifies unless another model does.

    Args:
        hidden: the width of the regressor's hidden layer.
        classifier: the model that decides the class, which is not trained, or None.
        network: see `CAMNetwork`.
    """

    def __init__(self, *network: Any, hidden: int, classifier: WSOLModule | None) -> None:
        super().__init__(*network)
        width = self.classifier.in_channels
        self.regressor = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 4))
        self.other = classifier
        if classifier is not None:
            self.classifier.requires_grad_(False)  # Nothing uses it.

    def boxes(self, feature: Tensor) -> Tensor:
        """Compute boxes [B, 4], as x, y, w, h in shares of the image, from F [B, D, h, w]."""
        return self.regressor(feature.mean(dim=(2, 3))).float().sigmoid()  # type: ignore[no-any-return]


class PSOL(CAMModule):
    """PSOL in training and evaluation.

    Args:
        classifier: the checkpoint of the model that decides the class, or its description. None learns the class beside
            the box.
        models: the model of this checkpoint, as `classifier`.
        hidden: see `PSOLNetwork`.
        box_weight: the factor of the box loss.
        head: see `HeadSettings`.

    Raises:
        ConfigError: the classifier does not fit, or a post-process is given.
    """

    network: PSOLNetwork
    model_settings: ClassVar[Sequence[str]] = ("classifier",)
    targets = ("train_boxes",)
    maps_are_probabilities = True

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        classifier: str | Mapping[str, Any] | None,
        models: Mapping[str, WSOLModule],
        hidden: int,
        box_weight: float,
        **head: Unpack[HeadSettings],
    ) -> None:
        if head["postprocess"] is not None:
            raise ConfigError("method=psol makes a box and no map that a post-process could refine: leave it out")
        own = models.get("classifier")
        check_classes("classifier", own, num_classes)
        make = functools.partial(PSOLNetwork, hidden=hidden, classifier=own)
        super().__init__(backbone, num_classes, "average_first", head, make)
        self.box_weight = box_weight

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [B, C] of a normalised image [B, 3, H, W]."""
        other = self.network.other
        return self.network(image) if other is None else logits_of(other, image, self.description)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the box loss, and the cross-entropy unless another model classifies."""
        feature = self.network.features(batch["image"])
        losses = {"loss_box": box_loss(self.network.boxes(feature), batch["pseudo_box"])}
        total = self.box_weight * losses["loss_box"]
        if self.network.other is None:
            losses["loss_cls"] = classification_loss(self.network.logits(feature), batch)
            total = total + losses["loss_cls"]
        return {"loss": total, **losses}

    @torch.no_grad()
    def localize(self, image: Tensor, classes: Classes = None) -> Localization:
        """Localize as `WSOLModule.localize` says. Every class has the same map, which is 1 inside the box."""
        feature = self.network.features(image)
        logits = self.network.logits(feature) if self.network.other is None else self(image)
        chosen = choose_classes(classes, logits)
        maps = box_maps(self.network.boxes(feature), image.shape[-2:])[:, None]
        return Localization(logits, maps.expand(-1, 1 if chosen is None else chosen.shape[1], -1, -1))
