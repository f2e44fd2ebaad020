from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from wsolkit.metrics.norms import NORM_BINS, NormHistogram, box_mask


def batch(boxes: list[list[list[int]]], size: tuple[int, int] = (40, 20), mask: torch.Tensor | None = None) -> Any:
    arrays = [np.array(each, np.int64).reshape(-1, 4) for each in boxes]
    return {"boxes": arrays, "size": torch.tensor([size] * len(boxes)), "mask": mask}


def test_positions_belong_to_a_box_by_their_centre() -> None:
    inside = box_mask(np.array([[0, 0, 19, 9], [35, 15, 39, 19]]), image_size=(40, 20), grid=(4, 4))
    assert inside.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    # The first centre is at x = 5, y = 2.5: a box of which it is the last pixel, and one that ends before.
    assert box_mask(np.array([[0, 0, 5, 2]]), (40, 20), (4, 4))[0, 0]
    assert not box_mask(np.array([[0, 0, 4, 2]]), (40, 20), (4, 4)).any()
    assert not box_mask(np.zeros((0, 4), np.int64), (40, 20), (4, 4)).any()


def test_histogram_tells_objects_from_background() -> None:
    norms = torch.zeros(2, 2, 2)
    norms[0] = torch.tensor([[1.0, 0.5], [0.0, 0.011]])
    metric = NormHistogram()
    metric.update(norms, batch([[[0, 0, 19, 9]], []]))  # the second image has no truth
    shares = metric.compute()
    assert shares["norms/object"].nonzero().tolist() == [[NORM_BINS - 1]]
    expected = torch.zeros(NORM_BINS, dtype=torch.float64)
    expected[[0, NORM_BINS // 2]] = torch.tensor([200 / 3, 100 / 3], dtype=torch.float64)
    torch.testing.assert_close(shares["norms/background"], expected)
    metric.update(norms[:1], batch([[[0, 0, 39, 19]]]))
    assert metric.compute()["norms/object"].sum().item() == pytest.approx(100)
    assert metric.histogram.sum() == 8


def test_masks_come_before_boxes_and_ignored_pixels_do_not_count() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, :4, :4], mask[:, 4:, 4:] = 1, 255
    metric = NormHistogram()
    metric.update(torch.full((1, 2, 2), 0.3), batch([[[0, 0, 39, 19]]], mask=mask))
    assert metric.histogram.sum(dim=1).tolist() == [2, 1]


def test_nothing_seen_gives_nothing() -> None:
    metric = NormHistogram()
    metric.update(torch.rand(1, 2, 2), batch([[]]))
    assert metric.compute() == {}
