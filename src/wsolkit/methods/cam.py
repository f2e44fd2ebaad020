"""CAM: class activation map (Zhou et al., CVPR 2016), and the network that all methods on a CNN share.

The network averages the last feature map F [B, D, H, W] over space, and classifies the mean with weights w and biases
b [C]:

    logits_c = w_c · mean_u F_u + b_c,        score map of class c: CAM_c(u) = w_c · F_u

The second form comes from ACoL (Zhang et al., CVPR 2018) and swaps the two steps. A 1×1 convolution gives class maps
w_c · F_u + b_c, and their spatial mean gives the logits. Since the mean is linear, the logits are the same. The maps
differ by b_c, which min-max normalisation removes. A method that works on the class maps in training (SPA) needs the
second form.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.base import Network, WSOLModule
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.maps import choose_classes
from wsolkit.methods.parameters import fine_tuning_groups
from wsolkit.types import Classes, Localization, TrainingBatch

Form = Literal["average_first", "maps_first"]


class FineTuning(TypedDict):
    """How the layers learn, see `wsolkit.methods.parameters.fine_tuning_groups`.

    new_from: the first new layer. "head" stands for the layers after the backbone, and a stage of the backbone for this
    stage and all that follows.
    """

    new_from: str
    new_lr_factor: float
    bias_lr_factor: float
    decay_biases: bool


class PostProcess(Protocol):
    """Refines score maps after training, with the help of feature maps."""

    @property
    def stages(self) -> Sequence[str]:
        """Return the stages of the backbone whose feature maps it needs."""

    def __call__(self, maps: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Refine score maps [B, K, h, w] with a feature map [B, D, h', w'] of each stage. The shape stays."""


class HeadSettings(TypedDict):
    """The settings that all methods on a CAM network share, see `CAMNetwork` and `FineTuning`."""

    head_channels: Sequence[int]
    head_init: Literal["default", "xavier"]
    keep_classifier: Sequence[int] | None
    postprocess: PostProcess | None
    fine_tuning: FineTuning


def feature_norm(feature: Tensor) -> Tensor:
    """Compute the norm of each position's vector, scaled to [0, 1] over space: [B, D, H, W] → [B, H, W], float32."""
    return min_max(feature.float().norm(dim=1))


