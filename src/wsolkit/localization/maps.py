"""Turn score maps at the network's resolution into localization maps in [0, 1] at the resolution of the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["bicubic", "bilinear", "nearest"]

Normalisation = Literal["minmax", "max", "pas", "ivr"]
"""How score maps are scaled to [0, 1], see `normalise`."""

_PAS_PERCENTILE = 0.9  # Released code of Bae et al. (ECCV 2020) and of IVR.
_ROUNDING = 8  # Values of a constant map may differ by this many units in the last place.


def min_max(maps: Tensor, epsilon: float = 0) -> Tensor:
    """Scale each map [..., H, W] to [0, 1] over space. A map that is constant up to rounding becomes 0.

    Args:
        maps: the maps.
        epsilon: a number that is added to the range before the division, as in some released code.
    """
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    constant = _constant(low, high)
    scaled = (maps - low) / (high - low + epsilon).masked_fill(constant, 1)
    return scaled.masked_fill(constant, 0)


def _constant(low: Tensor, high: Tensor) -> Tensor:
    """Say which maps with these extremes are constant up to rounding."""
    # Enlarging a constant map leaves differences of a few units in the last place.
    rounding = _ROUNDING * torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs())
    return high - low <= rounding


def normalise(maps: Tensor, how: Normalisation, percentile: float, epsilon: float = 0) -> Tensor:
    """Scale each map to [0, 1] over space. A map that is constant up to rounding becomes 0.

    - minmax: (m − min) / (max − min).
    - max: max(0, m) / max. A map without positive values becomes 0.
    - pas, percentile as a standard (Bae et al., ECCV 2020): m − min, divided by its 90th percentile, and
      1 where it is above it.
    - ivr (Kim et al., ICCV 2021): max(0, m − its percentile), divided by the maximum.

    The percentile q of n values is the one at position int(n · q) of the sorted values, without interpolation.

    Args:
        maps: [..., H, W].
        how: see above.
        percentile: q of ivr, in [0, 1).
        epsilon: a number that is added to the range of minmax before the division, as in some released code.

    >>> import torch
    >>> from wsolkit.localization.maps import normalise
    >>> normalise(torch.tensor([[-1.0, 0.0, 1.0, 3.0]]), "ivr", percentile=0.5)
    tensor([[0., 0., 0., 1.]])
    """
    if how == "minmax":
        return min_max(maps, epsilon)
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    if how == "max":
        above, scale = maps.relu(), high
    elif how == "pas":
        above = maps - low
        scale = _at(above, _PAS_PERCENTILE)
    else:
        above = (maps - _at(maps, percentile)).relu()
        scale = above.amax(dim=(-2, -1), keepdim=True)
    # Where the percentile of pas is the minimum, all values above it are 1, as if it were slightly larger.
    empty = (above > 0).to(maps.dtype) if how == "pas" else torch.zeros_like(maps)
    scaled = torch.where(scale > 0, (above / scale.masked_fill(scale <= 0, 1)).clamp(max=1), empty)
    return scaled.masked_fill(_constant(low, high), 0)


def _at(maps: Tensor, percentile: float) -> Tensor:
    """Return the percentile [..., 1, 1] of each map [..., H, W]."""
    values = maps.flatten(-2)
    place = min(int(values.shape[-1] * percentile), values.shape[-1] - 1)  # In double precision, as released.
    return values.kthvalue(place + 1, dim=-1, keepdim=True).values[..., None]


def upsample(maps: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """Resize maps [B, h, w] to [B, H, W], without aligned corners, as OpenCV does."""
    if maps.shape[-2:] == size:
        return maps
    aligned = None if interpolation == "nearest" else False
    return F.interpolate(maps[:, None], size=size, mode=interpolation, align_corners=aligned)[:, 0]


def central_crop(images: Tensor, size: int) -> Tensor:
    """Cut the central square [..., size, size] out of images [..., H, W]."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def ten_crops(images: Tensor, size: int) -> Sequence[Tensor]:
    """Cut four corners, the centre and their mirror images out of images [B, 3, H, W]: ten of [B, 3, size, size]."""
    ends = slice(size), slice(-size, None)
    crops = [images[..., rows, columns] for rows in ends for columns in ends] + [central_crop(images, size)]
    return crops + [crop.flip(-1) for crop in crops]


def enlarge(score_map: npt.NDArray[np.floating[Any]], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Resize a map [h, w] to size (H, W), bilinearly, or by area where it shrinks."""
    given = np.ascontiguousarray(score_map, np.float32)
    if given.shape == size:
        return given
    shrinks = given.shape[0] > size[0] or given.shape[1] > size[1]
    return np.asarray(cv2.resize(given, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR))


def enlarge_labels(labels: npt.NDArray[np.int32], size: tuple[int, int]) -> npt.NDArray[np.int32]:
    """Resize regions [h, w], 0 outside and numbered from 1, to size (H, W), with smooth outlines."""
    if labels.shape == size:
        return np.array(labels)
    inside = enlarge((labels > 0).astype(np.float32), size) >= 0.5
    if labels.max() <= 1:
        return inside.astype(np.int32)
    # A smooth outline reaches half a pixel of the map beyond its region: those pixels take the neighbour's number.
    spread = cv2.dilate(labels.astype(np.float32), np.ones((3, 3), np.uint8))
    numbers = np.where(labels > 0, labels, spread.astype(np.int32))
    nearest = cv2.resize(numbers, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    found: npt.NDArray[np.int32] = np.where(inside, nearest, 0)
    return found
