"""One pass, every number: against a loop over images that decides each by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from wsolkit.localization import boxes_at_thresholds
from wsolkit.localization.maps import min_max, upsample
from wsolkit.localization.protocol import Protocol
from wsolkit.metrics.evaluation import Evaluation, baseline_map
from wsolkit.metrics.functional import box_iou
from wsolkit.types import EvaluationBatch, Localization

SIZE, CLASSES, IMAGES = 32, 8, 24
RULES = Protocol(SIZE, "bicubic", "largest", (0.3, 0.5, 0.7), 50)


def batch_of(start: int, end: int, with_masks: bool = True) -> tuple[Localization, EvaluationBatch, Tensor]:
    """A part of 24 images of 64×48 pixels with one or two boxes, maps for all classes, and logits often wrong."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(IMAGES, CLASSES, generator=generator)
    label = torch.randint(CLASSES, (IMAGES,), generator=generator)
    maps = torch.rand(IMAGES, CLASSES, 8, 8, generator=generator)
    rng = np.random.default_rng(0)
    boxes = []
    for index in range(IMAGES):
        corners = rng.integers(0, [40, 30], (1 + index % 2, 2))
        boxes.append(np.concatenate([corners, corners + rng.integers(8, 18, corners.shape)], axis=1))
        x0, y0, x1, y1 = boxes[-1][0] / [8, 6, 8, 6]
        maps[index, label[index], int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] += 0.8  # maps that know something
    mask = (torch.rand(IMAGES, SIZE, SIZE, generator=generator) < 0.2).to(torch.uint8)
    part = slice(start, end)
    batch: EvaluationBatch = {
        "image": torch.empty(end - start, 3, SIZE, SIZE),
        "label": label[part],
        "boxes": boxes[part],
        "size": torch.tensor([[64, 48]] * (end - start)),
        "mask": mask[part] if with_masks else None,
        "index": torch.arange(start, end),
    }
    return Localization(logits[part], maps[part]), batch, logits[part]


def evaluate(evaluation: Evaluation, *parts: tuple[int, int], with_masks: bool = True) -> dict[str, float]:
    for start, end in parts:
        (logits, maps), batch, _ = batch_of(start, end, with_masks)
        classes = evaluation.classes(logits, batch["label"])
        chosen = maps.gather(1, classes[:, :, None, None].expand(-1, -1, 8, 8))
        evaluation.update(Localization(logits, chosen), batch)
    return {name: float(value) for name, value in evaluation.compute().items()}


def by_hand(threshold: float) -> dict[str, float]:
    """Each condition at δ = 0.5, image by image."""
    (logits, maps), batch, _ = batch_of(0, IMAGES)
    totals = dict.fromkeys(("gt_known_loc", "top1_loc", "top5_loc", "gt_known_loc_predicted_class"), 0)
    for index in range(IMAGES):
        truth = (batch["boxes"][index] * SIZE / np.array([64, 48, 64, 48])).astype(int)
        order = logits[index].argsort(descending=True).tolist()
        label = int(batch["label"][index])

        def right(which: int, index: int = index, truth: np.ndarray = truth) -> bool:
            score = min_max(upsample(maps[index, which][None], SIZE, "bicubic"))[0].numpy()
            box = boxes_at_thresholds(score, np.array([threshold]), "largest")
            return bool(box_iou(box, truth).max() >= 0.5)

        totals["gt_known_loc"] += right(label)
        totals["gt_known_loc_predicted_class"] += right(order[0])
        totals["top1_loc"] += right(label) and order[0] == label
        totals["top5_loc"] += right(label) and label in order[:5]
    return {name: 100 * count / IMAGES for name, count in totals.items()}


def test_conditions_are_those_decided_image_by_image() -> None:
    values = evaluate(Evaluation({"p": RULES}), (0, 10), (10, 24))
    expected = by_hand(values["p/threshold"])
    assert {name: values[f"p/{name}"] for name in expected} == pytest.approx(expected)
    assert 0 < expected["top1_loc"] < expected["top5_loc"] < expected["gt_known_loc"] < 100
    assert expected["gt_known_loc_predicted_class"] != expected["gt_known_loc"]
    assert values["p/gt_known_loc"] == values["p/max_box_acc"] == values["p/max_box_acc_50"]


def test_threshold_selected_elsewhere_is_the_one_reported_at() -> None:
    evaluation = Evaluation({"p": RULES})
    evaluation.thresholds = {"p": 0.3, "other": 0.1}
    assert evaluation.thresholds == {"p": 0.3}
    values = evaluate(evaluation, (0, 24))
    assert values["p/threshold"] == 0.3
    assert values["p/gt_known_loc"] == pytest.approx(by_hand(0.3)["gt_known_loc"])
    assert values["p/max_box_acc"] >= values["p/gt_known_loc"]  # still the best over all thresholds


def test_numbers_do_not_depend_on_batches_and_are_forgotten_on_reset() -> None:
    evaluation = Evaluation({"p": RULES})
    whole = evaluate(evaluation, (0, 24))
    evaluation.reset()
    assert evaluate(evaluation, (0, 7), (7, 8), (8, 24)) == whole


def test_without_masks_there_are_no_pixel_metrics() -> None:
    values = evaluate(Evaluation({"p": RULES}), (0, 24), with_masks=False)
    assert "p/max_box_acc" in values
    assert not [name for name in values if "pxap" in name or "peak" in name]
    assert set(evaluate(Evaluation({"p": RULES}), (0, 24))) >= set(Evaluation({"p": RULES}).names)


def test_baselines_are_what_their_names_say() -> None:
    full = boxes_at_thresholds(baseline_map("full_image", 32), np.arange(0, 1, 0.1), "largest")
    assert full.tolist() == [[0, 0, 31, 31]] * 10
    centred = boxes_at_thresholds(baseline_map("center_box", 32), np.arange(0, 1, 0.1), "largest")
    widths = centred[:, 2] - centred[:, 0]
    assert (centred[:, :2].sum(axis=1) - centred[:, [1, 0]].sum(axis=1) == 0).all()
    assert (np.diff(widths) < 0).all()
    assert np.abs(centred[1:, [0, 1]] + centred[1:, [2, 3]] - 32).max() <= 1  # around the centre

    values = evaluate(Evaluation({"p": RULES}), (0, 24))
    (_, _), batch, _ = batch_of(0, IMAGES)
    truth = [(boxes * SIZE / np.array([64, 48, 64, 48])).astype(int) for boxes in batch["boxes"]]
    covers = np.mean([box_iou(np.array([[0, 0, 31, 31]]), boxes).max() >= 0.3 for boxes in truth])
    assert values["p/full_image/max_box_acc_30"] == pytest.approx(100 * covers)
    assert values["p/full_image/pxap"] == pytest.approx(100 * float(torch.as_tensor(batch["mask"]).float().mean()))
