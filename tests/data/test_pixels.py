"""Resizing as PIL does it, for any size."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from wsolkit.data import pixels
from wsolkit.data.pixels import resize


def by_pil(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BILINEAR))


def test_resizing_gives_the_pixels_of_pil() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 600, (60, 4)).tolist()
    # Usual ones, portraits (where PIL's versions differ), one pixel wide or high, and images that stay or grow one way.
    sizes += [[375, 500, 256, 256], [500, 375, 224, 224], [500, 300, 256, 256], [1, 3000, 224, 224], [700, 1, 9, 224]]
    sizes += [[224, 224, 224, 224], [256, 500, 256, 256], [500, 256, 256, 256], [40, 30, 256, 256], [1, 1, 5, 4]]
    for height, width, new_height, new_width in sizes:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image[:, : width // 3] = 255  # white must stay white
        assert np.array_equal(resize(image, new_height, new_width), by_pil(image, new_height, new_width))
        assert pixels._passes(height, width, new_height, new_width) is not None


def test_where_pil_resizes_in_another_way_it_does_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def nearest(image: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.NEAREST))

    monkeypatch.setattr(pixels, "_resize_by_pil", nearest)
    pixels._passes.cache_clear()
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert np.array_equal(resize(image, 16, 16), nearest(image, 16, 16))
    pixels._passes.cache_clear()
