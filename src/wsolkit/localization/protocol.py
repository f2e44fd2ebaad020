"""Define the rules of an evaluation as data. A protocol is a YAML file in `conf/protocol` that names its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wsolkit.errors import ConfigError
from wsolkit.localization.boxes import (
    GREY_LEVELS,
    BoxRule,
    Component,
    Empty,
    FarCorner,
    FloatArray,
    Levels,
    Regions,
    grey_cuts,
    threshold_grid,
)
from wsolkit.localization.maps import Interpolation, Normalisation, enlarge, enlarge_labels, normalise, upsample
from wsolkit.types import Boxes

Input = Literal["resize", "center_crop"]
Comparison = Literal["at_least", "above"]
WhoseMap = Literal["label", "predicted"]
Selection = Literal["val", "test", "pseudo", "classification"]

UNKNOWN_THRESHOLD = 0.3
"""The τ if none was selected because there were no boxes, or none were to be used. The papers' values are close to
it."""

_GRID_TOLERANCE = 1e-9
_MAX_THRESHOLDS = 10_000


@dataclass(frozen=True)
class Protocol:
    """How the evaluation compares an image's score map with its ground truth, and what counts as right.

    Args:
        input: whether the network sees the image resized to `resolution`, or the centre of the image resized to
            `resize`.
        resolution, resize: the side lengths in pixels of the network's input, and of the image that it is cut out of.
        frame: whether maps and ground truth are compared at the network's "input" size, or at the "original" image
            size.
        far_corner_shift: a number that is added to x1 and y1 of the published ground truth at its original size. If it
            is not 0, boxes are not clipped at the edges of the image before.
        clip_truth: whether ground truth beyond the last pixel is moved on to it.
        interpolation, min_max, epsilon: how maps are enlarged, whether they are scaled to [0, 1] before or after, and
            what is added to the range of "minmax" before the division.
        normalisation, percentile: how maps are scaled, see `normalise`.
        threshold_rule: "relative_8_bit" truncates the map to 8 bits and needs it above int(τ · its maximum). "above"
            needs the map > τ, and "from" needs it >= τ.
        component, far_corner, empty: see `BoxRule`.
        num_thresholds: the size n of the grid of thresholds τ = 0, 1/n, …, (n − 1)/n.
        threshold: the τ of a paper, or your own. None chooses the best one, by GT-known Loc.
        threshold_range: the first and the last τ of the choice.
        threshold_per: whether there is one τ for the "protocol", or the best for each "metric".
        selection: what τ is chosen by: the boxes of the held-out split, if there is one ("val"), those of the reported
            split itself ("test"), pseudo boxes of the held-out split ("pseudo"), or nothing, since there is only a
            classification: τ is then `UNKNOWN_THRESHOLD` ("classification").
        iou_thresholds: δ, which must include 0.5.
        gt_known_comparison, top_k_comparison: whether an IoU of exactly δ is right ("at_least") or not ("above"), for
            GT-known and MaxBoxAcc, and for Top-1 and Top-5 Loc.
        gt_known_map: whether the source's GT-known uses the map of the label or of the predicted class. τ is chosen by
            it.
        top5_map: whether Top-5 Loc takes the box from the map of the label, or of the predicted class for all five
            classes.
        classification: whether to use the logits of the "single" input, or the mean of the softmax over "ten_crop".
    """

    input: Input
    resolution: int
    resize: int
    frame: Literal["input", "original"]
    far_corner_shift: int
    clip_truth: bool
    interpolation: Interpolation
    min_max: Literal["before_upsampling", "after_upsampling"]
    epsilon: float
    normalisation: Normalisation
    percentile: float
    threshold_rule: Literal["relative_8_bit", "above", "from"]
    component: Component
    far_corner: FarCorner
    empty: Empty
    num_thresholds: int
    threshold: float | None
    threshold_range: Sequence[float]
    threshold_per: Literal["protocol", "metric"]
    selection: Selection
    iou_thresholds: Sequence[float]
    gt_known_comparison: Comparison
    top_k_comparison: Comparison
    gt_known_map: WhoseMap
    top5_map: WhoseMap
    classification: Literal["single", "ten_crop"]

    def __post_init__(self) -> None:
        if self.resolution < 1 or not 1 <= self.num_thresholds <= _MAX_THRESHOLDS:
            raise ConfigError(f"a protocol's resolution must be 1 or more, its num_thresholds 1 to {_MAX_THRESHOLDS}")
        if not 0 <= self.epsilon < 1:
            raise ConfigError(f"a protocol's epsilon={self.epsilon}: expected a small number, 0 or more")
        if not 0 <= self.percentile < 1:
            raise ConfigError(f"a protocol's percentile={self.percentile}: expected a share from 0 to below 1")
        if self.input == "center_crop" and self.resize < self.resolution:
            raise ConfigError(
                f"a protocol's resize={self.resize} is smaller than its resolution={self.resolution}: nothing can be "
                "cut out of it"
            )
        percents = {round(100 * delta) for delta in self.iou_thresholds}
        within = all(0 < delta <= 1 for delta in self.iou_thresholds)
        if 0.5 not in self.iou_thresholds or not within or len(percents) < len(self.iou_thresholds):
            raise ConfigError(
                f"a protocol's iou_thresholds={list(self.iou_thresholds)}: expected numbers above 0 and up to 1, 0.5 "
                "among them, that differ as whole percentages"
            )
        if not self.admissible.any():
            raise ConfigError(
                f"a protocol's threshold_range={list(self.threshold_range)}: expected first and last of a range that "
                f"holds a multiple of 1/num_thresholds = {1 / self.num_thresholds:g} below 1"
            )
        if self.threshold is not None and self.index_of(self.threshold) is None:
            raise ConfigError(
                f"a protocol's threshold={self.threshold}: expected a multiple of 1/num_thresholds = "
                f"{1 / self.num_thresholds:g} in [0, 1), or null to choose the best"
            )

    @property
    def thresholds(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return the grid of τ [T]."""
        return threshold_grid(self.num_thresholds)

    @property
    def admissible(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Return which thresholds of the grid may be chosen, bool [T]."""
        if len(self.threshold_range) != 2:
            return np.zeros(self.num_thresholds, bool)
        low, high = self.threshold_range
        return (self.thresholds >= low - _GRID_TOLERANCE) & (self.thresholds <= high + _GRID_TOLERANCE)

    def index_of(self, threshold: float) -> int | None:
        """Return the place of τ in the grid, or None if it is not on the grid."""
        nearest = int(np.abs(self.thresholds - threshold).argmin())
        return nearest if abs(self.thresholds[nearest] - threshold) < _GRID_TOLERANCE else None

    @property
    def box_rule(self) -> BoxRule:
        """Return the rule that draws boxes."""
        return BoxRule(self.component, self.far_corner, self.empty)

    @property
    def map_rule(self) -> tuple[object, ...]:
        """Return a key that is equal for protocols with the same `localization_maps`."""
        scaling = self.min_max, self.epsilon, self.normalisation, self.percentile
        return self.input, self.resolution, self.resize, self.interpolation, *scaling

    @property
    def level_rule(self) -> tuple[object, ...]:
        """Return a key that is equal for protocols with the same `levels`."""
        return *self.map_rule, self.frame, self.threshold_rule, self.num_thresholds

    def localization_maps(self, maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Turn raw score maps [B, h, w] into localization maps in [0, 1], float32.

        Args:
            maps: the raw score maps.
            size: the height and width of the result. None takes the resolution of the network's input.
        """
        maps = maps.float()
        side = size or (self.resolution, self.resolution)
        if self.min_max == "before_upsampling":
            return upsample(self._normalise(maps), side, self.interpolation)
        return self._normalise(upsample(maps, side, self.interpolation))

    def _normalise(self, maps: Tensor) -> Tensor:
        return normalise(maps, self.normalisation, self.percentile, self.epsilon)

    def levels(self, maps: Tensor, thresholds: npt.NDArray[np.float64] | None = None) -> list[Levels]:
        """Cut localization maps [B, H, W] in [0, 1] into levels on their device, one entry for each map.

        Args:
            maps: the localization maps.
            thresholds: rising τ [T] in [0, 1). None takes the grid.
        """
        if thresholds is None:
            thresholds = self.thresholds
        if self.threshold_rule == "relative_8_bit":
            grey = (maps * 255).to(torch.uint8).cpu().numpy()
            return [Levels(g, grey_cuts(int(g.max()), thresholds), GREY_LEVELS) for g in grey]
        if maps.device.type == "mps":  # The device has no float64, which thresholds need.
            maps = maps.cpu()
        grid = torch.from_numpy(thresholds).to(maps.device)
        # This is the number of thresholds that each pixel passes.
        passed = torch.bucketize(maps.double(), grid, right=self.threshold_rule == "from", out_int32=True)
        cuts = np.arange(len(thresholds))
        return [Levels(level, cuts, len(thresholds)) for level in passed.cpu().numpy().astype(np.uint16)]

    def truth(self, boxes: Boxes, width: int, height: int) -> Boxes:
        """Convert true boxes [n, 4] from pixels of the original image to pixels of the map, truncated."""
        boxes = np.asarray(boxes, np.int64) + np.array([0, 0, self.far_corner_shift, self.far_corner_shift])
        sides = np.array([width, height, width, height])
        last = np.array([width, height] * 2) - 1
        if self.frame == "input":
            boxes = boxes * (self.resize if self.input == "center_crop" else self.resolution) // sides
            if self.input == "center_crop":
                boxes = boxes - (self.resize - self.resolution) // 2
            last[:] = self.resolution - 1
        return np.clip(boxes, 0, last) if self.clip_truth else boxes

    def on_image(self, score_map: FloatArray, found: Regions, width: int, height: int) -> tuple[FloatArray, Regions]:
        """Convert a localization map [H, W] and its regions to pixels of the original image.

        If the network saw the centre of the image only, the map is 0 around it. Boxes keep both corners inside, and are
        clipped at the edges of the image.
        """
        if self.frame == "original":
            canvas, shift = np.array([width, height]), 0
        else:
            canvas = np.array([self.resize if self.input == "center_crop" else self.resolution] * 2)
            shift = (int(canvas[0]) - self.resolution) // 2
            if shift:
                margin = shift, int(canvas[0]) - self.resolution - shift
                score_map = np.pad(score_map, [margin] * 2)
                found = found._replace(labels=np.pad(found.labels, [margin] * 2))
        scale = np.tile([width, height] / canvas, 2)
        edges = np.floor((found.boxes + shift + np.array([0, 0, 1, 1])) * scale + 0.5).astype(np.int64)
        last = np.array([width, height]) - 1
        near = np.clip(edges[:, :2], 0, last)
        boxes = np.concatenate([near, np.clip(edges[:, 2:] - 1, near, last)], axis=1)
        labels = enlarge_labels(found.labels, (height, width))
        for number, (x0, y0, x1, y1) in enumerate(boxes.tolist(), start=1):
            inside = labels[y0 : y1 + 1, x0 : x1 + 1]
            if (scale < 1).any() and not (inside == number).any():  # The region is smaller than a pixel.
                inside[...] = number
        return enlarge(score_map, (height, width)), Regions(boxes, labels)
