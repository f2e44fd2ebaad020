"""Find images, and read the files that describe data sets. Errors name the file and the line.

All readers and commands see the same files of a folder:

- Hidden files and folders, and those that systems leave behind (`Thumbs.db`, `@eaDir/`, `__MACOSX/`), are not data.
- Symbolic links to files and folders are followed, but not to a folder that contains the link itself.
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
    *([".avif"] if find_spec("PIL._avif") else []),  # Some builds of PIL cannot decode it.
)

# Storage servers, Windows and file systems leave these behind, with names that do not begin with a dot.
_LEFT_BEHIND = {
    *("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "system volume information"),
    *("lost+found", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}
_BROKEN_LINK = "broken links"
_ENDINGS_NAMED = 5
_MAX_NUMBER = 10**9

# Looking for one file takes about ten microseconds on a local disk, and far more on a network disk.
_MAX_FILES_TO_LOOK_FOR = 100_000

_sources: set[Path] | None = None


def note_source(path: Path) -> None:
    """Note that a file or folder is about to be read for records. An index is not used if one of them has changed.

    All code that reads the official files of a data set calls this, directly or through the functions of this file.
    """
    if _sources is not None:
        _sources.add(path)


@contextmanager
def noted_sources() -> Iterator[set[Path]]:
    """Collect what is noted within this context."""
    global _sources
    before, _sources = _sources, set()
    try:
        yield _sources
    finally:
        _sources = before


class Folder(NamedTuple):
    """The content of a folder.

    path: its path relative to the start of a walk, "" for the start itself; folders, files: their names, including
    links to them; broken: the names of links that lead nowhere.
    """

    path: str
    folders: list[str]
    files: list[str]
    broken: list[str]


def walk(folder: Path, skip: Collection[Path] = ()) -> Iterator[Folder]:
    """Yield a folder and all folders below it, in no particular order.

    A caller may delete names from `folders` before the next step. The walk does not enter these.

    Args:
        folder: where to begin.
        skip: folders that the walk does not enter.

    Raises:
        DataError: a folder cannot be read.
    """
    skipped = {path.resolve() for path in skip}
    # Each folder comes with its real path, and with the real paths of the folders whose links led to it.
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
                    continue  # The walk would never end.
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
    except OSError:  # The link leads to itself.
        return found.broken


def images_below(folder: Path, left_out: Counter[str]) -> list[str]:
    """Return the paths of the images in a folder and all folders below it, relative to it, in no particular order.

    Args:
        folder: where to begin.
        left_out: counts the files that are not images by their ending, see `say_left_out`.

    Raises:
        DataError: a folder cannot be read.
    """
    return [path for found in walk(folder) for path in image_paths(found, left_out)]


def image_paths(found: Folder, left_out: Counter[str], suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """Return the paths of the images in a folder of a walk, see `images_below`.

    Args:
        found: the folder.
        left_out: see `images_below`.
        suffixes: the endings of images, in lower case.
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
    """Warn in one line of files that are left out, by their endings, and of links that lead nowhere."""
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
    """Return the names of the images in a folder, in alphabetical order, see `images_below`."""
    return sorted(image_paths(_look_into(folder), Counter() if left_out is None else left_out))


