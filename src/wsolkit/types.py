"""The values that travel along the path of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
from torch import Tensor

Boxes = npt.NDArray[np.int64]
"""Boxes [n, 4]: x0, y0, x1, y1 in pixels of the image they belong to; both corners lie inside the box."""

Image = npt.NDArray[np.uint8]
"""An RGB image [H, W, 3]."""

Mask = npt.NDArray[np.uint8]
"""A mask [H, W]: 0 background, 1 object, 255 ignored."""

Exif = Literal["apply", "ignore"]
"""Whether an image is turned as its EXIF orientation says: "apply": upright; "ignore": as it is stored."""

Select = Literal["largest", "all"]
"""Which of a map's components above the threshold make boxes: the one with the largest outline, or each."""

Classes = Tensor | Callable[[Tensor], Tensor] | Literal["all"] | None
"""Whose score maps: class indices [B, K]; a function of the logits [B, C] that returns them; None: the top class;
"all": of every class, in order, or one where a method has the same for all."""


class Localization(NamedTuple):
    """What a method says of a batch: logits [B, C] and raw score maps [B, K, h, w], float32, at its own resolution."""

    logits: Tensor
    maps: Tensor


class TrainingBatch(TypedDict):
    """What a loss needs: image [B, 3, H, W] normalised as the backbone expects it, label [B] int64."""

    image: Tensor
    label: Tensor


class EvaluationBatch(TrainingBatch):
    """A training batch and its ground truth.

    boxes: per image [n, 4] in pixels of the original image; uncut_boxes: the same as published, perhaps past its edges;
    size [B, 2]: width and height of the original image;
    mask: [B, H, W] uint8 (0, 1, 255) at the network's input size, 255 everywhere for an image without mask, or None
    where no image of the batch has one;
    index [B]: position in the split; uncropped [B, 3, R, R] and uncropped_mask [B, R, R]: the image and mask of which
    some protocols cut the network's input, or None where none does.
    """

    boxes: list[Boxes]
    uncut_boxes: list[Boxes]
    size: Tensor
    mask: Tensor | None
    index: Tensor
    uncropped: Tensor | None
    uncropped_mask: Tensor | None


PlainConfig = dict[str, Any]
"""A resolved config as plain containers: what checkpoints carry."""
