"""Boxes at thresholds equal the plain rules: one cv2.threshold and one cv2.findContours per threshold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from wsolkit.localization import boxes_at_thresholds
from wsolkit.localization.boxes import (
    MAXBOXACC_V2,
    BoxRule,
    Levels,
    grey_levels,
    matched_boxes,
    regions,
    threshold_grid,
)
from wsolkit.metrics.functional import box_iou
from wsolkit.system.compiled import compiled


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


def smooth(rng: np.random.Generator, shape: tuple[int, int], cells: int) -> npt.NDArray[np.float64]:
    coarse = rng.random((cells, cells))
    score = cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.asarray((score - score.min()) / max(float(np.ptp(score)), 1e-12))


def score_maps(shape: tuple[int, int], seed: int) -> Iterator[npt.NDArray[Any]]:
    """Maps of every kind that may go wrong."""
    rng = np.random.default_rng([seed, *shape])
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    yield from (np.zeros(shape), np.ones(shape, np.float32), np.full(shape, rng.random()))
    one_pixel = np.zeros(shape)
    one_pixel[rng.integers(height), rng.integers(width)] = rng.random()
    yield one_pixel
    yield 1 - one_pixel
    stripe = int(rng.integers(1, 4))
    yield (rows // stripe % 2).astype(float) * rng.random()
    yield (columns // stripe % 2) * (1 - rows / height)
    yield ((rows // stripe + columns // stripe) % 2).astype(float)
    yield ((rows + columns) % 2) * rng.random(shape)
    yield rng.random(shape)
    yield rng.integers(0, 2, shape).astype(float)
    yield rng.integers(0, 4, shape) / 3
    yield (rng.random(shape) < 0.7) * rng.random(shape)
    yield smooth(rng, shape, 3)
    yield smooth(rng, shape, 6).astype(np.float32)
    distance = np.hypot(rows - height / 2, columns - width / 2)
    yield np.clip(np.cos(distance * rng.uniform(0.3, 1.5)), 0, 1)  # rings, one in another
    holed = smooth(rng, shape, 5)
    holed[rng.random(shape) < 0.1] *= rng.random()
    yield holed
    border = smooth(rng, shape, 4)
    border[1:-1, 1:-1] *= 0.3  # touches all sides
    yield border
    yield np.minimum(rows, columns) / max(height, width)
    spiral = np.zeros(shape)
    top, left, bottom, right = 0, 0, height - 1, width - 1
    while top <= bottom and left <= right:  # a thin winding line, with gaps
        spiral[top, left : right + 1] = spiral[top : bottom + 1, right] = rng.random()
        spiral[bottom, left : right + 1] = rng.random()
        spiral[top + 2 : bottom + 1, left] = rng.random()
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    yield spiral


SHAPES = [(1, 1), (1, 9), (8, 1), (2, 2), (3, 5), (5, 4), (7, 7), (9, 13), (16, 16), (20, 31), (33, 24)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_equal_the_reference_rule(shape: tuple[int, int]) -> None:
    """About 3,500 maps; order of "all" included."""
    thresholds = threshold_grid(40)
    for seed in range(16):
        for score_map in score_maps(shape, seed):
            largest = boxes_at_thresholds(score_map, thresholds, "largest")
            every = boxes_at_thresholds(score_map, thresholds, "all")
            for threshold, one, several in zip(thresholds, largest, every, strict=True):
                boxes, areas = reference(score_map, threshold)
                assert several.tolist() == boxes
                assert one.tolist() == boxes[int(np.argmax(areas))]


def test_boxes_equal_the_reference_rule_on_large_maps() -> None:
    thresholds = threshold_grid(1000)
    for score_map in score_maps((224, 224), 0):
        largest = boxes_at_thresholds(score_map, thresholds, "largest")
        every = boxes_at_thresholds(score_map, thresholds, "all")
        for place in range(0, 1000, 37):
            boxes, areas = reference(score_map, thresholds[place])
            assert every[place].tolist() == boxes
            assert largest[place].tolist() == boxes[int(np.argmax(areas))]


@pytest.mark.parametrize("shape", [(5, 4), (16, 16), (33, 24)], ids=str)
def test_best_overlap_is_that_over_all_outlines(shape: tuple[int, int]) -> None:
    thresholds = threshold_grid(40)
    rng = np.random.default_rng(0)
    for score_map in score_maps(shape, 1):
        corners = rng.integers(0, min(shape) - 1, (2, 2))
        truth = np.concatenate([corners, corners + rng.integers(0, 9, (2, 2))], axis=1)
        boxes, overlap = matched_boxes(grey_levels(score_map, thresholds), MAXBOXACC_V2, truth)
        every = boxes_at_thresholds(score_map, thresholds, "all")
        assert overlap.tolist() == [box_iou(several, truth).max() for several in every]
        assert [box_iou(box[None], truth).max() for box in boxes] == overlap.tolist()


def most_pixels(binary: Any) -> list[int]:
    """The 8-connected component with the most pixels, of equals the first in raster order: first and last pixel."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(binary.astype(np.uint8), connectivity=8)
    if count == 1:
        return [0, 0, binary.shape[1] - 1, binary.shape[0] - 1]
    labels = labels[stats[:, cv2.CC_STAT_AREA][labels] == stats[1:, cv2.CC_STAT_AREA].max()]
    x, y, w, h, _ = stats[labels[labels > 0][0]]
    return [x, y, x + w - 1, y + h - 1]


