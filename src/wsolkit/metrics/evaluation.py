"""Compute all metrics in one pass over a split: classification, boxes and masks under each protocol, and baselines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from wsolkit.data.records import FileRecords
from wsolkit.localization.boxes import Levels
from wsolkit.localization.inputs import localize_views, network_mask, network_views, ten_crop_probabilities
from wsolkit.localization.protocol import Input, Protocol
from wsolkit.metrics.boxes import CONDITIONS, BoxEvaluation
from wsolkit.metrics.errors import ERRORS
from wsolkit.metrics.finite import NotFinite
from wsolkit.metrics.under_protocol import ProtocolEvaluation, at_size
from wsolkit.metrics.workers import BoxWorkers, Pending
from wsolkit.types import Classes, EvaluationBatch, Localization


class _Shared:
    """What protocols share of a batch if they feed the network in the same way. It is computed once for all of them."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, object], Any] = {}

    def get(self, what: str, rule: object, make: Callable[[], Any]) -> Any:
        if (what, rule) not in self._made:
            self._made[what, rule] = make()
        return self._made[what, rule]


_BY_TRUTH, _BY_MAPS = "by_truth", "by_maps"


class Outcome(NamedTuple):
    """The metrics of a pass by name: numbers, and curves and tables."""

    results: dict[str, float]
    curves: dict[str, list[Any]]


