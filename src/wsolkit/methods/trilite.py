"""TriLite: a tri-region head on a frozen transformer (Sabaghi & Oramas, CVPR 2026, arXiv 2602.23120).

A frozen vision transformer gives patch tokens F [B, D, H, W] and a class token f [B, D]. Less than a million parameters
are trained: a localization head on F and a classifier on f, which do not share anything.

The localization head divides the image into three regions:

    A = BatchNorm(Conv3×3(F)),    P = softmax(A) over the channels: 0 foreground, 1 background, 2 ambiguous

It pools the tokens of foreground and background, and classifies both with the same linear layer:

    f_k = Σ_i P_k,i F_i / (Σ_i P_k,i + ε),    z_k = W_p f_k + b_p,    k = foreground, background

The foreground must show the class, and the background must not. The ambiguous region is free:

    loss = CE(classifier(f), y) + CE(z_fg, y) + α · mean(−log(1 − softmax(z_bg)_y + 1e-7))

The score map is P_0, the same for all classes. Everything here follows the released code. Its docstring has the regions
in another order than its code, and this file has the code's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolkit.backbones.tokens import TokenBackbone
from wsolkit.methods.base import Network, WSOLModule
from wsolkit.methods.maps import choose_classes
from wsolkit.methods.similarity import SimilarityWalk
from wsolkit.types import Classes, Localization, Tokens, TrainingBatch

_REGIONS = 3
_POOLING_EPSILON = 1e-6  # The released code has these two values.
_LOG_EPSILON = 1e-7


class LocalizationHead(nn.Module):
    """Divides patch tokens into regions, and classifies foreground and background.

    Args:
        embed_dim: D, the width of the tokens.
        num_classes: C.
        dropout: the probability with which parts of a pooled feature are dropped in training.
    """

    def __init__(self, embed_dim: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(embed_dim, _REGIONS, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(_REGIONS)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(embed_dim, num_classes)

    def regions(self, feature: Tensor) -> Tensor:
        """Compute the regions P [B, 3, H, W], which sum to 1, from patch tokens [B, D, H, W]."""
        return self.norm(self.conv(feature)).float().softmax(dim=1)  # type: ignore[no-any-return]

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the regions [B, 3, H, W], and the logits [B, C] of foreground and background."""
        regions = self.regions(feature)
        weights = regions[:, :2].flatten(2)  # [B, 2, H, W] → [B, 2, N]
        sums = weights @ feature.flatten(2).float().mT  # [B, 2, N]·[B, N, D] → [B, 2, D]
        pooled = sums / (weights.sum(dim=2, keepdim=True) + _POOLING_EPSILON)
        foreground, background = self.classifier(self.dropout(pooled)).float().unbind(dim=1)
        return regions, foreground, background


def background_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Compute the mean of −log(1 − p_y) over a batch, for probabilities p of logits [B, C] and labels [B]."""
    probability = logits.float().softmax(dim=1).gather(1, label[:, None])
    return -(1 - probability + _LOG_EPSILON).log().mean()


class TriLiteNetwork(Network):
    """A frozen backbone with a localization head and a classifier of the class token.

    Args:
        backbone: gives the tokens. The first one of its blocks is used.
        num_classes: C.
        localization_dropout, classification_dropout: the dropout before each linear layer.
    """

    passes = ("tokens",)

    def __init__(
        self, backbone: TokenBackbone, num_classes: int, localization_dropout: float, classification_dropout: float
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.localization = LocalizationHead(backbone.embed_dim, num_classes, localization_dropout)
        self.dropout = nn.Dropout(classification_dropout)
        self.classifier = nn.Linear(backbone.pooled_dim, num_classes)

    def tokens(self, image: Tensor | Tokens) -> Tokens:
        """Return the tokens of images [B, 3, H, W], unless they are given already."""
        return image if isinstance(image, Tokens) else self.backbone(image)

    def classify(self, tokens: Tokens) -> Tensor:
        """Compute the logits [B, C] of whole images."""
        return self.classifier(self.dropout(tokens.pooled)).float()  # type: ignore[no-any-return]

    def forward(self, image: Tensor | Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the logits [B, C], the regions [B, 3, h, w], and the logits of foreground and background."""
        tokens = self.tokens(image)
        return self.classify(tokens), *self.localization(tokens.patches[:, 0])


class TriLite(WSOLModule):
    """TriLite in training and evaluation. `TriLiteNetwork` explains the arguments that are not named here.

    Args:
        background_weight: α, the factor of the background's loss.
        classifier_lr_factor: the factor of the learning rate for the classifier of the class token.
        postprocess: refines the maps, or None.
    """

    network: TriLiteNetwork
    maps_are_probabilities = True
    # The released code joins the best classifier and the best localization head.
    chosen_apart: ClassVar[Mapping[str, str]] = {"network.classifier.": "top1_cls"}

    def __init__(
        self,
        backbone: TokenBackbone,
        num_classes: int,
        localization_dropout: float,
        classification_dropout: float,
        background_weight: float,
        classifier_lr_factor: float,
        postprocess: SimilarityWalk | None,
    ) -> None:
        super().__init__(TriLiteNetwork(backbone, num_classes, localization_dropout, classification_dropout))
        self.background_weight = background_weight
        self.classifier_lr_factor = classifier_lr_factor
        self.postprocess = postprocess

    def forward(self, image: Tensor | Tokens) -> Tensor:
        """Compute the logits [B, C] of normalised images [B, 3, H, W] or of their tokens."""
        return self.network.classify(self.network.tokens(image))

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy of class token and foreground, and the loss of the background."""
        label = batch["label"]
        logits, regions, foreground, background = self.network(batch["image"])
        losses = {
            "loss_cls": F.cross_entropy(logits, label),
            "loss_fg": F.cross_entropy(foreground, label),
            "loss_bg": self.background_weight * background_loss(background, label),
        }
        areas = zip(("foreground", "background", "ambiguous"), regions.mean(dim=(0, 2, 3)).detach(), strict=True)
        return {
            "loss": torch.stack(list(losses.values())).sum(),
            **losses,
            **{f"area_{name}": one for name, one in areas},
        }

    @torch.no_grad()
    def localize(self, image: Tensor | Tokens, classes: Classes = None) -> Localization:
        """Localize as `WSOLModule.localize` says. Every class has the same map, the probability of the foreground."""
        tokens = self.network.tokens(image)
        logits = self.network.classify(tokens)
        feature = tokens.patches[:, 0]
        maps = self.network.localization.regions(feature)[:, :1]
        if self.postprocess is not None:
            maps = self.postprocess(maps, feature)
        chosen = choose_classes(classes, logits)
        return Localization(logits, maps.expand(-1, 1 if chosen is None else chosen.shape[1], -1, -1))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return two groups for the optimizer. Weight decay acts on all trained parameters, as released."""
        own = self.network
        return [
            {"name": "localization", "params": list(own.localization.parameters())},
            {
                "name": "classifier",
                "params": list(own.classifier.parameters()),
                "lr_factor": self.classifier_lr_factor,
            },
        ]
