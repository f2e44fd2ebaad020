"""Compute metrics under one protocol."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolkit.localization.boxes import Levels, best_iou, matched_boxes
from wsolkit.localization.maps import upsample
from wsolkit.localization.protocol import Protocol
from wsolkit.metrics.baselines import BASELINES, baseline_map
from wsolkit.metrics.boxes import CONDITIONS, BoxEvaluation, matched_sizes
from wsolkit.metrics.classification import TopKAccuracy
from wsolkit.metrics.errors import localization_errors
from wsolkit.metrics.functional import pixel_histogram
from wsolkit.metrics.map_values import MapValues
from wsolkit.metrics.masks import PIXEL_BINS, MaskEvaluation
from wsolkit.types import Boxes, EvaluationBatch

_MAX_SIZES = 64

# What pseudo boxes give: the numbers that select the checkpoint and the threshold.
_SELECTING = ("max_box_acc", "threshold", *(f"threshold_{condition}" for condition in CONDITIONS))

Judged = tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8], npt.NDArray[np.uint8], npt.NDArray[np.float64]]
"""The result for an image's boxes at T thresholds: IoU [T], error [T], the size of the object [T], and the baselines'
IoU [baselines, T]."""


class ProtocolEvaluation(nn.Module):
    """A protocol and its metrics.

    Args:
        protocol: the rules.
        num_classes: the number of classes in the table by class.
        threshold_by_maps: whether maps alone give a threshold where no boxes do.
    """

    def __init__(self, protocol: Protocol, num_classes: int, threshold_by_maps: bool) -> None:
        super().__init__()
        self.protocol = protocol
        self.top1_cls = TopKAccuracy(1)
        self.top5_cls = TopKAccuracy(5)
        self.boxes = BoxEvaluation(protocol, num_classes)
        # It compares the same boxes with pseudo boxes, which only a split has that selects.
        self.pseudo = BoxEvaluation(protocol, num_classes) if protocol.selection == "pseudo" else None
        self.map_values = MapValues() if threshold_by_maps else None
        self.masks = MaskEvaluation(1 + len(BASELINES))
        self._baselines = [baseline_map(name, protocol.resolution) for name in BASELINES]
        self._drawn: dict[tuple[int, int], list[Boxes]] = {}

    def levels(self, maps: Tensor, raw: Tensor, rows: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[Levels]:
        """Cut the maps of some images of a batch into levels.

        Args:
            maps: localization maps [B, R, R].
            raw: the score maps [B, h, w] that they come from.
            rows: the images to use.
            sizes: the height and width of each original image of the batch.
        """
        rules = self.protocol
        if rules.frame == "input":
            return rules.levels(maps[list(rows)])
        return [rules.levels(rules.localization_maps(raw[row : row + 1], sizes[row]))[0] for row in rows]

    def sizes(self, batch: EvaluationBatch) -> list[tuple[int, int]]:
        """Return the height and width of the maps of a batch."""
        if self.protocol.frame == "input":
            return [(self.protocol.resolution, self.protocol.resolution)] * len(batch["boxes"])
        return [(height, width) for width, height in batch["size"].tolist()]

    def localization_maps(self, raw: Tensor, batch: EvaluationBatch) -> list[Tensor]:
        """Make localization maps of a batch from its score maps [B, h, w], each at the size of its evaluation."""
        rules = self.protocol
        return [rules.localization_maps(raw[row : row + 1], size)[0] for row, size in enumerate(self.sizes(batch))]

    def at_size(self, maps: Sequence[Tensor], batch: EvaluationBatch) -> list[Tensor]:
        """Resize localization maps that are ready, each to the size of its evaluation."""
        return [at_size(score, size)[0] for score, size in zip(maps, self.sizes(batch), strict=True)]

    def truths(self, batch: EvaluationBatch, rows: Sequence[int]) -> list[Boxes]:
        """Return the true boxes of some images of a batch, in pixels of the maps."""
        sizes = batch["size"].tolist()
        # If the protocol shifts the far corner, the corner must not have been moved to the last pixel before.
        boxes = batch["uncut_boxes"] if self.protocol.far_corner_shift else batch["boxes"]
        return [self.protocol.truth(boxes[row], *sizes[row]) for row in rows]

    def judge(self, levels: Levels, truth: Boxes, sizes: npt.NDArray[np.uint8]) -> Judged:
        """Draw an image's boxes and compare them with the true ones [n, 4], n ≥ 1, and take their sizes from [n]."""
        boxes, overlap = matched_boxes(levels, self.protocol.box_rule, truth)
        height, width = levels.level.shape
        baselines = np.stack([best_iou(drawn, truth) for drawn in self._baseline_boxes((height, width))])
        return overlap, localization_errors(boxes, truth), matched_sizes(boxes, truth, sizes), baselines

    def _baseline_boxes(self, size: tuple[int, int]) -> list[Boxes]:
        """Return the baselines' boxes at each threshold, for a height and width of maps. A few sizes are kept."""
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
        # Each of their level sets has one outline only, so it does not matter which outline counts.
        component = "largest_outline" if rules.component == "all_outlines" else rules.component
        any_box = np.zeros((1, 4), np.int64)
        rule = rules.box_rule._replace(component=component)
        return [matched_boxes(levels, rule, any_box)[0] for levels in rules.levels(maps)]

    def histograms(self, maps: Tensor, mask: Tensor) -> Tensor:
        """Count the pixels of localization maps [B, R, R] and baselines by score: [1 + baselines, B, 2, bins]."""
        constant = [torch.from_numpy(score).to(maps).expand_as(maps) for score in self._baselines]
        mask = F.interpolate(mask[:, None], maps.shape[-2:], mode="nearest")[:, 0]
        return torch.stack([pixel_histogram(scores, mask, PIXEL_BINS) for scores in (maps, *constant)])

    def compute(self) -> dict[str, Tensor]:
        """Return metrics by name, and the baselines' as `<baseline>/<metric>`, if there was ground truth for them."""
        # Each part synchronises the processes, so all processes compute all parts, whatever they have seen themselves.
        classification = {"top1_cls": self.top1_cls.compute(), "top5_cls": self.top5_cls.compute()}
        known = {name: value for name, value in classification.items() if not value.isnan()}
        pseudo = {} if self.pseudo is None else self.pseudo.compute()
        selecting = {f"pseudo_{name}": value for name, value in pseudo.items() if name in _SELECTING}
        boxes = self.boxes.compute()
        if self.map_values is not None:
            by_maps = self.map_values.compute()
            if not by_maps.isnan() and ("threshold" not in boxes or self.protocol.selection == "classification"):
                selecting["threshold_by_maps"] = by_maps
        return known | boxes | self.masks.compute() | selecting


def at_size(score: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map [h, w] to [1, H, W]. A map of that size stays as it is, in its own precision."""
    return score[None] if score.shape == size else upsample(score[None].float(), size, "bilinear")
