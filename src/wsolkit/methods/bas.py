"""BAS: background activation suppression (Wu et al., CVPR 2022), on convolutional networks and on transformers.

A generator, a 3×3 convolution with a sigmoid, makes a mask M_c [B, H, W] for each class from an intermediate map F of
the network. The clean pass goes on from F to class maps A ≥ 0, whose spatial mean S gives the logits. A background pass
sees F without what the mask of the true class y covers, through the same layers with constant weights:

    S = mean of A(F),    S^b = mean of A(stop-grad(F) · (1 − M_y))

A good mask leaves the background with little of the class. It also is small, and its foreground shows the class:

    L_bas  = S^b_y / stop-grad(S_y),  or 0 where S^b_y ≥ S_y
    L_area = mean of M_y
    L_frg  = CE(mean of A · M_y, y),  with M_y averaged to the size of A
    L      = CE(S, y) + α L_frg + L_bas + β L_area

The background pass teaches the generator only. F does get a gradient through M_y, since the generator sees F itself. In
training, BatchNorm normalises the background's batch by itself, and its running statistics stay those of the clean
pass.

The score map is M_c, or the mean of the masks of the top k predicted classes, which is then the same for all classes.

On a transformer (SAT, Wu et al., ICCV 2023, Table 7), F are the patch tokens that enter the last blocks, and TS-CAM's
head makes the class maps. The class token is not masked. This is our reading of a table, since no code is public. S
passes a ReLU for L_bas, so that the ratio is defined. `objective="sat"` trains the same mask with SAT's batch area loss
and normalization loss in place of L_bas, L_area and L_frg, which is BAS* in that table.

The released code puts 0 where S^b_y > S_y on ILSVRC, and differs from the above only if both are equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.backbones.vit import ViT, run_block
from wsolkit.errors import ConfigError
from wsolkit.methods.base import Network, WSOLModule
from wsolkit.methods.cam import CAMModule, CAMNetwork, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.constant_weights import with_constant_weights
from wsolkit.methods.heads import Initialisation, initialise
from wsolkit.methods.map_losses import Filter, batch_area_loss, normalization_loss, smoothing_kernel
from wsolkit.methods.maps import choose_classes, select_maps, semantic_head
from wsolkit.methods.similarity import SimilarityWalk
from wsolkit.types import Classes, Localization, TrainingBatch

_EPSILON = 1e-8  # The released code has this value.


def background_logits(feature: Tensor, mask: Tensor, rest: nn.Module) -> Tensor:
    """Classify the background of a feature map with constant weights.

    Args:
        feature: F [B, D, H, W], which gets no gradient.
        mask: M_y [B, H, W] in [0, 1], which gets the gradient.
        rest: the layers from F to logits [B, C], or to class maps, whose spatial mean counts.

    Returns:
        [B, C], float32.
    """
    background = feature.detach() * (1 - mask)[:, None].to(feature.dtype)
    found: Tensor = with_constant_weights(rest, background)
    return found.float().flatten(2).mean(dim=2) if found.ndim > 2 else found.float()


def suppression_loss(score: Tensor, background_score: Tensor) -> Tensor:
    """Compute L_bas as a scalar.

    Args:
        score: S_y [B], which gets no gradient.
        background_score: S^b_y [B].
    """
    score = score.detach()
    ratio = background_score / (score + _EPSILON)
    return torch.where(background_score < score, ratio, 0).mean()


def foreground_logits(maps: Tensor, mask: Tensor) -> Tensor:
    """Classify the foreground of class maps.

    Args:
        maps: A [B, C, h, w].
        mask: M_y [B, H, W], as large as the maps or larger, for example 2h × 2w.

    Returns:
        [B, C].
    """
    return (maps * _pooled(mask, maps.shape[-2:])[:, None]).mean(dim=(2, 3))


def _pooled(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Average a mask [B, H, W] to a smaller size, as max pooling divides it."""
    kernel = [side // smaller for side, smaller in zip(mask.shape[-2:], size, strict=True)]
    if all(side // step == smaller for side, step, smaller in zip(mask.shape[-2:], kernel, size, strict=True)):
        return F.avg_pool2d(mask, kernel)
    return F.adaptive_avg_pool2d(mask, (int(size[0]), int(size[1])))


class MaskSettings(TypedDict):
    """The settings of masks and their losses, on any backbone.

    top_k: the number of predicted classes whose masks are averaged into the score map, or None for the mask of the
    class in question; objective: whether to train with the losses of "bas" or of "sat"; foreground_weight, area_weight:
    α and β; area_prior: SAT's λ; filter, filter_sigma: see `smoothing_kernel`.
    """

    top_k: int | None
    objective: Literal["bas", "sat"]
    foreground_weight: float
    area_weight: float
    area_prior: float
    filter: Filter
    filter_sigma: float


class MaskLosses(nn.Module):
    """The losses of a classifier with masks.

    Args:
        settings: see `MaskSettings`.

    Raises:
        ConfigError: a setting is out of its range.
    """

    kernel: Tensor

    def __init__(self, settings: MaskSettings) -> None:
        super().__init__()
        if not 0 < settings["area_prior"] < 1:
            raise ConfigError(
                f"method.area_prior={settings['area_prior']}: expected a share of the image between 0 and 1"
            )
        if settings["top_k"] is not None and settings["top_k"] < 1:
            raise ConfigError(f"method.top_k={settings['top_k']}: expected 1 or more classes, or null")
        self.objective = settings["objective"]
        self.foreground_weight = settings["foreground_weight"]
        self.area_weight = settings["area_weight"]
        self.area_prior = settings["area_prior"]
        kernel = smoothing_kernel(settings["filter"], settings["filter_sigma"])
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(
        self, maps: Tensor, mask: Tensor, background: Callable[[], Tensor], batch: TrainingBatch
    ) -> dict[str, Tensor]:
        """Compute the losses, without their weights, and their weighted sum.

        Args:
            maps: A [B, C, h, w], whose spatial mean gives the logits.
            mask: M_y [B, H, W].
            background: computes the logits [B, C] of the background.
            batch: the training batch.
        """
        label = batch["label"][:, None]
        logits = maps.mean(dim=(2, 3))  # [B, C, h, w] → [B, C]
        losses = {"loss_cls": classification_loss(logits, batch)}
        if self.objective == "sat":
            losses["loss_area"] = batch_area_loss(mask, self.area_prior)
            with torch.autocast(mask.device.type, enabled=False):
                losses["loss_norm"] = normalization_loss(mask, self.kernel)
            total = torch.stack(list(losses.values())).sum()
        else:
            score, background_score = (each.relu().gather(1, label)[:, 0] for each in (logits, background()))
            losses["loss_bas"] = suppression_loss(score, background_score)
            losses["loss_area"] = mask.mean()
            losses["loss_frg"] = F.cross_entropy(foreground_logits(maps, mask), label[:, 0])
            total = losses["loss_cls"] + losses["loss_bas"]
            total = total + self.area_weight * losses["loss_area"] + self.foreground_weight * losses["loss_frg"]
        return {"loss": total, **losses, "map_area": mask.mean()}


def score_maps(masks: Tensor, logits: Tensor, classes: Tensor | None, top_k: int | None) -> Tensor:
    """Choose the score maps of classes.

    Args:
        masks: M [B, C, H, W].
        logits: [B, C].
        classes: [B, K], or None for all classes.
        top_k: see `MaskSettings`.

    Returns:
        [B, K, H, W], or [B, 1, H, W] if all classes are asked for and have the same map.
    """
    if top_k is None:
        return select_maps(masks, classes)
    predicted = logits.topk(min(top_k, logits.shape[1]), dim=1).indices
    mean = select_maps(masks, predicted).mean(dim=1, keepdim=True)
    return mean.expand(-1, 1 if classes is None else classes.shape[1], -1, -1)


class BASNetwork(CAMNetwork):
    """A CAM network with a generator of masks, whose class maps pass a ReLU.

    Args:
        stage: the stage of the backbone whose map is F.
        pool: whether 2×2 max pooling follows F, before the rest of the network.
        top_k: see `MaskSettings`.
        init: the initialisation of the generator, see `initialise`.
        network: see `CAMNetwork`.
    """

    passes = ("features", "features_and_stages", "parts", "background")

    def __init__(self, *network: Any, stage: str, pool: bool, top_k: int | None, init: Initialisation) -> None:
        super().__init__(*network)
        (width,) = self.backbone.widths([stage])
        self.stage, self.top_k = stage, top_k
        self.generator = nn.Conv2d(width, self.classifier.out_channels, kernel_size=3, padding=1)
        initialise([self.generator], init)
        if pool:
            self.backbone.pool_after(stage)

    def activations(self, feature: Tensor) -> Tensor:
        """Compute A [B, C, h, w] ≥ 0 from the last feature map [B, D, h, w]."""
        return self.class_maps(feature).relu()

    def logits(self, feature: Tensor) -> Tensor:
        """Compute logits [B, C] from the last feature map [B, D, h, w]."""
        return self.activations(feature).mean(dim=(2, 3))

    def masks(self, middle: Tensor) -> Tensor:
        """Compute the masks M [B, C, H, W] in [0, 1], float32, from F [B, D, H, W]."""
        return self.generator(middle).float().sigmoid()  # type: ignore[no-any-return]

    def parts(self, image: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Look at images [B, 3, H, W].

        Returns:
            F [B, D, H, W], the last feature map [B, D, h, w], and a map of each stage that the post-process needs.
        """
        last, (middle, *stages) = self.backbone.maps(image, [self.stage, *self._stages])
        return middle, self.head(last), stages

    def background(self, middle: Tensor, mask: Tensor) -> Tensor:
        """Compute the logits [B, C] of the background, from F [B, D, H, W] and M_y [B, H, W]."""
        after = self.backbone.split(self.stage)[1]
        return background_logits(middle, mask, nn.Sequential(after, self.head, self.classifier, nn.ReLU()))

    @torch.no_grad()
    def localize(self, image: Tensor, classes: Classes) -> Localization:
        """Localize as `WSOLModule.localize` says."""
        middle, feature, stages = self.parts(image)
        logits = self.logits(feature)
        chosen = choose_classes(classes, logits)
        maps = score_maps(self.masks(middle), logits, chosen, self.top_k)
        return Localization(logits, self.refined(maps, image, feature, stages, chosen, self.stage))


class BASSettings(MaskSettings, HeadSettings):
    """The settings of BAS on a convolutional network."""


class BAS(CAMModule):
    """BAS on a convolutional network, in training and evaluation.

    Args:
        stage, pool: see `BASNetwork`.
        settings: see `MaskSettings` and `HeadSettings`.

    Raises:
        ConfigError: a setting is out of its range, or the backbone does not have the stage.
    """

    network: BASNetwork
    maps_are_probabilities = True

    def __init__(
        self, backbone: CNN, num_classes: int, stage: str, pool: bool, **settings: Unpack[BASSettings]
    ) -> None:
        make = functools.partial(
            BASNetwork, stage=stage, pool=pool, top_k=settings["top_k"], init=settings["head_init"]
        )
        losses = MaskLosses(settings)
        super().__init__(backbone, num_classes, "maps_first", settings, make)
        self.mask_losses = losses

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the losses of the objective, without their weights. "map_area" is the mean of the masks."""
        network = self.network
        middle, feature, _ = network.parts(batch["image"])
        mask = select_maps(network.masks(middle), batch["label"][:, None])[:, 0]
        return self.mask_losses(network.activations(feature), mask, lambda: network.background(middle, mask), batch)  # type: ignore[no-any-return]


class _LastBlocks(nn.Module):
    """The last blocks, the norm and the head of a transformer, as one module that shares their weights."""

    def __init__(self, network: BASViTNetwork) -> None:
        super().__init__()
        backbone = network.backbone
        self.blocks = backbone.blocks[network.first :]
        self.norm, self.head, self.patches = backbone.network.norm, network.head, backbone.patches

    def forward(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute semantic maps [B, C, h, w] and tokens before the norm, from tokens [B, 1 + N, D] and their image."""
        for block in self.blocks:
            tokens = run_block(block, tokens)
        semantic: Tensor = self.head(self.patches(self.norm(tokens), image))
        return semantic.float(), tokens


class BASViTNetwork(Network):
    """TS-CAM's network with a generator of masks.

    Args:
        backbone: a vision transformer.
        num_classes: C.
        num_blocks: the number of last blocks whose input the generator sees, and the masks cover.
        head_init: see `semantic_head`.

    Raises:
        ConfigError: `num_blocks` is not in 1 … depth.
    """

    passes = ("clean", "background")

    def __init__(self, backbone: ViT, num_classes: int, num_blocks: int, head_init: Literal["default", "he"]) -> None:
        super().__init__()
        if not 1 <= num_blocks <= backbone.depth:
            raise ConfigError(
                f"method.num_blocks={num_blocks}: expected 1 to {backbone.depth}, the number of transformer blocks"
            )
        self.backbone = backbone
        self.first = backbone.depth - num_blocks
        self.generator = nn.Conv2d(backbone.embed_dim, num_classes, kernel_size=3, padding=1)
        self.head = semantic_head(backbone.embed_dim, num_classes, head_init)
        self._last = (_LastBlocks(self),)  # As a tuple, it is not registered, so the weights have one name each.

    def clean(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Look at images [B, 3, H, W].

        Returns:
            F as tokens [B, 1 + N, D], the masks [B, C, h, w] in [0, 1], the semantic maps [B, C, h, w], and the patch
            tokens [B, D, h, w] before the final LayerNorm.
        """
        middle = self.backbone.embed(image)
        for block in self.backbone.blocks[: self.first]:
            middle = run_block(block, middle)
        masks = self.generator(self.backbone.patches(middle, image)).float().sigmoid()
        semantic, tokens = self._last[0](middle, image)
        return middle, masks, semantic, self.backbone.patches(tokens, image)

    def background(self, middle: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Compute the logits [B, C] of the background, from F [B, 1 + N, D] and M_y [B, h, w]."""
        others = mask.new_ones(mask.shape[0], self.backbone.num_prefix_tokens)
        kept = torch.cat([others, (1 - mask).flatten(1)], dim=1)  # [B, h, w] → [B, 1 + N]
        masked = middle.detach() * kept[:, :, None].to(middle.dtype)
        semantic, _ = with_constant_weights(self._last[0], masked, image)
        return semantic.mean(dim=(2, 3))  # type: ignore[no-any-return]


class BASViT(WSOLModule):
    """BAS on a vision transformer, in training and evaluation.

    Args:
        num_blocks, head_init: see `BASViTNetwork`.
        postprocess: refines the maps, or None.
        settings: see `MaskSettings`.

    Raises:
        ConfigError: a setting is out of its range.
    """

    network: BASViTNetwork
    maps_are_probabilities = True

    def __init__(
        self,
        backbone: ViT,
        num_classes: int,
        num_blocks: int,
        head_init: Literal["default", "he"],
        postprocess: SimilarityWalk | None,
        no_weight_decay: Sequence[str],
        **settings: Unpack[MaskSettings],
    ) -> None:
        super().__init__(BASViTNetwork(backbone, num_classes, num_blocks, head_init), no_weight_decay)
        self.num_blocks = num_blocks
        self.top_k = settings["top_k"]
        self.postprocess = postprocess
        self.mask_losses = MaskLosses(settings)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [B, C] of a normalised image [B, 3, H, W]."""
        semantic: Tensor = self.network.clean(image)[2]
        return semantic.mean(dim=(2, 3))

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the losses of the objective, without their weights. "map_area" is the mean of the masks."""
        network, image = self.network, batch["image"]
        middle, masks, semantic, _ = network.clean(image)
        mask = select_maps(masks, batch["label"][:, None])[:, 0]
        return self.mask_losses(semantic, mask, lambda: network.background(middle, mask, image), batch)  # type: ignore[no-any-return]

    @torch.no_grad()
    def localize(self, image: Tensor, classes: Classes = None) -> Localization:
        """Localize as `WSOLModule.localize` says."""
        _, masks, semantic, tokens = self.network.clean(image)
        logits = semantic.mean(dim=(2, 3))
        maps = score_maps(masks, logits, choose_classes(classes, logits), self.top_k)
        return Localization(logits, maps if self.postprocess is None else self.postprocess(maps, tokens))
