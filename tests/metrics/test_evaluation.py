"""One pass, every number: against plain OpenCV, image by image and threshold by threshold."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import protocol
from wsolkit.data.records import FileRecords, file_records
from wsolkit.localization import boxes_at_thresholds
from wsolkit.localization.maps import central_crop, min_max, ten_crops
from wsolkit.localization.protocol import Protocol
from wsolkit.metrics import MaxBoxAccuracy
from wsolkit.metrics.baselines import BASELINES, baseline_map
from wsolkit.metrics.boxes import CONDITIONS, NUM_EXTREMES
from wsolkit.metrics.errors import ERRORS, localization_errors
from wsolkit.metrics.evaluation import Evaluation, outcome
from wsolkit.metrics.functional import box_iou
from wsolkit.metrics.map_values import MapValues
from wsolkit.training.evaluator import check_monitor
from wsolkit.types import Classes, EvaluationBatch, Localization

SIZE, RESIZE, CLASSES, IMAGES, WIDTH, HEIGHT = 32, 40, 8, 40, 64, 48
NAMES = ("maxboxacc", "maxboxacc_v2", "ts_cam", "scm", "sat", "spa")


def rules(name: str, **changes: object) -> Protocol:
    return protocol(name, resolution=SIZE, resize=RESIZE, num_thresholds=20, **changes)


class Network:
    """Stands for a method: its score maps and logits are the pixels of what it is shown."""

    def __init__(self) -> None:
        self.calls = 0

    def classify(self, image: Tensor) -> Tensor:
        """Average over 8 strips: [B, 3, S, S] → [B, 8]."""
        logits: Tensor = image[:, 0].unflatten(1, (8, -1)).mean(dim=(2, 3))
        return logits

    def maps(self, image: Tensor) -> Tensor:
        """Maps of all classes [B, 8, 8, 8]."""
        pooled = torch.nn.functional.avg_pool2d(image[:, 1], image.shape[-1] // 8)
        return torch.stack([pooled.roll(shift, dims=2) for shift in (0, 0, 0, 1, 2, 3, 4, 5)], dim=1)

    def localize(self, image: Tensor, classes: Classes) -> Localization:
        self.calls += 1
        logits = self.classify(image)
        assert callable(classes)
        chosen = classes(logits)
        return Localization(logits, self.maps(image).gather(1, chosen[:, :, None, None].expand(-1, -1, 8, 8)))


def batch_of(start: int, end: int, with_masks: bool = True, with_boxes: bool = True) -> EvaluationBatch:
    """A part of 40 images of 64×48 pixels with one or two boxes, some brighter in them, labels often wrong."""
    rng = np.random.default_rng(0)
    boxes, labels, images, uncropped = [], [], [], []
    for index in range(IMAGES):
        corners = rng.integers(0, [40, 30], (1 + index % 2, 2))
        boxes.append(np.concatenate([corners, corners + rng.integers(8, 24, corners.shape)], axis=1))
        boxes[-1] = np.minimum(boxes[-1], [WIDTH - 1, HEIGHT - 1] * 2)
        picture = rng.random((HEIGHT, WIDTH, 3))
        for x0, y0, x1, y1 in boxes[-1][:1]:
            picture[y0 : y1 + 1, x0 : x1 + 1, 1] += rng.uniform(0.2, 2)
        images.append(torch.from_numpy(cv2.resize(picture, (SIZE, SIZE))).permute(2, 0, 1))
        uncropped.append(torch.from_numpy(cv2.resize(picture, (RESIZE, RESIZE))).permute(2, 0, 1))
        labels.append(int(rng.integers(CLASSES)))
    logits = Network().classify(torch.stack(images).float())
    for index in range(0, IMAGES, 3):
        labels[index] = int(logits[index].argmax())
    part = slice(start, end)
    masks = torch.from_numpy((rng.random((IMAGES, RESIZE, RESIZE)) < 0.2).astype(np.uint8))
    return {
        "image": torch.stack(images).float()[part],
        "label": torch.tensor(labels)[part],
        "boxes": [b if with_boxes else b[:0] for b in boxes[part]],
        "uncut_boxes": [b if with_boxes else b[:0] for b in boxes[part]],
        "size": torch.tensor([[WIDTH, HEIGHT]] * (end - start)),
        "mask": masks[part, :SIZE, :SIZE] if with_masks else None,
        "index": torch.arange(start, end),
        "uncropped": torch.stack(uncropped).float()[part],
        "uncropped_mask": masks[part] if with_masks else None,
    }


def run(evaluation: Evaluation, *parts: tuple[int, int], **options: bool) -> tuple[dict[str, float], dict[str, Any]]:
    network = Network()
    for start, end in parts or ((0, IMAGES),):
        evaluation.update(batch_of(start, end, **options), network.localize, network.classify)
    return outcome(evaluation.compute())


def plain_boxes(p: Protocol, score: Any, threshold: float) -> Any:
    """All boxes at one threshold, by the rule as its paper words it."""
    height, width = score.shape
    if p.threshold_rule == "relative_8_bit":
        grey = (score * 255).astype(np.uint8)
        above = grey > int(threshold * grey.max())
    else:
        above = score.astype(float) > threshold if p.threshold_rule == "above" else score.astype(float) >= threshold
    if not above.any():
        full = [0, 0, width, height] if p.far_corner == "half_open" else [0, 0, width - 1, height - 1]
        return np.array([{"zero": [0, 0, 0, 0], "one_pixel": [0, 0, 1, 1], "image": full}[p.empty]])
    if p.component == "all_pixels":
        rows, columns = np.nonzero(above)
        return np.array([[columns.min(), rows.min(), columns.max(), rows.max()]])
    if p.component == "most_pixels":
        stats = cv2.connectedComponentsWithStats(above.astype(np.uint8), connectivity=8)[2][1:]
        rectangles = [stats[stats[:, cv2.CC_STAT_AREA].argmax(), :4]]
    else:
        contours = cv2.findContours(above.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        contours = contours if p.component == "all_outlines" else [max(contours, key=cv2.contourArea)]
        rectangles = [cv2.boundingRect(contour) for contour in contours]
    boxes = [[x, y, x + w, y + h] for x, y, w, h in rectangles]
    return np.minimum(boxes, [width - 1, height - 1] * 2) if p.far_corner == "clipped" else np.array(boxes)


def by_hand(p: Protocol) -> dict[str, Any]:
    """For each condition the share of right images at each threshold, and the error analysis."""
    batch = batch_of(0, IMAGES)
    image = batch["image"] if p.input == "resize" else central_crop(batch["uncropped"], SIZE)  # type: ignore[arg-type]
    network = Network()
    logits, maps = network.classify(image), network.maps(image)
    if p.classification == "ten_crop":
        crops = ten_crops(batch["uncropped"], SIZE)  # type: ignore[arg-type]
        logits = torch.stack([network.classify(crop).softmax(1) for crop in crops]).mean(0)
    right: dict[str, list[Any]] = {name: [] for name in CONDITIONS}
    errors, ious = [], []
    side = (HEIGHT, WIDTH) if p.frame == "original" else (SIZE, SIZE)
    for index in range(IMAGES):
        order = logits[index].argsort(descending=True).tolist()
        label = int(batch["label"][index])
        truth = p.truth(batch["boxes"][index], WIDTH, HEIGHT)

        def curve(which: int, index: int = index, truth: Any = truth) -> tuple[Any, list[Any]]:
            score = p.localization_maps(maps[index, which][None], side)[0].numpy()
            every = [plain_boxes(p, score, threshold) for threshold in p.thresholds]
            overlaps = [box_iou(boxes, truth).max(axis=1) for boxes in every]
            best = [boxes[overlap.argmax()] for boxes, overlap in zip(every, overlaps, strict=True)]
            return np.array([overlap.max() for overlap in overlaps]), best

        def judge(overlap: Any, comparison: str) -> Any:
            return overlap >= 0.5 if comparison == "at_least" else overlap > 0.5

        (own, boxes), (predicted, _) = curve(label), curve(order[0])
        right["gt_known_loc"].append(judge(own, p.gt_known_comparison))
        right["gt_known_loc_predicted_class"].append(judge(predicted, p.gt_known_comparison))
        right["top1_loc"].append(judge(own, p.top_k_comparison) & (order[0] == label))
        five = own if p.top5_map == "label" else predicted
        right["top5_loc"].append(judge(five, p.top_k_comparison) & (label in order[:5]))
        kinds = localization_errors(np.array(boxes), truth)
        errors.append(kinds if order[0] == label else np.full(len(kinds), ERRORS.index("cls")))
        ious.append(own)
    curves = {name: 100 * np.mean(rows, axis=0) for name, rows in right.items()}
    top = [100 * np.mean([int(batch["label"][i]) in row for i, row in enumerate(logits.topk(k).indices.tolist())]) for k in (1, 5)]  # fmt: skip
    return curves | {"errors": np.array(errors), "ious": np.array(ious), "top1_cls": top[0], "top5_cls": top[1]}


@pytest.mark.parametrize("name", NAMES)
def test_every_protocol_is_what_plain_opencv_gives(name: str) -> None:
    p = rules(name)
    results, curves = run(Evaluation({name: p}, CLASSES), (0, 10), (10, 11), (11, 40))
    expected = by_hand(p)
    own = "gt_known_loc_predicted_class" if name == "scm" else "gt_known_loc"
    main = int(expected[own].argmax())
    assert results[f"{name}/threshold"] == p.thresholds[main]
    for condition in CONDITIONS:
        at = int(expected[condition].argmax()) if name == "scm" else main
        assert results[f"{name}/{condition}"] == pytest.approx(expected[condition][at])
        key = "gt_known_loc_50" if condition == "gt_known_loc" else condition
        assert curves[f"{name}/curves/{key}"] == pytest.approx(expected[condition])
    assert results[f"{name}/max_box_acc"] == pytest.approx(expected["gt_known_loc"].max())
    for kind, error in enumerate(ERRORS):
        share = 100 * np.mean(expected["errors"][:, main] == kind)
        assert results[f"{name}/error_{error}"] == pytest.approx(share)
    ious = expected["ious"][:, main]
    assert results[f"{name}/iou_median"] == pytest.approx(100 * np.sort(ious)[(IMAGES - 1) // 2], abs=0.051)
    assert curves[f"{name}/iou_histogram"] == np.bincount((ious * 100).clip(max=99).astype(int), minlength=100).tolist()
    assert [results[f"{name}/top{k}_cls"] for k in (1, 5)] == pytest.approx(
        [expected["top1_cls"], expected["top5_cls"]]
    )
    assert curves[f"{name}/worst_images"] == sorted(range(IMAGES), key=lambda i: (round(ious[i], 9), i))[:NUM_EXTREMES]
    assert curves[f"{name}/best_images"] == sorted(range(IMAGES), key=lambda i: (-round(ious[i], 9), i))[:NUM_EXTREMES]


def test_the_cases_differ() -> None:
    """The data above tells the rules apart."""
    expected = by_hand(rules("maxboxacc"))
    at = int(expected["gt_known_loc"].argmax())
    assert 0 < expected["top1_loc"][at] < expected["top5_loc"][at] < expected["gt_known_loc"][at] < 100
    assert expected["gt_known_loc_predicted_class"][at] != expected["gt_known_loc"][at]
    assert len({tuple(by_hand(rules(name))["gt_known_loc"]) for name in NAMES}) == len(NAMES)
    assert len(np.unique(expected["errors"])) >= 4


def test_several_protocols_in_one_pass_are_what_each_gives_alone() -> None:
    together, curves = run(Evaluation({name: rules(name) for name in NAMES}, CLASSES))
    for name in NAMES:
        alone, alone_curves = run(Evaluation({name: rules(name)}, CLASSES))
        assert {key: together[key] for key in alone if "/" in key} == pytest.approx(
            {key: value for key, value in alone.items() if "/" in key}, nan_ok=True
        )
        for key, values in alone_curves.items():
            np.testing.assert_array_equal(curves[key], values, err_msg=key)


def test_whole_evaluation_can_be_pickled_and_copied() -> None:
    evaluation = Evaluation({"p": rules("maxboxacc")}, CLASSES)
    expected = run(evaluation)[0]
    evaluation.reset()
    for other in (pickle.loads(pickle.dumps(evaluation)), copy.deepcopy(evaluation)):
        assert run(other)[0] == pytest.approx(expected)


def test_error_while_counting_is_raised_once_and_forgotten() -> None:
    evaluation = Evaluation({"p": rules("maxboxacc")}, 2)  # the data has 8 classes
    network = Network()
    evaluation.update(batch_of(0, IMAGES), network.localize, network.classify)
    with pytest.raises(IndexError):
        evaluation.compute()
    evaluation.reset()


def test_threshold_is_not_said_to_be_from_a_split_that_had_no_boxes() -> None:
    evaluation = Evaluation({"p": rules("maxboxacc")}, CLASSES)
    evaluation.select(run(evaluation, with_boxes=False)[0])
    assert evaluation.chosen_on(held_out=True) == {"p": "test"}


def test_the_network_sees_each_input_once() -> None:
    network = Network()
    evaluation = Evaluation({name: rules(name) for name in NAMES}, CLASSES)
    evaluation.update(batch_of(0, 4), network.localize, network.classify)
    assert network.calls == 2  # resized, and the centre of the larger one


def test_table_by_class_is_that_of_its_images() -> None:
    results, curves = run(Evaluation({"p": rules("maxboxacc")}, CLASSES))
    label = batch_of(0, IMAGES)["label"].numpy()
    images = np.array(curves["p/per_class/images"])
    assert images.tolist() == np.bincount(label, minlength=CLASSES).tolist()
    for metric in ("gt_known_loc", "top1_loc", "top1_cls"):
        shares = np.nan_to_num(curves[f"p/per_class/{metric}"])
        assert (shares * images).sum() / IMAGES == pytest.approx(results[f"p/{metric}"])


def test_threshold_selected_elsewhere_is_the_one_reported_at() -> None:
    evaluation = Evaluation({"p": rules("maxboxacc"), "scm": rules("scm")}, CLASSES)
    evaluation.thresholds = {"p/gt_known_loc": 0.3, "scm/top1_loc": 0.6, "other/top1_loc": 0.1}
    assert evaluation.thresholds == {"p/gt_known_loc": 0.3, "scm/top1_loc": 0.6}
    results, _ = run(evaluation)
    assert results["p/threshold"] == pytest.approx(0.3)
    assert results["p/gt_known_loc"] == pytest.approx(by_hand(rules("maxboxacc"))["gt_known_loc"][6])
    assert results["p/top1_loc"] == pytest.approx(by_hand(rules("maxboxacc"))["top1_loc"][6])
    assert results["scm/top1_loc"] == pytest.approx(by_hand(rules("scm"))["top1_loc"][12])
    assert results["p/max_box_acc"] >= results["p/gt_known_loc"]  # still the best over all thresholds


def test_selection_takes_over_the_best_thresholds() -> None:
    evaluation = Evaluation({"p": rules("maxboxacc"), "scm": rules("scm")}, CLASSES)
    results, _ = run(evaluation)
    evaluation.select(results)
    chosen = evaluation.thresholds
    assert {chosen[f"p/{condition}"] for condition in CONDITIONS} == {results["p/threshold"]}
    assert chosen["scm/top5_loc"] == results["scm/threshold_top5_loc"]
    assert evaluation.chosen_on(held_out=True) == {"p": "val", "scm": "val"}
    assert evaluation.chosen_on(held_out=False) == {"p": "test", "scm": "test"}


def test_fixed_and_test_selected_thresholds_ignore_the_other_split() -> None:
    protocols = {"fixed": rules("maxboxacc", threshold=0.4), "best": rules("maxboxacc", selection="test")}
    evaluation = Evaluation(protocols, CLASSES)
    evaluation.thresholds = {"fixed/gt_known_loc": 0.1, "best/gt_known_loc": 0.1}
    results, _ = run(evaluation)
    assert results["fixed/threshold"] == pytest.approx(0.4)
    assert results["best/gt_known_loc"] == results["best/max_box_acc"]
    assert evaluation.chosen_on(held_out=True) == {"fixed": "fixed", "best": "test"}


def pseudo(boxes: dict[int, list[list[int]]]) -> FileRecords:
    """Pseudo boxes of some of the images."""
    ids = [str(index) for index in range(IMAGES)]
    sizes = np.array([[WIDTH, HEIGHT]] * IMAGES)
    named = {ids[index]: own for index, own in boxes.items()}
    return file_records(Path(), ids, [0] * IMAGES, [str(label) for label in range(CLASSES)], named, sizes)


@pytest.mark.parametrize("name", ["maxboxacc", "scm", "spa"])
def test_pseudo_boxes_select_as_ground_truth_would_that_is_like_them(name: str) -> None:
    """The held-out split has pseudo boxes of 30 images, and other ground truth. Numbers of the test stay its own."""
    other = {index: [[0, 0, WIDTH - 9 + index % 9, HEIGHT - 1], [0, 0, 9, 9]][: 1 + index % 2] for index in range(30)}
    alone = Evaluation({"p": rules(name)}, CLASSES)
    network = Network()
    batch = batch_of(0, 30)
    batch["boxes"] = batch["uncut_boxes"] = [np.array(other[index]) for index in range(30)]
    alone.update(batch, network.localize, network.classify)
    like_them, by_truth = outcome(alone.compute()).results, run(Evaluation({"p": rules(name)}, CLASSES))[0]
    assert like_them["p/threshold"] != by_truth["p/threshold"]

    evaluation = Evaluation({"p": rules(name, selection="pseudo")}, CLASSES)
    evaluation.pseudo_boxes = pseudo(other)
    held_out = run(evaluation, (0, 10), (10, IMAGES))[0]
    assert held_out["p/pseudo_max_box_acc"] == pytest.approx(like_them["p/max_box_acc"])
    assert held_out["p/max_box_acc"] == by_truth["p/max_box_acc"]
    evaluation.select(held_out)
    evaluation.reset()
    evaluation.pseudo_boxes = None
    assert evaluation.chosen_on(held_out=True) == {"p": "pseudo"}
    results, _ = run(evaluation)
    assert results["p/threshold"] == results["p/threshold_by_pseudo"] == like_them["p/threshold"]
    assert results["p/threshold_by_truth"] == results["p/threshold_by_best"] == by_truth["p/threshold"]
    own = "gt_known_loc_predicted_class" if name == "scm" else "gt_known_loc"
    assert results["p/gt_known_loc_by_best"] == by_truth[f"p/{own}"] >= results["p/gt_known_loc_by_pseudo"]
    assert not [key for key in results if key.startswith("p/pseudo")]


def test_pseudo_boxes_select_where_there_is_no_ground_truth_at_all() -> None:
    evaluation = Evaluation({"p": rules("maxboxacc", selection="pseudo")}, CLASSES)
    evaluation.pseudo_boxes = pseudo({0: [[5, 5, 30, 30]], 7: [[0, 0, 20, 20]]})
    held_out = run(evaluation, with_boxes=False, with_masks=False)[0]
    assert set(held_out) >= {"p/pseudo_max_box_acc", "p/pseudo_threshold"}
    assert not [key for key in held_out if "loc" in key]
    evaluation.select(held_out)
    evaluation.reset()
    evaluation.pseudo_boxes = None
    results, _ = run(evaluation, with_boxes=False, with_masks=False)
    assert results["p/threshold_by_pseudo"] == held_out["p/pseudo_threshold"]
    assert "p/threshold" not in results


def test_pseudo_boxes_and_maps_of_another_program_give_the_same() -> None:
    boxes = {index: [[5, 5, 30, 30 + index % 9]] for index in range(20)}
    saved: list[Tensor] = []
    own, other = (Evaluation({"p": rules("maxboxacc", selection="pseudo")}, CLASSES) for _ in range(2))
    own.pseudo_boxes = other.pseudo_boxes = pseudo(boxes)
    own.on_maps = lambda batch, maps: saved.extend(maps)
    expected = run(own)[0]
    other.update_maps(batch_of(0, IMAGES), saved)
    assert outcome(other.compute()).results["p/pseudo_max_box_acc"] == expected["p/pseudo_max_box_acc"]


def test_without_boxes_the_maps_choose_the_threshold() -> None:
    """Of the split that selects, or else of the split itself."""
    evaluation = Evaluation({"p": rules("maxboxacc")}, CLASSES, threshold_by_maps=True)
    held_out, _ = run(evaluation, (0, 20), with_boxes=False)
    expected = MapValues()
    saved: list[Tensor] = []
    again = Evaluation({"p": rules("maxboxacc")}, CLASSES, threshold_by_maps=True)
    again.on_maps = lambda batch, maps: saved.extend(maps)
    run(again, (0, 20), with_boxes=False)
    expected.update(torch.stack(saved))
    assert held_out["p/threshold_by_maps"] == expected.compute().item()
    evaluation.select(held_out)
    assert evaluation.thresholds == {"p/by_maps": held_out["p/threshold_by_maps"]}
    with_boxes, _ = run(Evaluation({"p": rules("maxboxacc")}, CLASSES, threshold_by_maps=True), (0, 20))
    without_values, _ = run(Evaluation({"p": rules("maxboxacc")}, CLASSES), (0, 20), with_boxes=False)
    assert not {"p/threshold_by_maps"} & (with_boxes.keys() | without_values.keys())


def test_classification_selects_the_threshold_by_the_maps() -> None:
    evaluation = Evaluation({"p": rules("maxboxacc", selection="classification")}, CLASSES, threshold_by_maps=True)
    held_out = run(evaluation)[0]
    evaluation.select(held_out)
    by_maps = held_out["p/threshold_by_maps"]
    assert evaluation.thresholds == {"p/by_truth": held_out["p/threshold_by_best"], "p/by_maps": by_maps}
    assert evaluation.chosen_on(held_out=True) == {"p": "maps"}
    evaluation.reset()
    results, curves = run(evaluation)
    place = round(results["p/threshold"] * 20)
    assert abs(results["p/threshold"] - by_maps) <= 1 / 40
    assert results["p/threshold"] == results["p/threshold_by_classification"]
    assert results["p/gt_known_loc"] == curves["p/curves/gt_known_loc_50"][place]
    assert results["p/gt_known_loc_by_truth"] == max(curves["p/curves/gt_known_loc_50"])
    by_default = Evaluation({"p": rules("maxboxacc", selection="classification")}, CLASSES)
    assert run(by_default, (0, 4))[0]["p/threshold"] == pytest.approx(0.3)
    assert by_default.chosen_on(held_out=True) == {"p": "default"}
    fixed = Evaluation({"p": rules("maxboxacc", selection="classification", threshold=0.4)}, CLASSES)
    assert run(fixed, (0, 4))[0]["p/threshold"] == pytest.approx(0.4)
    assert fixed.chosen_on(held_out=True) == {"p": "fixed"}


def test_accuracy_by_size_is_that_of_the_metric_by_itself() -> None:
    """For images as large as the maps, with the same boxes."""
    maps = torch.rand(IMAGES, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    batch = batch_of(0, IMAGES)
    batch["size"] = torch.full((IMAGES, 2), SIZE)
    batch["boxes"] = [boxes % SIZE for boxes in batch["boxes"]]
    batch["boxes"] = [
        np.concatenate([np.minimum(b[:, :2], b[:, 2:]), b.reshape(-1, 2, 2).max(1)], 1) for b in batch["boxes"]
    ]
    evaluation = Evaluation({"p": rules("maxboxacc")}, CLASSES)
    evaluation.update_maps(batch, list(maps))
    results, curves = outcome(evaluation.compute())
    metric = MaxBoxAccuracy(num_thresholds=20)
    metric.update(maps, batch["boxes"])
    expected = metric.compute()
    assert results["p/max_box_acc_size_mean"] == pytest.approx(expected["max_box_acc_size_mean"].item())
    assert curves["p/images_by_size"] == expected["images_by_size"].tolist()
    np.testing.assert_allclose(curves["p/max_box_acc_by_size"], expected["max_box_acc_by_size"])


@pytest.mark.parametrize(
    ("selection", "monitor"),
    [("val", "p/max_box_acc"), ("pseudo", "p/pseudo_max_box_acc"), ("classification", "top1_cls")],
)
def test_checkpoint_is_chosen_by_what_the_run_selects_by(selection: str, monitor: str) -> None:
    evaluation = Evaluation({"p": rules("maxboxacc", selection=selection)}, CLASSES)
    records = pseudo({0: [[0, 0, 3, 3]]})
    assert check_monitor(None, evaluation, records) == monitor
    assert check_monitor("p/pxap", evaluation, records) == "p/pxap"
    assert monitor in evaluation.names


def test_numbers_do_not_depend_on_batches_and_are_forgotten_on_reset() -> None:
    evaluation = Evaluation({"p": rules("maxboxacc")}, CLASSES)
    whole = run(evaluation)
    evaluation.reset()
    again = run(evaluation, (0, 7), (7, 8), (8, 40))
    assert again[0] == pytest.approx(whole[0])
    for key, values in whole[1].items():
        np.testing.assert_array_equal(again[1][key], values, err_msg=key)


def test_without_masks_there_are_no_pixel_metrics_and_without_boxes_no_others() -> None:
    with_both = run(Evaluation({"p": rules("maxboxacc")}, CLASSES))[0]
    assert set(with_both) >= set(Evaluation({"p": rules("maxboxacc")}, CLASSES).names)
    boxes = run(Evaluation({"p": rules("maxboxacc")}, CLASSES), with_masks=False)[0]
    masks = run(Evaluation({"p": rules("maxboxacc")}, CLASSES), with_boxes=False)[0]
    assert not [name for name in boxes if "pxap" in name or "peak" in name]
    assert not [name for name in masks if "loc" in name or "error" in name]
    assert with_both == boxes | masks


def test_images_without_boxes_are_left_out_of_box_metrics() -> None:
    evaluation = Evaluation({"p": rules("maxboxacc")}, CLASSES)
    network = Network()
    batch = batch_of(0, IMAGES)
    for index in range(1, IMAGES, 2):
        batch["boxes"][index] = np.zeros((0, 4), np.int64)
    evaluation.update(batch, network.localize, network.classify)
    results, curves = outcome(evaluation.compute())
    assert sum(curves["p/per_class/images"]) == IMAGES / 2
    expected = by_hand(rules("maxboxacc"))
    assert results["p/top1_cls"] == pytest.approx(expected["top1_cls"])  # counts all


def test_mask_iou_by_size_is_that_of_each_image() -> None:
    p = rules("maxboxacc")
    results, curves = run(Evaluation({"p": p}, CLASSES))
    batch = batch_of(0, IMAGES)
    maps = p.localization_maps(Network().maps(batch["image"])[range(IMAGES), batch["label"]])
    above = maps.double() >= results["p/peak_threshold"] / 255
    assert batch["mask"] is not None
    truth = batch["mask"].eq(1)
    iou = ((above & truth).sum((1, 2)) / (above | truth).sum((1, 2))).numpy()
    expected = np.zeros((20, 20))
    share = truth.float().mean((1, 2)).numpy()
    np.add.at(expected, ((share * 20).astype(int), (iou * 20).astype(int)), 1)
    assert curves["p/mask_iou_by_size"] == expected.tolist()
    assert results["p/peak_iou"] == pytest.approx(100 * float((above & truth).sum() / (above | truth).sum()))


def test_maps_of_another_program_give_what_the_network_s_own_maps_give() -> None:
    p = rules("maxboxacc")
    saved: list[Tensor] = []
    own = Evaluation({"p": p}, CLASSES)
    own.on_maps = lambda batch, maps: saved.extend(maps)
    expected, expected_curves = run(own)
    assert saved[0].shape == (SIZE, SIZE)
    other = Evaluation({"p": p}, CLASSES)
    other.update_maps(batch_of(0, 25), saved[:25])
    other.update_maps(batch_of(25, IMAGES), saved[25:])
    results, curves = outcome(other.compute())
    assert "top1_cls" not in results
    assert "p/top1_loc" not in results
    shared = {name for name in results if "error" not in name}
    assert {name: results[name] for name in shared} == pytest.approx({name: expected[name] for name in shared})
    assert curves["p/curves/gt_known_loc_50"] == expected_curves["p/curves/gt_known_loc_50"]
    assert results["p/error_cls"] == 0
    assert sum(results[f"p/error_{name}"] for name in ERRORS) == pytest.approx(100)


def test_maps_may_be_at_the_original_size_where_they_are_judged_there() -> None:
    evaluation = Evaluation({"spa": rules("spa")}, CLASSES)
    assert evaluation.map_sizes(batch_of(0, 1)) == [{(SIZE, SIZE), (HEIGHT, WIDTH)}]
    evaluation.update_maps(batch_of(0, 2), [torch.rand(SIZE, SIZE), torch.rand(HEIGHT, WIDTH)])
    assert outcome(evaluation.compute()).results["spa/gt_known_loc"] >= 0
    both = Evaluation({"spa": rules("spa"), "scm": rules("scm")}, CLASSES)
    assert both.map_sizes(batch_of(0, 1)) == [{(SIZE, SIZE)}]


def test_baselines_are_what_their_names_say() -> None:
    full = boxes_at_thresholds(baseline_map("full_image", 32), np.arange(0, 1, 0.1), "largest")
    assert full.tolist() == [[0, 0, 31, 31]] * 10
    for name in ("center_box", "gaussian"):
        centred = boxes_at_thresholds(baseline_map(name, 32), np.arange(0, 1, 0.1), "largest")
        widths = centred[:, 2] - centred[:, 0]
        assert (np.diff(widths) <= 0).all()
        assert widths[0] > 29
        assert widths[-1] < 9
        assert np.abs(centred[1:, [0, 1]] + centred[1:, [2, 3]] - 32).max() <= 1  # around the centre
    rows = np.arange(32) - 15.5
    assert np.corrcoef(np.log(baseline_map("gaussian", 32)[0]), rows**2)[0, 1] == pytest.approx(-1)


@pytest.mark.parametrize("name", NAMES)
def test_baselines_are_judged_by_the_same_rules(name: str) -> None:
    p = rules(name)
    results, curves = run(Evaluation({name: p}, CLASSES))
    batch = batch_of(0, IMAGES)
    side = (HEIGHT, WIDTH) if p.frame == "original" else (SIZE, SIZE)
    for baseline in BASELINES:
        score = cv2.resize(baseline_map(baseline, SIZE).astype(np.float32), side[::-1], interpolation=cv2.INTER_LINEAR)
        right = []
        for boxes in batch["boxes"]:
            truth = p.truth(boxes, WIDTH, HEIGHT)
            overlap = [box_iou(plain_boxes(p, score, threshold), truth).max() for threshold in p.thresholds]
            right.append(np.array(overlap) >= 0.5 if p.gt_known_comparison == "at_least" else np.array(overlap) > 0.5)
        assert curves[f"{name}/{baseline}/curves/gt_known_loc_50"] == pytest.approx(100 * np.mean(right, axis=0))
        assert results[f"{name}/{baseline}/max_box_acc"] == pytest.approx(100 * np.mean(right, axis=0).max())
    if p.input == "resize":
        assert results[f"{name}/full_image/pxap"] == pytest.approx(100 * float(batch["mask"].float().mean()))  # type: ignore[union-attr]


def test_constant_map_is_legal_and_an_outcome_like_any_other() -> None:
    constant = min_max(torch.full((1, 8, 8), 3.0))[0]
    for name in NAMES:
        evaluation = Evaluation({name: rules(name)}, CLASSES)
        evaluation.update_maps(batch_of(0, 1), [torch.nn.functional.pad(constant, (0, 24, 0, 24))])
        assert outcome(evaluation.compute()).results[f"{name}/error_correct"] in (0, 100)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["maps", "logits", "both"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_counts_as_wrong(name: str, what: str, value: float) -> None:
    """Even where nothing above the threshold makes the whole image the box, and where that box is right."""

    class Broken(Network):
        def classify(self, image: Tensor) -> Tensor:
            logits = super().classify(image)
            logits[1, 2] = value if what != "maps" else logits[1, 2]
            return logits

        def maps(self, image: Tensor) -> Tensor:
            maps = super().maps(image)
            maps[1, :, 3, 4] = value if what != "logits" else maps[1, :, 3, 4]
            return maps

    batch = batch_of(0, 3)
    batch["boxes"] = [np.array([[0, 0, WIDTH - 1, HEIGHT - 1]])] * 3
    batch["label"] = Network().classify(batch["image"]).argmax(dim=1)
    evaluation, broken = Evaluation({name: rules(name)}, CLASSES), Broken()
    seen: list[Any] = []
    evaluation.protocols[name].boxes.on_verdicts = seen.append
    evaluation.update(batch, broken.localize, broken.classify)
    results, curves = outcome(evaluation.compute())
    assert results["not_finite"] == 1
    assert curves["not_finite_images"] == [1, -1, -1, -1, -1]
    (verdicts,) = seen
    if what != "logits":
        assert (verdicts.iou[1] == 0).all()
        assert (verdicts.predicted_iou[1] == 0).all()
        assert (verdicts.error[1] == ERRORS.index("other")).all()
    if what != "maps":
        assert not verdicts.top1[1]
        assert not verdicts.top5[1]
        assert results["top1_cls"] < 100
    whole = evaluation.protocols[name].protocol.empty == "image"
    assert not whole or (verdicts.iou[0] > 0).any()
    evaluation.reset()
    evaluation.update(batch_of(0, 3), Network().localize, Network().classify)
    assert "not_finite" not in evaluation.compute()
