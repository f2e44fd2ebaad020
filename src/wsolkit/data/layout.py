"""Finding the files of a data set in the copies that go round: a level deeper, in a folder twice, or beside another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wsolkit.data.files import list_folders, note_source
from wsolkit.data.records import require_folder
from wsolkit.errors import DataError

_LEVELS = 3  # how far above dataset.root it is looked for the folder that was meant
_MOST = 30  # folders in a folder that is looked into: more are classes
_AROUND = 2  # how far above the official files it is looked for what belongs to them: Kaggle has Annotations/ there


@dataclass(frozen=True)
class Layout:
    """Where a copy of a data set lies.

    Args:
        root: the folder that `dataset.root` names.
        base: the folder that has the official files, in `root` or `root` itself.
    """

    root: Path
    base: Path

    def find(self, *names: str, holds: str = "", around: bool = False) -> Path:
        """The first of some paths that exists, relative to the root or the base.

        Args:
            names: the paths; the usual one first, which is returned if none exists, relative to the base.
            holds: path of a file that must be in it.
            around: whether it may also lie beside the base.
        """
        for place in dict.fromkeys([self.root, self.base, *self.base.parents[: _AROUND if around else 0]]):
            for name in names:
                if (place / name / holds).exists():
                    return place / name
        return self.base / names[0]

    def setting(self, path: str) -> str:
        """A path of the settings for `find`: relative to the root if it is in there, otherwise absolute."""
        given = Path(path)
        return str(given.relative_to(self.root) if given.is_relative_to(self.root) else given.absolute())


def find_layout(root: str, what: str, needs: str, marks: Sequence[str], inside: Sequence[str]) -> Layout:
    """Find out where the copy in a folder has the official files: there, in `inside`, or the same in one folder of it.

    Args:
        root: the folder that `dataset.root` names.
        what: name of the data set.
        needs: what the folder should hold, in words.
        marks: patterns of files and folders, each of which shows that the official files are here.
        inside: folders that copies have them in; the usual one first, which is taken if they are nowhere.

    Raises:
        DataError: there is no such folder; or several folders in it have the files; or only a folder around it has.
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
    """Folders in a folder, to some depth: those in which copies have parts of a data set, without those of classes."""
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
