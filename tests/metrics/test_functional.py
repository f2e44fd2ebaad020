from __future__ import annotations

import numpy as np
import pytest
import torch

from wsolkit.localization import boxes_at_thresholds
from wsolkit.localization.boxes import (
    MAXBOXACC,
    MAXBOXACC_V2,
    best_iou,
    grey_levels,
    matched_boxes,
    threshold_grid,
)
from wsolkit.metrics import MaxBoxAccuracy, PeakIoU, PixelAveragePrecision, TopKAccuracy
from wsolkit.metrics.functional import (
    box_iou,
    histogram_median,
    in_top_k,
    max_box_accuracy,
    pixel_histogram,
    pixel_iou,
    precision_recall,
    size_bins,
)


def test_iou_counts_both_corners_as_inside() -> None:
    boxes = np.array([[0, 0, 9, 9], [5, 0, 14, 9], [20, 20, 20, 20]])
    assert box_iou(boxes[:1], boxes)[0] == pytest.approx([1.0, 50 / 150, 0.0])


def test_label_among_the_top_k() -> None:
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]])
    assert in_top_k(logits, torch.tensor([2, 1]), 1).tolist() == [False, False]
    assert in_top_k(logits, torch.tensor([2, 1]), 2).tolist() == [True, False]
    assert in_top_k(logits, torch.tensor([2, 1]), 5).tolist() == [True, True]  # fewer classes than k


def test_top_k_accuracy_is_a_percentage() -> None:
    metric = TopKAccuracy(1)
    metric.update(torch.tensor([[2.0, 1.0], [1.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 0, 0]))
    assert metric.compute().item() == pytest.approx(200 / 3)


def test_any_box_may_match_any_ground_truth() -> None:
    score_map = np.zeros((50, 50))
    score_map[0:10, 0:10] = 1.0
    score_map[20:45, 20:45] = 0.6
    small, large = np.array([[0, 0, 10, 10]]), np.array([[20, 20, 45, 45]])
    levels = grey_levels(score_map, threshold_grid(10))
    for truth, rule, expected in (
        (large, MAXBOXACC, [True] * 6 + [False] * 4),  # above 0.6 only the small square is left
        (small, MAXBOXACC, [False] * 6 + [True] * 4),
        (small, MAXBOXACC_V2, [True] * 10),
        (large, MAXBOXACC_V2, [True] * 6 + [False] * 4),
    ):
        assert (matched_boxes(levels, rule, truth)[1] >= 0.8).tolist() == expected


def test_compiled_iou_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 200, (300, 2))
    boxes = np.concatenate([corners, corners + rng.integers(0, 60, (300, 2))], axis=1)
    assert best_iou(boxes[:200], boxes[200:]).tolist() == box_iou(boxes[:200], boxes[200:]).max(axis=1).tolist()


def test_best_is_sought_among_the_admissible_thresholds() -> None:
    correct, thresholds = torch.tensor([[9, 1, 2, 8]]), threshold_grid(4)
    values = max_box_accuracy(correct, torch.tensor(10), (0.5,), thresholds, np.array([False, True, True, False]))
    assert (values["max_box_acc"].item(), values["threshold"].item()) == (20, 0.5)


def test_median_of_a_histogram() -> None:
    values = np.random.default_rng(0).random(2001)
    counts = torch.from_numpy(np.bincount((values * 1000).astype(int), minlength=1000))
    assert histogram_median(counts).item() == pytest.approx(np.median(values), abs=5e-4)
    upper = histogram_median(counts, start=500).item()
    assert upper == pytest.approx(np.median(values[values >= 0.5]), abs=1e-3)
    assert histogram_median(torch.zeros(10)).isnan()


def test_histogram_bins_are_closed_below_and_open_above() -> None:
    scores = torch.tensor([[[0.0, 0.25, 0.5, 0.7499999, 1.0, 0.3]]])
    masks = torch.tensor([[[0, 0, 1, 1, 1, 255]]], dtype=torch.uint8)
    background, objects = pixel_histogram(scores, masks, 4)[0].tolist()
    assert background == [1, 1, 0, 0, 0, 0]
    assert objects == [0, 0, 2, 0, 1, 0]


def test_pixel_metrics_equal_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(3, 16, 16, generator=generator) < 0.3).to(torch.uint8)
    scores = (0.6 * torch.rand(3, 16, 16, generator=generator) + 0.4 * masks).double()
    masks[:, 0] = 255
    counted, truth = masks < 2, masks == 1
    points = []
    for threshold in np.arange(0, 1, 0.001)[::-1]:
        above = (scores >= threshold) & counted
        hits = int((above & truth).sum())
        if above.any():
            points.append(
                (hits / int(truth.sum()), hits / int(above.sum()), hits / int((above | truth).sum()), threshold)
            )
    recall = np.array([0.0] + [p[0] for p in points])
    area = (np.diff(recall) * [p[1] for p in points]).sum()
    best = max(points[::-1], key=lambda point: point[2])

    precision, peak = PixelAveragePrecision(), PeakIoU()
    precision.update(scores, masks)
    peak.update(scores, masks)
    assert precision.compute().item() == pytest.approx(100 * area)
    iou, threshold = peak.compute().tolist()
    assert iou == pytest.approx(100 * best[2])
    at = round(best[3] * 1000)
    assert pixel_iou(peak.histogram)[at].item() == pytest.approx(100 * best[2])
    curves = precision_recall(peak.histogram)
    assert [curve[at].item() for curve in curves] == pytest.approx([100 * best[1], 100 * best[0]])
    assert threshold == pytest.approx(255 * best[3])


