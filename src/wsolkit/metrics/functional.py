"""The mathematics of the metrics, without state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wsolkit.system.compiled import compiled
from wsolkit.types import Boxes


def in_top_k(logits: Tensor, label: Tensor, k: int) -> Tensor:
    """Say whether each label [B] is among the k classes with the highest logits [B, C], bool [B].

    The result is False for logits that are not finite.
    """
    # torchmetrics' accuracy breaks ties in another way, and counts images whose logits are not finite.
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == label[:, None]).any(dim=1) & logits.isfinite().all(dim=1)


def box_iou(boxes: Boxes, others: Boxes) -> npt.NDArray[np.float64]:
    """Compute the IoU [n, m] of boxes [n, 4] with others [m, 4]. Both corners are inside: the width is x1 − x0 + 1."""
    first, second = np.asarray(boxes)[:, None], np.asarray(others)[None]
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    intersection = np.clip(high - low + 1, 0, None).prod(-1)
    areas = [(box[..., 2:] - box[..., :2] + 1).prod(-1) for box in (first, second)]
    return np.asarray(intersection / (areas[0] + areas[1] - intersection), np.float64)


def max_box_accuracy(
    correct: Tensor,
    total: Tensor,
    iou_thresholds: Sequence[float],
    thresholds: npt.NDArray[np.float64],
    admissible: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Tensor]:
    """Summarise the correct images [δ, τ] out of `total`, as percentages from 0 to 100, float64.

    Args:
        correct: the numbers of correct images.
        total: the number of images.
        iou_thresholds: δ.
        admissible: bool [τ], the thresholds among which the best is sought. None admits all.

    Returns:
        max_box_acc_30 and so on, the best over τ for each δ; threshold_30 and so on, the τ in [0, 1) that reaches it;
        max_box_acc_v2, their mean; and with 0.5 among the δ, max_box_acc and threshold for 0.5.
    """
    accuracy = 100 * correct.cpu().double() / total.cpu()  # Some devices have no float64.
    if admissible is not None:
        accuracy = accuracy.masked_fill(~torch.from_numpy(admissible), -1)
    best, at = accuracy.amax(dim=1), accuracy.argmax(dim=1)
    values = {}
    for row, delta in enumerate(iou_thresholds):
        values[f"max_box_acc_{round(100 * delta)}"] = best[row]
        values[f"threshold_{round(100 * delta)}"] = accuracy.new_tensor(thresholds[int(at[row])])
    values["max_box_acc_v2"] = best.mean()
    if 0.5 in iou_thresholds:
        values["max_box_acc"], values["threshold"] = values["max_box_acc_50"], values["threshold_50"]
    return values


SIZE_EDGES = tuple(side**2 / 100 for side in range(11))
"""The edges of the bins of object sizes, as shares of the image: 0, 1, 4, …, 81, 100 %. Their sides are tenths."""


def size_bins(boxes: Boxes, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Return the bin of `SIZE_EDGES` for the share of an image that each box [n, 4] takes.

    A bin holds its lower edge, and the last one holds both. Source: Hwang et al., Neurocomputing 2025, whose released
    evaluation has (x1 − x0) · (y1 − y0) for the area of a box.
    """
    sides = np.asarray(boxes)[:, 2:] - np.asarray(boxes)[:, :2]
    share = sides.prod(axis=1) / (width * height)
    place = np.searchsorted(SIZE_EDGES, share, side="right") - 1
    return np.asarray(np.clip(place, 0, len(SIZE_EDGES) - 2), np.uint8)


def count_by_size(counts: Tensor, size: npt.NDArray[np.uint8], right: npt.NDArray[np.bool_]) -> None:
    """Add a batch to the images by object size and by the number of IoU thresholds that their box reaches.

    Args:
        counts: [bins, δ + 1, τ], which it changes.
        size: the bin of `SIZE_EDGES` of the object of each image at each τ [B, τ].
        right: whether its box is right [δ, B, τ]. A box that is right for a δ must be right for all lower δ.
    """
    table = np.zeros(counts.shape, np.int64)
    _tally(table, size, right.sum(axis=0, dtype=np.uint8))
    counts += torch.from_numpy(table).to(counts.device)


@compiled
def _tally(table: Any, size: Any, reached: Any) -> None:
    """Add one to `table` [bins, δ + 1, τ] for each image at each τ, by its bin and the δ that it reaches [B, τ]."""
    for image in range(size.shape[0]):
        for step in range(size.shape[1]):
            table[size[image, step], reached[image, step], step] += 1


