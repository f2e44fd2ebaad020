"""Reading the files that data sets are described by; what is wrong with them is named by file and line."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from scipy.io import loadmat

from wsolkit.errors import DataError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff")

# Looking for each file costs about ten microseconds on a local disk, far more on a network's.
_MAX_FILES_TO_LOOK_FOR = 100_000


def read_lines(path: Path, whose: str) -> Iterator[tuple[str, str]]:
    """Lines of a text file as ("file:line", text), without those that are empty.

    Args:
        path: of the file.
        whose: the data set that needs it.

    Raises:
        DataError: it is missing, or no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"'{path}' does not exist: {whose} needs it") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not a text file in UTF-8 ({error})") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def read_by_id(path: Path, whose: str) -> dict[str, tuple[str, str]]:
    """Lines of `id text` as id → ("file:line", text), in the file's order.

    Args:
        path: of the file.
        whose: the data set that needs it.

    Raises:
        DataError: it is missing, a line holds no text, or an id is listed twice.
    """
    found: dict[str, tuple[str, str]] = {}
    for where, line in read_lines(path, whose):
        number, _, text = line.partition(" ")
        if not text.strip():
            raise DataError(f"{where}: '{line}' should be an id and what belongs to it")
        if number in found:
            raise DataError(f"{where}: id {number} is listed twice, first in {found[number][0]}")
        found[number] = where, text.strip()
    return found


def numbers_of(where: str, texts: Sequence[str], count: int) -> list[float]:
    """Numbers of a line.

    Raises:
        DataError: there are not `count` of them, or one is no number; `where` names file and line.
    """
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise DataError(f"{where}: '{' '.join(texts)}' should be {count} numbers")
    return numbers


def read_annotation(path: Path) -> tuple[str, tuple[int, int], list[list[int]]]:
    """Class of the first object, (width, height), and boxes x0, y0, x1, y1 of an XML file of ImageNet's.

    Raises:
        DataError: it is missing or broken, or holds no object.
    """
    try:
        tree = ElementTree.parse(path)
        size = [int(tree.findtext(f"size/{side}", "")) for side in ("width", "height")]
        objects = tree.findall("object")
        corners = ("xmin", "ymin", "xmax", "ymax")
        boxes = [[int(entry.findtext(f"bndbox/{corner}", "")) for corner in corners] for entry in objects]
        names = [entry.findtext("name", "") for entry in objects]
    except FileNotFoundError as error:
        raise DataError(f"there are no boxes for image '{path.stem}': '{path}' does not exist") from error
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"'{path}' is not an annotation in the official XML ({error})") from error
    if not boxes:
        raise DataError(f"'{path}' holds no object: every image that is evaluated has at least one box")
    return names[0], (size[0], size[1]), boxes


def read_matlab(path: Path, whose: str, variables: Sequence[str]) -> Mapping[str, Any]:
    """Variables of a MATLAB file; a struct array comes as one with fields, of which each is a column.

    Args:
        path: of the file, in a format before 7.3.
        whose: the data set that needs it.
        variables: what it must hold.

    Raises:
        DataError: it is missing or broken, or lacks a variable.
    """
    try:
        with path.open("rb") as file:
            content: dict[str, Any] = loadmat(file, squeeze_me=True)
    except FileNotFoundError as error:
        raise DataError(f"'{path}' does not exist: {whose} needs it") from error
    except Exception as error:  # of a dozen kinds, depending on where the file is broken
        raise DataError(f"'{path}' cannot be read as a MATLAB file ({error}): unpack it again") from error
    for name in variables:
        if name not in content:
            held = ", ".join(key for key in content if not key.startswith("__"))
            raise DataError(f"'{path}' holds no variable '{name}', but {held or 'nothing'}: it is another file")
    return content


def list_images(folder: Path) -> list[str]:
    """Names of the image files in a folder, in alphabetical order."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGE_SUFFIXES))


def list_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, in alphabetical order."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def check_images(root: Path, ids: Sequence[str], where: Sequence[str]) -> None:
    """Check that the images of a list exist, unless there are so many that looking for them takes long.

    Args:
        root: folder that the ids are relative to.
        ids: of the images.
        where: "file:line" that names each of them.

    Raises:
        DataError: one does not exist.
    """
    if len(ids) <= _MAX_FILES_TO_LOOK_FOR:
        for name, place in zip(ids, where, strict=True):
            if not (root / name).is_file():
                raise DataError(f"{place}: image '{root / name}' does not exist")
