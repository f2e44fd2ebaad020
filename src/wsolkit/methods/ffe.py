"""FFE: Frozen Foreground Ensemble, this project's own method.

The starting point is TriLite's head (see `wsolkit.methods.trilite`), which divides the patch tokens of a frozen
transformer into foreground, background and an ambiguous rest. One such head depends on where its training starts: on
the same tokens, the accuracy of its boxes varies by twenty points. FFE trains several heads at once, from different
starts, and averages their foregrounds:

    P^h = softmax(BatchNorm(W^h F)),    M = mean over the heads h of P^h_foreground

F are the tokens of one block, the first one of the network's last quarter. A head looks at one patch at a time (W^h is
a 1×1 convolution), where TriLite's looks at nine. It learns more from few images, and costs a ninth.

Each head has its own classifier and its own loss, so the heads do not influence each other:

    loss = CE(classifier(f), y) + sum over h of [CE(z^h_fg, y) + α · mean(−log(1 − softmax(z^h_bg)_y + 1e-7))]

The method comes with `postprocess=similarity`. Its recipes evaluate at two sizes, whose maps are averaged.
docs/frozen.md has what each part is worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolkit.backbones.tokens import TokenBackbone
from wsolkit.methods.base import Network, WSOLModule
from wsolkit.methods.maps import choose_classes
from wsolkit.methods.similarity import SimilarityWalk
from wsolkit.methods.trilite import background_loss
from wsolkit.types import Classes, Localization, Tokens, TrainingBatch

_REGIONS = 3
_POOLING_EPSILON = 1e-6


class ForegroundHeads(nn.Module):
    """Heads that divide patch tokens into regions, several for each block.

    Args:
        embed_dim: D, the width of the tokens.
        blocks: L, the number of blocks whose tokens are used.
        starts: S, the number of heads for each block.
        num_classes: C.
    """

    def __init__(self, embed_dim: int, blocks: int, starts: int, num_classes: int) -> None:
        super().__init__()
        self.starts = starts
        heads = blocks * starts
        bound = 1 / math.sqrt(embed_dim)  # PyTorch's default for linear layers and 1×1 convolutions.
        self.weight = nn.Parameter(torch.empty(blocks, starts * _REGIONS, embed_dim).uniform_(-bound, bound))
        self.norm = nn.BatchNorm2d(heads * _REGIONS)
        self.classifier_weight = nn.Parameter(torch.empty(heads, num_classes, embed_dim).uniform_(-bound, bound))
        self.classifier_bias = nn.Parameter(torch.empty(heads, num_classes).uniform_(-bound, bound))

    def regions(self, feature: Tensor) -> Tensor:
        """Compute the regions [B, L·S, 3, H, W] of all heads, which sum to 1, from patch tokens [B, L, D, H, W]."""
        batch, blocks, _, height, width = feature.shape
        sums = torch.einsum("lod,bldn->blon", self.weight, feature.flatten(3))  # [B, L, 3S, N]
        regions: Tensor = self.norm(sums.reshape(batch, -1, height, width)).float()
        return regions.reshape(batch, blocks * self.starts, _REGIONS, height, width).softmax(dim=2)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the regions [B, h, 3, H, W] of h heads, and the logits [B, h, 2, C] of foreground and background."""
        regions = self.regions(feature)
        batch, blocks = feature.shape[:2]
        weights = regions[:, :, :2].flatten(3)  # [B, h, 2, H, W] → [B, h, 2, N]
        by_block = weights.reshape(batch, blocks, 2 * self.starts, -1)
        sums = by_block @ feature.flatten(3).float().mT  # [B, L, 2S, N]·[B, L, N, D] → [B, L, 2S, D]
        pooled = sums.reshape(batch, -1, 2, sums.shape[-1]) / (weights.sum(dim=3, keepdim=True) + _POOLING_EPSILON)
        logits = torch.einsum("bhkd,hcd->bhkc", pooled, self.classifier_weight) + self.classifier_bias[:, None]
        return regions, logits.float()


