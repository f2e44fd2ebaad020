"""Box metrics: MaxBoxAcc (Choe et al., CVPR 2020), its V2 from the journal version, and what else papers report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric

from wsolkit.localization.boxes import MAXBOXACC, MAXBOXACC_V2, best_match, grey_levels, matched_boxes, threshold_grid
from wsolkit.localization.protocol import UNKNOWN_THRESHOLD, Comparison, Protocol
from wsolkit.metrics.baselines import BASELINES
from wsolkit.metrics.errors import CLS, ERRORS
from wsolkit.metrics.functional import (
    SIZE_EDGES,
    count_by_size,
    histogram_median,
    max_box_accuracy,
    size_aware_accuracy,
    size_bins,
)
from wsolkit.types import Boxes

# The conditions under which a box counts: always, from the label's map; always, from the map of the predicted class;
# if the label is the top prediction; if it is among the top five. All but the first need a classification.
CONDITIONS = ("gt_known_loc", "gt_known_loc_predicted_class", "top1_loc", "top5_loc")

IOU_BINS = 1000
REPORTED_IOU_BINS = 100
NUM_EXTREMES = 12
_NO_IMAGE = torch.iinfo(torch.int64).max


class MaxBoxAccuracy(Metric):
    """The share of images with a right box at every threshold τ and IoU threshold δ, and its maximum over τ.

    The accuracy for objects of each size comes with it, see `size_aware_accuracy`. The state consists of tables of
    counts, [δ, τ] and [bins, δ + 1, τ]. It does not grow with the data set, and sums across processes.

    Args:
        select: "largest" takes the box of the outline with the largest area (V1). "any" accepts any right outline (V2).
        iou_thresholds: δ.
        num_thresholds: the size n of the grid τ = 0, 1/n, …, (n − 1)/n.

    >>> import numpy as np
    >>> from wsolkit.metrics import MaxBoxAccuracy
    >>> metric = MaxBoxAccuracy(iou_thresholds=(0.5, 0.7))
    >>> score_maps = np.zeros((1, 4, 6))
    >>> score_maps[0, 1:3, 2:5] = 1.0
    >>> metric.update(score_maps, [np.array([[2, 1, 4, 2]])])
    >>> found = metric.compute()
    >>> found["max_box_acc_50"].item(), found["max_box_acc_70"].item()  # the far corner is one past the last pixel
    (100.0, 0.0)
    >>> found["images_by_size"].tolist()  # the box has 2 · 1 of 24 pixels by its corners: from 4 % to 9 % of the image
    [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """

    correct: Tensor
    total: Tensor
    by_size: Tensor

    def __init__(
        self,
        select: Literal["largest", "any"] = "largest",
        iou_thresholds: Sequence[float] = (0.3, 0.5, 0.7),
        num_thresholds: int = 1000,
    ) -> None:
        super().__init__()
        if select not in ("largest", "any"):
            raise ValueError(f"select={select!r}: expected 'largest' or 'any'")
        self.rule = MAXBOXACC if select == "largest" else MAXBOXACC_V2
        self.iou_thresholds = tuple(iou_thresholds)
        self.thresholds = threshold_grid(num_thresholds)
        shape = (len(self.iou_thresholds), num_thresholds)
        self.add_state("correct", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("by_size", _no_sizes(*shape), dist_reduce_fx="sum")

    def update(self, score_maps: Tensor | npt.NDArray[np.floating], boxes: Sequence[Boxes]) -> None:
        """Count a batch.

        Args:
            score_maps: [B, H, W] in [0, 1].
            boxes: the true boxes of each image [n, 4], n ≥ 1, in pixels of the maps, with both corners inside.

        Raises:
            ValueError: the numbers of maps and boxes differ, a map leaves [0, 1], or an image has no box.
        """
        maps = score_maps.detach().cpu().numpy() if isinstance(score_maps, Tensor) else np.asarray(score_maps)
        if len(maps) != len(boxes):
            raise ValueError(f"{len(maps)} score maps with boxes for {len(boxes)} images: expected one entry per image")
        for number, ground_truth in enumerate(boxes):
            if np.ndim(ground_truth) != 2 or np.shape(ground_truth)[0] == 0 or np.shape(ground_truth)[1] != 4:
                raise ValueError(f"boxes of image {number} have shape {np.shape(ground_truth)}: expected [n, 4], n ≥ 1")
        if len(maps) == 0:
            return
        levels = [grey_levels(score_map, self.thresholds) for score_map in maps]
        truths = [np.asarray(ground_truth, np.int64) for ground_truth in boxes]
        drawn = [matched_boxes(part, self.rule, truth) for part, truth in zip(levels, truths, strict=True)]
        right = np.stack([iou for _, iou in drawn]) >= np.asarray(self.iou_thresholds)[:, None, None]  # → [δ, B, T]
        self.correct += torch.from_numpy(right.sum(axis=1)).to(self.correct.device)
        self.total += len(maps)
        height, width = maps.shape[1:]
        sizes = [
            matched_sizes(own, truth, size_bins(truth, width, height))
            for (own, _), truth in zip(drawn, truths, strict=True)
        ]
        count_by_size(self.by_size, np.stack(sizes), right)

    def counts(self) -> Tensor:
        """Return the number of correct images [δ, τ] that this process has seen."""
        return self.correct

    def compute(self) -> dict[str, Tensor]:
        """Return percentages from 0 to 100, and the best thresholds in [0, 1).

        See `max_box_accuracy` and `size_aware_accuracy` for their names.
        """
        by_size = size_aware_accuracy(self.by_size, self.iou_thresholds)
        return max_box_accuracy(self.correct, self.total, self.iou_thresholds, self.thresholds) | by_size


def matched_sizes(boxes: Boxes, truth: Boxes, bins: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the size of the true box that each box [T, 4] matches best, as its bin of `SIZE_EDGES` [T].

    Args:
        boxes: the boxes, one for each threshold.
        truth: the true boxes [n, 4].
        bins: the bin of each true box [n], see `size_bins`.
    """
    # Most images have one true box, and drawing boxes for the others takes much longer than this.
    return np.full(len(boxes), bins[0]) if len(truth) == 1 else bins[best_match(boxes, truth)]


def _no_sizes(deltas: int, steps: int) -> Tensor:
    """Return the table of `count_by_size` before the first batch."""
    return torch.zeros(len(SIZE_EDGES) - 1, deltas + 1, steps, dtype=torch.int64)


class Verdicts(NamedTuple):
    """The result for the boxes of B images at each of T thresholds.

    image, label [B]: the position in the split, and the class; iou [B, T]: the IoU of the box from the label's map;
    error [B, T]: see `localization_errors`; size [B, T]: see `matched_sizes`; baseline_iou [baselines, B, T]. A
    classification adds: predicted_iou [B, T]: the IoU of the box from the map of the predicted class; top1, top5 [B]:
    whether the label is the first, or among the first five; predicted [B]: the predicted class.
    """

    image: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    iou: npt.NDArray[np.float64]
    error: npt.NDArray[np.uint8]
    size: npt.NDArray[np.uint8]
    baseline_iou: npt.NDArray[np.float64]
    predicted_iou: npt.NDArray[np.float64] | None
    top1: npt.NDArray[np.bool_] | None
    top5: npt.NDArray[np.bool_] | None
    predicted: npt.NDArray[np.int64] | None


class BoxEvaluation(Metric):
    """Box metrics of a method, and of the baselines, under one protocol.

    The state consists of tables of counts with a fixed size, which sum across processes.

    Args:
        protocol: the rules.
        num_classes: the number of classes in the table by class.

    Attributes:
        selected: thresholds τ that were selected on another split, by condition. {} means the best ones on this split.
        by_truth: the τ that the ground truth of that split would have selected, if something else did, or None.
        by_maps: the τ that the maps of that split give without boxes, see `MapValues`, or None.
        on_verdicts: a function that is called with each result that is counted.
    """

    correct: Tensor
    images: Tensor
    classified: Tensor
    errors: Tensor
    ious: Tensor
    by_size: Tensor
    class_images: Tensor
    class_top1: Tensor
    class_correct: Tensor
    extremes: Tensor

    def __init__(self, protocol: Protocol, num_classes: int) -> None:
        super().__init__()
        self.protocol = protocol
        self.selected: dict[str, float] = {}
        self.by_truth: float | None = None
        self.by_maps: float | None = None
        self.on_verdicts: Callable[[Verdicts], None] | None = None
        deltas, steps = len(protocol.iou_thresholds), protocol.num_thresholds

        def table(name: str, *shape: int) -> None:
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

        table("correct", len(CONDITIONS) + len(BASELINES), deltas, steps)
        table("images")
        table("classified")
        table("errors", steps, len(ERRORS))
        table("ious", steps, IOU_BINS)
        self.add_state("by_size", _no_sizes(deltas, steps), dist_reduce_fx="sum")
        table("class_images", num_classes)
        table("class_top1", num_classes)
        table("class_correct", 2, num_classes, steps)  # GT-known and Top-1 Loc at δ = 0.5
        # The images of lowest and of highest IoU at each threshold, packed by `_pack`.
        none = torch.full((2, steps, NUM_EXTREMES), _NO_IMAGE)
        self.add_state("extremes", none, dist_reduce_fx=_merge_extremes)

    def update(self, verdicts: Verdicts) -> None:
        """Count a batch."""
        if self.on_verdicts is not None:
            self.on_verdicts(verdicts)
        rules, device = self.protocol, self.correct.device
        deltas = np.asarray(rules.iou_thresholds)[:, None, None]
        half = list(rules.iou_thresholds).index(0.5)

        def right(iou: npt.NDArray[np.float64], comparison: Comparison) -> npt.NDArray[np.bool_]:
            return iou >= deltas if comparison == "at_least" else iou > deltas  # [B, T] → [δ, B, T]

        gt_known = right(verdicts.iou, rules.gt_known_comparison)
        rows = [gt_known]
        error = verdicts.error
        label = torch.from_numpy(verdicts.label).to(device)
        if verdicts.top1 is not None and verdicts.top5 is not None and verdicts.predicted_iou is not None:
            by_label = right(verdicts.iou, rules.top_k_comparison)
            by_predicted = right(verdicts.predicted_iou, rules.top_k_comparison)
            top1_loc = by_label & verdicts.top1[:, None]
            rows += [
                right(verdicts.predicted_iou, rules.gt_known_comparison),
                top1_loc,
                (by_label if rules.top5_map == "label" else by_predicted) & verdicts.top5[:, None],
            ]
            error = np.where(verdicts.top1[:, None], error, np.uint8(CLS))
            self.classified += len(label)
            self.class_top1.index_add_(0, label, torch.from_numpy(verdicts.top1).to(label))
            self.class_correct[1].index_add_(0, label, torch.from_numpy(top1_loc[half]).to(label))
        for row, outcome in enumerate(rows):
            self.correct[row] += torch.from_numpy(np.count_nonzero(outcome, axis=1)).to(device)
        for row, iou in enumerate(verdicts.baseline_iou, start=len(CONDITIONS)):
            counts = np.count_nonzero(right(iou, rules.gt_known_comparison), axis=1)
            self.correct[row] += torch.from_numpy(counts).to(device)
        self.images += len(label)
        self.class_images.index_add_(0, label, torch.ones_like(label))
        self.class_correct[0].index_add_(0, label, torch.from_numpy(gt_known[half]).to(label))
        count_by_size(self.by_size, verdicts.size, gt_known)
        _count_in_rows(self.errors, error)
        _count_in_rows(self.ious, np.minimum(verdicts.iou * IOU_BINS, IOU_BINS - 1))
        packed = torch.from_numpy(_pack(verdicts.iou, verdicts.image)).to(device)
        self.extremes = _merge_extremes(torch.stack([self.extremes, _padded(packed)]))

    def chosen(self, condition: str | None = None) -> int:
        """Return the place in the grid of the threshold at which a condition of `CONDITIONS` is reported.

        For None, and for a condition without a threshold of its own, this is the threshold of the protocol's GT-known.
        """
        rules = self.protocol
        if condition is None or rules.threshold_per == "protocol":
            condition = self.main
        if not int(self.classified):
            condition = "gt_known_loc"
        threshold = rules.threshold
        if threshold is None and rules.selection == "classification":
            threshold = self.without_boxes
        if threshold is None and rules.selection != "test":
            threshold = self.selected.get(condition)
        return self.best(condition) if threshold is None else self._place(threshold)

    @property
    def without_boxes(self) -> float:
        """The τ if nobody drew boxes: that of the maps, or else `UNKNOWN_THRESHOLD`."""
        return UNKNOWN_THRESHOLD if self.by_maps is None else self.by_maps

    @property
    def main(self) -> str:
        """The condition of the protocol's GT-known."""
        predicted = self.protocol.gt_known_map == "predicted" and int(self.classified)
        return "gt_known_loc_predicted_class" if predicted else "gt_known_loc"

    def best(self, condition: str) -> int:
        """Return the place in the grid of the threshold that is best for a condition on this split."""
        rules = self.protocol
        half = list(rules.iou_thresholds).index(0.5)
        counts = self.correct[CONDITIONS.index(condition), half].cpu()
        return int(counts.masked_fill(~torch.from_numpy(rules.admissible), -1).argmax())

    def _place(self, threshold: float) -> int:
        return int(np.abs(self.protocol.thresholds - threshold).argmin())

    def choices(self) -> dict[str, int]:
        """Return the place of τ that each way to choose it leads to, if another one than ground truth is set.

        The ways are "pseudo" (pseudo boxes), "classification" (no boxes), "truth" (ground truth of the split that
        selects) and "best" (ground truth of this split). A way is left out if it is unknown.
        """
        rules = self.protocol
        if rules.selection not in ("pseudo", "classification"):
            return {}
        ways = {
            "pseudo": self.selected.get(self.main) if rules.selection == "pseudo" else None,
            "classification": self.without_boxes,
            "truth": self.by_truth,
            "best": float(rules.thresholds[self.best(self.main)]),
        }
        known = {way: threshold for way, threshold in ways.items() if threshold is not None}
        return {
            way: self._place(threshold if rules.threshold is None else rules.threshold)
            for way, threshold in known.items()
        }

    def compute(self) -> dict[str, Tensor]:
        """Return metrics by name, float64: scalars, curves [T], tables by class [C] and the IoU histogram [100].

        Percentages run from 0 to 100, and thresholds are in [0, 1). If no image had a box, there is at most the
        threshold that pseudo boxes have selected.
        """
        rules = self.protocol
        grid, deltas = rules.thresholds, rules.iou_thresholds
        choices = {way: (at, torch.tensor(grid[at], dtype=torch.float64)) for way, at in self.choices().items()}
        if not int(self.images):
            return {f"threshold_by_{way}": choices[way][1] for way in choices if way == "pseudo"}
        half = list(deltas).index(0.5)
        accuracy = 100 * self.correct.cpu().double() / self.images.cpu()
        values = max_box_accuracy(self.correct[0], self.images, deltas, grid, rules.admissible)
        values |= size_aware_accuracy(self.by_size, deltas, rules.admissible)
        for way, (at, threshold) in choices.items():
            values[f"threshold_by_{way}"] = threshold
            values[f"gt_known_loc_by_{way}"] = accuracy[CONDITIONS.index(self.main), half, at]
        known = CONDITIONS if int(self.classified) else CONDITIONS[:1]
        main = self.chosen()
        values["threshold"] = torch.tensor(grid[main], dtype=torch.float64)
        for condition in known:
            row, at = CONDITIONS.index(condition), self.chosen(condition)
            values[condition] = accuracy[row, half, at]
            if rules.threshold_per == "metric":
                values[f"threshold_{condition}"] = torch.tensor(grid[at], dtype=torch.float64)
            if condition != "gt_known_loc":
                values[f"curves/{condition}"] = accuracy[row, half]
        ious = self.ious[main].cpu()
        values["iou_median"] = 100 * histogram_median(ious)
        values["iou_median_correct"] = 100 * histogram_median(ious, start=IOU_BINS // 2)
        values |= {
            f"error_{name}": 100 * share
            for name, share in zip(ERRORS, self.errors[main].cpu().double() / self.images.cpu(), strict=True)
        }
        values["iou_histogram"] = ious.view(REPORTED_IOU_BINS, -1).sum(1).double()
        values["curves/threshold"] = torch.from_numpy(grid.copy())
        for delta, curve in zip(deltas, accuracy[0], strict=True):
            values[f"curves/gt_known_loc_{round(100 * delta)}"] = curve
        images = self.class_images.cpu().double()
        by_class = {"gt_known_loc": self.class_correct[0, :, main]}
        if int(self.classified):
            by_class |= {
                "top1_cls": self.class_top1,
                "top1_loc": self.class_correct[1, :, self.chosen("top1_loc")],
            }
        values["per_class/images"] = images
        values |= {f"per_class/{name}": 100 * count.cpu().double() / images for name, count in by_class.items()}
        for row, name in enumerate(BASELINES, start=len(CONDITIONS)):
            summary = max_box_accuracy(self.correct[row], self.images, deltas, grid, rules.admissible)
            values |= {f"{name}/{metric}": value for metric, value in summary.items()}
            values[f"{name}/curves/gt_known_loc_50"] = accuracy[row, half]
        lowest, highest = self.extremes[:, main].cpu()
        for name, packed in (("worst", lowest), ("best", highest)):
            values[f"{name}_images"] = (packed[packed < _NO_IMAGE] & 0xFFFFFFFF).double()
        return values


def _count_in_rows(table: Tensor, columns: npt.NDArray[np.generic]) -> None:
    """Add one to a table [T, n] in each row t and column columns[b, t]."""
    rows, width = table.shape
    places = torch.from_numpy(columns.astype(np.int64)) + width * torch.arange(rows)
    flat = places.flatten().to(table.device)
    table.view(-1).scatter_add_(0, flat, torch.ones_like(flat))


def _pack(iou: npt.NDArray[np.float64], image: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Pack IoU [B, T] and image [B] into whole numbers [2, T, B], which rise with IoU and with falling IoU.

    Ties are in the order of the images.
    """
    rising = np.round(iou.T * 2**30).astype(np.int64)
    return np.stack([rising, 2**30 - rising]) << 32 | image


def _padded(packed: Tensor) -> Tensor:
    """Return the NUM_EXTREMES smallest of [2, T, B], filled up to [2, T, NUM_EXTREMES]."""
    smallest = packed.topk(min(NUM_EXTREMES, packed.shape[-1]), dim=-1, largest=False).values
    fill = smallest.new_full((*smallest.shape[:-1], NUM_EXTREMES - smallest.shape[-1]), _NO_IMAGE)
    return torch.cat([smallest, fill], dim=-1)


def _merge_extremes(parts: Tensor) -> Tensor:
    """Merge several tables [n, 2, T, NUM_EXTREMES] into the smallest entries, in rising order."""
    together = parts.movedim(0, -1).flatten(-2)
    return together.sort(dim=-1).values[..., :NUM_EXTREMES].contiguous()
