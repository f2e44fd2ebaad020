"""Score maps in files: what is written is what is read, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wsolkit.errors import DataError
from wsolkit.interop.score_maps import ScoreMaps

SIZES = {(4, 6)}


def test_maps_are_named_after_image_ids(tmp_path: Path) -> None:
    maps = ScoreMaps(tmp_path)
    score = np.random.default_rng(0).random((4, 6)).astype(np.float32)
    maps.write("val/n01440764/a b.JPEG", score)
    assert (tmp_path / "val" / "n01440764" / "a b.JPEG.npy").is_file()
    assert np.array_equal(maps.read("val/n01440764/a b.JPEG", SIZES), score)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_constant_maps_of_any_precision_are_legal(dtype: Any, value: float, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((4, 6), value, dtype))
    score = torch.from_numpy(ScoreMaps(tmp_path).read("x", SIZES))
    assert score.numpy().itemsize == np.dtype(dtype).itemsize
    assert score.eq(np.dtype(dtype).type(value)).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.full((4, 6), np.nan), "holds NaN: expected values in [0, 1]"),
        (np.full((4, 6), 1.01), "has values from 1.01 to 1.01: expected [0, 1]"),
        (np.linspace(-0.5, 0.5, 24).reshape(4, 6), "has values from -0.5 to 0.5: expected [0, 1]"),
        (np.full((4, 6), np.inf), "has values from inf to inf"),
        (np.zeros((6, 4)), "is 6×4: expected 4×6 (height×width)"),
        (np.zeros((1, 4, 6)), "is 1×4×6: expected 4×6"),
        (np.zeros(()), "is a single number: expected 4×6"),
        (np.zeros((4, 6), np.uint8), "is of type uint8: expected floating point in [0, 1]"),
        (np.zeros((4, 6), complex), "is of type complex128"),
        (np.zeros((4, 6), np.longdouble), "is of type float128"),
        (b"PK no archive", "cannot be read as a .npy array"),
        (b"\x93NUMPY\x01\x00\x06\x00{'a(\n", "cannot be read as a .npy array"),
        (np.array([[None]]), "cannot be read as a .npy array (Object arrays cannot be loaded"),
        (b"", "cannot be read as a .npy array"),
        (b"no array at all", "cannot be read as a .npy array"),
        (None, "is missing: expected one .npy file for each image id"),
    ],
)
def test_wrong_maps_are_named(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "val" / "x.JPEG.npy"
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(DataError) as caught:
        ScoreMaps(tmp_path).read("val/x.JPEG", SIZES)
    assert str(caught.value).startswith(f"score map '{path}' ")
    assert message in str(caught.value)


def test_archive_of_arrays_is_not_a_map(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.zeros((4, 6)))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(DataError, match="is of type NpzFile"):
        ScoreMaps(tmp_path).read("x", SIZES)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x"])
def test_ids_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leads out of the folder of score maps"):
        ScoreMaps(tmp_path / "maps").write(name, np.zeros((4, 6), np.float32))
