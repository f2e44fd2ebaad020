"""LCTR: local continuity of a transformer, for localization (Chen et al., AAAI 2022).

a^l [N + 1, N + 1] is the softmax attention of block l, averaged over the heads. The class token has its first row. X
[B, D, H, W] are the patch tokens of the last block after the final LayerNorm.

The relational patch attention follows the class token's attention one step further. In each block, the tokens that the
class token looks at vote for the patches that they look at themselves, and the map is the mean over the L blocks:

    A_j = 1/L Σ_l 1/(N + 1) Σ_i a^l[class, i] · a^l[i, j]

The cue digging module looks where the class token does not. u is large there, and chooses a mixture of four kernels:

    u = 1 − 1/L Σ_l a^l[class, patches],    g = Conv 3×3 (X · u)
    w = sigmoid(Linear(GAP(g)) + Linear(GMP(g))) ∈ R⁴,    S = Σ_k w_k Conv_k 3×3 (X) + bias

GAP and GMP are the spatial mean and maximum. The logits are the spatial mean of S after a 3×3 average with padding,
whose zeros count. The score map of class c is A · ReLU(S_c).

Σ_i a[class, i] · a[i, j] is a row times a matrix. The matrix of one head of one block is made, used and dropped at a
time, and only where maps are wanted. Training needs the class token's rows alone, and leaves the rest to the fused
kernel. S is one convolution over the four copies w_k X. It equals the mixture of kernels, and needs no kernel for each
image.

This code differs from the released code in two points:
- The released map of an image is that of its top-1 class. Here every class may be asked for.
- An exponential moving average of the weights, repeated augmentation, RandAugment and random erasing are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolkit.backbones.transformer import Features, Gate, Read
from wsolkit.backbones.vit import ViT
from wsolkit.methods.base import Network, WSOLModule
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.maps import choose_classes, select_maps
from wsolkit.methods.similarity import SimilarityWalk
from wsolkit.types import Classes, Localization, TrainingBatch


def follow_attention(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Multiply a row by an attention matrix that is averaged over heads, and divide by the number of tokens.

    Args:
        weights: the row [B, N], for example the class token's attention.
        query, key: of the block, [B, h, N, d].

    Returns:
        Σ_i weights_i · a_ij / N, [B, N], float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        rows = weights.float()[:, None]
        followed = torch.zeros_like(rows)
        for own_query, own_key in zip(query.unbind(1), key.unbind(1), strict=True):
            scores = own_query.float() @ own_key.float().mT * query.shape[-1] ** -0.5  # [B, N, d]·[B, d, N] → [B, N, N]
            followed = followed + rows @ scores.softmax(dim=-1)
        return followed[:, 0] / (query.shape[1] * query.shape[2])


def smoothed_logits(semantic: Tensor) -> Tensor:
    """Compute logits [B, C]: the spatial mean of semantic maps [B, C, H, W] after a 3×3 average that counts padding."""
    return F.avg_pool2d(semantic, kernel_size=3, stride=1, padding=1).mean(dim=(2, 3))


class DynamicClassifier(nn.Module):
    """A 3×3 convolution into semantic maps whose kernel each image mixes from several.

    Args:
        embed_dim: D.
        num_classes: C.
        num_kernels: K.
    """

    def __init__(self, embed_dim: int, num_classes: int, num_kernels: int) -> None:
        super().__init__()
        kernels = [nn.Conv2d(embed_dim, num_classes, kernel_size=3) for _ in range(num_kernels)]
        self.weight = nn.Parameter(torch.stack([kernel.weight.detach() for kernel in kernels]))  # [K, C, D, 3, 3]
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.mean_route = nn.Linear(embed_dim, num_kernels)
        self.maximum_route = nn.Linear(embed_dim, num_kernels)

    def route(self, context: Tensor) -> Tensor:
        """Compute the shares [B, K] of the kernels, each in [0, 1], from features [B, D, H, W]."""
        mixture: Tensor = self.mean_route(context.mean(dim=(2, 3))) + self.maximum_route(context.amax(dim=(2, 3)))
        return mixture.sigmoid()

    def forward(self, feature: Tensor, shares: Tensor) -> Tensor:
        """Compute semantic maps [B, C, H, W] from features [B, D, H, W] and shares [B, K]."""
        weighted = shares.to(feature.dtype)[:, :, None, None, None] * feature[:, None]  # [B, K, D, H, W]
        kernels = self.weight.transpose(0, 1).flatten(1, 2)  # [K, C, D, 3, 3] → [C, K·D, 3, 3]
        return F.conv2d(weighted.flatten(1, 2), kernels, self.bias, padding=1)


class LCTRNetwork(Network):
    """A backbone with the cue digging module.

    Args:
        backbone: a vision transformer.
        num_classes: the number of classes.
        num_kernels: the number of kernels that each image mixes.
    """

    passes = ("forward", "with_maps")

    def __init__(self, backbone: ViT, num_classes: int, num_kernels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.context = nn.Conv2d(backbone.embed_dim, backbone.embed_dim, kernel_size=3, padding=1)
        self.classifier = DynamicClassifier(backbone.embed_dim, num_classes, num_kernels)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [B, C] of an image [B, 3, H, W]."""
        return smoothed_logits(self._semantic(self._features(image, None), image))

    def with_maps(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute semantic maps [B, C, h, w], the attention map A [B, h, w] and patch tokens [B, D, h, w]."""
        followed: list[Tensor] = []

        def follow(row: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            followed.append(follow_attention(head_mean(row), query, key))
            return query, key, value

        found = self._features(image, follow)
        attention = self.backbone.grid(torch.stack(followed).mean(dim=0), image)
        return self._semantic(found, image), attention, self.backbone.patches(found.tokens, image)

    def _features(self, image: Tensor, gate: Gate | None) -> Features:
        return self.backbone.features(image, dict.fromkeys(range(self.backbone.depth), Read(token=0, gate=gate)))

    def _semantic(self, found: Features, image: Tensor) -> Tensor:
        row = torch.stack([head_mean(scores) for scores in found.rows]).mean(dim=0)
        unseen = 1 - self.backbone.grid(row, image)[:, None]  # u, [B, 1, h, w]
        feature = self.backbone.patches(self.backbone.norm(found.tokens), image)
        shares = self.classifier.route(self.context(feature * unseen))
        semantic: Tensor = self.classifier(feature, shares)
        return semantic.float()


def head_mean(scores: Tensor) -> Tensor:
    """Turn a row of scores [B, h, N] into attention, averaged over the heads, [B, N]."""
    return scores.softmax(dim=-1).mean(dim=1)


class LCTR(WSOLModule):
    """LCTR in training and evaluation. `LCTRNetwork` explains the arguments, and `postprocess` refines the maps."""

    network: LCTRNetwork

    def __init__(
        self,
        backbone: ViT,
        num_classes: int,
        num_kernels: int,
        postprocess: SimilarityWalk | None,
        no_weight_decay: Sequence[str],
    ) -> None:
        super().__init__(LCTRNetwork(backbone, num_classes, num_kernels), no_weight_decay)
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
        semantic, attention, tokens = self.network.with_maps(image)
        logits = smoothed_logits(semantic)
        maps = attention[:, None] * select_maps(semantic, choose_classes(classes, logits)).relu()
        return Localization(logits, maps if self.postprocess is None else self.postprocess(maps, tokens))
