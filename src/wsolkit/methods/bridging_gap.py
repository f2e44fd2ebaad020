"""Bridging the gap between classification and localization (Kim et al., CVPR 2022).

A CAM factorises: w_c · F_u = ‖w_c‖ ‖F_u‖ cos(F_u, w_c). Classification only needs large products. A large norm may
therefore come with a wrong direction, and a small norm with a right one. Training aligns the two. With n = ‖F_u‖ scaled
to [0, 1] over space and s_c = cos(F_u, w_c), the losses are

    L_sim  = mean over images of [ mean s_y where n < τ_bg  −  mean s_y where n > τ_fg ]          (feature direction)
    L_norm = mean over images of [ mean n where s < 0       −  mean n where s > 0 ]               (feature norm)

In the released code, s in L_norm belongs to the true class on ILSVRC, and is the largest of all classes on CUB. Regions
are hard masks without a gradient. An empty region adds 0.

Attentive dropout makes the network see more than the most discriminative part. At an intermediate stage, it looks at
the positions whose channel mean exceeds γ times its spatial maximum, and sets each of them to 0 with a probability. The
last feature map should stay the same:

    L_drop = mean |F − F_erased|, with gradient through both

Both branches share the later stages. The cross-entropy uses the clean branch.

    L = CE + λ_drop L_drop, and after the warm-up epochs also + λ_sim L_sim + λ_norm L_norm

In its CAM, the paper averages w · F over the channels. This scale has no effect.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.methods.cam import CAMModule, HeadSettings, feature_norm
from wsolkit.methods.classification import classification_loss
from wsolkit.types import TrainingBatch

Similarity = Literal["target", "max"]


def alignment_losses(
    feature: Tensor,
    weight: Tensor,
    label: Tensor,
    foreground_threshold: float,
    background_threshold: float,
    similarity: Similarity = "target",
) -> tuple[Tensor, Tensor]:
    """Compute the losses L_sim and L_norm, which align the direction and the norm of features. Both are scalars.

    Args:
        feature: the feature map [B, D, H, W].
        weight: the classifier's weight [C, D].
        label: the true classes [B].
        foreground_threshold, background_threshold: τ_fg and τ_bg, for the norm scaled to [0, 1].
        similarity: the norm loss uses the similarity to the "target" class, or the "max" over all classes.

    >>> import torch
    >>> from wsolkit.methods.bridging_gap import alignment_losses
    >>> feature = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # long towards class 0, short towards 1
    >>> similarity, norm = alignment_losses(feature, torch.eye(2), torch.tensor([0]), 0.6, 0.3)
    >>> similarity.item(), norm.item()
    (-1.0, -1.0)
    """
    norm = feature_norm(feature)  # [B, H, W]
    unit, directions = F.normalize(feature.float(), dim=1), F.normalize(weight.float(), dim=1)
    target = torch.einsum("bdhw,bd->bhw", unit, directions[label])
    # Regions need no gradient.
    sign = (
        target
        if similarity == "target"
        else torch.einsum("bdhw,cd->bchw", unit.detach(), directions.detach()).amax(dim=1)
    )
    direction = _mean_where(target, norm < background_threshold) - _mean_where(target, norm > foreground_threshold)
    length = _mean_where(norm, sign < 0) - _mean_where(norm, sign > 0)
    return direction.mean(), length.mean()


def _mean_where(values: Tensor, region: Tensor) -> Tensor:
    """Compute the mean [B] of each map over a region [B, H, W], or 0 where the region is empty."""
    return (values * region).sum(dim=(1, 2)) / region.sum(dim=(1, 2)).clamp(min=1)


def attentive_dropout(feature: Tensor, threshold: float, probability: float) -> Tensor:
    """Set the most active positions of feature maps [B, D, H, W] to 0, each with a probability.

    Args:
        feature: the feature maps.
        threshold: γ. A position counts if its channel mean exceeds γ times the maximum over the image.
        probability: from 0 to 1.
    """
    activity = feature.mean(dim=1, keepdim=True)  # [B, D, H, W] → [B, 1, H, W]
    telling = activity > threshold * activity.amax(dim=(2, 3), keepdim=True)
    erased = telling & (torch.rand_like(activity, dtype=torch.float32) < probability)
    return feature.masked_fill(erased, 0)


class BridgingGap(CAMModule):
    """Bridging the gap, in training and evaluation.

    Args:
        warmup_epochs: the number of epochs before the alignment losses start.
        similarity_weight, norm_weight, drop_weight: λ_sim, λ_norm and λ_drop.
        foreground_threshold, background_threshold, similarity: see `alignment_losses`.
        drop_after: the stage of the backbone after which attentive dropout acts.
        drop_threshold, drop_probability: γ and p_drop, see `attentive_dropout`.
        head: see `HeadSettings`.

    Raises:
        ConfigError: the backbone does not have the stage, or the probability is not in [0, 1].
    """

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        warmup_epochs: int,
        similarity_weight: float,
        norm_weight: float,
        drop_weight: float,
        foreground_threshold: float,
        background_threshold: float,
        similarity: Similarity,
        drop_after: str,
        drop_threshold: float,
        drop_probability: float,
        **head: Unpack[HeadSettings],
    ) -> None:
        if not 0 <= drop_probability <= 1:
            raise ConfigError(f"method.drop_probability={drop_probability}: expected 0 to 1")
        backbone.places(drop_after)
        super().__init__(backbone, num_classes, "average_first", head)
        self.warmup_epochs = warmup_epochs
        self.similarity_weight = similarity_weight
        self.norm_weight = norm_weight
        self.drop_weight = drop_weight
        self.foreground_threshold = foreground_threshold
        self.background_threshold = background_threshold
        self.similarity: Similarity = similarity
        self.drop_after = drop_after
        self.erase = functools.partial(attentive_dropout, threshold=drop_threshold, probability=drop_probability)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return cross-entropy, L_drop and, after the warm-up, L_sim and L_norm. Only the total is weighted."""
        network, label = self.network, batch["label"]
        feature, (erased,) = network.features_and_changed(batch["image"], [self.drop_after], self.erase)
        losses = {
            "loss_cls": classification_loss(network.logits(feature), batch),
            "loss_drop": F.l1_loss(feature.float(), erased.float()),
        }
        total = losses["loss_cls"] + self.drop_weight * losses["loss_drop"]
        if self.current_epoch >= self.warmup_epochs:
            losses["loss_similarity"], losses["loss_norm"] = alignment_losses(
                feature,
                network.classifier.weight[:, :, 0, 0],
                label,
                self.foreground_threshold,
                self.background_threshold,
                self.similarity,
            )
            total = total + self.similarity_weight * losses["loss_similarity"] + self.norm_weight * losses["loss_norm"]
        return {"loss": total, **losses}
