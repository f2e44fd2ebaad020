"""Otsu's threshold of localization maps, against OpenCV's."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from wsolkit.metrics.map_values import BINS, MapValues, otsu_threshold


@pytest.mark.parametrize("seed", range(5))
def test_threshold_is_opencv_s(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.beta(2, 8, 3000), rng.beta(8, 3, 500 * (seed + 1))]).astype(np.float32)
    metric = MapValues()
    for part in np.array_split(values, 3):
        metric.update(torch.from_numpy(part))
    levels = np.minimum(values * BINS, BINS - 1).astype(np.uint8)[None]
    expected, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)  # Levels above it are object.
    assert metric.compute().item() == pytest.approx((expected + 1) / BINS)


def test_threshold_lies_in_the_middle_of_a_gap() -> None:
    counts = torch.zeros(100, dtype=torch.int64)
    counts[10], counts[70] = 30, 5
    assert otsu_threshold(counts).item() == pytest.approx(0.40)


@pytest.mark.parametrize("values", [[], [0.3, 0.3]])
def test_no_threshold_where_values_do_not_differ(values: list[float]) -> None:
    metric = MapValues()
    metric.update(torch.tensor(values))
    assert metric.compute().isnan()
