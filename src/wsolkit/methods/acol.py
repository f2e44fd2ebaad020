"""ACoL: adversarial complementary learning (Zhang et al., CVPR 2018).

Two classifiers of equal shape, A and B, look at the same feature map F [B, D, H, W]. Each makes class maps, whose
spatial mean gives its logits. The map of the true class of A, scaled to [0, 1], is the attention. B sees F without the
positions where the attention is at least δ, and so finds other parts of the object:

    L = CE(A(F), y) + CE(B(F · [attention < δ]), y)
    score map of class c:  max(min-max A_c, min-max B_c),  where B sees F without what A_c shows

The logits are those of A. The attention carries no gradient.

The map of each class needs its own pass through B, because erasing follows the class. VGG16 has a 3×3 average before
the classifiers, which counts the zeros of its padding. A constant map gives NaN in the released code and 0 here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.cam import CAMModule, CAMNetwork, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.erasing import keep
from wsolkit.methods.heads import convolutional_head, initialise
from wsolkit.methods.maps import choose_classes, select_maps
from wsolkit.types import Classes, Localization, TrainingBatch

_CLASSES_AT_ONCE = 16  # Branch B needs the memory of so many feature maps of an image.


def erase(feature: Tensor, maps_a: Tensor, label: Tensor, threshold: float) -> Tensor:
    """Set the positions of feature maps to 0 that branch A finds most telling for a class.

    Args:
        feature: [B, D, H, W].
        maps_a: the class maps [B, C, H, W] of branch A, which get no gradient.
        label: the class [B] of each image.
        threshold: δ. A position is kept if A's map, scaled to [0, 1], is below it.
    """
    attention = min_max(select_maps(maps_a.detach(), label[:, None]))  # [B, C, H, W] → [B, 1, H, W]
    return keep(feature, attention < threshold)


def merge(maps_a: Tensor, maps_b: Tensor) -> Tensor:
    """Merge the maps of both branches, [B, C, H, W] each, into their maximum after min-max, in [0, 1]."""
    return torch.maximum(min_max(maps_a), min_max(maps_b))


class ACoLNetwork(CAMNetwork):
    """A CAM network, which is branch A, with a second branch.

    Args:
        threshold: δ.
        average_before: whether a 3×3 average precedes both branches.
        network: see `CAMNetwork`.
    """

    passes = ("features", "shared_and_stages", "both_branches")

    def __init__(self, *network: Any, threshold: float, average_before: bool, head: HeadSettings) -> None:
        super().__init__(*network)
        self.threshold = threshold
        self.average_before = average_before
        widths = [self.backbone.channels, *head["head_channels"]]
        classifier = nn.Conv2d(widths[-1], self.classifier.out_channels, kernel_size=1)
        self.branch_b = nn.Sequential(*convolutional_head(widths, dropout=0.0), classifier)
        initialise(self.branch_b, head["head_init"])

    def _shared(self, last: Tensor) -> Tensor:
        return F.avg_pool2d(last, kernel_size=3, stride=1, padding=1) if self.average_before else last

    def classified(self, last: Tensor) -> Tensor:
        """Compute the map [B, D', h, w] that branch A classifies, from the backbone's last map [B, D, h, w]."""
        return super().classified(self._shared(last))

    def shared_and_stages(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute the map F [B, D, h, w] that both branches see, and a map of each stage for the post-process."""
        last, stages = self.backbone.maps(image, self._stages)
        return self._shared(last), stages

    def both_branches(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the class maps [B, C, h, w] of both branches, with F erased for labels [B] in branch B."""
        shared = self._shared(self.backbone(image))
        maps_a = self.class_maps(self.head(shared))
        return maps_a, self.branch_b(erase(shared, maps_a, label, self.threshold)).float()

    @torch.no_grad()
    def localize(self, image: Tensor, classes: Classes) -> Localization:
        """Localize as `WSOLModule.localize` says, with one map per class."""
        shared, stages = self.shared_and_stages(image)
        feature = self.head(shared)
        maps_a = self.class_maps(feature)
        logits = maps_a.mean(dim=(2, 3))
        chosen = choose_classes(classes, logits)
        if chosen is None:
            chosen = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[0], -1)
        own = select_maps(maps_a, chosen)
        others = [self._maps_b(shared, maps_a, part) for part in chosen.split(_CLASSES_AT_ONCE, dim=1)]
        maps = merge(own, torch.cat(others, dim=1))
        return Localization(logits, self.refined(maps, image, feature, stages, chosen))

    def _maps_b(self, shared: Tensor, maps_a: Tensor, classes: Tensor) -> Tensor:
        """Compute branch B's maps [B, K, h, w] of classes [B, K], each with F erased for its class."""
        count = classes.shape[1]
        label = classes.flatten()  # [B, K] → [B·K]
        erased = erase(
            shared.repeat_interleave(count, dim=0), maps_a.repeat_interleave(count, dim=0), label, self.threshold
        )
        maps = select_maps(self.branch_b(erased).float(), label[:, None])  # [B·K, C, h, w] → [B·K, 1, h, w]
        return maps.reshape(-1, count, *maps.shape[-2:])


class ACoL(CAMModule):
    """ACoL in training and evaluation.

    Args:
        threshold: δ of `erase`.
        average_before: see `ACoLNetwork`.
        head: see `HeadSettings`, which count for both branches. `keep_classifier` is A's only.

    Raises:
        ConfigError: the threshold is out of its range.
    """

    network: ACoLNetwork

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        threshold: float,
        average_before: bool,
        **head: Unpack[HeadSettings],
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"method.threshold={threshold}: expected 0 to 1, for maps scaled to [0, 1]")
        network = functools.partial(ACoLNetwork, threshold=threshold, average_before=average_before, head=head)
        super().__init__(backbone, num_classes, "maps_first", head, network)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy of both branches. What is erased follows the image's own label."""
        maps_a, maps_b = self.network.both_branches(batch["image"], batch["label"])
        losses = {
            "loss_a": classification_loss(maps_a.mean(dim=(2, 3)), batch),
            "loss_b": classification_loss(maps_b.mean(dim=(2, 3)), batch),
        }
        return {"loss": losses["loss_a"] + losses["loss_b"], **losses}
