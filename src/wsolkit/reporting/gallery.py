"""Draw what a method sees: images with ground truth, score map and box."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from wsolkit.data.dataset import WSOLDataset, evaluation_batch
from wsolkit.data.transforms import denormalise
from wsolkit.localization.boxes import matched_boxes
from wsolkit.localization.inputs import images_to, localize_views, network_input, network_views
from wsolkit.localization.protocol import UNKNOWN_THRESHOLD
from wsolkit.methods.base import WSOLModule
from wsolkit.metrics.evaluation import Evaluation
from wsolkit.metrics.functional import box_iou
from wsolkit.reporting.charts import Shown
from wsolkit.types import EvaluationBatch

Localize = Callable[[EvaluationBatch], tuple[list[Tensor], list[int | None]]]
"""A batch → the labels' localization maps at the size of the evaluation, and predicted classes if known."""


def localize_with(module: WSOLModule, evaluation: Evaluation) -> Localize:
    """Return a function that makes a module's localization maps, under the first protocol of an evaluation."""
    metric = next(iter(evaluation.protocols.values()))

    def localize(batch: EvaluationBatch) -> tuple[list[Tensor], list[int | None]]:
        # With trainer.precision=bf16-true, the weights have half precision, and the images need it, too.
        views = network_views(images_to(batch, next(module.parameters())), metric.protocol.input)
        training = module.training
        module.eval()
        try:
            with torch.inference_mode():
                localization = localize_views(views, module.localize, batch["label"].to(module.device)[:, None])
        finally:  # Showing an image must not change the training.
            module.train(training)
        maps = metric.localization_maps(localization.maps[:, 0], batch)
        return [score.cpu() for score in maps], list(localization.logits.argmax(dim=1).tolist())

    return localize


def shown_threshold(results: Mapping[str, float], protocol: str) -> float:
    """Return the threshold of the boxes in pictures: the protocol's τ, or `UNKNOWN_THRESHOLD`.

    Without boxes in the split, it is the τ that pseudo boxes or the maps have selected, if any.
    """
    names = ("threshold", "threshold_by_pseudo", "threshold_by_maps")
    known = (results[f"{protocol}/{name}"] for name in names if f"{protocol}/{name}" in results)
    return next(known, UNKNOWN_THRESHOLD)


def show(
    localize: Localize,
    evaluation: Evaluation,
    results: Mapping[str, float],
    dataset: WSOLDataset,
    indices: Sequence[int],
    class_names: Sequence[str],
    normalization: tuple[Sequence[float], Sequence[float]],
) -> list[Shown]:
    """Return images of a split under the first protocol, at `shown_threshold`.

    Args:
        dataset: the split.
        localize: makes the maps.
        evaluation: names the protocols.
        results: the numbers of a pass, for the threshold.
        indices: the images.
        class_names: the names of the classes by label.
        normalization: the mean and standard deviation of the images.
    """
    if not indices:
        return []
    name, metric = next(iter(evaluation.protocols.items()))
    rules = metric.protocol
    step = int(np.abs(rules.thresholds - shown_threshold(results, name)).argmin())
    batch = evaluation_batch([dataset[0, index] for index in indices])
    maps, predictions = localize(batch)
    inputs = network_input(batch, rules.input)
    truths = metric.truths(batch, range(len(indices)))
    shown = []
    for row, index in enumerate(indices):
        truth, predicted = truths[row], predictions[row]
        known = truth if len(truth) else np.zeros((1, 4), np.int64)
        box = matched_boxes(rules.levels(maps[row][None])[0], rules.box_rule, known)[0][step]
        original = rules.frame == "original"
        shown.append(
            Shown(
                name=dataset.records.name(index),
                image=dataset.records.image(index) if original else denormalise(inputs[row], *normalization),
                score_map=maps[row].numpy(),
                truth=truth,
                predicted=box[None],
                label=class_names[int(batch["label"][row])],
                predicted_label=None if predicted is None else class_names[predicted],
                iou=float(box_iou(box[None], truth).max()) if len(truth) else float("nan"),
            )
        )
    return shown
