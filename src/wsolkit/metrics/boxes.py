"""MaxBoxAcc (Choe et al., CVPR 2020; V2 from its journal version)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric

from wsolkit.localization.boxes import Select, threshold_grid, trace_boxes
from wsolkit.metrics.functional import correct_at_thresholds, max_box_accuracy
from wsolkit.types import Boxes


class MaxBoxAccuracy(Metric):
    """Share of images whose box is right, at every threshold τ and IoU threshold δ, and its maximum over τ.

    The state is a table of counts [δ, τ]: it does not grow with the data set and sums across processes.

    Args:
        select: "largest": the outline of largest area makes the box (V1); "any": any outline may be right (V2).
        iou_thresholds: δ.
        num_thresholds: size of the grid τ = 0, 1/n, …, (n − 1)/n.
    """

    correct: Tensor
    total: Tensor

    def __init__(
        self,
        select: Literal["largest", "any"] = "largest",
        iou_thresholds: Sequence[float] = (0.3, 0.5, 0.7),
        num_thresholds: int = 1000,
    ) -> None:
        super().__init__()
        if select not in ("largest", "any"):
            raise ValueError(f"select={select!r}: expected 'largest' or 'any'")
        self.select: Select = "largest" if select == "largest" else "all"
        self.iou_thresholds = tuple(iou_thresholds)
        self.thresholds = threshold_grid(num_thresholds)
        shape = (len(self.iou_thresholds), num_thresholds)
        self.add_state("correct", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, score_maps: Tensor | npt.NDArray[np.floating], boxes: Sequence[Boxes]) -> None:
        """Count a batch.

        Args:
            score_maps: [B, H, W] in [0, 1].
            boxes: ground truth of each image [n, 4], n ≥ 1, in pixels of the maps, both corners inside.

        Raises:
            ValueError: numbers of maps and boxes differ, a map leaves [0, 1], or an image has no box.
        """
        maps = score_maps.detach().cpu().numpy() if isinstance(score_maps, Tensor) else np.asarray(score_maps)
        if len(maps) != len(boxes):
            raise ValueError(f"{len(maps)} score maps with boxes for {len(boxes)} images: expected one entry per image")
        for number, ground_truth in enumerate(boxes):
            if np.ndim(ground_truth) != 2 or np.shape(ground_truth)[0] == 0 or np.shape(ground_truth)[1] != 4:
                raise ValueError(f"boxes of image {number} have shape {np.shape(ground_truth)}: expected [n, 4], n ≥ 1")
        if len(maps):
            verdicts = [
                correct_at_thresholds(trace_boxes(m, self.thresholds), np.asarray(b), self.select, self.iou_thresholds)
                for m, b in zip(maps, boxes, strict=True)
            ]
            self.correct += torch.from_numpy(np.sum(verdicts, axis=0)).to(self.correct.device)
            self.total += len(verdicts)

    def counts(self) -> Tensor:
        """Correct images [δ, τ] of what this process has seen."""
        return self.correct

    def compute(self) -> dict[str, Tensor]:
        """Percentages from 0 to 100, and the best threshold in [0, 1): see `max_box_accuracy`."""
        return max_box_accuracy(self.correct, self.total, self.iou_thresholds, self.thresholds)
