"""One pass over a split, every metric: classification, localization under each protocol, masks, and baselines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from wsolkit.localization.boxes import TracedBoxes, threshold_grid, trace_boxes
from wsolkit.localization.protocol import Protocol
from wsolkit.metrics.classification import TopKAccuracy
from wsolkit.metrics.functional import (
    correct_at_thresholds,
    in_top_k,
    max_box_accuracy,
    peak_iou,
    pixel_average_precision,
    pixel_histogram,
)
from wsolkit.types import Boxes, EvaluationBatch, Localization

BASELINES = ("center_box", "full_image")

# Under which condition a box counts: always; if the label is the first, or among the first five predictions; and
# with the map of the predicted class instead of the label's.
CONDITIONS = ("gt_known_loc", "top1_loc", "top5_loc", "gt_known_loc_predicted_class")

PIXEL_BINS = 1000


def baseline_map(name: str, size: int) -> npt.NDArray[np.float64]:
    """Maps [size, size] that know nothing of the image.

    "center_box": falls linearly from the centre to the border, so that its level sets are the centred squares of
    every size; "full_image": 1 everywhere, so that every threshold keeps the whole image.
    """
    if name == "full_image":
        return np.ones((size, size))
    distance = np.abs(np.arange(size) - (size - 1) / 2) / (size / 2)
    return np.asarray(1 - np.maximum(distance[:, None], distance[None]))


class ProtocolEvaluation(Metric):
    """Localization of a method, and of the baselines, under one protocol.

    Each map is traced once. The state is two tables that sum across processes: correct images by condition or
    baseline, δ and τ; and pixels by method or baseline, background or object, and score.

    Attributes:
        selected: the threshold τ chosen on another split, or None: the best one on this split.
    """

    correct: Tensor
    images: Tensor
    histogram: Tensor

    def __init__(self, protocol: Protocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.selected: float | None = None
        self.thresholds = threshold_grid(protocol.num_thresholds)
        self._baselines = [baseline_map(name, protocol.resolution) for name in BASELINES]
        self._traced_baselines = [trace_boxes(score, self.thresholds) for score in self._baselines]
        rows = len(CONDITIONS) + len(BASELINES)
        table = torch.zeros(rows, len(protocol.iou_thresholds), protocol.num_thresholds, dtype=torch.int64)
        self.add_state("correct", table, dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")
        histogram = torch.zeros(1 + len(BASELINES), 2, PIXEL_BINS + 2, dtype=torch.int64)
        self.add_state("histogram", histogram, dist_reduce_fx="sum")

    def update(self, localization: Localization, batch: EvaluationBatch) -> None:
        """Count a batch; `localization.maps` [B, 2, h, w] are those of the label and of the predicted class."""
        maps = self.protocol.localization_maps(localization.maps[:, 0])
        if any(len(boxes) for boxes in batch["boxes"]):
            self._count_boxes(maps, localization, batch)
        if batch["mask"] is not None:
            size = (self.protocol.resolution,) * 2
            mask = F.interpolate(batch["mask"][:, None], size, mode="nearest")[:, 0]
            constant = [torch.from_numpy(score).to(maps).expand_as(maps) for score in self._baselines]
            for row, scores in enumerate([maps, *constant]):
                self.histogram[row] += pixel_histogram(scores, mask, PIXEL_BINS).to(self.histogram.device)

    def _count_boxes(self, maps: Tensor, localization: Localization, batch: EvaluationBatch) -> None:
        label, logits = batch["label"], localization.logits
        truth = [
            self.protocol.scale_boxes(boxes, width, height)
            for boxes, (width, height) in zip(batch["boxes"], batch["size"].tolist(), strict=True)
        ]
        right = self._judge(maps, truth)
        # A class-agnostic map is the same for every class, and a right prediction has the label's own map.
        differs = (localization.maps[:, 0] != localization.maps[:, 1]).flatten(1).any(dim=1)
        rows = ((logits.argmax(dim=1) != label) & differs).nonzero()[:, 0]
        right_predicted = right.copy()
        if len(rows):
            others = self.protocol.localization_maps(localization.maps[rows, 1])
            right_predicted[rows.cpu().numpy()] = self._judge(others, [truth[row] for row in rows.tolist()])
        top1, top5 = (in_top_k(logits, label, k).cpu().numpy()[:, None, None] for k in (1, 5))
        ignorant = [np.stack([self._verdict(traced, boxes) for boxes in truth]) for traced in self._traced_baselines]
        table = np.stack([right, right & top1, right & top5, right_predicted, *ignorant])
        self.correct += torch.from_numpy(table.sum(axis=1)).to(self.correct.device)  # [rows, B, δ, τ] → [rows, δ, τ]
        self.images += len(truth)

    def _judge(self, maps: Tensor, truth: list[Boxes]) -> npt.NDArray[np.bool_]:
        traced = [trace_boxes(score, self.thresholds) for score in maps.cpu().numpy()]
        return np.stack([self._verdict(t, boxes) for t, boxes in zip(traced, truth, strict=True)])

    def _verdict(self, traced: TracedBoxes, boxes: Boxes) -> npt.NDArray[np.bool_]:
        return correct_at_thresholds(traced, boxes, self.protocol.select, self.protocol.iou_thresholds)

    def compute(self) -> dict[str, Tensor]:
        """Metrics by name, and those of the baselines as `<baseline>/<metric>`; only what there was truth for."""
        values: dict[str, Tensor] = {}
        if int(self.images):
            deltas = self.protocol.iou_thresholds
            values |= max_box_accuracy(self.correct[0], self.images, deltas, self.thresholds)
            if self.selected is not None:
                values["threshold"] = values["threshold"].new_tensor(self.selected)
            at = int(np.abs(self.thresholds - float(values["threshold"])).argmin())
            half = list(deltas).index(0.5)
            for row, condition in enumerate(CONDITIONS):
                values[condition] = 100 * self.correct[row, half, at].cpu().double() / self.images.cpu()
            for row, name in enumerate(BASELINES, start=len(CONDITIONS)):
                summary = max_box_accuracy(self.correct[row], self.images, deltas, self.thresholds)
                values |= {f"{name}/{metric}": value for metric, value in summary.items()}
        if int(self.histogram.sum()):
            for name, histogram in zip(["", *(f"{name}/" for name in BASELINES)], self.histogram, strict=True):
                values[f"{name}pxap"] = pixel_average_precision(histogram)
                values[f"{name}peak_iou"], values[f"{name}peak_threshold"] = peak_iou(histogram)
        return values


class Evaluation(nn.Module):
    """All metrics of a validation or test pass.

    Args:
        protocols: by the name under which each reports.
    """

    def __init__(self, protocols: Mapping[str, Protocol]) -> None:
        super().__init__()
        self.top1_cls = TopKAccuracy(1)
        self.top5_cls = TopKAccuracy(5)
        self._protocols = nn.ModuleDict({name: ProtocolEvaluation(rules) for name, rules in protocols.items()})

    @property
    def protocols(self) -> dict[str, ProtocolEvaluation]:
        """The protocols' metrics by name."""
        return cast("dict[str, ProtocolEvaluation]", dict(self._protocols.items()))

    @property
    def names(self) -> list[str]:
        """Names of what `compute` may return for the method, where there are boxes and masks."""
        per_protocol = [
            f"{name}/{metric}"
            for name, protocol in self.protocols.items()
            for metric in (
                *(f"max_box_acc_{round(100 * delta)}" for delta in protocol.protocol.iou_thresholds),
                *("max_box_acc", "max_box_acc_v2", "threshold", *CONDITIONS, "pxap", "peak_iou", "peak_threshold"),
            )
        ]
        return ["top1_cls", "top5_cls", *per_protocol]

    def classes(self, logits: Tensor, label: Tensor) -> Tensor:
        """Whose maps `update` needs: those of the ground-truth and of the predicted class [B, 2]."""
        return torch.stack([label, logits.argmax(dim=1)], dim=1)

    def update(self, localization: Localization, batch: EvaluationBatch) -> None:
        """Count a batch; `localization.maps` are those of `classes`."""
        self.top1_cls.update(localization.logits, batch["label"])
        self.top5_cls.update(localization.logits, batch["label"])
        for protocol in self.protocols.values():
            protocol.update(localization, batch)

    def compute(self) -> dict[str, Tensor]:
        """Sum over processes: `top1_cls`, `top5_cls`, `<protocol>/<metric>`, `<protocol>/<baseline>/<metric>`."""
        values = {"top1_cls": self.top1_cls.compute(), "top5_cls": self.top5_cls.compute()}
        for name, protocol in self.protocols.items():
            values |= {f"{name}/{metric}": value for metric, value in protocol.compute().items()}
        return values

    def reset(self) -> None:
        """Forget what was counted; selected thresholds stay."""
        for metric in (self.top1_cls, self.top5_cls, *self.protocols.values()):
            metric.reset()

    @property
    def thresholds(self) -> dict[str, float]:
        """Thresholds τ selected on another split, by protocol; assigning replaces them, {} forgets them."""
        return {name: p.selected for name, p in self.protocols.items() if p.selected is not None}

    @thresholds.setter
    def thresholds(self, selected: Mapping[str, float]) -> None:
        for name, protocol in self.protocols.items():
            protocol.selected = selected.get(name)
