"""ORNet: online refinement of low-level feature based activation maps (Xie et al., ICCV 2021).

A generator, which is a small U-Net, turns the low-level map F of a classifier (ResNet50's stem, 56×56) into class maps
X [B, C, H, W] and one map for all classes, M = sigmoid(BatchNorm(Conv(X))) [B, H, W]. Training has two stages.

Coarse: M multiplies F, and the rest of the classifier goes on from there. An attention branch classifies X:

    L = CE(classifier(F · M), y) + CE(mean of Conv1×1(X), y)

Fine: a frozen evaluator, which is any classifier, sees the image times the enlarged map. Only the generator's last
layers learn. The map has to keep the class and be small and certain:

    L      = CE(evaluator(image · M̃), y) + 0.02 L_area + 1.5 L_w
    L_area = mean of M + sum over the evaluator's classes of rank 4 … 25 of the mean of X_class
    L_w    = the weighted entropy of M, see `weighted_entropy_loss`

M̃ is M after attentive erasing, which covers some of the map's peak in half of the images, see `erase_attentively`. In
evaluation, M is the score map of all classes. The logits are those of the classifier after the coarse stage, and those
of the evaluator for the plain image after the fine one.

The released code has the fine stage only, with losses and erasing as here. The loss of the coarse stage is from memory.
The evaluator there is VGG16 with its fully connected layers. Here it is the model of any checkpoint. Frozen layers are
in evaluation mode in the fine stage, and the U-Net enlarges maps without aligned corners, which is both chosen here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.checkpoint import Checkpoint, name_of
from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.cam import CAMModule, CAMNetwork, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.map_losses import weighted_entropy_loss
from wsolkit.methods.maps import choose_classes
from wsolkit.methods.other_model import check_classes, normalised_for
from wsolkit.types import Classes, Localization, TrainingBatch

__all__ = ["ORNet", "ORNetNetwork", "area_loss", "erase_attentively", "weighted_entropy_loss"]

Stage = Literal["coarse", "fine"]

_FIRST_RANKS = 3  # The classes that may be the right one do not count in the area loss (released code).
_SLOPE = 0.01  # Of the generator's LeakyReLU, and the momentum of its BatchNorm (released code).
_MOMENTUM = 0.01
_FLOOR, _RANGE = 0.2, 0.6  # Attentive erasing turns M into 0.6 M + 0.2 (released code).
_LEAST_HALF_SIDE = 4


def area_loss(maps: Tensor, logits: Tensor, class_maps: Tensor, top: int) -> Tensor:
    """Compute the area of maps, and of the class maps of classes that the image probably does not show, as a scalar.

    Args:
        maps: M [B, H, W].
        logits: the evaluator's logits [B, C], which choose the classes and get no gradient.
        class_maps: X [B, C, H, W].
        top: the last rank of a predicted class that counts, at most C. The first one is 4.
    """
    ranked = logits.detach().topk(int(top), dim=1).indices[:, _FIRST_RANKS:]
    others = class_maps.float().mean(dim=(2, 3)).gather(1, ranked).sum(dim=1)  # [B, C] → [B, top − 3] → [B]
    return maps.mean() + others.mean()


def erase_attentively(maps: Tensor, probability: float, depth: float) -> Tensor:
    """Cover a random part of the peak of maps in some images, so that an evaluator needs the rest of the object.

    The values become 0.6 M + 0.2. In an image that is drawn, the region around the maximum with M > max − (max − min) r
    gets noise: each of its pixels is kept with the probability 1 − (0.6 M + 0.2), or else it becomes 0. The region ends
    at a window around the maximum, whose half sides are drawn from 4 to half the extent of all such pixels. r is drawn
    from 0 to `depth`, once for a batch.

    Args:
        maps: M [B, H, W] in [0, 1]. The gradient passes the product with the noise.
        probability: the share of images that are drawn.
        depth: the largest r.

    Returns:
        M̃ [B, H, W].
    """
    values = _RANGE * maps + _FLOOR
    with torch.no_grad():
        low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
        share = depth * torch.rand((), device=maps.device)
        peak = maps > high - (high - low) * share
        place = maps.flatten(1).argmax(dim=1)
        width = maps.shape[2]
        rows = _within(peak.any(dim=2), place.div(width, rounding_mode="floor"))
        columns = _within(peak.any(dim=1), place % width)
        drawn = torch.rand(maps.shape[0], 1, 1, device=maps.device) < probability
        region = peak & rows[:, :, None] & columns[:, None] & drawn
        kept = torch.rand_like(values, dtype=torch.float32) >= values
        noise = (kept | ~region).to(values.dtype)
    return values * noise


def _within(reached: Tensor, centre: Tensor) -> Tensor:
    """Say which positions of an axis lie in a window around a centre [B], as bool [B, S].

    Args:
        reached: which positions of the axis the peak reaches, bool [B, S].
        centre: the position of the maximum [B].
    """
    places = torch.arange(reached.shape[1], device=reached.device)
    last = torch.where(reached, places, -1).amax(dim=1)
    first = torch.where(reached, places, reached.shape[1]).amin(dim=1)
    room = ((last - first + 1) / 2 - _LEAST_HALF_SIDE).clamp(min=0)
    half = _LEAST_HALF_SIDE + (torch.rand(len(centre), device=centre.device) * room).floor()
    return (places - centre[:, None]).abs() <= half[:, None]


def _double_convolution(width: int, following: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (width, following):
        layers += [
            nn.Conv2d(before, following, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(following, momentum=_MOMENTUM),
            nn.LeakyReLU(_SLOPE),
        ]
    return nn.Sequential(*layers)


class Generator(nn.Module):
    """A U-Net that makes class maps and one map for all classes.

    Args:
        width: the number of channels of its input.
        num_classes: C.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        c = width
        self.down = nn.ModuleList(_double_convolution(before, 2 * before) for before in (c, 2 * c, 4 * c))
        self.up = nn.ModuleList(
            _double_convolution(before, following)
            for before, following in ((8 * c + 4 * c, 4 * c), (4 * c + 2 * c, 3 * c), (3 * c + c, num_classes))
        )
        self.to_map = nn.Conv2d(num_classes, 1, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(1, momentum=_MOMENTUM)
        self.classifier = nn.Conv2d(num_classes, num_classes, kernel_size=1, bias=False)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Compute X [B, C, H, W] and M [B, H, W] in [0, 1], float32, from a map [B, D, H, W] of 8×8 or more."""
        seen = [feature]
        for layer in self.down:
            seen.append(layer(F.max_pool2d(seen[-1], kernel_size=2)))
        found = seen.pop()
        for layer in self.up:
            skipped = seen.pop()
            larger = F.interpolate(found, size=skipped.shape[-2:], mode="bilinear", align_corners=False)
            found = layer(torch.cat([skipped, larger], dim=1))
        return found, self.norm(self.to_map(found)).float().sigmoid()[:, 0]

    def refined_layers(self) -> list[nn.Module]:
        """Return the layers that the fine stage trains: the last two of the way up, and those that make the map."""
        return [*self.up[1:], self.to_map, self.norm]


class ORNetNetwork(CAMNetwork):
    """A CAM network whose low-level map is multiplied by the generator's map, with an evaluator in the fine stage.

    Args:
        place: the stage of the backbone whose map the generator sees.
        evaluator: a classifier that is not trained, or None for the coarse stage.
        network: see `CAMNetwork`.
    """

    passes = ("features", "features_and_stages", "all_parts", "generate")

    def __init__(self, *network: Any, place: str, evaluator: WSOLModule | None) -> None:
        super().__init__(*network)
        (width,) = self.backbone.widths([place])
        self.place = place
        self.generator = Generator(width, self.classifier.out_channels)
        self.evaluator = evaluator
        if evaluator is not None:
            learns = {id(p) for layer in self.generator.refined_layers() for p in layer.parameters()}
            for parameter in self.parameters():
                parameter.requires_grad_(id(parameter) in learns)

    def train(self, mode: bool = True) -> Self:
        """Put the network into training or evaluation mode. In the fine stage, frozen layers stay in the latter."""
        if self.evaluator is None:
            return super().train(mode)
        super().train(False)
        self.training = mode
        for layer in self.generator.refined_layers():
            layer.train(mode)
        return self

    def all_parts(self, image: Tensor, stages: Sequence[str] = ()) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Look at images [B, 3, H, W].

        Returns:
            F [B, D, h, w], which is classified, X [B, C, H', W'], M [B, H', W'], and the maps after stages.
        """
        made: list[Tensor] = []

        def masked(low: Tensor) -> Tensor:
            made.extend(self.generator(low))
            return low * made[1][:, None].to(low.dtype)

        last, found = self.backbone.maps(image, stages, {self.place: masked})
        return self.classified(last), made[0], made[1], found

    def generate(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute X [B, C, H', W'] and M [B, H', W'] of images [B, 3, H, W], without classifying them."""
        class_maps, maps = self.generator(self.backbone.split(self.place)[0](image))
        return class_maps, maps

    def features(self, image: Tensor) -> Tensor:
        """Compute the map F [B, D, h, w] that is classified, from an image [B, 3, H, W]."""
        return self.all_parts(image)[0]

    def features_and_stages(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute F [B, D, h, w], and a feature map [B, D, h', w'] of each stage that the post-process needs."""
        feature, _, _, stages = self.all_parts(image, self._stages)
        return feature, stages


class ORNet(CAMModule):
    """ORNet in training and evaluation.

    Args:
        place: see `ORNetNetwork`.
        stage: "coarse" or "fine".
        coarse: the checkpoint of the coarse stage that the fine stage starts from.
        evaluator: the checkpoint of the evaluator in the fine stage, or its description.
        models: the model of this checkpoint, as `evaluator`.
        area_weight, entropy_weight: the factors of L_area and L_w.
        area_top: see `area_loss`. Data sets with fewer classes take all of them.
        entropy_mean, entropy_deviation: see `weighted_entropy_loss`.
        erase_probability, erase_depth: see `erase_attentively`.
        head: see `HeadSettings`.

    Raises:
        ConfigError: a checkpoint of the fine stage is missing, does not fit, or is not used.
    """

    network: ORNetNetwork
    model_settings: ClassVar[Sequence[str]] = ("evaluator",)
    start_setting: ClassVar[str | None] = "coarse"
    maps_are_probabilities = True

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        place: str,
        stage: Stage,
        coarse: str | None,
        evaluator: str | Mapping[str, Any] | None,
        models: Mapping[str, WSOLModule],
        area_weight: float,
        area_top: int,
        entropy_weight: float,
        entropy_mean: float,
        entropy_deviation: float,
        erase_probability: float,
        erase_depth: float,
        **head: Unpack[HeadSettings],
    ) -> None:
        _check_checkpoints(stage, coarse, evaluator)
        own = models.get("evaluator")
        check_classes("evaluator", own, num_classes)
        if head["postprocess"] is not None and head["postprocess"].sees_network:
            raise ConfigError(
                "method=ornet makes its map beside the classifier, so a post-process cannot take gradients: choose "
                "another postprocess, or none"
            )
        make = functools.partial(ORNetNetwork, place=place, evaluator=own)
        super().__init__(backbone, num_classes, "average_first", head, make)
        self.stage = stage
        self.area_weight = area_weight
        self.area_top = min(area_top, num_classes)
        self.entropy_weight = entropy_weight
        self.entropy_mean = entropy_mean
        self.entropy_deviation = entropy_deviation
        self.erase = functools.partial(erase_attentively, probability=erase_probability, depth=erase_depth)

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Take the weights of a coarse stage.

        Raises:
            CheckpointError: the checkpoint holds something else, or does not fit.
        """
        found = checkpoint.config["method"]
        if name_of(checkpoint.config, "method") != "ornet" or found.get("stage") != "coarse":
            raise CheckpointError(
                f"method.coarse={checkpoint.path}: expected a checkpoint of method=ornet method.stage=coarse, and this "
                f"is one of method={found['name']}"
            )
        rest = {name: value for name, value in self.state_dict().items() if name.startswith("network.evaluator.")}
        try:
            self.load_state_dict({**rest, **checkpoint.state_dict})
        except RuntimeError as error:
            raise CheckpointError(f"method.coarse={checkpoint.path} does not fit these settings: {error}") from error

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [B, C] of a normalised image [B, 3, H, W]."""
        evaluator = self.network.evaluator
        if evaluator is None:
            return self.network(image)  # type: ignore[no-any-return]
        return evaluator(self._for_evaluator(image)).float()  # type: ignore[no-any-return]

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the losses of the stage, without their weights. "map_area" is the mean of the maps."""
        coarse = self.network.evaluator is None
        losses, total, maps = (self._coarse_losses if coarse else self._fine_losses)(batch)
        return {"loss": total, **losses, "map_area": maps.mean()}

    def _coarse_losses(self, batch: TrainingBatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        network = self.network
        feature, class_maps, maps, _ = network.all_parts(batch["image"])
        branch = network.generator.classifier(class_maps).float().mean(dim=(2, 3))
        losses = {
            "loss_cls": classification_loss(network.logits(feature), batch),
            "loss_branch": classification_loss(branch, batch),
        }
        return losses, losses["loss_cls"] + losses["loss_branch"], maps

    def _fine_losses(self, batch: TrainingBatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        image, evaluator = batch["image"], self.network.evaluator
        assert evaluator is not None
        class_maps, maps = self.network.generate(image)
        mask = F.interpolate(self.erase(maps)[:, None], size=image.shape[-2:], mode="nearest")
        logits = evaluator(self._for_evaluator(image) * mask).float()
        losses = {
            "loss_cls": classification_loss(logits, batch),
            "loss_area": area_loss(maps, logits, class_maps, self.area_top),
            "loss_entropy": weighted_entropy_loss(maps, self.entropy_mean, self.entropy_deviation),
        }
        total = losses["loss_cls"] + self.area_weight * losses["loss_area"]
        return losses, total + self.entropy_weight * losses["loss_entropy"], maps

    def _for_evaluator(self, image: Tensor) -> Tensor:
        evaluator = self.network.evaluator
        assert evaluator is not None
        return normalised_for(evaluator.description, image, self.description)

    @torch.no_grad()
    def localize(self, image: Tensor, classes: Classes = None) -> Localization:
        """Localize as `WSOLModule.localize` says. Every class has the same map."""
        network = self.network
        if network.evaluator is None or network.postprocess is not None:
            feature, _, made, stages = network.all_parts(image, network._stages)
            logits = network.logits(feature) if network.evaluator is None else self(image)
        else:
            logits, made = self(image), network.generate(image)[1]
            feature, stages = made[:, None], []
        chosen = choose_classes(classes, logits)
        maps = network.refined(made[:, None], image, feature, stages, chosen, network.place)
        return Localization(logits, maps.expand(-1, 1 if chosen is None else chosen.shape[1], -1, -1))


def _check_checkpoints(stage: Stage, coarse: str | None, evaluator: str | Mapping[str, Any] | None) -> None:
    """Check that a stage has the checkpoints it needs, and no others.

    Raises:
        ConfigError: it has not.
    """
    if stage == "coarse" and (coarse is not None or evaluator is not None):
        raise ConfigError("method.coarse and method.evaluator belong to the fine stage: add method.stage=fine")
    inside = isinstance(evaluator, Mapping)  # Then the checkpoint that is restored holds all weights.
    if stage == "fine" and (evaluator is None or (coarse is None and not inside)):
        raise ConfigError(
            "method.stage=fine starts from two checkpoints: give method.coarse=PATH, one of method=ornet, and "
            "method.evaluator=PATH, one of any classifier of the same data set"
        )
