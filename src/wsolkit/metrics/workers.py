"""Draw boxes in threads, beside the forward pass of the next batch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from wsolkit.localization.boxes import Levels
from wsolkit.metrics.boxes import BoxEvaluation, Verdicts
from wsolkit.metrics.errors import OTHER
from wsolkit.metrics.functional import in_top_k, size_bins
from wsolkit.metrics.under_protocol import Judged, ProtocolEvaluation
from wsolkit.system.cores import available_cores
from wsolkit.types import EvaluationBatch


class Pending(NamedTuple):
    """A batch whose boxes are being drawn. `finite` says which images have finite score maps."""

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
        iou, error, size, baseline_iou = (np.stack(part) for part in zip(*judged, strict=True))
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
            size,
            baseline_iou.swapaxes(0, 1),
            predicted_iou,
            self.top1,
            self.top5,
            self.predicted,
        )
        # Each thread has its own mode, and the state may have been created in inference mode.
        with torch.inference_mode():
            self.metric.update(verdicts)


class BoxWorkers:
    """Draws the boxes of batches, and counts them, one batch after the other.

    Its threads live from the first batch of a pass until `close`.
    """

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._counter: ThreadPoolExecutor | None = None
        self._unfinished: list[Future[None]] = []

    def draw(
        self,
        metric: ProtocolEvaluation,
        batch: EvaluationBatch,
        rows: list[int],
        levels: Sequence[Levels],
        predicted: Mapping[int, Levels],
        logits: Tensor | None,
        finite: Tensor,
        counts: BoxEvaluation,
    ) -> Pending:
        """Start to draw the boxes of some images of a batch.

        Args:
            metric: the rules.
            batch: the batch of the images, with the boxes that the drawn ones are compared with.
            rows: the images to draw.
            levels: the levels of the maps of these images' labels.
            predicted: the levels of the maps of predicted classes, where they differ, by place in `rows`.
            logits: [B, C], or None without a classification.
            finite: whether the score maps are finite, bool [B].
            counts: counts the boxes.
        """
        if self._threads is None:
            together = distributed.is_available() and distributed.is_initialized()
            here = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.get_world_size() if together else 1))
            self._threads = ThreadPoolExecutor(max(1, available_cores() // here), thread_name_prefix="boxes")
        threads = self._threads
        label, truths = batch["label"][rows], metric.truths(batch, rows)
        shapes = batch["size"].tolist()
        sizes = [size_bins(batch["boxes"][row], *shapes[row]) for row in rows]
        top1, top5 = (None if logits is None else in_top_k(logits[rows], label, k).cpu().numpy() for k in (1, 5))
        return Pending(
            counts,
            finite[rows].cpu().numpy(),
            [threads.submit(metric.judge, *image) for image in zip(levels, truths, sizes, strict=True)],
            {p: threads.submit(metric.judge, part, truths[p], sizes[p]) for p, part in predicted.items()},
            batch["index"][rows].cpu().numpy(),
            label.cpu().numpy(),
            top1,
            top5,
            None if logits is None else logits[rows].argmax(dim=1).cpu().numpy(),
        )

    def count(self, pending: Sequence[Pending]) -> None:
        """Count the boxes of a batch once they are drawn.

        It waits for the batch before, whose boxes were drawn in the meantime, so that no more than two are in memory.
        """
        if self._counter is None:
            self._counter = ThreadPoolExecutor(1, thread_name_prefix="counts")
        previous, self._unfinished = self._unfinished, [self._counter.submit(one.finish) for one in pending]
        for counted in previous:
            counted.result()

    def finish(self) -> None:
        """Wait until all boxes are counted."""
        self.count(())

    def close(self) -> None:
        """Wait for the boxes, and end the threads."""
        self.finish()
        for pool in (self._counter, self._threads):
            if pool is not None:
                pool.shutdown()
        self._counter = self._threads = None
