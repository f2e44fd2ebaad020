"""CAM: class activation map (Zhou et al., CVPR 2016), and the network that all methods on a CNN share.

The network averages the last feature map F [B, D, H, W] over space, and classifies the mean with weights w and biases
b [C]:

    logits_c = w_c · mean_u F_u + b_c,        score map of class c: CAM_c(u) = w_c · F_u

The second form comes from ACoL (Zhang et al., CVPR 2018) and swaps the two steps. A 1×1 convolution gives class maps
w_c · F_u + b_c, and their spatial mean gives the logits. Since the mean is linear, the logits are the same. The maps
differ by b_c, which min-max normalisation removes. A method that works on the class maps in training (SPA) needs the
second form.

Two changes of CAM come from "Rethinking CAM" (Bae et al., ECCV 2020). Both are settings, and neither is on by default:

- TAP, thresholded average pooling: the mean of a channel takes only the positions above θ times its maximum. The
  logits of training and test both use it. The map stays w_c · F_u.
- NWC, negative weight clamping: the map uses max(w_c, 0). The logits keep w_c. (A switch in the released code clamps
  both.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.base import Network, WSOLModule
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.heads import Initialisation, convolutional_head, initialise
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


HEAD = "head"
"""What a post-process calls the map that is classified, among the stages of the backbone."""


class PostProcess(Protocol):
    """Refines score maps after training, with the help of feature maps or of the whole network."""

    @property
    def stages(self) -> Sequence[str]:
        """Return the stages of the backbone whose feature maps it needs. `HEAD` is the map that is classified."""

    @property
    def sees_network(self) -> bool:
        """Whether it makes maps from the network and the image itself, see `NetworkPostProcess`."""

    def __call__(self, maps: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Refine score maps [B, K, h, w] with a feature map [B, D, h', w'] of each stage. The shape stays."""


class NetworkPostProcess(PostProcess, Protocol):
    """Makes score maps from a network and an image, for example from gradients."""

    def from_network(self, network: Any, image: Tensor, classes: Tensor | None) -> Tensor:
        """Compute score maps [B, K, h, w] of images [B, 3, H, W] for classes [B, K], or for all classes for None."""


class HeadSettings(TypedDict):
    """The settings that all methods on a CAM network share, see `CAMNetwork` and `FineTuning`."""

    head_channels: Sequence[int]
    head_init: Initialisation
    keep_classifier: Sequence[int] | None
    postprocess: PostProcess | None
    fine_tuning: FineTuning


def feature_norm(feature: Tensor) -> Tensor:
    """Compute the norm of each position's vector, scaled to [0, 1] over space: [B, D, H, W] → [B, H, W], float32."""
    return min_max(feature.float().norm(dim=1))


def thresholded_average(feature: Tensor, threshold: float) -> Tensor:
    """Average each channel over its most active positions (TAP).

    Args:
        feature: [B, D, H, W].
        threshold: θ in [0, 1). A position counts if it is above θ times the maximum of its channel.

    Returns:
        [B, D], 0 for a channel without a positive value.

    >>> import torch
    >>> from wsolkit.methods.cam import thresholded_average
    >>> thresholded_average(torch.tensor([[[[0.2, 4.0, 0.0, 2.0]]]]), threshold=0.1)
    tensor([[3.]])
    """
    feature = feature.float()
    kept = feature > threshold * feature.amax(dim=(2, 3), keepdim=True)
    return (feature * kept).sum(dim=(2, 3)) / kept.sum(dim=(2, 3)).clamp(min=1)


