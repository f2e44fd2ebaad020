"""Finding images, and reading the files that data sets are described by; what is wrong is named by file and line.

All readers and commands see the same files of a folder:

- Hidden files and folders, and those that systems leave behind (`Thumbs.db`, `@eaDir/`, `__MACOSX/`), are not data.
- Symbolic links to files and folders are followed, but not to a folder in which the link itself lies.
- An image is a file with one of the endings `IMAGE_SUFFIXES`.
"""

from __future__ import annotations

import codecs
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from wsolkit.errors import DataError

IMAGE_SUFFIXES = (
    *(".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jfif", ".jpe", ".pjpeg", ".pjp", ".ppm", ".pgm"),
    *([".avif"] if find_spec("PIL._avif") else []),  # some builds of PIL cannot decode it
)

# What storage servers, Windows and file systems leave behind under names that do not begin with a dot.
_LEFT_BEHIND = {
    *("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "system volume information"),
    *("lost+found", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}
_BROKEN_LINK = "broken links"
_ENDINGS_NAMED = 5
_MAX_NUMBER = 10**9

# Looking for each file costs about ten microseconds on a local disk, far more on a network's.
_MAX_FILES_TO_LOOK_FOR = 100_000

_sources: set[Path] | None = None


def note_source(path: Path) -> None:
    """Say that a file or folder is about to be read for records; an index is not used where one of them has changed.

    Whatever reads the official files of a data set calls this, directly or by the functions of this file.
    """
    if _sources is not None:
        _sources.add(path)


@contextmanager
def noted_sources() -> Iterator[set[Path]]:
    """Collect what is noted within."""
    global _sources
    before, _sources = _sources, set()
    try:
        yield _sources
    finally:
        _sources = before


class Folder(NamedTuple):
    """What is in a folder.

    path: relative to where a walk began, "" for that folder itself. folders, files: their names, links to such among
    them. broken: names of links that lead nowhere.
    """

    path: str
    folders: list[str]
    files: list[str]
    broken: list[str]


def walk(folder: Path, skip: Collection[Path] = ()) -> Iterator[Folder]:
    """What is in a folder and all folders below it, in no particular order.

    What is deleted from a `folders` before the next step is not entered.

    Args:
        folder: where to begin.
        skip: folders that are not entered.

    Raises:
        DataError: a folder cannot be read.
    """
    skipped = {path.resolve() for path in skip}
    # Each folder with its real path, and the real paths of the folders in which links were that led to it.
    todo: list[tuple[str, Path, tuple[Path, ...]]] = [("", folder.resolve(), ())]
    while todo:
        below, real, passed = todo.pop()
        found = _look_into(folder / below, below)
        yield found
        for name in found.folders:
            inside, links = real / name, passed
            if inside.is_symlink():
                inside, links = inside.resolve(), (*passed, real)
                if any(place.is_relative_to(inside) for place in links):
                    continue  # it would never end
            if inside not in skipped:
                todo.append((f"{below}/{name}" if below else name, inside, links))


def _look_into(path: Path, below: str = "") -> Folder:
    found = Folder(below, [], [], [])
    note_source(path)
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if not (name[0] == "." or name.lower() in _LEFT_BEHIND):
                    _kind(entry, found).append(name)
    except OSError as error:
        raise DataError(f"the folder '{path}' cannot be read ({error.strerror})") from error
    return found


def _kind(entry: os.DirEntry[str], found: Folder) -> list[str]:
    try:
        return found.files if entry.is_file() else found.folders if entry.is_dir() else found.broken
    except OSError:  # a link to itself
        return found.broken


def images_below(folder: Path, left_out: Counter[str]) -> list[str]:
    """Paths of the images in a folder and all folders below it, relative to it, in no particular order.

    Args:
        folder: where to begin.
        left_out: counts by ending the files that are no images, see `say_left_out`.

    Raises:
        DataError: a folder cannot be read.
    """
    return [path for found in walk(folder) for path in image_paths(found, left_out)]


def image_paths(found: Folder, left_out: Counter[str], suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """Paths of the images in a folder that was walked; see `images_below`.

    Args:
        found: the folder.
        left_out: see `images_below`.
        suffixes: endings of images, in lower case.
    """
    prefix = f"{found.path}/" if found.path else ""
    images = []
    for name in found.files:
        if name.lower().endswith(suffixes):
            images.append(prefix + name)
        else:
            stem, _, ending = name.rpartition(".")
            left_out[f".{ending.lower()}" if stem and ending else "no ending"] += 1
    if found.broken:
        left_out[_BROKEN_LINK] += len(found.broken)
    return images


def say_left_out(folder: Path, left_out: Counter[str]) -> None:
    """Warn, in one line, of files that are left out, by their endings; of links that lead nowhere, too."""
    from lightning_utilities.core.rank_zero import rank_zero_warn

    if not left_out:
        return
    endings = ", ".join(f"{ending} ({count:,})" for ending, count in left_out.most_common(_ENDINGS_NAMED))
    more = ", …" if len(left_out) > _ENDINGS_NAMED else ""
    total = left_out.total()
    rank_zero_warn(
        f"'{folder}': {total:,} {'file is' if total == 1 else 'files are'} left out: {endings}{more}. Images end in "
        f"{', '.join(IMAGE_SUFFIXES)}"
    )


def list_images(folder: Path, left_out: Counter[str] | None = None) -> list[str]:
    """Names of the images in a folder, in alphabetical order; see `images_below`."""
    return sorted(image_paths(_look_into(folder), Counter() if left_out is None else left_out))


def list_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, in alphabetical order.

    Raises:
        DataError: it cannot be read.
    """
    return sorted(_look_into(folder).folders)


def read_text(path: Path, errors: str = "strict") -> str:
    """A text file in UTF-8, with or without a byte order mark; its lines end in "\\n", however they end in the file.

    Args:
        path: of the file.
        errors: what is done about other bytes, see `bytes.decode`.

    Raises:
        FileNotFoundError: it is missing. DataError: it cannot be read, or is no such text.
    """
    note_source(path)
    try:
        content = path.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
            raise DataError(f"'{path}' is not a text file in UTF-8, but in UTF-16 or no text at all: save it as UTF-8")
        return content.decode("utf-8-sig", errors).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not a text file in UTF-8 ({error}): save it as UTF-8") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror})") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: it is missing. DataError: it cannot be read, is no JSON, or says one thing twice.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not a JSON file ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"an object has the key '{twice}' twice")
    return content


def read_lines(path: Path, whose: str) -> Iterator[tuple[str, str]]:
    """Lines of a text file as ("file:line", text), without those that are empty.

    Args:
        path: of the file.
        whose: the data set that needs it.

    Raises:
        DataError: it is missing, or no text.
    """
    try:
        lines = read_text(path).split("\n")
    except FileNotFoundError as error:
        raise DataError(f"'{path}' does not exist: {whose} needs it") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def read_by_id(path: Path, whose: str) -> dict[str, tuple[str, str]]:
    """Lines of `id text` as id → ("file:line", text), in the file's order.

    Args:
        path: of the file.
        whose: the data set that needs it.

    Raises:
        DataError: it is missing, a line holds no text, or an id has two different lines.
    """
    found: dict[str, tuple[str, str]] = {}
    for where, line in read_lines(path, whose):
        number, *rest = line.split(maxsplit=1)
        if not rest:
            raise DataError(f"{where}: '{line}' should be an id and what belongs to it")
        text = rest[0].replace("\\", "/")  # of Windows' paths: no official text has one
        first, known = found.setdefault(number, (where, text))
        if known != text:
            raise DataError(f"{where}: id {number} is listed twice, first in {first}, as '{known}'")
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


def whole_number(text: str) -> int:
    """A whole number, perhaps with a decimal point: "96.0" is 96.

    Raises:
        ValueError: it is none.
    """
    number = float(text)
    if not (number.is_integer() and abs(number) <= _MAX_NUMBER):
        raise ValueError(f"'{text}' is no whole number, or too large")
    return int(number)


def read_annotation(path: Path) -> tuple[str, tuple[int, int], list[list[int]]]:
    """Class of the first object, (width, height), and boxes x0, y0, x1, y1 of an XML file of ImageNet's.

    Raises:
        DataError: it is missing or broken, or holds no object.
    """
    note_source(path)
    try:
        tree = ElementTree.parse(path)
        size = [whole_number(tree.findtext(f"size/{side}", "")) for side in ("width", "height")]
        objects = tree.findall("object")
        corners = ("xmin", "ymin", "xmax", "ymax")
        boxes = [[whole_number(entry.findtext(f"bndbox/{corner}", "")) for corner in corners] for entry in objects]
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
    from scipy.io import loadmat  # its import takes most of a second, and few data sets need it

    note_source(path)
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


def as_written(root: Path, name: str) -> str:
    """A path in a list, relative to `root`: with Windows' separators replaced, unless a file has them in its name."""
    return name if "\\" not in name or is_file(root / name) else name.replace("\\", "/")


def is_file(path: Path) -> bool:
    """Whether there is a file; where a path cannot be one, there is none."""
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


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
            if not is_file(root / name):
                raise DataError(f"{place}: image '{root / name}' does not exist")
