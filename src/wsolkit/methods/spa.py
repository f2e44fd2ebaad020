"""SPA: structure-preserving activation (Pan et al., CVPR 2021).

In training, a restricted activation loss (RAM, Eqn. 2 to 5) acts on the class maps F [B, C, H, W]. At each position,
the spread of softmax(F) over the classes tells background, where no class stands out, from object. The loss draws the
map of the true class down on the background and up on the object:

    v = spread, min-max over space;  background: v < τ;  object: v > τ + σ
    L = CE + α · mean(sigmoid(F_y) · background + (1 − sigmoid(F_y)) · object)

The spread is the standard deviation in the paper, and the unbiased variance in the released code, which is the default.

At inference, self-correlation (`SelfCorrelationGenerator`, SCG) completes a CAM from the similarity between positions
(Eqn. 6 to 13). The first-order correlation of two positions is the cosine of their feature vectors. A high-order
correlation goes over other positions that are similar to both. The final map adds the positions that are similar to the
object, and subtracts those that are similar to the background. SCG refines the CAM of any CNN.

First and high order can be merged in two ways. `merge="correlations"` takes the element-wise maximum of the
correlations of each stage, with a weight for the high order (Eqn. 10). `merge="maps"` takes the maximum of the two
resulting maps, as the released code also does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.cam import CAMModule, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.types import TrainingBatch

Spread = Literal["variance", "std"]

_EPSILON = 1e-5  # The released code has this value.


def restricted_activation_loss(
    logit_map: Tensor, label: Tensor, background_threshold: float, gap: float, spread: Spread = "variance"
) -> Tensor:
    """Compute the restricted activation loss (Eqn. 2 to 5) without its weight α, as a scalar.

    Args:
        logit_map: class maps [B, C, H, W].
        label: true classes [B].
        background_threshold: τ, for the spread scaled to [0, 1].
        gap: σ, between background and object.
        spread: "std" (paper) or "variance" (released code).
    """
    logit_map = logit_map.float()
    with torch.no_grad():  # The regions of background and object carry no gradient.
        probability = logit_map.softmax(dim=1)
        over_classes = probability.var(dim=1) if spread == "variance" else probability.std(dim=1)
        scaled = min_max(over_classes)  # [B, H, W]
        background, foreground = scaled < background_threshold, scaled > background_threshold + gap
    activation = logit_map[torch.arange(len(label), device=label.device), label].sigmoid()  # [B, C, H, W] → [B, H, W]
    return (activation * background + (1 - activation) * foreground).mean()


def self_correlation(
    feature: Tensor, order: int, first_order_threshold: float, high_order_threshold: float
) -> tuple[Tensor, Tensor]:
    """Compute the correlation between all positions of a feature map (Eqn. 6 to 9), HW × HW for each image.

    Memory: each result has B·(HW)² numbers, which is 0.15 MB per image at 14×14 and 2.5 MB at 28×28 in float32. Four
    arrays of this size exist at a time.

    Args:
        feature: the feature map [B, D, H, W].
        order: m of the high order. With 1 there is none, and the second result is 0.
        first_order_threshold: smaller cosines count as 0.
        high_order_threshold: high-order values below it, divided by HW, count as 0.

    Returns:
        first and high order, [B, HW, HW]. Entry (i, j) is the weight of position i among the positions that are similar
        to j. The columns of the first order sum to 1.

    >>> import torch
    >>> from wsolkit.methods.spa import self_correlation
    >>> feature = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).reshape(1, 2, 1, 3)  # the first two are alike
    >>> first, _ = self_correlation(feature, order=2, first_order_threshold=0.5, high_order_threshold=0.0)
    >>> first.round(decimals=3).tolist()
    [[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]]
    """
    unit = F.normalize(feature.float().flatten(2), dim=1)  # [B, D, H, W] → [B, D, HW]
    cosine = unit.transpose(1, 2) @ unit  # [B, HW, HW]
    cosine = cosine.masked_fill(cosine < max(first_order_threshold, 0.0), 0)
    first = _columns_to_one(cosine, _EPSILON)
    if order < 2:
        return first, torch.zeros_like(first)
    places = torch.arange(cosine.shape[1], device=cosine.device)
    cosine[:, places, places] = 0
    step = _columns_to_one(cosine, _EPSILON)
    high = step
    for _ in range(order - 1):
        high = _columns_to_one(high @ step, 0)
    return first, high.masked_fill(high < high_order_threshold / len(places), 0)


def _columns_to_one(correlation: Tensor, epsilon: float) -> Tensor:
    total = correlation.sum(dim=1, keepdim=True) + epsilon
    return correlation / total.masked_fill(total == 0, 1)


def self_correlation_map(
    cam: Tensor, correlation: Tensor, object_threshold: float, background_threshold: float
) -> Tensor:
    """Complete CAMs by self-correlation (Eqn. 11 to 13).

    Args:
        cam: [B, H, W] in [0, 1], or [B, K, H, W] for K maps of an image.
        correlation: [B, HW, HW].
        object_threshold, background_threshold: δ_h and δ_l. A position counts as object if its CAM is at least δ_h, and
            as background if it is at most δ_l.

    Returns:
        maps in [0, 1], shaped as `cam`.
    """
    columns = min_max(correlation.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)  # each column to [0, 1]
    grid = (cam.shape[0], -1, *cam.shape[-2:])
    flat = cam.reshape(cam.shape[0], -1, correlation.shape[-1])  # [B, K, H, W] → [B, K, HW]

    def alike(seeds: Tensor) -> Tensor:
        # The sum of the seeds' columns, a matrix product: [B, HW, HW]·[B, HW, K] → [B, K, HW] → [B, K, H, W]
        return min_max((columns @ seeds.to(columns).transpose(1, 2)).transpose(1, 2).reshape(grid))

    difference = alike(flat >= object_threshold) - alike(flat <= background_threshold)
    return min_max(difference.relu()).reshape(cam.shape)


@dataclass(frozen=True)
class SelfCorrelationGenerator:
    """SCG (Eqn. 11 to 13), as a post-process for the CAM of any CNN.

    It needs the memory of `self_correlation` for each stage, on the CAM's grid.

    Args:
        stages: the stages of the backbone whose correlations are combined. Adaptive average pooling brings maps of
            another size to the size of the CAM.
        order: the high order, 2 in the paper. 1 leaves it out.
        correlation: "first", "high" or "both" orders.
        merge: with "both", whether to take the maximum of "correlations" or of the resulting "maps".
        high_order_weight: the weight w of the high order in the maximum of correlations.
        first_order_threshold, high_order_threshold: see `self_correlation`.
        combine: whether to combine stages by "sum" or "maximum".
        object_threshold, background_threshold: see `self_correlation_map`.

    Raises:
        ConfigError: there is no stage, an order is below 1, or no order is left.
    """

    networks: ClassVar[str] = "convolutional networks"
    backbones: ClassVar[tuple[type[nn.Module], ...]] = (CNN,)
    sees_network: ClassVar[bool] = False

    stages: Sequence[str]
    order: int
    correlation: Literal["first", "high", "both"]
    merge: Literal["correlations", "maps"]
    high_order_weight: float
    first_order_threshold: float
    high_order_threshold: float
    combine: Literal["sum", "maximum"]
    object_threshold: float
    background_threshold: float

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("postprocess.stages=[]: name one or more stages of the backbone")
        if self.order < 1 or (self.order == 1 and self.correlation == "high"):
            raise ConfigError(
                f"postprocess.order={self.order}: expected 1, the first order only, or more. "
                "postprocess.correlation=high needs 2 or more"
            )

    @torch.no_grad()
    def __call__(self, maps: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Refine score maps [B, K, h, w] with a feature map [B, D, h', w'] of each stage. The result is in [0, 1]."""
        cam = min_max(maps.float().relu())
        orders = [
            self_correlation(
                F.adaptive_avg_pool2d(feature, cam.shape[-2:]),  # type: ignore[arg-type]
                self.order,
                self.first_order_threshold,
                self.high_order_threshold,
            )
            for feature in features
        ]
        if self.correlation == "both" and self.merge == "correlations":
            stages = [_columns_to_one(torch.maximum(first, self.high_order_weight * high), 0) for first, high in orders]
            return self._map(cam, stages)
        found = []
        if self.correlation != "high":
            found.append(self._map(cam, [first for first, _ in orders]))
        if self.correlation != "first" and self.order > 1:
            found.append(self._map(cam, [high for _, high in orders]))
        return found[0] if len(found) == 1 else torch.maximum(*found)

    def _map(self, cam: Tensor, stages: Sequence[Tensor]) -> Tensor:
        together = torch.stack(list(stages))
        combined = together.sum(dim=0) if self.combine == "sum" else together.amax(dim=0)
        return self_correlation_map(cam, combined, self.object_threshold, self.background_threshold)


