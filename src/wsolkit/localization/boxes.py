"""Boxes around what a score map holds above a threshold, as the MaxBoxAcc evaluation draws them.

Source: Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020. The map is truncated
to 8 bits, compared with int(τ · its maximum), and the outlines that OpenCV finds become boxes. Only 256 binary maps
exist, however many thresholds are asked for, so each is traced once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import cv2
import numpy as np
import numpy.typing as npt

from wsolkit.types import Boxes

Select = Literal["largest", "all"]
FloatArray = npt.NDArray[np.floating]


class TracedBoxes(NamedTuple):
    """Boxes of every outline of every distinct binary map.

    boxes: per distinct map [n, 4]; areas: per distinct map [n], OpenCV's contour area;
    which [T]: which distinct map a threshold gives.
    """

    boxes: list[Boxes]
    areas: list[npt.NDArray[np.float64]]
    which: npt.NDArray[np.int64]

    def select(self, select: Select) -> list[Boxes]:
        """Boxes per distinct map: the one with the "largest" outline, or "all"."""
        if select == "all":
            return self.boxes
        if select != "largest":
            raise ValueError(f"select={select!r}: expected 'largest' or 'all'")
        # argmax takes the first of equals, as max() over OpenCV's list does.
        return [boxes[[areas.argmax()]] for boxes, areas in zip(self.boxes, self.areas, strict=True)]


def threshold_grid(num_thresholds: int) -> npt.NDArray[np.float64]:
    """Thresholds τ: 0, 1/n, …, (n − 1)/n."""
    return np.arange(0, 1, 1 / num_thresholds)[:num_thresholds]


def trace_boxes(score_map: FloatArray, thresholds: FloatArray) -> TracedBoxes:
    """Outline what lies above each threshold.

    Args:
        score_map: [H, W] in [0, 1].
        thresholds: τ [T] in [0, 1), relative to the map's maximum.

    Returns:
        boxes as x0, y0, x1, y1 in pixels, x1 and y1 one past the last pixel but at most W − 1 and H − 1, as the
        reference has it; [0, 0, 0, 0] with area 0 where nothing is above the threshold.

    Raises:
        ValueError: the map is not two-dimensional, or has values outside [0, 1] or NaN.
    """
    score_map = np.asarray(score_map)
    if score_map.ndim != 2:
        raise ValueError(f"score map of shape {score_map.shape}: expected [H, W]")
    if not (score_map.min() >= 0 and score_map.max() <= 1):  # written so that NaN fails too
        raise ValueError(
            f"score map with values from {score_map.min()} to {score_map.max()}: expected [0, 1], min-max it first"
        )
    grey = (score_map * 255).astype(np.uint8)
    peak = int(grey.max())
    cuts = (np.asarray(thresholds, dtype=np.float64) * peak).astype(np.int64)  # int(τ · max): truncated
    # A cut between two values that occur gives the same binary map as the lower of them: trace each such map once.
    values = np.flatnonzero(np.bincount(grey.ravel(), minlength=256))
    distinct, index = np.unique(np.searchsorted(values, cuts, side="right"), return_inverse=True)
    traced = [_outline(grey, int(values[k - 1]) if k else -1) for k in distinct]
    return TracedBoxes([boxes for boxes, _ in traced], [areas for _, areas in traced], index.astype(np.int64))


@overload
def boxes_at_thresholds(score_map: FloatArray, thresholds: FloatArray, select: Literal["largest"]) -> Boxes: ...


@overload
def boxes_at_thresholds(score_map: FloatArray, thresholds: FloatArray, select: Literal["all"]) -> list[Boxes]: ...


def boxes_at_thresholds(score_map: FloatArray, thresholds: FloatArray, select: Select) -> Boxes | list[Boxes]:
    """Boxes at each of T thresholds, by the rules of MaxBoxAcc ("largest") or MaxBoxAccV2 ("all").

    Args, box convention and errors: see `trace_boxes`.

    Returns:
        [T, 4] for "largest"; a list of T arrays [n, 4] for "all", in OpenCV's order, outlines of holes included.
    """
    traced = trace_boxes(score_map, thresholds)
    chosen = traced.select(select)
    if select == "largest":
        return np.concatenate(chosen)[traced.which]
    return [chosen[k] for k in traced.which]


def _outline(grey: npt.NDArray[np.uint8], cut: int) -> tuple[Boxes, npt.NDArray[np.float64]]:
    height, width = grey.shape
    binary = (grey > cut).astype(np.uint8)
    contours: Sequence[npt.NDArray[np.int32]] = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if not contours:
        return np.zeros((1, 4), np.int64), np.zeros(1)
    corners = np.array([cv2.boundingRect(contour) for contour in contours], dtype=np.int64)  # x, y, w, h
    corners[:, 2] = np.minimum(corners[:, 0] + corners[:, 2], width - 1)
    corners[:, 3] = np.minimum(corners[:, 1] + corners[:, 3], height - 1)
    return corners, np.array([cv2.contourArea(contour) for contour in contours])
