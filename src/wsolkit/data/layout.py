"""Find the files of a data set in different copies: a level deeper, in a folder of the same name, or beside another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wsolkit.data.files import list_folders, note_source
from wsolkit.data.records import require_folder
from wsolkit.errors import DataError

_LEVELS = 3  # It looks this far above dataset.root for the folder that was meant.
_MOST = 30  # It looks into folders with up to this many folders. More of them would be classes.
_AROUND = 2  # It looks this far above the official files for what belongs to them: Kaggle has Annotations/ there.


@dataclass(frozen=True)
class Layout:
    """The location of a copy of a data set.

    Args:
        root: the folder that `dataset.root` names.
        base: the folder with the official files, in `root` or `root` itself.
    """

    root: Path
    base: Path

    def find(self, *names: str, holds: str = "", around: bool = False) -> Path:
        """Return the first existing path of several, relative to the root or the base.

        Args:
            names: the paths, beginning with the usual one. If none exists, the usual one is returned, relative to the
                base.
            holds: the path of a file that must be in it.
            around: whether it may also lie beside the base.
        """
        for place in dict.fromkeys([self.root, self.base, *self.base.parents[: _AROUND if around else 0]]):
            for name in names:
                if (place / name / holds).exists():
                    return place / name
        return self.base / names[0]

    def setting(self, path: str) -> str:
        """Return a path of the settings for `find`. It is relative to the root if it lies there, else absolute."""
        given = Path(path)
        return str(given.relative_to(self.root) if given.is_relative_to(self.root) else given.absolute())


def find_layout(root: str, what: str, needs: str, marks: Sequence[str], inside: Sequence[str]) -> Layout:
    """Find out where a copy has the official files: in the root, in `inside`, or in the same places one folder deeper.

    Args:
        root: the folder that `dataset.root` names.
        what: the name of the data set.
        needs: says in words what the folder should hold.
        marks: patterns of files and folders, each of which shows that the official files are here.
        inside: folders in which copies have them, beginning with the usual one, which is taken if they are nowhere.

    Raises:
        DataError: there is no such folder, or several folders in it have the files, or only a folder around it has.
    """
    path = require_folder(root, needs)
    for folder in inside:
        if _marked(path / folder, marks):
            return Layout(path, path / folder)
    children = _folders(path)
    found = {
        child: child / folder for folder in reversed(inside) for child in children if _marked(child / folder, marks)
    }
    if len(found) > 1:
        several = ", ".join(f"'{child}'" for child in sorted(found))
        raise DataError(f"dataset.root={root} holds more than one copy of {what}: set it to one of {several}")
    for base in found.values():
        return Layout(path, base)
    for above in list(path.absolute().parents)[:_LEVELS]:
        if _marked(above, marks):
            raise DataError(f"dataset.root={root} lies within {what}: you probably mean dataset.root={above}")
    return Layout(path, path / inside[0])


def folders_below(root: Path) -> list[Path]:
    """Return folders at some depth in a folder in which copies have parts of a data set, without folders of classes."""
    found, level = [], _folders(root)
    for _ in range(_LEVELS):
        found += level
        level = [folder for parent in level for folder in _folders(parent)]
    return found


def _folders(path: Path) -> list[Path]:
    names = [name for name in list_folders(path) if not name.startswith(".")]
    return [path / name for name in names] if len(names) <= _MOST else []


def _marked(folder: Path, marks: Sequence[str]) -> bool:
    for mark in marks:
        listed = folder / mark.partition("*")[0].rpartition("/")[0]
        if "*" in mark and listed.is_dir():
            note_source(listed)
        if any(folder.glob(mark)):
            return True
    return False