def list_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, in alphabetical order.

    Raises:
        DataError: it cannot be read.
    """
    return sorted(_look_into(folder).folders)


def read_text(path: Path, errors: str = "strict") -> str:
    """Read a text file in UTF-8, with or without a byte order mark. Its lines end in "\\n" in any case.

    Args:
        path: the path of the file.
        errors: how to treat other bytes, see `bytes.decode`.

    Raises:
        FileNotFoundError: it is missing.
        DataError: it cannot be read, or is not a text in UTF-8.
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
    """Read a JSON file.

    Raises:
        FileNotFoundError: it is missing.
        DataError: it cannot be read, is not JSON, or repeats a key.
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
    """Yield the lines of a text file as ("file:line", text), without empty lines.

    Args:
        path: the path of the file.
        whose: the data set that needs it.

    Raises:
        DataError: it is missing, or is not a text.
    """
    try:
        lines = read_text(path).split("\n")
    except FileNotFoundError as error:
        raise DataError(f"'{path}' does not exist: {whose} needs it") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def read_by_id(path: Path, whose: str) -> dict[str, tuple[str, str]]:
    """Read lines of `id text` as id → ("file:line", text), in the order of the file.

    Args:
        path: the path of the file.
        whose: the data set that needs it.

    Raises:
        DataError: it is missing, a line has no text, or an id has two different lines.
    """
    found: dict[str, tuple[str, str]] = {}
    for where, line in read_lines(path, whose):
        number, *rest = line.split(maxsplit=1)
        if not rest:
            raise DataError(f"{where}: '{line}' should be an id and what belongs to it")
        text = rest[0].replace("\\", "/")  # Windows paths have it, and no official text does.
        first, known = found.setdefault(number, (where, text))
        if known != text:
            raise DataError(f"{where}: id {number} is listed twice, first in {first}, as '{known}'")
    return found


def numbers_of(where: str, texts: Sequence[str], count: int) -> list[float]:
    """Read the numbers of a line.

    Raises:
        DataError: there are not `count` of them, or one is not a number. `where` names file and line.
    """
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise DataError(f"{where}: '{' '.join(texts)}' should be {count} numbers")
    return numbers


def whole_number(text: str) -> int:
    """Read a whole number, which may have a decimal point: "96.0" is 96.

    Raises:
        ValueError: it is not a whole number.
    """
    number = float(text)
    if not (number.is_integer() and abs(number) <= _MAX_NUMBER):
        raise ValueError(f"'{text}' is no whole number, or too large")
    return int(number)


def read_annotation(path: Path) -> tuple[str, tuple[int, int], list[list[int]]]:
    """Read the class of the first object, (width, height), and boxes x0, y0, x1, y1 from an XML file of ImageNet.

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
    """Read variables of a MATLAB file. A struct array comes as an array with fields, each of which is a column.

    Args:
        path: the path of the file, in a format before 7.3.
        whose: the data set that needs it.
        variables: the variables that it must hold.

    Raises:
        DataError: it is missing or broken, or lacks a variable.
    """
    from scipy.io import loadmat  # Its import takes most of a second, and few data sets need it.

    note_source(path)
    try:
        with path.open("rb") as file:
            content: dict[str, Any] = loadmat(file, squeeze_me=True)
    except FileNotFoundError as error:
        raise DataError(f"'{path}' does not exist: {whose} needs it") from error
    except Exception as error:  # The kind of error depends on where the file is broken.
        raise DataError(f"'{path}' cannot be read as a MATLAB file ({error}): unpack it again") from error
    for name in variables:
        if name not in content:
            held = ", ".join(key for key in content if not key.startswith("__"))
            raise DataError(f"'{path}' holds no variable '{name}', but {held or 'nothing'}: it is another file")
    return content


def as_written(root: Path, name: str) -> str:
    """Return a listed path, relative to `root`, with Windows' separators replaced unless a file's name has them."""
    return name if "\\" not in name or is_file(root / name) else name.replace("\\", "/")


def is_file(path: Path) -> bool:
    """Say whether a file exists. The result is False for a path that cannot exist."""
    try:
        return path.is_file()
    except OSError:  # For example, a name is too long.
        return False


def check_images(root: Path, ids: Sequence[str], where: Sequence[str]) -> None:
    """Check that the images of a list exist, unless there are so many that this would take long.

    Args:
        root: the folder that the ids are relative to.
        ids: the ids of the images.
        where: "file:line" that names each of them.

    Raises:
        DataError: an image does not exist.
    """
    if len(ids) <= _MAX_FILES_TO_LOOK_FOR:
        for name, place in zip(ids, where, strict=True):
            if not is_file(root / name):
                raise DataError(f"{place}: image '{root / name}' does not exist")
