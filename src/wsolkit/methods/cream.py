"""CREAM: class re-activation mapping (Xu et al., CVPR 2022).

A classifier is trained as for a CAM. Beside it, each class has two context embeddings, the mean features of its
foreground and of its background. With M_y the CAM of the label, scaled to [0, 1], and F the feature map:

    V_y^f ← λ V_y^f + (1 − λ) mean of F where M_y > δ,    V_y^b ← λ V_y^b + (1 − λ) mean of F elsewhere

There is no further loss. At inference, a mixture of two components divides the positions i of an image. It starts at
the embeddings of the class, and a few rounds of expectation maximisation refine it:

    E:  p_i^k = softmax over k of cos(F_i, V^k) / T,    k = foreground, background
    M:  V^k = Σ_i p_i^k F_i / Σ_i p_i^k

The map is p^f after a last E-step. It is calibrated: if the CAM is lower inside the foreground than outside, the map is
1 − p^f.

The authors released only the box regressor that they train on such maps. The course of the method and its constants δ,
λ and the number of rounds are from the paper, from memory, and have not been compared with it. These points are chosen
here: the cosine and its temperature T, the means weighted by p in the calibration, that the first image of a class
replaces the embeddings, and that a class without any starts at the means of the image itself. The regressor is not part
of this file.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.cam import CAMModule, CAMNetwork, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.maps import choose_classes
from wsolkit.methods.memory import move_memory
from wsolkit.methods.processes import gathered
from wsolkit.types import Classes, Localization, TrainingBatch


def context_means(feature: Tensor, cam: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Average a feature map over foreground and background.

    Args:
        feature: F [B, D, H, W].
        cam: the CAMs of K classes [B, K, H, W].
        threshold: δ, for the CAM scaled to [0, 1].

    Returns:
        means [B, K, 2, D] of foreground and background, and the number of positions of each [B, K, 2].
    """
    with torch.autocast(feature.device.type, enabled=False):
        inside = (min_max(cam.float()) > threshold).float().flatten(2)  # [B, K, H, W] → [B, K, N]
        regions = torch.stack([inside, 1 - inside], dim=2)  # [B, K, 2, N]
        counts = regions.sum(dim=3)
        means = regions @ feature.float().flatten(2).mT[:, None]  # [B, K, 2, N]·[B, 1, N, D] → [B, K, 2, D]
        return means / counts.clamp(min=1)[..., None], counts


