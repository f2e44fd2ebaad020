"""Boxes at thresholds equal the reference rule: one cv2.threshold and one cv2.findContours per threshold."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from wsolkit.localization import boxes_at_thresholds
from wsolkit.localization.boxes import threshold_grid


def reference(score_map: Any, threshold: float) -> tuple[list[list[int]], list[float]]:
    """Boxes and areas at one threshold, as the evaluation of Choe et al. computes them."""
    height, width = score_map.shape
    grey = (score_map * 255).astype(np.uint8)
    _, binary = cv2.threshold(grey, int(threshold * np.max(grey)), 255, cv2.THRESH_BINARY)
    contours, _ = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    if len(contours) == 0:
        return [[0, 0, 0, 0]], [0.0]
    boxes = []
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        boxes.append([x, y, min(x + w, width - 1), min(y + h, height - 1)])
    return boxes, [cv2.contourArea(contour) for contour in contours]


def score_maps() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:32, :40]
    one_pixel = np.zeros((32, 40))
    one_pixel[31, 39] = 1
    ring = (np.hypot(rows - 16, columns - 20) < 12) * (0.4 + 0.6 * (np.hypot(rows - 16, columns - 20) > 6))
    maps = {
        "zero": np.zeros((32, 40)),
        "constant": np.full((32, 40), 0.7),
        "ones": np.ones((32, 40), np.float32),
        "one pixel": one_pixel,
        "one row": rng.random((1, 50)),
        "stripes": (rows % 4 < 2).astype(float),
        "checkerboard": ((rows + columns) % 2).astype(float),
        "hole": ring,
        "border": np.minimum(rows, columns) / 31 * (columns < 32),
    }
    for number in range(12):
        coarse = rng.random((6, 6)).astype(np.float32)
        smooth = cv2.resize(coarse, (40, 32), interpolation=cv2.INTER_CUBIC)
        maps[f"smooth {number}"] = (smooth - smooth.min()) / (smooth.max() - smooth.min())
        maps[f"noise {number}"] = rng.random((32, 40))
    return maps


@pytest.mark.parametrize("name", score_maps())
def test_boxes_equal_the_reference_rule(name: str) -> None:
    score_map = score_maps()[name]
    thresholds = threshold_grid(500)
    largest = boxes_at_thresholds(score_map, thresholds, "largest")
    every = boxes_at_thresholds(score_map, thresholds, "all")
    assert largest.shape == (500, 4)
    for threshold, one, several in zip(thresholds, largest, every, strict=True):
        boxes, areas = reference(score_map, threshold)
        assert several.tolist() == boxes
        assert one.tolist() == boxes[int(np.argmax(areas))]


@pytest.mark.parametrize("count", [1, 20, 100, 200, 1000])
def test_threshold_grid_is_that_of_the_reference(count: int) -> None:
    assert threshold_grid(count).tolist() == np.arange(0, 1, 1 / count).tolist()[:count]


@pytest.mark.parametrize(
    ("score_map", "message"),
    [
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\): expected \[H, W\]"),
        (np.full((4, 4), np.nan), "values from nan to nan"),
        (np.full((4, 4), 1.5), "values from 1.5 to 1.5: expected"),
        (np.full((4, 4), -0.1), "values from -0.1"),
    ],
)
def test_maps_outside_the_range_are_refused(score_map: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boxes_at_thresholds(score_map, np.array([0.5]), "largest")


def test_unknown_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'largest' or 'all'"):
        boxes_at_thresholds(np.zeros((4, 4)), np.array([0.5]), "any")  # type: ignore[call-overload]
