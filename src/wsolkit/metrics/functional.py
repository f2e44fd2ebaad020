"""The mathematics of the metrics, without state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wsolkit.localization.boxes import Select, TracedBoxes
from wsolkit.types import Boxes


def in_top_k(logits: Tensor, label: Tensor, k: int) -> Tensor:
    """Whether each label [B] is among the k classes with the highest logits [B, C]: bool [B]."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == label[:, None]).any(dim=1)


def box_iou(boxes: Boxes, others: Boxes) -> npt.NDArray[np.float64]:
    """IoU of boxes [n, 4] with others [m, 4]: [n, m]. Both corners are inside a box: its width is x1 − x0 + 1."""
    first, second = np.asarray(boxes)[:, None], np.asarray(others)[None]
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    intersection = np.clip(high - low + 1, 0, None).prod(-1)
    areas = [(box[..., 2:] - box[..., :2] + 1).prod(-1) for box in (first, second)]
    return np.asarray(intersection / (areas[0] + areas[1] - intersection), np.float64)


def correct_at_thresholds(
    traced: TracedBoxes, ground_truth: Boxes, select: Select, iou_thresholds: Sequence[float]
) -> npt.NDArray[np.bool_]:
    """Whether some chosen box overlaps some ground-truth box [n, 4] by at least δ, at each δ and τ: [δ, τ]."""
    chosen = traced.select(select)
    overlap = box_iou(np.concatenate(chosen), ground_truth).max(axis=1)  # [Σ boxes, n] → [Σ boxes]
    starts = np.cumsum([0] + [len(boxes) for boxes in chosen[:-1]])
    best = np.maximum.reduceat(overlap, starts)[traced.which]  # [distinct maps] → [τ]
    return best >= np.asarray(iou_thresholds)[:, None]


def max_box_accuracy(
    correct: Tensor, total: Tensor, iou_thresholds: Sequence[float], thresholds: npt.NDArray[np.float64]
) -> dict[str, Tensor]:
    """Summarise correct images [δ, τ] out of `total`, as percentages from 0 to 100, float64.

    Returns:
        max_box_acc_30 and so on: best over τ for each δ; max_box_acc_v2: their mean; and where 0.5 is among the δ,
        max_box_acc: the best over τ there, and threshold: the τ in [0, 1) that reaches it.
    """
    accuracy = 100 * correct.cpu().double() / total.cpu()  # some devices have no float64
    best = accuracy.amax(dim=1)
    values = {f"max_box_acc_{round(100 * d)}": value for d, value in zip(iou_thresholds, best, strict=True)}
    values["max_box_acc_v2"] = best.mean()
    if 0.5 in iou_thresholds:
        half = list(iou_thresholds).index(0.5)
        values["max_box_acc"] = best[half]
        values["threshold"] = accuracy.new_tensor(thresholds[int(correct[half].argmax())])
    return values


def pixel_histogram(scores: Tensor, masks: Tensor, num_thresholds: int) -> Tensor:
    """Count pixels by score, background and object apart; ignored pixels are left out.

    Args:
        scores: [B, H, W] in [0, 1].
        masks: [B, H, W], 0 background, 1 object, 255 ignored.
        num_thresholds: n; the bins are [i/n, (i + 1)/n), then [1, 2) and [2, 3), as in the reference evaluation.

    Returns:
        int64 [2, n + 2]: background, object.
    """
    if scores.device.type == "mps":  # no float64 there, and the bins' edges need it
        scores, masks = scores.cpu(), masks.cpu()
    edges = torch.arange(0, 1, 1 / num_thresholds, dtype=torch.float64, device=scores.device)[:num_thresholds]
    edges = torch.cat([edges, edges.new_tensor([1.0, 2.0])])
    bins = torch.bucketize(scores.double(), edges, right=True) - 1
    counted = masks <= 1
    combined = bins[counted] + masks[counted].long() * len(edges)
    return torch.bincount(combined, minlength=2 * len(edges)).view(2, -1)


def pixel_average_precision(histogram: Tensor) -> Tensor:
    """Area under the pooled pixel precision-recall curve in [0, 100] from a histogram [2, bins]; NaN without objects.

    Source: Choe et al. 2020: Σ precision · Δrecall, from the highest bin down.
    """
    positives = histogram.cpu().double().flip(1).cumsum(1)
    false_positives, true_positives = positives
    recall = true_positives / true_positives[-1]
    precision = true_positives / (true_positives + false_positives).clamp(min=1)
    area: Tensor = (precision[1:] * recall.diff()).sum()
    return 100 * area


def peak_iou(histogram: Tensor) -> tuple[Tensor, Tensor]:
    """Best of `pixel_iou` over the thresholds in [0, 1), and that threshold on a scale of 0 to 255."""
    num_thresholds = histogram.shape[1] - 2
    iou = pixel_iou(histogram)[:num_thresholds]
    peak = iou.argmax()
    return iou[peak], 255 * peak.double() / num_thresholds


def pixel_iou(histogram: Tensor) -> Tensor:
    """Pooled IoU of pixels with score ≥ τ with the objects, in [0, 100], for each bin's lower edge τ: [bins]."""
    false_positives, true_positives = histogram.cpu().double().flip(1).cumsum(1).flip(1)
    objects = true_positives[0]
    iou: Tensor = true_positives / (objects + false_positives)
    return 100 * iou
