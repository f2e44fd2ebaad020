"""SAT: spatial-aware token (Wu et al., ICCV 2023).

A learnable spatial token with its own position embedding is appended to the token sequence. In block l, s = q kᵀ /
sqrt(d) are the scaled scores before softmax. The row of the spatial token gives every token a probability that it
belongs to the object: mask^l = sigmoid(mean over heads of s[spatial token]) (Eqn. 3). In the spatial blocks, attention
becomes softmax(s) ⊙ mask^l. This weighs columns and does not renormalise rows (Eqn. 4). The localization map M is the
mean of mask^l over the spatial blocks, at the patches (Eqn. 6). It is class-agnostic.

Weighing the columns of the attention matrix by a mask equals weighing the rows of v: softmax(s)(mask ⊙ v). The fused
attention kernel can therefore be used, and no N×N matrix is stored.

Loss = cross-entropy + batch area loss |mean over the batch of M − λ| (Eqn. 7) + normalization loss, the mean of
M*(1 − M*), where M* is M smoothed by a 3×3 filter (Eqn. 8).

Table 6 has SAT on a Conformer, and neither the paper nor released code says how. Chosen here: the spatial token follows
the patches, and takes the same part as the class token in every exchange with the convolutional branch. The logits
include those of that branch's classifier, as in TS-CAM.

The released code differs from the paper in two points:
- The paper's filter is "a Gaussian with standard deviation 6". The released kernel is far narrower, with 0.805 at its
  centre. `filter="released"` is that kernel, and `filter="gaussian"` follows the paper with `filter_sigma`.
- "The batch" in the area loss is the global batch here. Under DDP, the released code takes the batch of each device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from wsolkit.backbones.transformer import Read, Transformer
from wsolkit.errors import ConfigError
from wsolkit.methods.base import Network, WSOLModule
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.map_losses import (
    Filter,
    batch_area_loss,
    global_mean,
    image_area_loss,
    normalization_loss,
    smoothing_kernel,
)
from wsolkit.methods.maps import choose_classes, class_logits, semantic_head
from wsolkit.methods.similarity import SimilarityWalk
from wsolkit.types import Classes, Localization, TrainingBatch

__all__ = [
    "SAT",
    "SATNetwork",
    "batch_area_loss",
    "global_mean",
    "image_area_loss",
    "mask_probabilities",
    "normalization_loss",
    "smoothing_kernel",
    "spatial_blocks",
]

# The published ablations with fewer than three spatial blocks put them where three would start (Table 9).
_PAPER_BLOCKS = 3


def spatial_blocks(depth: int, num_blocks: int) -> range:
    """Return the indices of the spatial blocks: the last `num_blocks`, or fewer than 3 from the last 3 (Table 9).

    Counted from 1 as in the paper, the spatial blocks of 12 are 10; 10 and 11; 10 to 12; 9 to 12; …

    Raises:
        ConfigError: `num_blocks` is not in 1 … depth.
    """
    if not 1 <= num_blocks <= depth:
        raise ConfigError(f"method.num_blocks={num_blocks}: expected 1 to {depth}, the number of transformer blocks")
    start = max(depth - max(num_blocks, _PAPER_BLOCKS), 0)
    return range(start, start + num_blocks)


class SATNetwork(Network):
    """A backbone with a spatial token and a head.

    Args:
        backbone: a vision transformer or a Conformer.
        num_classes: the number of classes.
        num_blocks: the number of spatial blocks, see `spatial_blocks`.
        mask_position: whether the mask weighs attention "after" softmax (the method) or scores "before" it (Table 10).
        token_init: whether the spatial token starts "random", as a copy of the "class" token, or "shared" with it
            (Table 11).
        head_init: see `semantic_head`.
    """

    passes = ("with_tokens",)

    def __init__(
        self,
        backbone: Transformer,
        num_classes: int,
        num_blocks: int,
        mask_position: Literal["after", "before"],
        token_init: Literal["random", "class", "shared"],
        head_init: Literal["default", "he"],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.spatial = spatial_blocks(backbone.depth, num_blocks)
        self.mask_position = mask_position
        class_token = backbone.class_token
        self.spatial_token = class_token if token_init == "shared" else nn.Parameter(torch.zeros_like(class_token))
        self.spatial_embed = nn.Parameter(torch.zeros_like(class_token))
        nn.init.trunc_normal_(self.spatial_embed, std=0.02)
        if token_init == "random":
            nn.init.trunc_normal_(self.spatial_token, std=0.02)
        elif token_init == "class":
            self.spatial_token.data.copy_(class_token.data)
        self.head = semantic_head(backbone.embed_dim, num_classes, head_init)
        self.branch_head = backbone.branch_classifier(num_classes)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits [B, C] and the localization map [B, h, w] in [0, 1], float32, from an image [B, 3, H, W]."""
        return self.with_tokens(image)[:2]

    def with_tokens(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what `forward` does, and the patch tokens [B, D, h, w] before the final LayerNorm."""
        reads = dict.fromkeys(self.spatial, Read(token=-1, gate=self._gate))
        found = self.backbone.features(image, reads, extra=self.spatial_token + self.spatial_embed)
        semantic = self.head(self.backbone.patches(self.backbone.norm(found.tokens), image))
        logits = class_logits(semantic, self.branch_head, found.branch)
        masks = [mask_probabilities(scores) for scores in found.rows]
        maps = self.backbone.grid(torch.stack(masks).mean(dim=0), image)
        return logits, maps, self.backbone.patches(found.tokens, image)

    def _gate(self, scores: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = mask_probabilities(scores)[:, None, :, None].to(value.dtype)  # [B, N + 2] → [B, 1, N + 2, 1]
        if self.mask_position == "before":
            return query, key * mask, value
        return query, key, value * mask


def mask_probabilities(scores: Tensor) -> Tensor:
    """Turn scores [B, h, N + 2] of the spatial token into probabilities [B, N + 2] to be on the object (Eqn. 3)."""
    return scores.mean(dim=1).sigmoid()


class SAT(WSOLModule):
    """SAT in training and evaluation. `SATNetwork` explains the arguments that are not named here.

    Args:
        area_prior: λ of the area loss.
        area_level: whether the area loss takes the "batch" (the method) or each "image" (Table 13).
        area_weight, norm_weight: the factors of the two spatial losses. 0 leaves a term out (Table 2).
        filter, filter_sigma: see `smoothing_kernel`.
        postprocess: refines the maps, or None.
    """

    network: SATNetwork
    maps_are_probabilities = True
    kernel: Tensor

    def __init__(
        self,
        backbone: Transformer,
        num_classes: int,
        num_blocks: int,
        mask_position: Literal["after", "before"],
        token_init: Literal["random", "class", "shared"],
        head_init: Literal["default", "he"],
        area_prior: float,
        area_level: Literal["batch", "image"],
        area_weight: float,
        norm_weight: float,
        filter: Filter,
        filter_sigma: float,
        postprocess: SimilarityWalk | None,
        no_weight_decay: Sequence[str],
    ) -> None:
        if not 0 < area_prior < 1:
            raise ConfigError(f"method.area_prior={area_prior}: expected a share of the image between 0 and 1")
        network = SATNetwork(backbone, num_classes, num_blocks, mask_position, token_init, head_init)
        super().__init__(network, no_weight_decay)
        self.num_blocks = num_blocks
        self.area_prior = area_prior
        self.area_level = area_level
        self.area_weight = area_weight
        self.norm_weight = norm_weight
        self.postprocess = postprocess
        self.register_buffer("kernel", smoothing_kernel(filter, filter_sigma), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [B, C] of a normalised image [B, 3, H, W]."""
        logits: Tensor = self.network(image)[0]
        return logits

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return cross-entropy, area and normalization loss. "map_area" is the mean of the maps, to watch against λ."""
        logits, maps = self.network(batch["image"])
        classification = classification_loss(logits, batch)
        area_loss = batch_area_loss if self.area_level == "batch" else image_area_loss
        area = area_loss(maps, self.area_prior)
        with torch.autocast(maps.device.type, enabled=False):  # In half precision, M*(1 − M*) would drown in rounding.
            normalization = normalization_loss(maps, self.kernel)
        total = classification + self.area_weight * area + self.norm_weight * normalization
        return {
            "loss": total,
            "loss_cls": classification,
            "loss_area": area,
            "loss_norm": normalization,
            "map_area": maps.mean(),
            "area_prior": maps.new_full((), self.area_prior),
        }

    @torch.no_grad()
    def localize(self, image: Tensor, classes: Classes = None) -> Localization:
        """Localize as `WSOLModule.localize` says. Every class has the same map."""
        logits, mask, tokens = self.network.with_tokens(image)
        maps = mask[:, None]
        if self.postprocess is not None:
            maps = self.postprocess(maps, tokens)
        chosen = choose_classes(classes, logits)
        return Localization(logits, maps.expand(-1, 1 if chosen is None else chosen.shape[1], -1, -1))
