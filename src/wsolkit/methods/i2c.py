"""I²C: inter-image communication (Zhang et al., ECCV 2020).

Training batches hold pairs of images of one class. Each image has a few seeds, which are positions where the class map
of its label, scaled to [0, 1], exceeds 0.7. With F the feature map that the head classifies, two losses bring the seeds
of a class together:

    L_local  = mean over pairs and seeds k of ‖F_i(s_ik) − F_j(s_jk)‖
    L_global = mean over pairs of ‖μ_y − v‖,    v = mean of F over the seeds of both images
    loss = CE + λ_l L_local + λ_g L_global

A bank holds a centre μ_c for each class. After each batch, it moves to the centres of the pairs:

    μ_y ← (1 − w) μ_y + w v,    w = exp(−0.002 t_y)

t_y counts the pairs of the class so far, so the first one replaces what the bank started with, which is random. The
network is branch A of ACoL: a 3×3 average of the backbone's map, dropout, 3×3 convolutions, and class maps. F is the
averaged map.

What differs from the released code:
- It draws 40 classes for a batch, and two images of each. Here an epoch shows each image, see `pairs_of_classes`. If
  pairs of one batch have the same class, the bank moves to one after the other.
- It draws a random permutation of the seeds, and does not use it. As there, the first seeds in row order are taken, and
  taken again from the start if there are too few. Its rule for fewer than 30 seeds does nothing.
- Under DDP, the bank moves to the centres of all processes.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.cam import CAMModule, CAMNetwork, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.memory import move_memory
from wsolkit.methods.processes import gathered
from wsolkit.types import TrainingBatch


def object_seeds(maps: Tensor, label: Tensor, count: int, threshold: float = 0.7) -> Tensor:
    """Return the positions of the first seeds of each image in row order.

    Args:
        maps: class maps [B, C, H, W].
        label: [B].
        count: the number of seeds. If fewer positions exceed the threshold, they are taken again from the start.
        threshold: for the map of the label, scaled to [0, 1].

    Returns:
        positions row · W + column, int64 [B, count]. A constant map has no seeds, and gives its first positions.
    """
    of_label = maps.detach()[torch.arange(len(label), device=maps.device), label]  # [B, C, H, W] → [B, H, W]
    exceeds = (min_max(of_label.float()) > threshold).flatten(1)
    first = (~exceeds).to(torch.uint8).argsort(dim=1, stable=True)  # the seeds in row order, and then all others
    found = exceeds.sum(dim=1, keepdim=True)
    found = torch.where(found == 0, exceeds.shape[1], found)
    return first.gather(1, torch.arange(count, device=maps.device) % found)


def _at(feature: Tensor, positions: Tensor) -> Tensor:
    """Return the vectors [B, n, D] of a feature map [B, D, H, W] at positions [B, n], in float32."""
    flat = feature.float().flatten(2)  # [B, D, H, W] → [B, D, N]
    return flat.gather(2, positions[:, None].expand(-1, flat.shape[1], -1)).mT


def local_loss(feature: Tensor, positions: Tensor) -> Tensor:
    """Compute L_local as a scalar.

    Args:
        feature: F [B, D, H, W], where the images 2k and 2k + 1 are a pair.
        positions: the seeds [B, n].
    """
    with torch.autocast(feature.device.type, enabled=False):
        vectors = _at(feature, positions)
        return F.pairwise_distance(vectors[0::2], vectors[1::2]).mean()


def class_centres(feature: Tensor, positions: Tensor) -> Tensor:
    """Return the centres v [B/2, D] of the pairs, for F [B, D, H, W] and seeds [B, n]."""
    vectors = _at(feature, positions).mean(dim=1)  # [B, n, D] → [B, D]
    return (vectors[0::2] + vectors[1::2]) / 2


def global_loss(bank: Tensor, label: Tensor, centres: Tensor) -> Tensor:
    """Compute L_global as a scalar.

    Args:
        bank: the centres μ [C, D], before their update.
        label: [B], the same for both images of a pair.
        centres: v [B/2, D].
    """
    with torch.autocast(centres.device.type, enabled=False):
        return F.pairwise_distance(bank[label[0::2]], centres.float()).mean()


def update_bank(
    bank: Tensor, visits: Tensor, label: Tensor, centres: Tensor, decay: float = 0.002
) -> tuple[Tensor, Tensor]:
    """Move the centres of classes to those of pairs, one pair after the other.

    Args:
        bank: μ [C, D].
        visits: t [C], the number of pairs of each class so far.
        label: [B], the same for both images of a pair.
        centres: v [B/2, D].
        decay: the factor in w = exp(−decay · t).

    Returns:
        the new bank and visits. What was given stays.
    """
    return move_memory(bank, visits, label[0::2], centres, lambda visits: torch.exp(-decay * visits))


class I2CNetwork(CAMNetwork):
    """A CAM network with a 3×3 average of the backbone's map, and dropout before each convolution of its head.

    Args:
        cam: the arguments of `CAMNetwork`.
        dropout: the probability of dropout.

    Attributes:
        bank, visits: the centre of each class [C, D], and the number of its pairs so far [C].
    """

    bank: Tensor
    visits: Tensor
    passes: ClassVar[tuple[str, ...]] = ("features", "features_and_stages", "averaged_and_features")

    def __init__(self, backbone: CNN, num_classes: int, *cam: Any, dropout: float) -> None:
        super().__init__(backbone, num_classes, *cam)
        layers: list[nn.Module] = []
        for layer in self.head:
            layers += [nn.Dropout(dropout), layer] if isinstance(layer, nn.Conv2d) else [layer]
        self.head = nn.Sequential(*layers)
        self.register_buffer("bank", torch.randn(num_classes, backbone.channels))
        self.register_buffer("visits", torch.zeros(num_classes))

    def classified(self, last: Tensor) -> Tensor:
        """Compute the map [B, D', h, w] that is classified, from the backbone's last map [B, D, h, w]."""
        return super().classified(_averaged(last))

    def averaged_and_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the averaged map of the backbone [B, D, h, w], and the map that is classified [B, D', h, w]."""
        averaged = _averaged(self.backbone(image))
        return averaged, self.head(averaged)


def _averaged(last: Tensor) -> Tensor:
    return F.avg_pool2d(last, kernel_size=3, stride=1, padding=1)


class I2C(CAMModule):
    """I²C in training and evaluation.

    Args:
        local_weight, global_weight: λ_l and λ_g.
        seeds, seed_threshold: see `object_seeds`.
        bank_decay: see `update_bank`.
        dropout: see `I2CNetwork`.
        head: see `HeadSettings`. The network makes class maps first and then averages them.

    Raises:
        ConfigError: there are no seeds, or the dropout is not a probability.
    """

    network: I2CNetwork
    pairs: ClassVar[bool] = True

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        local_weight: float,
        global_weight: float,
        seeds: int,
        seed_threshold: float,
        bank_decay: float,
        dropout: float,
        **head: Unpack[HeadSettings],
    ) -> None:
        if seeds < 1 or not 0 <= dropout <= 1:
            raise ConfigError(
                f"method.seeds={seeds} and method.dropout={dropout}: expected one seed or more, and a probability"
            )
        super().__init__(backbone, num_classes, "maps_first", head, functools.partial(I2CNetwork, dropout=dropout))
        self.local_weight = local_weight
        self.global_weight = global_weight
        self.seeds = seeds
        self.seed_threshold = seed_threshold
        self.bank_decay = bank_decay

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy and the unweighted `loss_local` and `loss_global`. Training moves the bank."""
        network, label = self.network, batch["label"]
        averaged, feature = network.averaged_and_features(batch["image"])
        maps = network.class_maps(feature)
        positions = object_seeds(maps, label, self.seeds, self.seed_threshold)
        centres = class_centres(averaged, positions)
        losses = {
            "loss_cls": classification_loss(maps.mean(dim=(2, 3)), batch),
            "loss_local": local_loss(averaged, positions),
            "loss_global": global_loss(network.bank, label, centres),
        }
        if self.training:
            of_pairs = gathered(label[0::2]).repeat_interleave(2)
            bank, visits = update_bank(
                network.bank, network.visits, of_pairs, gathered(centres.detach()), self.bank_decay
            )
            network.bank.copy_(bank)
            network.visits.copy_(visits)
        total = losses["loss_cls"] + self.local_weight * losses["loss_local"]
        return {"loss": total + self.global_weight * losses["loss_global"], **losses}