class CAMNetwork(Network):
    """A backbone with additional convolutions and a linear classifier.

    Args:
        backbone: a convolutional network.
        num_classes: C.
        head_channels: the widths of 3×3 convolutions between backbone and classifier, each with a ReLU.
        form: whether the network averages the features before it classifies them, or averages class maps.
        head_init: the initialisation of all layers after the backbone, see `initialise`.
        keep_classifier: the class indices whose rows of the pretrained classifier the new one starts from, or None for
            a new classifier.
        postprocess: refines the maps, or None.
        dropout: the probability of dropout before each additional convolution and the classifier.
        pooling_threshold: θ of `thresholded_average`, which then averages the features, or None.
        clamp_weights: whether maps take the positive weights of the classifier only.

    Raises:
        ConfigError: there is no classifier to keep, or it does not fit, or the backbone lacks a stage that
            `postprocess` needs.
    """

    passes: ClassVar[tuple[str, ...]] = ("features", "features_and_stages", "features_and_changed")

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        head_channels: Sequence[int],
        form: Form,
        head_init: Initialisation,
        keep_classifier: Sequence[int] | None,
        postprocess: PostProcess | None,
        *,
        dropout: float = 0.0,
        pooling_threshold: float | None = None,
        clamp_weights: bool = False,
    ) -> None:
        super().__init__()
        self.postprocess = postprocess
        for stage in self._stages:
            backbone.places(stage)  # A missing stage raises an error here.
        widths = [backbone.channels, *head_channels]
        self.backbone = backbone
        self.head = convolutional_head(widths, dropout)
        self.classifier = nn.Conv2d(widths[-1], num_classes, kernel_size=1)
        self.form = form
        self.pooling_threshold = pooling_threshold
        self.clamp_weights = clamp_weights
        initialise((*self.head, self.classifier), head_init)
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

    @property
    def _stages(self) -> list[str]:
        """The stages of the backbone whose maps the post-process needs."""
        return [] if self.postprocess is None else [stage for stage in self.postprocess.stages if stage != HEAD]

    def classified(self, last: Tensor) -> Tensor:
        """Compute the map F [B, D', h, w] that is classified, from the backbone's last map [B, D, h, w]."""
        return self.head(last)  # type: ignore[no-any-return]

    def features(self, image: Tensor) -> Tensor:
        """Compute the map F [B, D, h, w] that is classified, from an image [B, 3, H, W]."""
        return self.classified(self.backbone(image))

    def features_and_stages(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute F [B, D, h, w], and a feature map [B, D, h', w'] of each stage that the post-process needs."""
        last, stages = self.backbone.maps(image, self._stages)
        return self.classified(last), stages

    def refined(
        self,
        maps: Tensor,
        image: Tensor,
        feature: Tensor,
        stages: Sequence[Tensor],
        classes: Tensor | None,
        stage: str | None = None,
    ) -> Tensor:
        """Refine score maps [B, K, h, w] with the post-process, if there is one, and align them with the image.

        Args:
            maps: the score maps of the classes.
            image: the images [B, 3, H, W] that they come from.
            feature: F, the map that is classified [B, D, h, w].
            stages: the maps of the stages that the post-process needs.
            classes: [B, K], or None for all classes.
            stage: the stage of the backbone whose map has the size of the score maps, or None for the last one.
        """
        refine = self.postprocess
        if refine is None:
            return self.backbone.aligned(maps, stage)
        if refine.sees_network:
            made = cast("NetworkPostProcess", refine).from_network(self, image, classes)
            return self.backbone.aligned(made, refine.stages[-1])
        of_backbone = iter(stages)
        found = refine(maps, [feature if name == HEAD else next(of_backbone) for name in refine.stages])
        return self.backbone.aligned(found, stage)

    def features_and_changed(
        self, image: Tensor, stages: Sequence[str], change: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute F [B, D, h, w], and, for each of some stages, F with the maps after this stage changed."""
        last, early = self.backbone.maps(image, stages)
        later = [self.backbone.split(stage)[1] for stage in stages]
        changed = [self.head(after(change(maps))) for after, maps in zip(later, early, strict=True)]
        return self.head(last), changed

    def logits(self, feature: Tensor) -> Tensor:
        """Compute logits [B, C] from F [B, D, h, w]."""
        if self.pooling_threshold is not None:
            pooled = thresholded_average(feature, self.pooling_threshold)[:, :, None, None]
            return self.classifier(pooled).flatten(1).float()  # type: ignore[no-any-return]
        if self.form == "average_first":
            return self.classifier(feature.mean(dim=(2, 3), keepdim=True)).flatten(1).float()  # type: ignore[no-any-return]
        return self.class_maps(feature).mean(dim=(2, 3))

    def class_maps(self, feature: Tensor, classes: Tensor | None = None) -> Tensor:
        """Compute class maps [B, C, h, w], or [B, K, h, w] of classes [B, K], from F [B, D, h, w].

        They include the bias if the form is "maps_first".
        """
        return self._weighted(feature, self.classifier.weight, classes)

    def score_maps(self, feature: Tensor, classes: Tensor | None) -> Tensor:
        """Compute score maps, which are class maps with the weights clamped, if they are to be."""
        weight = self.classifier.weight
        return self._weighted(feature, weight.relu() if self.clamp_weights else weight, classes)

    def _weighted(self, feature: Tensor, weight: Tensor, classes: Tensor | None) -> Tensor:
        bias = self.classifier.bias if self.form == "maps_first" else None
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
        chosen = choose_classes(classes, logits)
        return Localization(logits, self.refined(self.score_maps(feature, chosen), image, feature, stages, chosen))

    @torch.no_grad()
    def norms(self, image: Tensor) -> Tensor:
        """Return the norms of the features, see `WSOLModule.norms`."""
        return self.backbone.aligned(feature_norm(self.features(image))[:, None])[:, 0]

    @torch.no_grad()
    def inside(self, image: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return the parts of a class's map: norm, similarity and the map itself.

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
        return {name: self.backbone.aligned(part) for name, part in maps.items()}

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
        make: the class of the network, with its own settings bound.
    """

    network: CAMNetwork

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        form: Form,
        head: HeadSettings,
        make: Callable[..., CAMNetwork] = CAMNetwork,
    ) -> None:
        super().__init__(
            make(
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
        """Return the parts of a class's map, see `CAMNetwork.inside`, and its "refined" map after a post-process."""
        maps = self.network.inside(image, classes)
        if self.network.postprocess is None:
            return maps
        return maps | {"refined": self.localize(image, classes[:, None]).maps}


class CAM(CAMModule):
    """CAM in training and localization.

    Args:
        form: see `CAMNetwork`.
        pooling: whether the features' mean takes all positions, or those above a threshold only (TAP).
        pooling_threshold: θ of TAP.
        clamp_weights: whether the maps take positive weights only (NWC).
        head: see `HeadSettings`.

    Raises:
        ConfigError: the settings do not go together, or the threshold is out of its range.
    """

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        form: Form,
        pooling: Literal["average", "thresholded"],
        pooling_threshold: float,
        clamp_weights: bool,
        **head: Unpack[HeadSettings],
    ) -> None:
        if pooling == "thresholded" and form != "average_first":
            raise ConfigError(
                "method.pooling=thresholded averages features, so it needs method.form=average_first, and not "
                f"method.form={form}"
            )
        if not 0 <= pooling_threshold < 1:
            raise ConfigError(
                f"method.pooling_threshold={pooling_threshold}: expected a share of the maximum, from 0 to below 1"
            )
        network = functools.partial(
            CAMNetwork,
            pooling_threshold=pooling_threshold if pooling == "thresholded" else None,
            clamp_weights=clamp_weights,
        )
        super().__init__(backbone, num_classes, form, head, network)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy."""
        return {"loss": classification_loss(self(batch["image"]), batch)}