def size_aware_accuracy(
    counts: Tensor, iou_thresholds: Sequence[float], admissible: npt.NDArray[np.bool_] | None = None
) -> dict[str, Tensor]:
    """Summarise accuracy for objects of each size, in percent, float64. The best τ over all images counts for each δ.

    Args:
        counts: see `count_by_size`.
        iou_thresholds: δ.
        admissible: bool [τ], the thresholds among which the best is sought. None admits all.

    Returns:
        max_box_acc_by_size [bins], the mean over δ, 0 for a bin without images; max_box_acc_size_mean, its mean over
        the bins that have images; images_by_size [bins], at the best τ of the middle δ.
    """
    counts = counts.cpu()
    forbidden = torch.zeros(counts.shape[2], dtype=torch.bool) if admissible is None else ~torch.from_numpy(admissible)
    shares, images = [], []
    for rank in range(1, 1 + len(iou_thresholds)):  # A box reaches the lowest δ first.
        correct = counts[:, rank:].sum(dim=1)  # [bins, τ]
        at = int(correct.sum(dim=0).masked_fill(forbidden, -1).argmax())
        images.append(counts[:, :, at].sum(dim=1).double())
        shares.append(100 * correct[:, at] / images[-1])
    by_size = torch.stack(shares).mean(dim=0)
    return {
        "max_box_acc_size_mean": by_size.nanmean(),
        "max_box_acc_by_size": by_size.nan_to_num(),
        "images_by_size": images[(len(images) - 1) // 2],
    }


def histogram_median(counts: Tensor, start: int = 0) -> Tensor:
    """Compute the median of values in [0, 1), up to half a bin, float64.

    The values are counted in bins [n] of equal width, and bins before `start` do not count. The result is NaN if
    nothing was counted.
    """
    cumulated = counts[start:].double().cumsum(0)
    if cumulated[-1] == 0:
        return torch.tensor(torch.nan, dtype=torch.float64)
    median_bin = start + int(torch.searchsorted(cumulated, cumulated[-1] / 2))
    return torch.tensor((median_bin + 0.5) / len(counts), dtype=torch.float64)


def pixel_histogram(scores: Tensor, masks: Tensor, num_thresholds: int) -> Tensor:
    """Count pixels by score, separately for background and object, without ignored pixels.

    Args:
        scores: [B, H, W] in [0, 1].
        masks: [B, H, W], 0 background, 1 object, 255 ignored.
        num_thresholds: n. The bins are [i/n, (i + 1)/n), then [1, 2) and [2, 3), as in the reference evaluation.

    Returns:
        int64 [B, 2, n + 2]: background, object.
    """
    if scores.device.type == "mps":  # The device has no float64, which the edges of the bins need.
        scores, masks = scores.cpu(), masks.cpu()
    edges = torch.arange(0, 1, 1 / num_thresholds, dtype=torch.float64, device=scores.device)[:num_thresholds]
    edges = torch.cat([edges, edges.new_tensor([1.0, 2.0])])
    bins = torch.bucketize(scores.double(), edges, right=True) - 1
    counted = masks <= 1
    table = 2 * torch.arange(len(masks), device=masks.device)[:, None, None] + masks.long()
    combined = (bins + table * len(edges))[counted]
    return torch.bincount(combined, minlength=2 * len(masks) * len(edges)).view(len(masks), 2, -1)


def pixel_average_precision(histogram: Tensor) -> Tensor:
    """Compute the area under the pooled pixel precision-recall curve in [0, 100] from a histogram [2, bins].

    The result is NaN without objects. Source: Choe et al. 2020: Σ precision · Δrecall, from the highest bin down.
    """
    positives = histogram.cpu().double().flip(1).cumsum(1)
    false_positives, true_positives = positives
    recall = true_positives / true_positives[-1]
    precision = true_positives / (true_positives + false_positives).clamp(min=1)
    area: Tensor = (precision[1:] * recall.diff()).sum()
    return 100 * area


def peak_iou(histogram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best `pixel_iou` over the thresholds in [0, 1), and its threshold on a scale of 0 to 255."""
    num_thresholds = histogram.shape[1] - 2
    iou = pixel_iou(histogram)[:num_thresholds]
    peak = iou.argmax()
    return iou[peak], 255 * peak.double() / num_thresholds


def pixel_iou(histogram: Tensor) -> Tensor:
    """Compute the IoU of pixels with score ≥ τ and the objects, in [0, 100], for each bin's lower edge τ.

    [..., 2, bins] → [..., bins]. The result is NaN if no pixel is on an object or has this score.
    """
    false_positives, true_positives = histogram.cpu().double().flip(-1).cumsum(-1).flip(-1).unbind(-2)
    objects = true_positives[..., :1]
    return 100 * true_positives / (objects + false_positives)


def precision_recall(histogram: Tensor) -> tuple[Tensor, Tensor]:
    """Compute pooled precision and recall in [0, 100] of pixels with score ≥ τ, for each bin's lower edge τ: [bins]."""
    false_positives, true_positives = histogram.cpu().double().flip(1).cumsum(1).flip(1)
    found = (true_positives + false_positives).clamp(min=1)
    return 100 * true_positives / found, 100 * true_positives / true_positives[0]
