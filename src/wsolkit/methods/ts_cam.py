"""TS-CAM: token semantic coupled attention map (Gao et al., ICCV 2021).

A 3×3 convolution classifies the patch tokens of the last block into semantic maps S [B, C, H, W], whose spatial average
gives the logits (Eqn. 5, 6). The softmax attention of the class token over the patches, averaged over the heads and
summed over all blocks, gives a class-agnostic attention map A [B, H, W] (Eqn. 3, 4). The score map of class c is A ·
S_c (Eqn. 7).

On a Conformer, S comes from the tokens after `trans_norm`, A from all twelve blocks, and the classifier of the
convolutional branch stays. The logits are then the spatial average of S plus that classifier's logits (released code).

The paper averages A over the blocks, and the released code sums. Both are the same after min-max normalisation, which
every evaluation applies. This code sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from wsolkit.backbones.transformer import Read, Transformer
from wsolkit.errors import ConfigError
from wsolkit.methods.base import Network, WSOLModule
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.maps import choose_classes, class_logits, select_maps, semantic_head
from wsolkit.methods.similarity import SimilarityWalk
from wsolkit.types import Classes, Localization, TrainingBatch


def couple(semantic: Tensor, attention: Tensor) -> Tensor:
    """Multiply semantic maps [B, K, H, W] by the attention map [B, H, W] into score maps [B, K, H, W] (Eqn. 7)."""
    return semantic * attention[:, None]


class CoupledMaps(NamedTuple):
    """The two maps of TS-CAM, and the features from which they come.

    semantic: [B, C, h, w]; attention: [B, h, w]; tokens: patch tokens [B, D, h, w] before the final LayerNorm; branch:
    see `Features`.
    """

    semantic: Tensor
    attention: Tensor
    tokens: Tensor
    branch: Tensor | None


class TSCAMNetwork(Network):
    """A backbone with a head.

    Args:
        backbone: a vision transformer or a Conformer.
        num_classes: the number of classes.
        head_init: see `semantic_head`.
        keep_head_bias: whether to start from the bias of the classifier in the backbone's weights, if they have one, as
            the released code does for ImageNet.
    """

    passes = ("forward", "with_tokens")

    def __init__(
        self, backbone: Transformer, num_classes: int, head_init: Literal["default", "he"], keep_head_bias: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = semantic_head(backbone.embed_dim, num_classes, head_init)
        self.branch_head = backbone.branch_classifier(num_classes)
        bias = backbone.classifier_bias
        if keep_head_bias and bias is not None:
            if len(bias) != num_classes:
                raise ConfigError(
                    f"method.keep_head_bias=true needs backbone weights with a classifier of {num_classes} classes, "
                    f"but these have {len(bias)}. Set method.keep_head_bias=false"
                )
            self.head.bias = nn.Parameter(bias.clone())

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [B, C] of an image [B, 3, H, W]."""
        found = self.backbone.features(image, {})
        return self.classify(self._semantic(found.tokens, image), found.branch)

    def with_attention(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute semantic maps [B, C, h, w] and the attention map [B, h, w] from an image [B, 3, H, W]."""
        found = self.with_tokens(image)
        return found.semantic, found.attention

    def with_tokens(self, image: Tensor) -> CoupledMaps:
        """Compute what `with_attention` does, and the features from which it comes."""
        found = self.backbone.features(image, dict.fromkeys(range(self.backbone.depth), Read(token=0)))
        attention = torch.zeros(found.tokens.shape[:2], device=image.device)
        for scores in found.rows:
            attention = attention + scores.softmax(dim=-1).mean(dim=1)  # [B, h, 1 + N] → [B, 1 + N]
        attention = self.backbone.grid(attention, image)
        tokens = self.backbone.patches(found.tokens, image)
        return CoupledMaps(self._semantic(found.tokens, image), attention, tokens, found.branch)

    def classify(self, semantic: Tensor, branch: Tensor | None) -> Tensor:
        """Compute logits [B, C] of semantic maps [B, C, h, w], and of the backbone's second branch if there is one."""
        return class_logits(semantic, self.branch_head, branch)

    def _semantic(self, tokens: Tensor, image: Tensor) -> Tensor:
        semantic: Tensor = self.head(self.backbone.patches(self.backbone.norm(tokens), image))
        return semantic.float()


class TSCAM(WSOLModule):
    """TS-CAM in training and evaluation. `TSCAMNetwork` explains the arguments, and `postprocess` refines the maps."""

    network: TSCAMNetwork

    def __init__(
        self,
        backbone: Transformer,
        num_classes: int,
        head_init: Literal["default", "he"],
        keep_head_bias: bool,
        postprocess: SimilarityWalk | None,
        no_weight_decay: Sequence[str],
    ) -> None:
        network = TSCAMNetwork(backbone, num_classes, head_init, keep_head_bias)
        super().__init__(network, no_weight_decay)
        self.postprocess = postprocess

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [B, C] of a normalised image [B, 3, H, W]."""
        logits: Tensor = self.network(image)
        return logits

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy."""
        return {"loss": classification_loss(self(batch["image"]), batch)}

    @torch.no_grad()
    def localize(self, image: Tensor, classes: Classes = None) -> Localization:
        """Localize as `WSOLModule.localize` says, with one map per class."""
        semantic, attention, tokens, branch = self.network.with_tokens(image)
        logits = self.network.classify(semantic, branch)
        maps = couple(select_maps(semantic, choose_classes(classes, logits)), attention)
        return Localization(logits, maps if self.postprocess is None else self.postprocess(maps, tokens))
