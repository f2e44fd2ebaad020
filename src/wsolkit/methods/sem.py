"""SEM: self-enhancement maps (Zhang et al., arXiv 2006.05220), a post-process for the CAM of any CNN.

The positions at which a CAM is highest are surely object. SEM takes K of them as seeds, and gives each position the
cosine similarity to the seed that it is most like:

    SEM_i = max over the seeds s of cos(F_i, F_s),    min-max over space

F is the last feature map before the classifier. Nothing is trained.

The released code takes 60 seeds on maps of 28×28 positions, and runs on images of their own size. Here, the number of
seeds scales with the number of positions, so that other maps have the same share of seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.cam import HEAD


def self_enhancement(feature: Tensor, cam: Tensor, seeds: int) -> Tensor:
    """Compute self-enhancement maps.

    Args:
        feature: the last feature map [B, D, H, W].
        cam: class activation maps [B, H, W], or [B, K, H, W] for K maps of an image.
        seeds: the number of highest positions, at most H·W of which are taken.

    Returns:
        maps in [0, 1], shaped as `cam`.

    >>> import torch
    >>> from wsolkit.methods.sem import self_enhancement
    >>> feature = torch.tensor([[[[1.0, 2.0, 0.0]], [[0.0, 0.0, 1.0]]]])  # the first two positions are alike
    >>> self_enhancement(feature, torch.tensor([[[1.0, 0.2, 0.0]]]), seeds=1)
    tensor([[[1., 1., 0.]]])
    """
    unit = F.normalize(feature.float().flatten(2), dim=1, eps=1e-8)  # [B, D, H, W] → [B, D, N]
    flat = cam.float().reshape(cam.shape[0], -1, unit.shape[2])  # [B, K, N]
    places = flat.topk(min(int(seeds), flat.shape[2]), dim=2).indices  # [B, K, S]
    index = places.flatten(1)[:, None].expand(-1, unit.shape[1], -1)  # [B, D, K·S]
    similarity = unit.mT @ unit.gather(2, index)  # [B, N, D]·[B, D, K·S] → [B, N, K·S]
    closest = similarity.unflatten(2, (flat.shape[1], -1)).amax(dim=3).mT  # [B, K, N]
    return min_max(closest.reshape(cam.shape))


@dataclass(frozen=True)
class SelfEnhancement:
    """SEM as a post-process.

    Args:
        seeds: the number of seeds on a map of `positions` positions. Other maps have the same share of seeds, and at
            least one.
        positions: the number of positions that `seeds` refers to.

    Raises:
        ConfigError: a number is below 1.
    """

    networks: ClassVar[str] = "convolutional networks"
    backbones: ClassVar[tuple[type[nn.Module], ...]] = (CNN,)
    stages: ClassVar[Sequence[str]] = (HEAD,)
    sees_network: ClassVar[bool] = False

    seeds: int
    positions: int

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.positions < 1:
            raise ConfigError(
                f"postprocess: seeds={self.seeds} and positions={self.positions}: expected 1 or more of each, for "
                "example 60 of 784"
            )

    @torch.no_grad()
    def __call__(self, maps: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Refine score maps [B, K, h, w] with the feature map [B, D, h', w'] that is classified, to maps in [0, 1]."""
        count = maps.shape[-2] * maps.shape[-1]
        feature = features[0]
        if feature.shape[-2:] != maps.shape[-2:]:  # BAS has finer maps.
            feature = F.interpolate(feature, size=maps.shape[-2:], mode="bilinear", align_corners=False)
        return self_enhancement(feature, maps, max(1, round(self.seeds * count / self.positions)))