def test_state_sums_over_parts_of_a_data_set() -> None:
    rng = np.random.default_rng(0)
    maps, boxes = rng.random((6, 20, 20)), [np.array([[2, 3, 12, 15]])] * 6
    whole = MaxBoxAccuracy(num_thresholds=50)
    whole.update(maps, boxes)
    parts = [MaxBoxAccuracy(num_thresholds=50) for _ in range(2)]
    parts[0].update(maps[:4], boxes[:4])
    parts[1].update(maps[4:], boxes[4:])
    assert torch.equal(parts[0].counts() + parts[1].counts(), whole.counts())


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([np.zeros((1, 4))], "2 score maps with boxes for 1 images"),
        ([np.zeros((1, 4)), np.zeros((0, 4))], "boxes of image 1 have shape \\(0, 4\\)"),
        ([np.zeros(4), np.zeros((1, 4))], "boxes of image 0 have shape \\(4,\\)"),
    ],
)
def test_wrong_boxes_are_refused(boxes: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaxBoxAccuracy().update(torch.zeros(2, 8, 8), boxes)


def test_wrong_masks_and_scores_are_refused() -> None:
    metric = PixelAveragePrecision()
    with pytest.raises(ValueError, match="must have one shape"):
        metric.update(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match="hold NaN"):
        metric.update(torch.full((1, 4, 4), torch.nan), torch.zeros(1, 4, 4))


def test_size_is_a_share_of_the_image_whose_bins_have_sides_in_tenths() -> None:
    boxes = np.array([[0, 0, 0, 0], [0, 0, 19, 10], [0, 0, 20, 10], [0, 0, 90, 90], [0, 0, 99, 99], [0, 0, 100, 100]])
    assert size_bins(boxes, 100, 100).tolist() == [0, 1, 1, 9, 9, 9]
    assert size_bins(boxes[1:3], 20, 10).tolist() == [9, 9]
    assert size_bins(np.array([[5, 5, 15, 15]]), 100, 100).tolist() == [1]  # 1 % belongs to the bin that it begins


@pytest.mark.parametrize("select", ["largest", "all"])
def test_accuracy_by_size_is_what_counting_image_by_image_gives(select: str) -> None:
    """An image belongs to the size of the true box that its own box matches best, at each threshold anew."""
    rng = np.random.default_rng(1)
    side, deltas, taus = 30, (0.3, 0.5, 0.7), threshold_grid(20)
    distance = (np.mgrid[:side, :side][..., None] - rng.uniform(5, 25, (2, 1, 1, 30))) ** 2
    maps = np.exp(-distance.sum(axis=0) / rng.uniform(5, 90, 30)) * rng.uniform(0.8, 1, (side, side, 30))
    maps = maps.transpose(2, 0, 1)  # [30, side, side]
    corners = [rng.integers(0, 20, (1 + index % 3, 2)) for index in range(30)]
    truths = [np.concatenate([c, np.minimum(c + rng.integers(1, 25, c.shape), side - 1)], axis=1) for c in corners]
    images, correct = np.zeros((10, 20)), np.zeros((3, 10, 20))
    for score, truth in zip(maps, truths, strict=True):
        drawn = boxes_at_thresholds(score, taus, select)  # type: ignore[call-overload]
        for step, boxes in enumerate(drawn):
            overlap = box_iou(np.atleast_2d(boxes), truth)
            x0, y0, x1, y1 = truth[overlap.max(axis=0).argmax()]
            size = int(np.sqrt((x1 - x0) * (y1 - y0) / side**2 + 1e-12) * 10)
            images[size, step] += 1
            for row, delta in enumerate(deltas):
                correct[row, size, step] += overlap.max() >= delta
    best = correct.sum(axis=1).argmax(axis=1)
    with np.errstate(invalid="ignore"):
        expected = np.mean([100 * correct[row, :, at] / images[:, at] for row, at in enumerate(best)], axis=0)

    metric = MaxBoxAccuracy("largest" if select == "largest" else "any", deltas, 20)
    for part in (slice(0, 11), slice(11, 30)):
        metric.update(maps[part], truths[part])
    found = metric.compute()
    assert len(np.unique(best)) > 1
    assert np.isnan(expected).any()
    assert found["images_by_size"].tolist() == images[:, best[1]].tolist()
    np.testing.assert_allclose(found["max_box_acc_by_size"], np.nan_to_num(expected))
    assert found["max_box_acc_size_mean"].item() == pytest.approx(np.nanmean(expected))
