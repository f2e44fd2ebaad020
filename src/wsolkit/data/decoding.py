"""What an image holds as 8 bits a channel, as it is stored or upright.

How bright a value is has to follow from its type, which is the same for all images of a data set, and never from the
values that one image happens to have:

    8 bits            0 to 255
    16 bits           0 to 65535, of which the upper 8 bits are kept, as Pillow does with colours
    1 bit, bool       0 and 1
    floating point    0 to 1
    all others        refused, such as integers of 32 bits or with a sign

Phones store photos as the sensor lies, and note in EXIF data how a viewer has to turn them. The eight ways to do so are
the orientations 1 (not at all) to 8 of the EXIF standard.
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
_FLIPS = {2: 1, 3: -1, 4: 0, 6: 0, 7: -1, 8: 1}  # OpenCV's codes; those from 5 on are transposed after it
_TAKES_BACK = {6: 8, 8: 6}  # every other orientation takes back itself
_BITS, _PHOTOMETRIC, _WIDTH, _LENGTH, _SAMPLE_FORMAT = 258, 262, 256, 257, 339  # tags of TIFF files
_ZERO_IS_WHITE, _SIGNED = 0, (2,)


@contextmanager
def decoding(what: str, remedy: str = "") -> Iterator[None]:
    """Name what cannot be decoded, whatever a decoder raises."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise whatever comes
        raise DataError(f"{what} cannot be decoded ({str(error) or type(error).__name__}){remedy}") from error


def to_8_bits(pixels: npt.NDArray[Any], what: str) -> npt.NDArray[np.uint8]:
    """Scale pixels of any shape by their type; see the top of this file.

    Args:
        what: begins the error: "an image came as".

    Raises:
        DataError: the type does not say how bright its values are, or they are out of its range.
    """
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    if pixels.dtype == np.uint8:
        return pixels
    if kind == "b":
        return np.asarray(255 * pixels.astype(np.uint8), np.uint8)
    if kind == "u" and size == 2:
        return np.asarray(pixels >> 8, np.uint8)
    if kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:  # not so with NaN
        precise = pixels.astype(np.float32) if size < 4 else pixels
        return np.asarray((precise * 255).round(), np.uint8)
    found = f" with values from {pixels.min()} to {pixels.max()}" if kind in "iuf" else ""
    raise DataError(
        f"{what} {pixels.dtype.name}{found}: expected uint8 from 0 to 255, uint16 from 0 to 65535, floating point from "
        "0 to 1, or bool. Nothing else says which value is white: convert it to 8 bits, all images alike"
    )


def rgb(image: PIL.Image.Image, exif: Exif, what: str) -> Image:
    """Pixels [H, W, 3] of an image in any mode; opacity is left out.

    Args:
        what: names the image in errors.

    Raises:
        DataError: it has no pixels, or `to_8_bits` refuses them. Whatever else Pillow raises where it cannot decode.
    """
    turn = _load(image, exif, what)
    levels = _scaled(image, what)
    pixels = np.asarray(_colours(image)) if levels is None else np.repeat(levels[..., None], 3, axis=2)
    return turned(pixels, turn)


def grey(image: PIL.Image.Image, what: str) -> npt.NDArray[np.uint8]:
    """Grey levels [H, W] of a mask as it is stored; 0 stays 0, and no other value becomes 0 by scaling.

    Raises:
        DataError: as `rgb`; or opacity, or the numbers of a palette's colours, mark other pixels than the grey levels.
    """
    turn = _load(image, "ignore", what)
    levels = _scaled(image, what, keep_dark=True)
    if levels is None:
        levels = np.asarray((image if image.mode in ("1", "L") else _colours(image)).convert("L"))
        _check_marks(image, levels, what)
    return turned(levels, turn)


def orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation of an image, 1 to 8; 1 too where there is none, or the data are broken.

    Of a PNG, data behind the pixels are seen only after it was loaded.
    """
    try:
        # Not by PNG's own method, which decodes the image first.
        value: Any = PIL.Image.Image.getexif(image).get(_ORIENTATION)
        return int(value) if value in range(1, 9) else 1
    except Exception:  # broken data make the reader fail in any way
        return 1


def turned(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Turn pixels [H, W] or [H, W, 3] as an EXIF orientation says; 5 to 8 exchange height and width."""
    if orientation in _FLIPS:
        pixels = np.asarray(cv2.flip(pixels, _FLIPS[orientation]), np.uint8)
    return np.asarray(cv2.transpose(pixels), np.uint8) if orientation >= 5 else pixels


def stored_size(image: PIL.Image.Image) -> tuple[int, int]:
    """Width and height of an image as it lies in its file; Pillow gives those of a TIFF as it will be turned."""
    tags = getattr(image, "tag_v2", None)
    return (tags[_WIDTH], tags[_LENGTH]) if tags else image.size


def _load(image: PIL.Image.Image, exif: Exif, what: str) -> int:
    """Load an image; the orientation by which its pixels are still to be turned."""
    if 0 in image.size:
        raise DataError(f"{what} has {image.size[0]}×{image.size[1]} pixels")
    noted = orientation(image) if image.format == "TIFF" else 1  # loading a TIFF turns it, and takes the note away
    image.load()
    left = orientation(image)
    if exif == "apply":
        return left
    return _TAKES_BACK.get(noted, noted) if left == 1 else 1


def _scaled(image: PIL.Image.Image, what: str, keep_dark: bool = False) -> npt.NDArray[np.uint8] | None:
    """Levels [H, W] of an image of which Pillow's conversion would go wrong; None: it would not.

    Args:
        keep_dark: only 0 becomes 0.
    """
    tags = getattr(image, "tag_v2", {})
    signed = image.mode == "L" and tags.get(_SAMPLE_FORMAT) == _SIGNED
    if not (signed or image.mode in ("I", "F") or image.mode.startswith("I;16")):
        return None
    pixels = np.asarray(image)
    if signed:
        pixels = pixels.view(np.int8)
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, which some versions of Pillow widen
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
    elif image.mode == "P" and image.has_transparency_data:  # else Pillow warns
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
        coloured = (colours != colours[..., :1]).any()  # in a palette of greys the numbers mean nothing
        if coloured and ((numbers > 0) != (levels > 0)).any():
            raise DataError(
                f"{what} has a palette in which another colour than number 0 is black, or number 0 is not: save what "
                "it means as grey levels, 0 for the background"
            )