class CAMNetwork(Network):
    """A backbone with additional convolutions and a linear classifier.

    Args:
        backbone: a convolutional network.
        num_classes: C.
        head_channels: the widths of 3×3 convolutions between backbone and classifier, each with a ReLU.
        form: whether the network averages the features before it classifies them, or averages class maps.
        head_init: the initialisation of all layers after the backbone. "default" is PyTorch's own, "xavier" is uniform
            with biases 0.
        keep_classifier: the class indices whose rows of the pretrained classifier the new one starts from, or None for
            a new classifier.
        postprocess: refines the maps, or None.

    Raises:
        ConfigError: there is no classifier to keep, or it does not fit, or the backbone lacks a stage that
            `postprocess` needs.
    """

    passes: ClassVar[tuple[str, ...]] = ("features", "features_and_stages", "features_twice")

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        head_channels: Sequence[int],
        form: Form,
        head_init: Literal["default", "xavier"],
        keep_classifier: Sequence[int] | None,
        postprocess: PostProcess | None,
    ) -> None:
        super().__init__()
        for stage in () if postprocess is None else postprocess.stages:
            backbone.places(stage)  # A missing stage raises an error here.
        self.postprocess = postprocess
        widths = [backbone.channels, *head_channels]
        layers: list[nn.Module] = []
        for width, following in itertools.pairwise(widths):
            layers += [nn.Conv2d(width, following, kernel_size=3, padding=1), nn.ReLU()]
        self.backbone = backbone
        self.head = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(widths[-1], num_classes, kernel_size=1)
        self.form = form
        if head_init == "xavier":
            for layer in (*layers, self.classifier):
                if isinstance(layer, nn.Conv2d):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        if keep_classifier is not None:
            self._load_classifier(keep_classifier)

    def _load_classifier(self, rows: Sequence[int]) -> None:
        known, own = self.backbone.classifier, self.classifier
        if known is None or known.weight.shape[1] != own.in_channels:
            raise ConfigError(
                "method.keep_classifier needs backbone weights with a linear classifier on the last map, and no "
                "convolutions in between (method.head_channels=[]). Set method.keep_classifier=null"
            )
        if len(rows) != own.out_channels or not all(0 <= row < len(known.weight) for row in rows):
            raise ConfigError(
                f"method.keep_classifier has {len(rows)} class indices: expected one for each of the "
                f"{own.out_channels} classes, from 0 to {len(known.weight) - 1}"
            )
        assert own.bias is not None
        with torch.no_grad():
            own.weight.copy_(known.weight[list(rows), :, None, None])
            own.bias.copy_(known.bias[list(rows)])

    def features(self, image: Tensor) -> Tensor:
        """Compute the map F [B, D, h, w] that is classified, from an image [B, 3, H, W]."""
        return self.head(self.backbone(image))  # type: ignore[no-any-return]

    def features_and_stages(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute F [B, D, h, w], and a feature map [B, D, h', w'] of each stage that the post-process needs."""
        last, stages = self.backbone.maps(image, () if self.postprocess is None else self.postprocess.stages)
        return self.head(last), stages

    def features_twice(self, image: Tensor, stage: str, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Compute F [B, D, h, w] twice: as it is, and with the maps after a stage of the backbone changed."""
        before, after = self.backbone.split(stage)
        early = before(image)
        return self.head(after(early)), self.head(after(change(early)))

    def logits(self, feature: Tensor) -> Tensor:
        """Compute logits [B, C] from F [B, D, h, w]."""
        if self.form == "average_first":
            return self.classifier(feature.mean(dim=(2, 3), keepdim=True)).flatten(1).float()  # type: ignore[no-any-return]
        return self.class_maps(feature).mean(dim=(2, 3))

    def class_maps(self, feature: Tensor, classes: Tensor | None = None) -> Tensor:
        """Compute score maps [B, C, h, w], or [B, K, h, w] of classes [B, K], from F [B, D, h, w].

        They include the bias if the form is "maps_first".
        """
        weight, bias = self.classifier.weight, self.classifier.bias if self.form == "maps_first" else None
        if classes is None:
            return F.conv2d(feature, weight, bias).float()
        maps = torch.einsum("bdhw,bkd->bkhw", feature, weight[:, :, 0, 0][classes].to(feature.dtype)).float()
        return maps if bias is None else maps + bias[classes][:, :, None, None]

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits [B, C] from an image [B, 3, H, W]."""
        return self.logits(self.features(image))

    @torch.no_grad()
    def localize(self, image: Tensor, classes: Classes) -> Localization:
        """Localize as `WSOLModule.localize` says, with one map per class."""
        feature, stages = self.features_and_stages(image)
        logits = self.logits(feature)
        maps = self.class_maps(feature, choose_classes(classes, logits))
        if self.postprocess is not None:
            maps = self.postprocess(maps, stages)
        return Localization(logits, self.backbone.aligned(maps))

    @torch.no_grad()
    def norms(self, image: Tensor) -> Tensor:
        """Return the norms of the features, see `WSOLModule.norms`."""
        return self.backbone.aligned(feature_norm(self.features(image))[:, None])[:, 0]

    @torch.no_grad()
    def inside(self, image: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return the parts of a class's map: norm, similarity, the map, and the refined map after a post-process.

        Args:
            image: [B, 3, H, W].
            classes: [B].

        Returns:
            maps [B, 1, h, w] by name.
        """
        feature, chosen = self.features(image), classes[:, None]
        weight = self.classifier.weight[classes, :, 0, 0]
        maps = {
            "norm": feature_norm(feature)[:, None],
            "similarity": F.cosine_similarity(feature.float(), weight[:, :, None, None].float(), dim=1)[:, None],
            "CAM": self.class_maps(feature, chosen),
        }
        maps = {name: self.backbone.aligned(part) for name, part in maps.items()}
        return maps if self.postprocess is None else maps | {"refined": self.localize(image, chosen).maps}

    def parameter_groups(self, settings: FineTuning) -> list[dict[str, Any]]:
        """Return the parameter groups for the optimizer.

        Raises:
            ConfigError: the backbone does not have the stage in `new_from`.
        """
        start, stages = settings["new_from"], len(self.backbone.names)
        first = stages if start == "head" else self.backbone.places(start)[0]
        old = tuple(f"backbone.stages.{place}." for place in range(first))
        return fine_tuning_groups(
            self,
            lambda name: not name.startswith(old),
            settings["new_lr_factor"],
            settings["bias_lr_factor"],
            settings["decay_biases"],
        )


class CAMModule(WSOLModule):
    """The base of all methods on a CAM network, which differ in their losses.

    Args:
        backbone, num_classes, form: see `CAMNetwork`.
        head: see `HeadSettings`.
        network: makes the network from the arguments of `CAMNetwork`, which it extends.
    """

    network: CAMNetwork

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        form: Form,
        head: HeadSettings,
        network: Callable[..., CAMNetwork] = CAMNetwork,
    ) -> None:
        super().__init__(
            network(
                backbone,
                num_classes,
                head["head_channels"],
                form,
                head["head_init"],
                head["keep_classifier"],
                head["postprocess"],
            )
        )
        self.fine_tuning = head["fine_tuning"]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups, see `CAMNetwork.parameter_groups`."""
        return self.network.parameter_groups(self.fine_tuning)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [B, C] of a normalised image [B, 3, H, W]."""
        return self.network(image)  # type: ignore[no-any-return]

    def localize(self, image: Tensor, classes: Classes = None) -> Localization:
        """Localize as `WSOLModule.localize` says, with one map per class."""
        return self.network.localize(image, classes)

    def norms(self, image: Tensor) -> Tensor:
        """Return the norms of the features, see `WSOLModule.norms`."""
        return self.network.norms(image)

    def inside(self, image: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return the parts of a class's map, see `CAMNetwork.inside`."""
        return self.network.inside(image, classes)


class CAM(CAMModule):
    """CAM in training and localization.

    Args:
        form: see `CAMNetwork`.
        head: see `HeadSettings`.
    """

    def __init__(self, backbone: CNN, num_classes: int, form: Form, **head: Unpack[HeadSettings]) -> None:
        super().__init__(backbone, num_classes, form, head)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy."""
        return {"loss": classification_loss(self(batch["image"]), batch)}
