"""Decode an image to 8 bits a channel, as it is stored or upright.

The brightness of a value has to follow from its type, which is the same for all images of a data set. It must not
depend on the values of a single image:

    8 bits            0 to 255
    16 bits           0 to 65535, of which the upper 8 bits are kept, as Pillow does with colours
    1 bit, bool       0 and 1
    floating point    0 to 1
    all others        refused, such as integers of 32 bits or with a sign

Phones store photos as the sensor lies, and note in EXIF data how a viewer has to turn them. The EXIF standard numbers
the eight ways as orientations 1 (not at all) to 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image

from wsolkit.errors import DataError
from wsolkit.types import Exif, Image

_ORIENTATION = 0x0112
_FLIPS = {2: 1, 3: -1, 4: 0, 6: 0, 7: -1, 8: 1}  # OpenCV's codes. The orientations from 5 on are transposed after it.
_TAKES_BACK = {6: 8, 8: 6}  # Every other orientation is its own inverse.
_BITS, _PHOTOMETRIC, _WIDTH, _LENGTH, _SAMPLE_FORMAT = 258, 262, 256, 257, 339  # These are tags of TIFF files.
_ZERO_IS_WHITE, _SIGNED = 0, (2,)


@contextmanager
def decoding(what: str, remedy: str = "") -> Iterator[None]:
    """Raise a DataError with a name for any error of a decoder."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # Decoders raise all kinds of errors on broken files.
        raise DataError(f"{what} cannot be decoded ({str(error) or type(error).__name__}){remedy}") from error


def to_8_bits(pixels: npt.NDArray[Any], what: str) -> npt.NDArray[np.uint8]:
    """Scale pixels of any shape by their type, as the head of this file says.

    Args:
        pixels: the pixels.
        what: begins the error, for example "an image came as".

    Raises:
        DataError: the brightness does not follow from the type, or values are out of its range.
    """
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    if pixels.dtype == np.uint8:
        return pixels
    if kind == "b":
        return np.asarray(255 * pixels.astype(np.uint8), np.uint8)
    if kind == "u" and size == 2:
        return np.asarray(pixels >> 8, np.uint8)
    if kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:  # NaN fails this, too.
        precise = pixels.astype(np.float32) if size < 4 else pixels
        return np.asarray((precise * 255).round(), np.uint8)
    found = f" with values from {pixels.min()} to {pixels.max()}" if kind in "iuf" else ""
    raise DataError(
        f"{what} {pixels.dtype.name}{found}: expected uint8 from 0 to 255, uint16 from 0 to 65535, floating point from "
        "0 to 1, or bool. Nothing else says which value is white: convert it to 8 bits, all images alike"
    )


def rgb(image: PIL.Image.Image, exif: Exif, what: str) -> Image:
    """Return pixels [H, W, 3] of an image in any mode, without opacity.

    Args:
        image: the image.
        exif: see `Exif`.
        what: names the image in errors.

    Raises:
        DataError: it has no pixels, or `to_8_bits` refuses them. If Pillow cannot decode it, Pillow's errors pass
            through.
    """
    turn = _load(image, exif, what)
    levels = _scaled(image, what)
    pixels = np.asarray(_colours(image)) if levels is None else np.repeat(levels[..., None], 3, axis=2)
    return turned(pixels, turn)


def grey(image: PIL.Image.Image, what: str) -> npt.NDArray[np.uint8]:
    """Return the grey levels [H, W] of a mask as it is stored. 0 stays 0, and no other value becomes 0 by scaling.

    Raises:
        DataError: as for `rgb`, or if opacity or palette numbers mark other pixels than the grey levels.
    """
    turn = _load(image, "ignore", what)
    levels = _scaled(image, what, keep_dark=True)
    if levels is None:
        levels = np.asarray((image if image.mode in ("1", "L") else _colours(image)).convert("L"))
        _check_marks(image, levels, what)
    return turned(levels, turn)


def orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8. It is 1 if there is none, or if the data are broken.

    Data behind the pixels of a PNG are found only after the PNG was loaded.
    """
    try:
        # PNG's own method would decode the image first.
        value: Any = PIL.Image.Image.getexif(image).get(_ORIENTATION)
        return int(value) if value in range(1, 9) else 1
    except Exception:  # The reader may fail in any way on broken data.
        return 1


def turned(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Turn pixels [H, W] or [H, W, 3] as an EXIF orientation says. 5 to 8 exchange height and width."""
    if orientation in _FLIPS:
        pixels = np.asarray(cv2.flip(pixels, _FLIPS[orientation]), np.uint8)
    return np.asarray(cv2.transpose(pixels), np.uint8) if orientation >= 5 else pixels


def stored_size(image: PIL.Image.Image) -> tuple[int, int]:
    """Return the stored width and height of an image. For a TIFF, Pillow gives those after turning."""
    tags = getattr(image, "tag_v2", None)
    return (tags[_WIDTH], tags[_LENGTH]) if tags else image.size


def _load(image: PIL.Image.Image, exif: Exif, what: str) -> int:
    """Load an image, and return the orientation by which its pixels still have to be turned."""
    if 0 in image.size:
        raise DataError(f"{what} has {image.size[0]}×{image.size[1]} pixels")
    noted = orientation(image) if image.format == "TIFF" else 1  # Loading a TIFF turns it, and removes the note.
    image.load()
    left = orientation(image)
    if exif == "apply":
        return left
    return _TAKES_BACK.get(noted, noted) if left == 1 else 1


def _scaled(image: PIL.Image.Image, what: str, keep_dark: bool = False) -> npt.NDArray[np.uint8] | None:
    """Return levels [H, W] of an image that Pillow would convert wrongly, or None if Pillow converts it correctly.

    Args:
        image: the image.
        what: names the image in errors.
        keep_dark: whether only 0 becomes 0.
    """
    tags = getattr(image, "tag_v2", {})
    signed = image.mode == "L" and tags.get(_SAMPLE_FORMAT) == _SIGNED
    if not (signed or image.mode in ("I", "F") or image.mode.startswith("I;16")):
        return None
    pixels = np.asarray(image)
    if signed:
        pixels = pixels.view(np.int8)
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # It has 16 bits, which some versions of Pillow widen.
        pixels = pixels.astype(np.uint16)
    elif tags.get(_BITS) == (12,):
        pixels = pixels << 4
    levels = to_8_bits(pixels, f"{what} is of mode {image.mode} and holds")
    if keep_dark:
        levels = np.maximum(levels, pixels > 0)
    return 255 - levels if tags.get(_PHOTOMETRIC) == _ZERO_IS_WHITE else levels


def _colours(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    elif image.mode == "P" and image.has_transparency_data:  # Pillow would warn otherwise.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _check_marks(image: PIL.Image.Image, levels: npt.NDArray[np.uint8], what: str) -> None:
    """Check that a mask means its grey levels, and not its opacity or the numbers of its colours."""
    if image.has_transparency_data:
        hidden = np.asarray((image.convert("LA") if image.mode == "La" else image).convert("RGBA"))[..., 3] == 0
        if hidden.any() and (levels[hidden].any() or not levels.any()):
            raise DataError(
                f"{what} marks pixels by its opacity, and others by its grey levels: save what it means as grey "
                "levels, 0 for the background, without opacity"
            )
    if image.mode in ("P", "PA"):
        colours, numbers = np.asarray(_colours(image)), np.asarray(image)
        numbers = numbers[..., 0] if image.mode == "PA" else numbers
        coloured = (colours != colours[..., :1]).any()  # In a palette of greys, the numbers mean nothing.
        if coloured and ((numbers > 0) != (levels > 0)).any():
            raise DataError(
                f"{what} has a palette in which another colour than number 0 is black, or number 0 is not: save what "
                "it means as grey levels, 0 for the background"
            )
