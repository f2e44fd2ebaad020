"""Localization maps that know nothing of the image, to compare with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BASELINES = ("center_box", "gaussian", "full_image")


def baseline_map(name: str, size: int) -> npt.NDArray[np.float64]:
    """Localization maps [size, size] that know nothing of the image.

    "center_box": falls linearly from the centre to the border, so that its level sets are the centred squares of
    every size; "gaussian": round, with a standard deviation of a quarter of the side; "full_image": 1 everywhere, so
    that every threshold keeps the whole image.
    """
    if name == "full_image":
        return np.ones((size, size))
    distance = np.abs(np.arange(size) - (size - 1) / 2) / (size / 2)
    if name == "center_box":
        return np.asarray(1 - np.maximum(distance[:, None], distance[None]))
    bell = np.exp(-2 * distance**2)
    return np.outer(bell, bell)