class Evaluation(nn.Module):
    """All metrics of a validation or test pass.

    Threads draw the boxes while the network works on the next batch. `compute` waits for the last ones.

    Args:
        protocols: the protocols by the name under which each reports.
        num_classes: the number of classes in the data set.
        threshold_by_maps: whether maps alone give a threshold where no boxes do, see `wsolkit.metrics.map_values`.
    """

    def __init__(self, protocols: Mapping[str, Protocol], num_classes: int, threshold_by_maps: bool = False) -> None:
        super().__init__()
        self._protocols = nn.ModuleDict(
            {name: ProtocolEvaluation(rules, num_classes, threshold_by_maps) for name, rules in protocols.items()}
        )
        self._inputs: list[Input] = sorted({rules.input for rules in protocols.values()}, reverse=True)
        self._ten_crop = any(rules.classification == "ten_crop" for rules in protocols.values())
        self.not_finite = NotFinite()
        self._workers = BoxWorkers()
        self.pseudo_boxes: FileRecords | None = None
        """The pseudo boxes of the split that is counted, by position, for protocols that select by them."""
        self.on_maps: Callable[[EvaluationBatch, list[Tensor]], None] | None = None
        """A function that is called with each batch and its labels' localization maps, under the first protocol."""

    @property
    def protocols(self) -> dict[str, ProtocolEvaluation]:
        """Return the metrics of the protocols by name."""
        return cast("dict[str, ProtocolEvaluation]", dict(self._protocols.items()))

    @property
    def names(self) -> list[str]:
        """Return the names of the numbers that `compute` returns for the method if there are boxes and masks."""
        names = ["top1_cls", "top5_cls"]
        for name, metric in self.protocols.items():
            deltas = [round(100 * delta) for delta in metric.protocol.iou_thresholds]
            names += [
                f"{name}/{key}"
                for key in (
                    *("top1_cls", "top5_cls", *CONDITIONS, "max_box_acc", "max_box_acc_v2", "threshold"),
                    *(f"{key}_{delta}" for delta in deltas for key in ("max_box_acc", "threshold")),
                    *("iou_median", "iou_median_correct", *(f"error_{error}" for error in ERRORS)),
                    *("pxap", "peak_iou", "peak_threshold", "max_box_acc_size_mean"),
                    *(() if metric.pseudo is None else ("pseudo_max_box_acc", "pseudo_threshold")),
                )
            ]
        return names

    def update(
        self,
        batch: EvaluationBatch,
        localize: Callable[[Tensor, Classes], Localization],
        classify: Callable[[Tensor], Tensor],
    ) -> None:
        """Count a batch. An image with logits or score maps that are not finite counts as wrong.

        Args:
            batch: the images and their ground truth.
            localize: see `WSOLModule.localize`. It is called for each view that the protocols show to the network.
            classify: maps images [B, 3, H, W] to logits [B, C], for protocols that classify ten crops.
        """
        label = batch["label"]
        pooled = ten_crop_probabilities(batch, classify) if self._ten_crop else None

        def classes(logits: Tensor) -> Tensor:
            tops = (logits,) if pooled is None else (logits, pooled)
            return torch.stack([label, *(top.argmax(dim=1) for top in tops)], dim=1)

        submitted = []
        all_finite = torch.ones_like(label, dtype=torch.bool)
        for way in self._inputs:
            localization = localize_views(network_views(batch, way), localize, classes)
            mask = network_mask(batch, way)
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
                if metric.map_values is not None:
                    metric.map_values.update(maps[finite])
                if self.on_maps is not None and metric is next(iter(self.protocols.values())):
                    self.on_maps(batch, metric.localization_maps(raw[0], batch))
                if mask is not None:
                    histograms = functools.partial(metric.histograms, maps, mask)
                    metric.masks.update(shared.get("histograms", rules.map_rule, histograms))
                for counts, boxed, rows in self._to_draw(metric, batch):
                    submitted.append(self._draw(metric, counts, boxed, rows, maps, raw, logits, finite, shared))
        if pooled is not None:
            all_finite &= pooled.isfinite().all(dim=1)
        self.not_finite.update(all_finite, batch["index"])
        self._workers.count(submitted)

    def _to_draw(
        self, metric: ProtocolEvaluation, batch: EvaluationBatch
    ) -> Iterator[tuple[BoxEvaluation, EvaluationBatch, list[int]]]:
        """Yield what counts boxes, with a batch whose boxes it compares them with, and the images that have some."""
        boxed = [(metric.boxes, batch)]
        if metric.pseudo is not None and self.pseudo_boxes is not None:
            indices, pseudo = batch["index"].tolist(), self.pseudo_boxes
            boxes, uncut = map(pseudo.boxes, indices), map(pseudo.uncut_boxes, indices)
            boxed.append((metric.pseudo, {**batch, "boxes": list(boxes), "uncut_boxes": list(uncut)}))
        for counts, one in boxed:
            rows = [row for row, boxes in enumerate(one["boxes"]) if len(boxes)]
            if rows:
                yield counts, one, rows

    def _draw(
        self,
        metric: ProtocolEvaluation,
        counts: BoxEvaluation,
        batch: EvaluationBatch,
        rows: list[int],
        maps: Tensor,
        raw: tuple[Tensor, Tensor],
        logits: Tensor,
        finite: Tensor,
        shared: _Shared,
    ) -> Pending:
        """Draw the boxes of some images of a batch in threads.

        Args:
            maps: localization maps [B, R, R] of the labels.
            raw: score maps [B, h, w] of the labels and of the predicted classes.
            logits: [B, C].
            finite: whether the score maps are finite, bool [B].
            shared: what the protocol shares with other protocols.
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

        rule = (*rules.level_rule, *rows)
        levels = shared.get("levels", rule, lambda: metric.levels(maps, raw[0], rows, sizes))
        predicted: dict[int, Levels] = {}
        if others:
            made = shared.get("predicted", (*rule, rules.classification), other_levels)
            predicted = dict(zip(others, made, strict=True))
        return self._workers.draw(metric, batch, rows, levels, predicted, logits, finite, counts)

    def update_maps(self, batch: EvaluationBatch, maps: Sequence[Tensor]) -> None:
        """Count a batch of localization maps in [0, 1] that are ready, each [R, R] or at the size of its image.

        They count as maps of the label's class. There is no classification.
        """
        submitted = []
        for metric in self.protocols.values():
            rules = metric.protocol
            square = (rules.resolution, rules.resolution)
            if batch["mask"] is not None:
                mask = network_mask(batch, rules.input)
                assert mask is not None
                resized = torch.cat([at_size(score, square) for score in maps])
                metric.masks.update(metric.histograms(resized, mask))
            sized = metric.at_size(maps, batch)
            for counts, boxed, rows in self._to_draw(metric, batch):
                levels = [rules.levels(sized[row][None])[0] for row in rows]
                finite = torch.ones(len(maps), dtype=torch.bool)  # The reader of files refuses others.
                submitted.append(self._workers.draw(metric, boxed, rows, levels, {}, None, finite, counts))
        self._workers.count(submitted)

    def map_sizes(self, batch: EvaluationBatch) -> list[set[tuple[int, int]]]:
        """Return the heights and widths that `update_maps` accepts for each image of a batch."""
        squares = {(m.protocol.resolution,) * 2 for m in self.protocols.values()}
        if any(metric.protocol.frame == "input" for metric in self.protocols.values()):
            return [squares] * len(batch["boxes"])
        return [squares | {(height, width)} for width, height in batch["size"].tolist()]

    def compute(self) -> dict[str, Tensor]:
        """Sum over processes. Return `top1_cls`, `top5_cls`, `<protocol>/<metric>`, `<protocol>/<baseline>/<metric>`.

        Scalars are numbers, and other tensors are curves and tables. Classification without a protocol is that of the
        first one.
        """
        self._workers.finish()
        values: dict[str, Tensor] = {}
        for name, metric in self.protocols.items():
            computed = metric.compute()
            values = {key: computed[key] for key in ("top1_cls", "top5_cls") if key in computed} | values
            values |= {f"{name}/{key}": value for key, value in computed.items()}
        return values | self.not_finite.compute()

    def reset(self) -> None:
        """Forget all counts, and end the threads. Selected thresholds stay."""
        self._workers.close()
        self.not_finite.reset()
        for metric in self.protocols.values():
            for part in (
                metric.top1_cls,
                metric.top5_cls,
                metric.boxes,
                metric.masks,
                metric.map_values,
                metric.pseudo,
            ):
                if part is not None:
                    part.reset()

    @property
    def thresholds(self) -> dict[str, float]:
        """The thresholds τ selected on another split, as `<protocol>/<condition>`. {} stands for none.

        `<protocol>/by_truth` is the τ that its ground truth would have selected, if something else did.
        `<protocol>/by_maps` is the τ that its maps alone give, if nothing else selects.
        """
        selected: dict[str, float] = {}
        for name, metric in self.protocols.items():
            selected |= {f"{name}/{condition}": threshold for condition, threshold in metric.boxes.selected.items()}
            if metric.boxes.by_truth is not None:
                selected[f"{name}/{_BY_TRUTH}"] = metric.boxes.by_truth
            if metric.boxes.by_maps is not None:
                selected[f"{name}/{_BY_MAPS}"] = metric.boxes.by_maps
        return selected

    @thresholds.setter
    def thresholds(self, selected: Mapping[str, float]) -> None:
        for name, metric in self.protocols.items():
            metric.boxes.selected = {
                condition: selected[f"{name}/{condition}"]
                for condition in CONDITIONS
                if f"{name}/{condition}" in selected
            }
            metric.boxes.by_truth = selected.get(f"{name}/{_BY_TRUTH}")
            metric.boxes.by_maps = selected.get(f"{name}/{_BY_MAPS}")

    def select(self, results: Mapping[str, float]) -> None:
        """Select the thresholds in the numbers of another split, by what each protocol selects by."""
        selected: dict[str, float] = {}
        for name, metric in self.protocols.items():
            prefix = f"{name}/pseudo_" if metric.protocol.selection == "pseudo" else f"{name}/"
            for condition in CONDITIONS if metric.protocol.selection != "classification" else ():
                for key in (f"{prefix}threshold_{condition}", f"{prefix}threshold"):
                    if key in results:
                        selected.setdefault(f"{name}/{condition}", results[key])
            if f"{name}/threshold_by_best" in results:
                selected[f"{name}/{_BY_TRUTH}"] = results[f"{name}/threshold_by_best"]
            if f"{name}/threshold_by_maps" in results:
                selected[f"{name}/{_BY_MAPS}"] = results[f"{name}/threshold_by_maps"]
        self.thresholds = selected

    def chosen_on(self, held_out: bool) -> dict[str, str]:
        """Say what chooses each protocol's threshold.

        This is "fixed" for a given one, "val" for the held-out split, "test" for the reported split itself, "pseudo"
        for pseudo boxes, "maps" for the maps themselves, or "default" for `UNKNOWN_THRESHOLD`.
        """
        return {name: self._chosen_on(metric, held_out) for name, metric in self.protocols.items()}

    def _chosen_on(self, metric: ProtocolEvaluation, held_out: bool) -> str:
        rules = metric.protocol
        if rules.threshold is not None:
            return "fixed"
        if rules.selection == "classification":
            return "default" if metric.boxes.by_maps is None else "maps"
        if rules.selection == "test" or not metric.boxes.selected:
            return "test"
        return "pseudo" if rules.selection == "pseudo" else "val" if held_out else "test"


def outcome(values: Mapping[str, Tensor]) -> Outcome:
    """Divide the result of `Evaluation.compute` into numbers, and curves and tables."""
    results = {name: float(value) for name, value in values.items() if value.ndim == 0}
    return Outcome(results, {name: value.tolist() for name, value in values.items() if value.ndim > 0})