def all_pixels(binary: Any) -> list[int]:
    rows, columns = np.nonzero(binary)
    if len(rows) == 0:
        return [0, 0, binary.shape[1] - 1, binary.shape[0] - 1]
    return [columns.min(), rows.min(), columns.max(), rows.max()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("component", "rule"), [("most_pixels", most_pixels), ("all_pixels", all_pixels)])
def test_pixel_rules_equal_opencv(component: Any, rule: Any, shape: tuple[int, int]) -> None:
    grid = threshold_grid(20)
    anything = np.zeros((1, 4), np.int64)
    for seed in range(4):
        for score_map in score_maps(shape, seed):
            # The number of thresholds that a pixel is above.
            levels = Levels(np.searchsorted(grid, score_map, side="left").astype(np.uint16), np.arange(20), 20)
            boxes, _ = matched_boxes(levels, BoxRule(component, "inclusive", "image"), anything)
            assert boxes.tolist() == [rule(score_map > threshold) for threshold in grid]


def test_conventions_of_the_far_corner_and_of_nothing() -> None:
    score_map = np.zeros((10, 12))
    score_map[4:, 8:] = 0.6  # touches the far sides
    score_map[1:3, 2:5] = 0.9
    levels = grey_levels(score_map, np.array([0.5, 0.9, 1.0]))
    anything = np.zeros((1, 4), np.int64)

    def boxes(rule: BoxRule) -> list[list[int]]:
        return matched_boxes(levels, rule, anything)[0].tolist()  # type: ignore[no-any-return]

    assert boxes(BoxRule("largest_outline", "clipped", "zero")) == [[8, 4, 11, 9], [2, 1, 5, 3], [0, 0, 0, 0]]
    assert boxes(BoxRule("most_pixels", "half_open", "image")) == [[8, 4, 12, 10], [2, 1, 5, 3], [0, 0, 12, 10]]
    assert boxes(BoxRule("all_pixels", "inclusive", "one_pixel")) == [[2, 1, 11, 9], [2, 1, 4, 2], [0, 0, 1, 1]]
    assert boxes(BoxRule("largest_outline", "inclusive", "image"))[2] == [0, 0, 11, 9]


