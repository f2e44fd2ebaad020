"""Define the types of values that the package passes from image to box."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
from torch import Tensor
from typing_extensions import NotRequired

Boxes = npt.NDArray[np.int64]
"""Boxes [n, 4]: x0, y0, x1, y1 in pixels of their image. Both corners lie inside the box."""

Image = npt.NDArray[np.uint8]
"""An RGB image [H, W, 3]."""

Mask = npt.NDArray[np.uint8]
"""A mask [H, W]: 0 background, 1 object, 255 ignored."""

Exif = Literal["apply", "ignore"]
"""Whether to turn an image as its EXIF orientation says: "apply" turns it upright, "ignore" keeps it as stored."""

Select = Literal["largest", "all"]
"""Which components of a map above the threshold get a box: the one with the largest outline, or each of them."""

Classes = Tensor | Callable[[Tensor], Tensor] | Literal["all"] | None
"""The classes of score maps: class indices [B, K]; a function that returns them for logits [B, C]; None for the top
class; "all" for every class in order, or a single map if a method has the same for all."""


class Localization(NamedTuple):
    """A method's result for a batch: logits [B, C] and raw score maps [B, K, h, w], float32, at its own resolution."""

    logits: Tensor
    maps: Tensor


class Tokens(NamedTuple):
    """What a frozen transformer makes of a batch of images.

    pooled: a feature of each whole image [B, D]; patches: the patch tokens after L chosen blocks [B, L, D, h, w].
    """

    pooled: Tensor
    patches: Tensor


class View(NamedTuple):
    """A batch as the network sees it: images [B, 3, S, S] or their tokens, and whether these images are mirrored."""

    image: Any
    mirrored: bool


class TrainingBatch(TypedDict):
    """The input of a loss: image [B, 3, H, W], normalised as the backbone expects it, and label [B] int64.

    Where tokens are cached, `image` holds the tokens of the images instead. Where CutMix pasted a part of another image
    into each image, `pasted_label` [B] is the label of that image, and `own_share` is the share λ of the image, as a
    scalar, that is its own.
    """

    image: Any
    label: Tensor
    pasted_label: NotRequired[Tensor]
    own_share: NotRequired[Tensor]


class EvaluationBatch(TrainingBatch):
    """A training batch and its ground truth.

    boxes: per image [n, 4] in pixels of the original image; uncut_boxes: the boxes as published, which may exceed the
    image; size [B, 2]: width and height of the original image; mask [B, H, W]: uint8 (0, 1, 255) at the network's input
    size, 255 everywhere for an image without a mask, or None if no image of the batch has one; index [B]: the position
    in the split; uncropped [B, 3, R, R], uncropped_mask [B, R, R]: the image and the mask from which some protocols cut
    the network's input, or None if no protocol does; views: the images at the sizes of the evaluation, absent or [] if
    it only takes `image`; uncropped_views: the same before protocols cut them.
    """

    boxes: list[Boxes]
    uncut_boxes: list[Boxes]
    size: Tensor
    mask: Tensor | None
    index: Tensor
    uncropped: Tensor | None
    uncropped_mask: Tensor | None
    views: NotRequired[list[View]]
    uncropped_views: NotRequired[list[View]]


PlainConfig = dict[str, Any]
"""A resolved config as plain containers, as checkpoints hold it."""


@dataclass(frozen=True)
class Description:
    """Describes a model in its checkpoint: settings, class names by label, and mean and std of the network's input.

    parts: the settings of the method that name other checkpoints, with what stands in their place once the weights are
    in this model's checkpoint, see `wsolkit.checkpoint.Checkpoint`.
    """

    config: PlainConfig = field(default_factory=dict)
    class_names: Sequence[str] = ()
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    parts: Mapping[str, PlainConfig | None] = field(default_factory=dict)
