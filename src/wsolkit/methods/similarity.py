"""A random walk over the similarity of patches, which refines the maps of methods on vision transformers.

Patch tokens that show the same thing are alike. The walk moves the score of each patch towards the scores of the
patches that are like it:

    A_ij = softmax over j of cos(F_i − F̄, F_j − F̄) / T,    M ← A M, several times

F̄ is the mean of the image's patch tokens. Without subtracting it, all patches would be alike. The walk was chosen here;
related methods refine CAMs with random walks over learned affinities (AffinityNet, Ahn & Kwak, CVPR 2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolkit.backbones.tokens import TokenBackbone
from wsolkit.backbones.transformer import Transformer
from wsolkit.errors import ConfigError


def similarity_walk(maps: Tensor, feature: Tensor, temperature: float, steps: int) -> Tensor:
    """Walk over the similarity of patches.

    The walk needs memory for a matrix [N, N] of each image, N = H·W.

    Args:
        maps: score maps [B, K, H, W].
        feature: patch tokens [B, D, H, W].
        temperature: T. A small one only follows the most similar patches.
        steps: the number of steps.

    Returns:
        maps [B, K, H, W], float32, within the range of the old ones.

    >>> import torch
    >>> from wsolkit.methods.similarity import similarity_walk
    >>> maps = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
    >>> feature = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 1.0]]]])  # two patches of each kind
    >>> similarity_walk(maps, feature, temperature=0.1, steps=1)
    tensor([[[[0.5000, 0.5000, 0.0000, 0.0000]]]])
    """
    with torch.autocast(maps.device.type, enabled=False):
        tokens = feature.float().flatten(2)  # [B, D, H, W] → [B, D, N]
        tokens = F.normalize(tokens - tokens.mean(dim=2, keepdim=True), dim=1)
        affinity = (tokens.mT @ tokens / temperature).softmax(dim=2)  # [B, N, D]·[B, D, N] → [B, N, N]
        walked = maps.float().flatten(2).mT  # [B, K, H, W] → [B, N, K]
        for _ in range(steps):
            walked = affinity @ walked
        return walked.mT.reshape(maps.shape)


@dataclass(frozen=True)
class SimilarityWalk:
    """`similarity_walk` as a post-process.

    Args:
        temperature, steps: see `similarity_walk`.

    Raises:
        ConfigError: they are out of range.
    """

    networks: ClassVar[str] = "vision transformers"
    backbones: ClassVar[tuple[type[nn.Module], ...]] = (Transformer, TokenBackbone)

    temperature: float
    steps: int

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.steps < 1:
            raise ConfigError(
                f"postprocess: temperature={self.temperature} and steps={self.steps}: expected a temperature above 0, "
                "and one step or more"
            )

    @torch.no_grad()
    def __call__(self, maps: Tensor, feature: Tensor) -> Tensor:
        """Refine score maps [B, K, h, w] with patch tokens [B, D, h, w]."""
        return similarity_walk(maps, feature, self.temperature, self.steps)
