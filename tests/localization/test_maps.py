from __future__ import annotations

import cv2
import numpy as np
import torch

from wsolkit.localization.maps import min_max, upsample
from wsolkit.localization.protocol import Protocol

RULES = Protocol(resolution=224, interpolation="bicubic", select="largest", iou_thresholds=(0.5,), num_thresholds=10)


def test_min_max_scales_each_map_by_itself() -> None:
    maps = torch.tensor([[[2.0, 4.0], [3.0, 2.0]], [[-1.0, -1.0], [0.0, 1.0]]])
    expected = [[[0.0, 1.0], [0.5, 0.0]], [[0.0, 0.0], [0.5, 1.0]]]
    assert min_max(maps).tolist() == expected


def test_constant_map_becomes_zero_and_not_nan() -> None:
    assert min_max(torch.full((1, 3, 3), 7.0)).eq(0).all()


def test_upsampling_is_that_of_opencv() -> None:
    maps = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0))
    for interpolation, flag in (("bicubic", cv2.INTER_CUBIC), ("bilinear", cv2.INTER_LINEAR)):
        expected = np.stack([cv2.resize(m, (224, 224), interpolation=flag) for m in maps.numpy()])
        actual = upsample(maps, 224, interpolation)  # type: ignore[arg-type]
        assert np.abs(actual.numpy() - expected).max() < 1e-5


def test_ground_truth_is_scaled_and_truncated() -> None:
    boxes = np.array([[10, 20, 499, 374], [0, 0, 500, 375]])
    assert RULES.scale_boxes(boxes, 500, 375).tolist() == [[4, 11, 223, 223], [0, 0, 224, 224]]