class FFENetwork(Network):
    """A frozen backbone with heads on its patch tokens, and a classifier of the pooled feature.

    Args:
        backbone: gives the tokens of one or more blocks.
        num_classes: C.
        starts: the number of heads for each block.
    """

    passes = ("tokens",)

    def __init__(self, backbone: TokenBackbone, num_classes: int, starts: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = ForegroundHeads(backbone.embed_dim, len(backbone.blocks), starts, num_classes)
        self.classifier = nn.Linear(backbone.pooled_dim, num_classes)

    def tokens(self, image: Tensor | Tokens) -> Tokens:
        """Return the tokens of images [B, 3, H, W], unless they are given already."""
        return image if isinstance(image, Tokens) else self.backbone(image)

    def forward(self, image: Tensor | Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the logits [B, C], the regions [B, h, 3, H, W] and the logits [B, h, 2, C] of h heads."""
        tokens = self.tokens(image)
        return self.classifier(tokens.pooled).float(), *self.heads(tokens.patches)


class FFE(WSOLModule):
    """FFE in training and evaluation. `FFENetwork` explains the arguments that are not named here.

    Args:
        background_weight: α, the factor of the background's loss.
        postprocess: refines the maps, or None. It uses the tokens of the first one of the backbone's blocks.
    """

    network: FFENetwork
    maps_are_probabilities = True
    chosen_apart: ClassVar[Mapping[str, str]] = {"network.classifier.": "top1_cls"}

    def __init__(
        self,
        backbone: TokenBackbone,
        num_classes: int,
        starts: int,
        background_weight: float,
        postprocess: SimilarityWalk | None,
    ) -> None:
        super().__init__(FFENetwork(backbone, num_classes, starts))
        self.background_weight = background_weight
        self.postprocess = postprocess

    def forward(self, image: Tensor | Tokens) -> Tensor:
        """Compute the logits [B, C] of normalised images [B, 3, H, W] or of their tokens."""
        return self.network.classifier(self.network.tokens(image).pooled).float()  # type: ignore[no-any-return]

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy of the whole image, and the losses of the regions, summed over the heads."""
        label = batch["label"]
        logits, regions, of_regions = self.network(batch["image"])
        heads = of_regions.shape[1]
        foreground, background = of_regions.transpose(0, 1).unbind(dim=2)  # [B, h, 2, C] → two of [h, B, C]
        repeated = label.repeat(heads)
        losses = {
            "loss_cls": F.cross_entropy(logits, label),
            "loss_fg": heads * F.cross_entropy(foreground.flatten(0, 1), repeated),
            "loss_bg": heads * self.background_weight * background_loss(background.flatten(0, 1), repeated),
        }
        shares = regions.mean(dim=(0, 1, 3, 4)).detach()
        watched = {
            f"area_{name}": share for name, share in zip(("foreground", "background", "ambiguous"), shares, strict=True)
        }
        return {"loss": torch.stack(list(losses.values())).sum(), **losses, **watched}

    @torch.no_grad()
    def localize(self, image: Tensor | Tokens, classes: Classes = None) -> Localization:
        """Localize as `WSOLModule.localize` says. Every class has the same map, the mean of all foregrounds."""
        tokens = self.network.tokens(image)
        logits = self.network.classifier(tokens.pooled).float()
        maps = self.network.heads.regions(tokens.patches)[:, :, 0].mean(dim=1, keepdim=True)
        if self.postprocess is not None:
            maps = self.postprocess(maps, tokens.patches[:, 0])
        chosen = choose_classes(classes, logits)
        return Localization(logits, maps.expand(-1, 1 if chosen is None else chosen.shape[1], -1, -1))

    @torch.no_grad()
    def inside(self, image: Tensor | Tokens, classes: Tensor) -> dict[str, Tensor]:
        """Return the foregrounds of all heads, a series [B, h, h', w'], with the starts of a block side by side."""
        return {"P": self.network.heads.regions(self.network.tokens(image).patches)[:, :, 0]}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one group for the optimizer. Weight decay acts on all trained parameters, as in TriLite."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"name": "heads", "params": trained}]