class SPA(CAMModule):
    """SPA in training and evaluation.

    Args:
        start_epoch: the first epoch, counted from 0, with the restricted activation loss.
        activation_weight: α.
        background_threshold, gap, spread: see `restricted_activation_loss`.
        head: see `HeadSettings`. The network makes class maps first and then averages them.
    """

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        start_epoch: int,
        activation_weight: float,
        background_threshold: float,
        gap: float,
        spread: Spread,
        **head: Unpack[HeadSettings],
    ) -> None:
        super().__init__(backbone, num_classes, "maps_first", head)
        self.start_epoch = start_epoch
        self.activation_weight = activation_weight
        self.background_threshold = background_threshold
        self.gap = gap
        self.spread: Spread = spread

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy `loss_cls` and, from `start_epoch` on, the unweighted `loss_activation`."""
        maps = self.network.class_maps(self.network.features(batch["image"]))
        losses = {"loss_cls": classification_loss(maps.mean(dim=(2, 3)), batch)}
        if self.current_epoch < self.start_epoch:
            return {"loss": losses["loss_cls"], **losses}
        losses["loss_activation"] = restricted_activation_loss(
            maps, batch["label"], self.background_threshold, self.gap, self.spread
        )
        total = losses["loss_cls"] + self.activation_weight * losses["loss_activation"]
        return {"loss": total, **losses}
