"""One pass over a split, every metric: classification, boxes and masks under each protocol, and baselines."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torchmetrics import Metric

from wsolkit.cores import available_cores
from wsolkit.localization.boxes import Levels, best_iou, matched_boxes
from wsolkit.localization.maps import central_crop, ten_crops, upsample
from wsolkit.localization.protocol import Input, Protocol
from wsolkit.metrics.boxes import BASELINES, CONDITIONS, BoxEvaluation, Verdicts
from wsolkit.metrics.classification import TopKAccuracy
from wsolkit.metrics.errors import ERRORS, OTHER, localization_errors
from wsolkit.metrics.functional import in_top_k, pixel_histogram
from wsolkit.metrics.masks import PIXEL_BINS, MaskEvaluation
from wsolkit.types import Boxes, Classes, EvaluationBatch, Localization

_MAX_SIZES = 64
_NUM_NAMED = 5  # images that are named for numbers that are not finite
_NO_IMAGE = torch.iinfo(torch.int64).max

Judged = tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8], npt.NDArray[np.float64]]
"""Of an image's boxes at T thresholds: IoU [T], what is wrong with them [T], and the baselines' IoU [baselines, T]."""


def baseline_map(name: str, size: int) -> npt.NDArray[np.float64]:
    """Localization maps [size, size] that know nothing of the image.

    "center_box": falls linearly from the centre to the border, so that its level sets are the centred squares of
    every size; "gaussian": round, with a standard deviation of a quarter of the side; "full_image": 1 everywhere, so
    that every threshold keeps the whole image.
    """
    if name == "full_image":
        return np.ones((size, size))
    distance = np.abs(np.arange(size) - (size - 1) / 2) / (size / 2)
    if name == "center_box":
        return np.asarray(1 - np.maximum(distance[:, None], distance[None]))
    bell = np.exp(-2 * distance**2)
    return np.outer(bell, bell)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Boxes are drawn in these, beside the forward pass of the next batch."""
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return ThreadPoolExecutor(max(1, available_cores() // here), thread_name_prefix="boxes")


@functools.cache
def _counter() -> ThreadPoolExecutor:
    """Counts what the others have drawn, one batch after the other."""
    return ThreadPoolExecutor(1, thread_name_prefix="counts")


class _Shared:
    """What protocols that feed the network alike share of a batch: made once for all that agree on how."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, object], Any] = {}

    def get(self, what: str, rule: object, make: Callable[[], Any]) -> Any:
        if (what, rule) not in self._made:
            self._made[what, rule] = make()
        return self._made[what, rule]


class Outcome(NamedTuple):
    """Metrics of a pass by name: numbers, and curves and tables."""

    results: dict[str, float]
    curves: dict[str, list[Any]]


class NotFinite(Metric):
    """Images whose logits or score maps are not finite: how many, and the positions of the first ones.

    The state has a fixed size and sums across processes.
    """

    count: Tensor
    first: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("first", torch.full((_NUM_NAMED,), _NO_IMAGE), dist_reduce_fx=_lowest)

    def update(self, finite: Tensor, index: Tensor) -> None:
        """Count a batch: whether each image's are finite, bool [B], and its position in the split [B]."""
        self.count += (~finite).sum()
        self.first = _lowest(torch.cat([self.first, index.masked_fill(finite, _NO_IMAGE)]))

    def compute(self) -> dict[str, Tensor]:
        """`not_finite`, and positions as `not_finite_images`, filled up with −1; nothing where all are finite."""
        if not int(self.count):
            return {}
        named = self.first.masked_fill(self.first == _NO_IMAGE, -1)
        return {"not_finite": self.count.cpu().double(), "not_finite_images": named.cpu().double()}


def _lowest(positions: Tensor) -> Tensor:
    return positions.flatten().sort().values[:_NUM_NAMED]


class _Pending(NamedTuple):
    """A batch whose boxes are being drawn; `finite` says of which images the score maps are."""

    metric: BoxEvaluation
    finite: npt.NDArray[np.bool_]
    by_label: list[Future[Judged]]
    by_predicted: dict[int, Future[Judged]]
    image: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    top1: npt.NDArray[np.bool_] | None
    top5: npt.NDArray[np.bool_] | None
    predicted: npt.NDArray[np.int64] | None

    def finish(self) -> None:
        """Wait for the boxes and count them."""
        judged = [future.result() for future in self.by_label]
        iou, error, baseline_iou = (np.stack(part) for part in zip(*judged, strict=True))
        predicted_iou = None
        if self.top1 is not None:
            predicted_iou = iou.copy()
            for row, future in self.by_predicted.items():
                predicted_iou[row] = future.result()[0]
            predicted_iou[~self.finite] = 0
        iou[~self.finite], error[~self.finite] = 0, OTHER
        verdicts = Verdicts(
            self.image,
            self.label,
            iou,
            error,
            baseline_iou.swapaxes(0, 1),
            predicted_iou,
            self.top1,
            self.top5,
            self.predicted,
        )
        with torch.inference_mode():  # each thread has its own mode, and the state may have been made in this one
            self.metric.update(verdicts)


class ProtocolEvaluation(nn.Module):
    """A protocol and its metrics."""

    def __init__(self, protocol: Protocol, num_classes: int) -> None:
        super().__init__()
        self.protocol = protocol
        self.top1_cls = TopKAccuracy(1)
        self.top5_cls = TopKAccuracy(5)
        self.boxes = BoxEvaluation(protocol, num_classes)
        self.masks = MaskEvaluation(1 + len(BASELINES))
        self._baselines = [baseline_map(name, protocol.resolution) for name in BASELINES]
        self._drawn: dict[tuple[int, int], list[Boxes]] = {}

    def levels(self, maps: Tensor, raw: Tensor, rows: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[Levels]:
        """Cut the maps of some images of a batch into levels.

        Args:
            maps: localization maps [B, R, R].
            raw: score maps [B, h, w] that they come from.
            rows: of which images.
            sizes: height and width of each original image of the batch.
        """
        rules = self.protocol
        if rules.frame == "input":
            return rules.levels(maps[list(rows)])
        return [rules.levels(rules.localization_maps(raw[row : row + 1], sizes[row]))[0] for row in rows]

    def sizes(self, batch: EvaluationBatch) -> list[tuple[int, int]]:
        """Height and width of the maps of a batch."""
        if self.protocol.frame == "input":
            return [(self.protocol.resolution, self.protocol.resolution)] * len(batch["boxes"])
        return [(height, width) for width, height in batch["size"].tolist()]

    def localization_maps(self, raw: Tensor, batch: EvaluationBatch) -> list[Tensor]:
        """Localization maps of a batch from its score maps [B, h, w], each at the size at which it is judged."""
        rules = self.protocol
        return [rules.localization_maps(raw[row : row + 1], size)[0] for row, size in enumerate(self.sizes(batch))]

    def at_size(self, maps: Sequence[Tensor], batch: EvaluationBatch) -> list[Tensor]:
        """Localization maps that are ready, each at the size at which it is judged."""
        return [_at_size(score, size)[0] for score, size in zip(maps, self.sizes(batch), strict=True)]

    def truths(self, batch: EvaluationBatch, rows: Sequence[int]) -> list[Boxes]:
        """Ground-truth boxes of some images of a batch, in pixels of the maps."""
        sizes = batch["size"].tolist()
        # A far corner that is to be moved must not have been moved already, to the last pixel of the image.
        boxes = batch["uncut_boxes"] if self.protocol.far_corner_shift else batch["boxes"]
        return [self.protocol.truth(boxes[row], *sizes[row]) for row in rows]

    def judge(self, levels: Levels, truth: Boxes) -> Judged:
        """Draw an image's boxes and compare them with the true ones [n, 4], n ≥ 1."""
        boxes, overlap = matched_boxes(levels, self.protocol.box_rule, truth)
        height, width = levels.level.shape
        baselines = np.stack([best_iou(drawn, truth) for drawn in self._baseline_boxes((height, width))])
        return overlap, localization_errors(boxes, truth), baselines

    def _baseline_boxes(self, size: tuple[int, int]) -> list[Boxes]:
        """The baselines' boxes at each threshold, on maps of a height and width; kept for a few sizes."""
        drawn = self._drawn.get(size)
        if drawn is None:
            drawn = self._draw_baselines(size)
            if len(self._drawn) >= _MAX_SIZES:
                self._drawn.clear()
            self._drawn[size] = drawn
        return drawn

    def _draw_baselines(self, size: tuple[int, int]) -> list[Boxes]:
        rules = self.protocol
        maps = upsample(torch.from_numpy(np.stack(self._baselines)).float(), size, "bilinear")
        # Each of their level sets has one outline only, so which of several is meant does not matter.
        component = "largest_outline" if rules.component == "all_outlines" else rules.component
        any_box = np.zeros((1, 4), np.int64)
        rule = rules.box_rule._replace(component=component)
        return [matched_boxes(levels, rule, any_box)[0] for levels in rules.levels(maps)]

    def histograms(self, maps: Tensor, mask: Tensor) -> Tensor:
        """Pixels by score, of localization maps [B, R, R] and of the baselines: [1 + baselines, B, 2, bins]."""
        constant = [torch.from_numpy(score).to(maps).expand_as(maps) for score in self._baselines]
        mask = F.interpolate(mask[:, None], maps.shape[-2:], mode="nearest")[:, 0]
        return torch.stack([pixel_histogram(scores, mask, PIXEL_BINS) for scores in (maps, *constant)])

    def compute(self) -> dict[str, Tensor]:
        """Metrics by name, and those of the baselines as `<baseline>/<metric>`; only what there was truth for."""
        # Each part synchronises the processes, so all of them compute all parts, whatever they have seen themselves.
        classification = {"top1_cls": self.top1_cls.compute(), "top5_cls": self.top5_cls.compute()}
        known = {name: value for name, value in classification.items() if not value.isnan()}
        return known | self.boxes.compute() | self.masks.compute()


class Evaluation(nn.Module):
    """All metrics of a validation or test pass.

    Boxes are drawn by threads while the network works on the next batch; `compute` waits for the last ones.

    Args:
        protocols: by the name under which each reports.
        num_classes: of the data set.
    """

    def __init__(self, protocols: Mapping[str, Protocol], num_classes: int) -> None:
        super().__init__()
        self._protocols = nn.ModuleDict({n: ProtocolEvaluation(rules, num_classes) for n, rules in protocols.items()})
        self._inputs: list[Input] = sorted({rules.input for rules in protocols.values()}, reverse=True)
        self._ten_crop = any(rules.classification == "ten_crop" for rules in protocols.values())
        self.not_finite = NotFinite()
        self._pending: list[Future[None]] = []
        self.on_maps: Callable[[EvaluationBatch, list[Tensor]], None] | None = None
        """Called with each batch and its localization maps by label, under the first protocol."""

    @property
    def protocols(self) -> dict[str, ProtocolEvaluation]:
        """The protocols' metrics by name."""
        return cast("dict[str, ProtocolEvaluation]", dict(self._protocols.items()))

    @property
    def names(self) -> list[str]:
        """Names of the numbers that `compute` may return for the method, where there are boxes and masks."""
        names = ["top1_cls", "top5_cls"]
        for name, metric in self.protocols.items():
            deltas = [round(100 * delta) for delta in metric.protocol.iou_thresholds]
            names += [
                f"{name}/{key}"
                for key in (
                    *("top1_cls", "top5_cls", *CONDITIONS, "max_box_acc", "max_box_acc_v2", "threshold"),
                    *(f"{key}_{delta}" for delta in deltas for key in ("max_box_acc", "threshold")),
                    *("iou_median", "iou_median_correct", *(f"error_{error}" for error in ERRORS)),
                    *("pxap", "peak_iou", "peak_threshold"),
                )
            ]
        return names

    def update(
        self,
        batch: EvaluationBatch,
        localize: Callable[[Tensor, Classes], Localization],
        classify: Callable[[Tensor], Tensor],
    ) -> None:
        """Count a batch. An image whose logits or score maps are not finite counts as wrong, and is named.

        Args:
            localize: see `WSOLModule.localize`; called once for each way in which protocols feed the network.
            classify: images [B, 3, H, W] → logits [B, C], for protocols that classify ten crops.
        """
        label = batch["label"]
        pooled = ten_crop_probabilities(batch, classify) if self._ten_crop else None

        def classes(logits: Tensor) -> Tensor:
            tops = (logits,) if pooled is None else (logits, pooled)
            return torch.stack([label, *(top.argmax(dim=1) for top in tops)], dim=1)

        submitted = []
        all_finite = torch.ones_like(label, dtype=torch.bool)
        for way in self._inputs:
            image, mask = network_input(batch, way)
            localization = localize(image, classes)
            finite = localization.maps.isfinite().flatten(1).all(dim=1)
            all_finite &= finite & localization.logits.isfinite().all(dim=1)
            score_maps = localization.maps.where(finite[:, None, None, None], 0)
            shared = _Shared()
            for metric in self.protocols.values():
                rules = metric.protocol
                if rules.input != way:
                    continue
                by_crops = pooled is not None and rules.classification == "ten_crop"
                logits = pooled if by_crops and pooled is not None else localization.logits
                metric.top1_cls.update(logits, label)
                metric.top5_cls.update(logits, label)
                raw = score_maps[:, 0], score_maps[:, 2 if by_crops else 1]
                maps = shared.get("maps", rules.map_rule, functools.partial(rules.localization_maps, raw[0]))
                if self.on_maps is not None and metric is next(iter(self.protocols.values())):
                    self.on_maps(batch, metric.localization_maps(raw[0], batch))
                if mask is not None:
                    histograms = functools.partial(metric.histograms, maps, mask)
                    metric.masks.update(shared.get("histograms", rules.map_rule, histograms))
                rows = [row for row, boxes in enumerate(batch["boxes"]) if len(boxes)]
                if rows:
                    submitted.append(_submit(metric, batch, rows, maps, raw, logits, finite, shared))
        if pooled is not None:
            all_finite &= pooled.isfinite().all(dim=1)
        self.not_finite.update(all_finite, batch["index"])
        self._finish(submitted)

    def update_maps(self, batch: EvaluationBatch, maps: Sequence[Tensor]) -> None:
        """Count a batch of localization maps in [0, 1] that are ready, each [R, R] or at its image's own size.

        They count as those of the label's class; there is no classification.
        """
        submitted = []
        for metric in self.protocols.values():
            rules = metric.protocol
            square = (rules.resolution, rules.resolution)
            if batch["mask"] is not None:
                mask = network_input(batch, rules.input)[1]
                assert mask is not None
                resized = torch.cat([_at_size(score, square) for score in maps])
                metric.masks.update(metric.histograms(resized, mask))
            rows = [row for row, boxes in enumerate(batch["boxes"]) if len(boxes)]
            if rows:
                sized = metric.at_size(maps, batch)
                levels = [rules.levels(sized[row][None])[0] for row in rows]
                finite = torch.ones(len(maps), dtype=torch.bool)  # files of others are not read
                submitted.append(_submit_levels(metric, batch, rows, levels, {}, None, finite))
        self._finish(submitted)

    def map_sizes(self, batch: EvaluationBatch) -> list[set[tuple[int, int]]]:
        """Heights and widths that `update_maps` takes for each image of a batch."""
        squares = {(m.protocol.resolution,) * 2 for m in self.protocols.values()}
        if any(metric.protocol.frame == "input" for metric in self.protocols.values()):
            return [squares] * len(batch["boxes"])
        return [squares | {(height, width)} for width, height in batch["size"].tolist()]

    def _finish(self, submitted: list[_Pending]) -> None:
        """Wait for the previous batch, whose boxes were drawn meanwhile, so that no more than two are in memory."""
        previous, self._pending = self._pending, [_counter().submit(pending.finish) for pending in submitted]
        for counted in previous:
            counted.result()

    def compute(self) -> dict[str, Tensor]:
        """Sum over processes: `top1_cls`, `top5_cls`, `<protocol>/<metric>`, `<protocol>/<baseline>/<metric>`.

        Scalars are numbers, others curves and tables. Classification without a protocol is the first one's.
        """
        self._finish([])
        values: dict[str, Tensor] = {}
        for name, metric in self.protocols.items():
            computed = metric.compute()
            values = {key: computed[key] for key in ("top1_cls", "top5_cls") if key in computed} | values
            values |= {f"{name}/{key}": value for key, value in computed.items()}
        return values | self.not_finite.compute()

    def reset(self) -> None:
        """Forget what was counted; selected thresholds stay."""
        self._finish([])
        self.not_finite.reset()
        for metric in self.protocols.values():
            for part in (metric.top1_cls, metric.top5_cls, metric.boxes, metric.masks):
                part.reset()

    @property
    def thresholds(self) -> dict[str, float]:
        """Thresholds τ selected on another split, as `<protocol>/<condition>`; assigning replaces them, {} forgets."""
        return {
            f"{name}/{condition}": threshold
            for name, metric in self.protocols.items()
            for condition, threshold in metric.boxes.selected.items()
        }

    @thresholds.setter
    def thresholds(self, selected: Mapping[str, float]) -> None:
        for name, metric in self.protocols.items():
            metric.boxes.selected = {
                condition: selected[f"{name}/{condition}"]
                for condition in CONDITIONS
                if f"{name}/{condition}" in selected
            }

    def select(self, results: Mapping[str, float]) -> None:
        """Take the thresholds of these numbers, of another split, as selected."""
        selected: dict[str, float] = {}
        for name in self.protocols:
            for condition in CONDITIONS:
                for key in (f"{name}/threshold_{condition}", f"{name}/threshold"):
                    if key in results:
                        selected.setdefault(f"{name}/{condition}", results[key])
        self.thresholds = selected

    def chosen_on(self, held_out: bool) -> dict[str, str]:
        """Where each protocol's threshold is chosen: "fixed", "val", or "test", the reported split itself."""
        chosen = {}
        for name, metric in self.protocols.items():
            taken_over = held_out and metric.protocol.selection == "val" and metric.boxes.selected
            chosen[name] = "fixed" if metric.protocol.threshold is not None else "val" if taken_over else "test"
        return chosen


def outcome(values: Mapping[str, Tensor]) -> Outcome:
    """Sort what `Evaluation.compute` returns into numbers, and curves and tables."""
    results = {name: float(value) for name, value in values.items() if value.ndim == 0}
    return Outcome(results, {name: value.tolist() for name, value in values.items() if value.ndim > 0})


def network_input(batch: EvaluationBatch, way: Input) -> tuple[Tensor, Tensor | None]:
    """What the network sees of a batch [B, 3, S, S], and the masks of that part [B, S, S]."""
    if way == "resize":
        return batch["image"], batch["mask"]
    uncropped, mask = _uncropped(batch), batch["uncropped_mask"]
    size = batch["image"].shape[-1]
    return central_crop(uncropped, size), None if mask is None else central_crop(mask, size)


def ten_crop_probabilities(batch: EvaluationBatch, classify: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of the softmax over four corners, the centre, and their mirror images: [B, C].

    It is NaN for an image with logits that are not finite.
    """
    crops = ten_crops(_uncropped(batch), batch["image"].shape[-1])
    logits = torch.stack([classify(crop).float() for crop in crops])  # [10, B, C]
    finite = logits.isfinite().all(dim=0).all(dim=1, keepdim=True)
    return logits.softmax(dim=2).mean(dim=0).masked_fill(~finite, torch.nan)


def _at_size(score: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [h, w] at another size [1, H, W]; as it is, in its own precision, where it has that size."""
    return score[None] if score.shape == size else upsample(score[None].float(), size, "bilinear")


def _uncropped(batch: EvaluationBatch) -> Tensor:
    uncropped = batch["uncropped"]
    if uncropped is None:
        raise ValueError(
            "a protocol crops its input, but the batch has no 'uncropped' images: WSOLDataModule makes them"
        )
    return uncropped


def _submit(
    metric: ProtocolEvaluation,
    batch: EvaluationBatch,
    rows: list[int],
    maps: Tensor,
    raw: tuple[Tensor, Tensor],
    logits: Tensor,
    finite: Tensor,
    shared: _Shared,
) -> _Pending:
    """Have the boxes of some images of a batch drawn.

    Args:
        maps: localization maps [B, R, R] of the labels.
        raw: score maps [B, h, w] of the labels and of the predicted classes.
        logits: [B, C].
        finite: whether the score maps are, bool [B].
        shared: with other protocols.
    """
    rules, sizes = metric.protocol, metric.sizes(batch)
    # A class-agnostic map is the same for every class, and a right prediction has the label's own map.
    differs = (raw[0] != raw[1]).flatten(1).any(dim=1) & (logits.argmax(dim=1) != batch["label"])
    others = [place for place, other in enumerate(differs[rows].tolist()) if other]

    def other_levels() -> list[Levels]:
        theirs = raw[1][[rows[place] for place in others]]
        return metric.levels(
            rules.localization_maps(theirs), theirs, range(len(others)), [sizes[rows[place]] for place in others]
        )

    levels = shared.get("levels", rules.level_rule, lambda: metric.levels(maps, raw[0], rows, sizes))
    predicted: dict[int, Levels] = {}
    if others:
        made = shared.get("predicted", (*rules.level_rule, rules.classification), other_levels)
        predicted = dict(zip(others, made, strict=True))
    return _submit_levels(metric, batch, rows, levels, predicted, logits, finite)


def _submit_levels(
    metric: ProtocolEvaluation,
    batch: EvaluationBatch,
    rows: list[int],
    levels: list[Levels],
    predicted: dict[int, Levels],
    logits: Tensor | None,
    finite: Tensor,
) -> _Pending:
    label, truths = batch["label"][rows], metric.truths(batch, rows)
    threads = _threads()
    top1, top5 = (None if logits is None else in_top_k(logits[rows], label, k).cpu().numpy() for k in (1, 5))
    return _Pending(
        metric.boxes,
        finite[rows].cpu().numpy(),
        [threads.submit(metric.judge, part, truth) for part, truth in zip(levels, truths, strict=True)],
        {place: threads.submit(metric.judge, part, truths[place]) for place, part in predicted.items()},
        batch["index"][rows].cpu().numpy(),
        label.cpu().numpy(),
        top1,
        top5,
        None if logits is None else logits[rows].argmax(dim=1).cpu().numpy(),
    )
