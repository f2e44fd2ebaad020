"""Make localization maps that ignore the image, as baselines."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BASELINES = ("center_box", "gaussian", "full_image")


def baseline_map(name: str, size: int) -> npt.NDArray[np.float64]:
    """Make a localization map [size, size] that ignores the image.

    "center_box" falls linearly from the centre to the border, so that its level sets are the centred squares of every
    size. "gaussian" is round, with a standard deviation of a quarter of the side. "full_image" is 1 everywhere, so that
    every threshold keeps the whole image.
    """
    if name == "full_image":
        return np.ones((size, size))
    distance = np.abs(np.arange(size) - (size - 1) / 2) / (size / 2)
    if name == "center_box":
        return np.asarray(1 - np.maximum(distance[:, None], distance[None]))
    bell = np.exp(-2 * distance**2)
    return np.outer(bell, bell)