def test_of_equal_outlines_opencv_lists_the_last_found_first() -> None:
    score_map = np.zeros((9, 20))
    score_map[1:4, 1:4] = score_map[1:4, 11:14] = score_map[5:8, 5:8] = 1
    assert boxes_at_thresholds(score_map, np.array([0.5]), "largest").tolist() == [[5, 5, 8, 8]]
    levels = Levels((score_map > 0).astype(np.uint8), np.array([0]), 1)
    pixels = matched_boxes(levels, BoxRule("most_pixels", "inclusive", "image"), np.zeros((1, 4), np.int64))[0]
    assert pixels.tolist() == [[1, 1, 3, 3]]  # labels are given in raster order


@pytest.mark.parametrize("count", [1, 20, 100, 200, 1000])
def test_threshold_grid_is_that_of_the_reference(count: int) -> None:
    assert threshold_grid(count).tolist() == np.arange(0, 1, 1 / count).tolist()[:count]


@pytest.mark.parametrize(
    ("score_map", "message"),
    [
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\): expected \[H, W\]"),
        (np.zeros((0, 4)), r"shape \(0, 4\)"),
        (np.zeros((1, 40000)), r"up to 32767 pixels a side"),
        (np.full((4, 4), np.nan), "values from nan to nan"),
        (np.full((4, 4), 1.5), "values from 1.5 to 1.5: expected"),
        (np.full((4, 4), -0.1), "values from -0.1"),
    ],
)
def test_maps_outside_the_range_are_refused(score_map: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boxes_at_thresholds(score_map, np.array([0.5]), "largest")


def test_thresholds_are_of_the_maximum() -> None:
    score_map = np.pad(np.full((2, 2), 0.5), 3)
    boxes = boxes_at_thresholds(score_map, np.array([0.0, 0.99, 1.0, 2.0, 300.0]), "largest")
    assert boxes.tolist() == [[3, 3, 5, 5]] * 2 + [[0, 0, 0, 0]] * 3
    for wrong in (-0.1, np.nan):
        with pytest.raises(ValueError, match="expected \\[0, 1\\], relative to"):
            boxes_at_thresholds(score_map, np.array([0.5, wrong]), "largest")


def test_unknown_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'largest' or 'all'"):
        boxes_at_thresholds(np.zeros((4, 4)), np.array([0.5]), "any")  # type: ignore[call-overload]


def test_without_a_place_for_a_cache_functions_are_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    njit = numba.njit

    def refuse(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", refuse)
    assert compiled(lambda x: x + 1)(2) == 3


@pytest.mark.parametrize("component", ["largest_outline", "all_outlines", "most_pixels", "all_pixels"])
@pytest.mark.parametrize("far_corner", ["clipped", "half_open", "inclusive"])
def test_regions_are_what_the_boxes_are_drawn_around(component: Any, far_corner: Any) -> None:
    rng = np.random.default_rng(3)
    rule = BoxRule(component, far_corner, "zero")
    one = rule._replace(component="largest_outline") if component == "all_outlines" else rule
    past = int(far_corner != "inclusive")
    for _ in range(200):
        score_map = rng.random((int(rng.integers(1, 20)), int(rng.integers(1, 20)))).round(1)
        height, width = score_map.shape
        levels = grey_levels(score_map, np.array([rng.choice([0.0, 0.4, 0.8])]))
        above = levels.level > levels.cuts[0]
        for select in ("largest", "all"):
            found = regions(levels, rule, select)
            assert found.labels.max() == len(found.boxes)
            for number, box in enumerate(found.boxes, start=1):
                rows, columns = np.nonzero(found.labels == number)
                tight = np.array([columns.min(), rows.min(), columns.max() + past, rows.max() + past])
                last = [width - 1, height - 1] * 2 if far_corner == "clipped" else [width, height] * 2
                np.testing.assert_array_equal(box, np.minimum(tight, last))
            if select == "all":
                np.testing.assert_array_equal(found.labels > 0, above)
                assert len(found.boxes) == cv2.connectedComponents(above.astype(np.uint8), connectivity=8)[0] - 1
            elif above.any():
                np.testing.assert_array_equal(found.boxes, matched_boxes(levels, one, np.zeros((1, 4), int))[0])
