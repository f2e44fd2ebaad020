"""Draw boxes around the parts of a score map above each threshold, by the rules of the papers' evaluations.

A map is first cut into levels, so that "above threshold number i" becomes "level > c" for a whole number c. MaxBoxAcc
(Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020) truncates the map to 8 bits
and compares it with int(τ · its maximum). So there are only 256 different binary maps, however many thresholds there
are. Other rules compare the map itself with τ. The level of a pixel is then the number of thresholds that it passes.
`components` finds the components above all levels in one pass. The results equal those of OpenCV 5.0.0 at each
threshold, bit for bit.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import cv2
import numpy as np
import numpy.typing as npt

from wsolkit.localization.components import (
    AREA_GAIN,
    FIRST,
    PIXEL_GAIN,
    RANK,
    around_all_pixels,
    components,
    fill_holes,
    highest,
    holes,
    opencv_order,
    pad,
)
from wsolkit.system.compiled import compiled
from wsolkit.types import Boxes, Select

Component = Literal["largest_outline", "all_outlines", "most_pixels", "all_pixels"]
FarCorner = Literal["clipped", "half_open", "inclusive"]
Empty = Literal["zero", "one_pixel", "image"]
FloatArray = npt.NDArray[np.floating]

GREY_LEVELS = 256
_MAX_SIDE = 32767
_LAST_PIXEL = 2**31 - 1


class BoxRule(NamedTuple):
    """How the pixels above a threshold become boxes.

    component: a box around the outline with the largest `cv2.contourArea` (if several are equal, the one that OpenCV
    lists first); around each outline, including those of holes; around the 8-connected component with the most pixels
    (if several are equal, the first in raster order); or one box around all pixels. far_corner: "inclusive" is the last
    pixel in the box, "half_open" one past it, "clipped" one past it but at most W − 1 and H − 1. empty: the box if
    nothing is above the threshold: [0, 0, 0, 0], [0, 0, 1, 1], or the whole image.
    """

    component: Component
    far_corner: FarCorner
    empty: Empty

    def empty_box(self, height: int, width: int) -> npt.NDArray[np.int64]:
        """Return the box [4] of a map of this size that has nothing above the threshold."""
        if self.empty != "image":
            return np.array([0, 0, 0, 0] if self.empty == "zero" else [0, 0, 1, 1], np.int64)
        past = int(self.far_corner == "half_open")
        return np.array([0, 0, width - 1 + past, height - 1 + past], np.int64)


MAXBOXACC = BoxRule("largest_outline", "clipped", "zero")
MAXBOXACC_V2 = BoxRule("all_outlines", "clipped", "zero")


@dataclass(frozen=True)
class Levels:
    """A map in whole numbers. A pixel is above threshold number i if level > cuts[i].

    level [H, W]: uint8 or uint16, at most `num_levels`; cuts [T]: below `num_levels`.
    """

    level: npt.NDArray[np.unsignedinteger]
    cuts: npt.NDArray[np.int64]
    num_levels: int

    @functools.cached_property
    def padded(self) -> npt.NDArray[np.uint16]:
        """Return the levels [H + 2, W + 2] in one type and layout, because functions are compiled for each."""
        padded: npt.NDArray[np.uint16] = pad(np.ascontiguousarray(self.level, np.uint16))
        return padded

    @functools.cached_property
    def filled(self) -> npt.NDArray[np.uint16]:
        """Return the same with holes filled, see `fill_holes`. Several rules need it."""
        filled: npt.NDArray[np.uint16] = fill_holes(self.padded)
        return filled


def threshold_grid(num_thresholds: int) -> npt.NDArray[np.float64]:
    """Return the thresholds τ: 0, 1/n, …, (n − 1)/n."""
    return np.arange(0, 1, 1 / num_thresholds)[:num_thresholds]


def grey_cuts(peak: int, thresholds: FloatArray) -> npt.NDArray[np.int64]:
    """Return int(τ · peak), truncated, for a map in 8 bits with this maximum. Nothing is above the highest level."""
    return np.minimum(np.asarray(thresholds, dtype=np.float64) * peak, GREY_LEVELS - 1).astype(np.int64)


def grey_levels(score_map: FloatArray, thresholds: FloatArray) -> Levels:
    """Cut a map [H, W] in [0, 1] into levels by the rule of MaxBoxAcc: truncated to 8 bits, above int(τ · its maximum).

    Raises:
        ValueError: the map is not two-dimensional, is empty, or has values outside [0, 1] or NaN, or a threshold is
            below 0 or NaN.
    """
    score_map = np.asarray(score_map)
    if not (np.asarray(thresholds) >= 0).all():
        raise ValueError(f"thresholds from {np.min(thresholds)}: expected [0, 1], relative to the map's maximum")
    if score_map.ndim != 2 or 0 in score_map.shape or max(score_map.shape) > _MAX_SIDE:
        raise ValueError(f"score map of shape {score_map.shape}: expected [H, W], up to {_MAX_SIDE} pixels a side")
    if not (score_map.min() >= 0 and score_map.max() <= 1):  # It is written so that NaN fails too.
        raise ValueError(
            f"score map with values from {score_map.min()} to {score_map.max()}: expected [0, 1], min-max it first"
        )
    grey = (score_map * 255).astype(np.uint8)
    return Levels(grey, grey_cuts(int(grey.max()), thresholds), GREY_LEVELS)


@overload
def boxes_at_thresholds(score_map: FloatArray, thresholds: FloatArray, select: Literal["largest"]) -> Boxes: ...


@overload
def boxes_at_thresholds(score_map: FloatArray, thresholds: FloatArray, select: Literal["all"]) -> list[Boxes]: ...


def boxes_at_thresholds(score_map: FloatArray, thresholds: FloatArray, select: Select) -> Boxes | list[Boxes]:
    """Draw boxes at each of T thresholds, by the rules of MaxBoxAcc ("largest") or MaxBoxAccV2 ("all").

    Args:
        score_map: [H, W] in [0, 1].
        thresholds: τ [T] in [0, 1], relative to the map's maximum.
        select: "largest" or "all".

    Returns:
        boxes as x0, y0, x1, y1 in pixels. As in the reference, x1 and y1 are one past the last pixel but at most W − 1
        and H − 1, and the box is [0, 0, 0, 0] if nothing is above the threshold. "largest" gives [T, 4]. "all" gives a
        list of T arrays [n, 4] in OpenCV's order, including outlines of holes.

    Raises:
        ValueError: see `grey_levels`.

    >>> import numpy as np
    >>> from wsolkit.localization import boxes_at_thresholds
    >>> score_map = np.array([[0.0, 0.0, 0.0, 0.0, 0.0], [0.4, 0.0, 0.8, 0.8, 0.0], [0.0, 0.0, 0.8, 0.8, 0.0]])
    >>> boxes_at_thresholds(score_map, np.array([0.25, 0.75]), "largest").tolist()
    [[2, 1, 4, 2], [2, 1, 4, 2]]
    >>> [boxes.tolist() for boxes in boxes_at_thresholds(score_map, np.array([0.25, 0.75]), "all")]
    [[[2, 1, 4, 2], [0, 1, 1, 2]], [[2, 1, 4, 2]]]
    """
    if select not in ("largest", "all"):
        raise ValueError(f"select={select!r}: expected 'largest' or 'all'")
    levels = grey_levels(score_map, thresholds)
    if select == "largest":
        return _one_box(levels, MAXBOXACC)[levels.cuts]
    outer = components(levels.padded, GREY_LEVELS, PIXEL_GAIN)
    inner = holes(levels.padded, levels.filled, GREY_LEVELS)
    rows, start = opencv_order(outer, inner, levels.filled, GREY_LEVELS)
    nodes = np.concatenate([outer[0], inner[0]])
    listed = _far_corners(nodes[:, :4], MAXBOXACC_V2, levels)[rows]
    nothing = MAXBOXACC_V2.empty_box(*levels.level.shape)[None]
    each = [listed[a:b] if a < b else nothing for a, b in itertools.pairwise(start.tolist())]
    return [each[c] for c in levels.cuts.tolist()]


def matched_boxes(levels: Levels, rule: BoxRule, truth: Boxes) -> tuple[Boxes, npt.NDArray[np.float64]]:
    """Return the box at each threshold, and its best IoU with a true box.

    If the rule draws all outlines, the one with the highest IoU counts.

    Args:
        levels: the levels of a map [H, W].
        rule: how to draw boxes.
        truth: true boxes [n, 4], n ≥ 1, in pixels of the map.

    Returns:
        boxes [T, 4] and the highest IoU with any true box [T], see `iou`.
    """
    truth = np.ascontiguousarray(truth, np.int64)
    if rule.component == "all_outlines":
        inner = holes(levels.padded, levels.filled, levels.num_levels)[0]
        nodes = np.concatenate([components(levels.padded, levels.num_levels, PIXEL_GAIN)[0], inner])
        drawn = _far_corners(nodes[:, :4], rule, levels)
        boxes = _chosen(drawn, highest(nodes, best_iou(drawn, truth), levels.num_levels), rule, levels)
    else:
        boxes = _one_box(levels, rule)
    return boxes[levels.cuts], best_iou(boxes, truth)[levels.cuts]


class Regions(NamedTuple):
    """The parts of a map above a threshold: boxes [n, 4] in its pixels; labels [H, W], 0 outside, i + 1 for box i."""

    boxes: Boxes
    labels: npt.NDArray[np.int32]


def regions(levels: Levels, rule: BoxRule, select: Select) -> Regions:
    """Return the boxes at the first threshold, and the pixels that they are drawn around.

    Args:
        levels: the levels of a map [H, W].
        rule: how to draw boxes. If nothing is above the threshold there is no box, whatever the rule says.
        select: "largest" takes the one box of the rule, or if it draws several, the one around the outline with the
            largest area. "all" takes a box around each 8-connected component, ordered by the number of pixels.
    """
    cut = levels.cuts[0]
    above = (levels.level > cut).astype(np.uint8)
    if not above.any():
        return Regions(np.zeros((0, 4), np.int64), above.astype(np.int32))
    tight = rule._replace(far_corner="inclusive")
    if select == "largest" and rule.component == "all_pixels":
        return Regions(_far_corners(_one_box(levels, tight)[cut][None], rule, levels), above.astype(np.int32))
    count, components_of, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    corner, size = stats[:, [cv2.CC_STAT_LEFT, cv2.CC_STAT_TOP]], stats[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]]
    around = np.concatenate([corner, corner + size - 1], axis=1)
    around[0] = -1  # the background
    if select == "largest":
        if rule.component == "all_outlines":
            tight = tight._replace(component="largest_outline")
        # No two components have the same box, because one that touches all four sides leaves no way across for another.
        order = np.flatnonzero((around == _one_box(levels, tight)[cut]).all(axis=1))
    else:
        order = 1 + np.argsort(-stats[1:, cv2.CC_STAT_AREA], kind="stable")
    number = np.zeros(count, np.int32)
    number[order] = np.arange(1, len(order) + 1)
    return Regions(_far_corners(around[order], rule, levels), number[components_of])


def _one_box(levels: Levels, rule: BoxRule) -> Boxes:
    """Return the box of a rule that draws one, at each threshold 0 <= c < num_levels."""
    count = levels.num_levels
    if rule.component == "all_pixels":
        around = around_all_pixels(levels.padded, count)
        chosen = np.where(around[:, 2] >= 0, np.arange(count), -1)
        return _chosen(_far_corners(around, rule, levels), chosen, rule, levels)
    outline = rule.component == "largest_outline"
    # The area in an outline is the area of the component with its holes filled.
    nodes = components(levels.filled if outline else levels.padded, count, AREA_GAIN if outline else PIXEL_GAIN)[0]
    # If outlines are equal, OpenCV lists the one first that it finds last. If components are equal, the first counts.
    order = nodes[:, FIRST] if outline else _LAST_PIXEL - nodes[:, FIRST]
    chosen = highest(nodes, nodes[:, RANK].astype(np.int64) << 32 | order, count)
    return _chosen(_far_corners(nodes[:, :4], rule, levels), chosen, rule, levels)


def _far_corners(boxes: npt.NDArray[np.int32], rule: BoxRule, levels: Levels) -> Boxes:
    """Move the far corners of boxes [n, 4] that end with their last pixel to the convention of a rule."""
    height, width = levels.level.shape
    drawn = boxes.astype(np.int64)
    if rule.far_corner != "inclusive":
        drawn[:, 2:] += 1
    if rule.far_corner == "clipped":
        np.minimum(drawn[:, 2:], [width - 1, height - 1], out=drawn[:, 2:])
    return drawn


def _chosen(boxes: Boxes, rows: npt.NDArray[np.int64], rule: BoxRule, levels: Levels) -> Boxes:
    """Pick rows of boxes [n, 4], with the empty box for -1."""
    empty = rule.empty_box(*levels.level.shape)
    return np.where(rows[:, None] >= 0, boxes[rows], empty) if len(boxes) else np.tile(empty, (len(rows), 1))


@compiled
def iou(box: Any, other: Any) -> float:
    """Compute the IoU of two boxes [4] of whole numbers. Both corners are inside, so the width is x1 − x0 + 1."""
    width = min(box[2], other[2]) - max(box[0], other[0]) + 1
    height = min(box[3], other[3]) - max(box[1], other[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
    other_area = (other[2] - other[0] + 1) * (other[3] - other[1] + 1)
    return float(width * height / (area + other_area - width * height))


@compiled
def best_iou(boxes: Any, truth: Any) -> Any:
    """Compute the highest IoU [m] of each box [m, 4] with any of [n, 4]."""
    best = np.zeros(len(boxes))
    for b in range(len(boxes)):
        for t in range(len(truth)):
            best[b] = max(best[b], iou(boxes[b], truth[t]))
    return best


@compiled
def best_match(boxes: Any, truth: Any) -> Any:
    """Return which of the true boxes [n, 4] has the highest IoU with each box [m, 4], int64 [m], the first if equal."""
    match = np.zeros(len(boxes), np.int64)
    for b in range(len(boxes)):
        best = 0.0
        for t in range(len(truth)):
            overlap = iou(boxes[b], truth[t])
            if overlap > best:
                best, match[b] = overlap, t
    return match