def reactivate(feature: Tensor, foreground: Tensor, background: Tensor, rounds: int, temperature: float) -> Tensor:
    """Divide the positions of images between foreground and background by expectation maximisation.

    Args:
        feature: F [B, D, H, W].
        foreground, background: where V^f and V^b start for each of K classes, [B, K, D].
        rounds: the number of M-steps. With 0, the embeddings stay as they are.
        temperature: T.

    Returns:
        p^f [B, K, H, W] in [0, 1].
    """
    with torch.autocast(feature.device.type, enabled=False):
        values = feature.float().flatten(2)  # [B, D, H, W] → [B, D, N]
        unit = F.normalize(values, dim=1)

        def expect(foreground: Tensor, background: Tensor) -> Tensor:
            closer = F.normalize(foreground, dim=2) @ unit - F.normalize(background, dim=2) @ unit  # [B, K, N]
            return (closer / temperature).sigmoid()  # the softmax over two components

        def mean(shares: Tensor) -> Tensor:
            # It is never 0/0 because no share is 0, unless it is too small for float32.
            return shares @ values.mT / shares.sum(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

        shares = expect(foreground, background)
        for _ in range(rounds):
            shares = expect(mean(shares), mean(1 - shares))
        return shares.reshape(*shares.shape[:2], *feature.shape[-2:])


def calibrate(maps: Tensor, cam: Tensor) -> Tensor:
    """Turn maps p [B, K, H, W] into 1 − p where the CAM [B, K, H, W] is lower inside them than outside.

    Inside and outside are the means of the CAM weighted by p and by 1 − p.
    """
    outside = 1 - maps
    tiny = torch.finfo(torch.float32).tiny

    def mean(weights: Tensor) -> Tensor:
        return (weights * cam).sum(dim=(2, 3), keepdim=True) / weights.sum(dim=(2, 3), keepdim=True).clamp(min=tiny)

    return torch.where(mean(maps) < mean(outside), outside, maps)


class CREAMNetwork(CAMNetwork):
    """A CAM network with context embeddings.

    Args:
        cam: the arguments of `CAMNetwork`.
        threshold, momentum: δ and λ.
        rounds, temperature: see `reactivate`.

    Attributes:
        context: V^f and V^b of each class [C, 2, D].
        visits: the number of images of each class that moved them [C].
    """

    context: Tensor
    visits: Tensor

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        *cam: Any,
        threshold: float,
        momentum: float,
        rounds: int,
        temperature: float,
    ) -> None:
        super().__init__(backbone, num_classes, *cam)
        self.threshold, self.momentum = threshold, momentum
        self.rounds, self.temperature = rounds, temperature
        self.register_buffer("context", torch.zeros(num_classes, 2, self.classifier.in_channels))
        self.register_buffer("visits", torch.zeros(num_classes))

    @torch.no_grad()
    def remember(self, feature: Tensor, label: Tensor) -> None:
        """Move the context embeddings of the labels, with the images of all processes.

        Args:
            feature: F [B, D, h, w].
            label: [B].
        """
        cam = self.class_maps(feature, label[:, None])
        means, counts = (found[:, 0] for found in context_means(feature, cam, self.threshold))
        means = torch.where(counts[:, :, None] > 0, means, self.context[label])  # A constant CAM has no foreground.
        rows, values = gathered(label), gathered(means)
        context, visits = move_memory(
            self.context.flatten(1),
            self.visits,
            rows,
            values.flatten(1),
            lambda visits: torch.where(visits == 0, 1.0, 1 - self.momentum),
        )
        self.context.copy_(context.view_as(self.context))
        self.visits.copy_(visits)

    @torch.no_grad()
    def localize(self, image: Tensor, classes: Classes) -> Localization:
        """Localize as `WSOLModule.localize` says, with one map per class."""
        feature, stages = self.features_and_stages(image)
        logits = self.logits(feature)
        chosen = choose_classes(classes, logits)
        cam = self.class_maps(feature, chosen)
        context, visits = (self.context, self.visits) if chosen is None else (self.context[chosen], self.visits[chosen])
        starts = torch.where(visits[..., None, None] > 0, context, context_means(feature, cam, self.threshold)[0])
        foreground, background = starts.unbind(dim=2)  # [B, K, 2, D] → two of [B, K, D]
        maps = calibrate(reactivate(feature, foreground, background, self.rounds, self.temperature), cam)
        return Localization(logits, self.refined(maps, image, feature, stages, chosen))


class CREAM(CAMModule):
    """CREAM in training and evaluation.

    Args:
        foreground_threshold: δ.
        momentum: λ.
        rounds, temperature: see `reactivate`.
        head: see `HeadSettings`.

    Raises:
        ConfigError: a setting is out of its range.
    """

    network: CREAMNetwork

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        foreground_threshold: float,
        momentum: float,
        rounds: int,
        temperature: float,
        **head: Unpack[HeadSettings],
    ) -> None:
        if not 0 <= foreground_threshold < 1 or not 0 <= momentum <= 1 or rounds < 0 or not temperature > 0:
            raise ConfigError(
                f"method: foreground_threshold={foreground_threshold}, momentum={momentum}, rounds={rounds} and "
                f"temperature={temperature}: expected 0 to 1 for the first two, 0 rounds or more, and a temperature "
                "above 0"
            )
        network = functools.partial(
            CREAMNetwork,
            threshold=foreground_threshold,
            momentum=momentum,
            rounds=rounds,
            temperature=temperature,
        )
        super().__init__(backbone, num_classes, "average_first", head, network)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy. Training moves the context embeddings."""
        feature = self.network.features(batch["image"])
        if self.training:
            self.network.remember(feature, batch["label"])
        return {"loss": classification_loss(self.network.logits(feature), batch)}
