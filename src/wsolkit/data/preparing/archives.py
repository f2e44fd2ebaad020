"""The archives that data sets are published in: checked, and unpacked so that they can neither harm nor be left halves.

What an archive holds is written into a folder beside the data set's files (`ROOT/.wsolkit`) and moved into
place when all of it is there. A process that is killed leaves this folder; the next one goes on from it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from rich.progress import Progress

from wsolkit.errors import ConfigError, DataError

STATE = ".wsolkit"
"""Folder in a data set's root of what is known about it, and of what is not finished."""

_SPARE = 100 * 2**20  # bytes that are left free on the disk
# Images do not shrink in archives, and lists and XML by 10 to 30 times. Small archives may do as they like.
_MAX_RATIO, _ALWAYS_ALLOWED = 200, 2**30
_CHUNK = 2**20


@dataclass(frozen=True)
class Archive:
    """An archive of a data set: tar, compressed or not, or zip. A tar in a tar is unpacked into a folder of its name.

    Args:
        file: its name, in the data set's root.
        page: where a person finds it.
        url: where it can be downloaded without a login; None: it has to be put there by hand.
        size: in bytes, None if unknown.
        checksum: "sha256:…" or "md5:…", None if unknown.
        unpack: folders of the archive → folders of the root that their contents go to; "." is the whole archive, or the
            root. What lies in other folders is left out. Empty: the file is no archive, and is used where it lies.
        holds: patterns of files that are in the root afterwards; "a|b" is either.
        setting: of the data set; without it, the archive is not needed. None: it is always.
        splits: which cannot be read without the archive. It is not needed while they can be.
        place: setting of the data set that names the folder where what is unpacked is looked for. If it names another
            folder, the archive is not needed. None: there is none.
    """

    file: str
    page: str
    url: str | None
    size: int | None
    checksum: str | None
    unpack: Mapping[str, str]
    holds: Sequence[str]
    setting: str | None
    splits: Sequence[str] = ("train", "val", "test")
    place: str | None = None

    def finished(self, root: Path) -> bool:
        """Whether all files of the archive lie in the root, or in folders of it."""
        from wsolkit.data.layout import folders_below  # here, since readers load torch

        if self.started(root):
            return False
        return not self.missing(root) or (root.is_dir() and not self.missing(root, *folders_below(root)))

    def started(self, root: Path) -> bool:
        """Whether a process that unpacked the archive did not finish."""
        return self._stage(root).exists()

    def missing(self, *places: Path) -> list[str]:
        """Which of `holds` are in none of some folders."""
        return [
            pattern
            for pattern in self.holds
            if not any(any(place.glob(alternative)) for alternative in pattern.split("|") for place in places)
        ]

    def is_looked_for(self, root: Path, places: Sequence[str]) -> bool:
        """Whether what is unpacked is looked for in folders that are relative to the root, or in it."""
        targets = [root / target for target in self.unpack.values()]
        return any(
            target.is_relative_to(place) for target in targets for text in places for place in (Path(text), root / text)
        )

    def described(self) -> str:
        """Size and checksum in words, as far as they are known."""
        size = None if self.size is None else f"{self.size:,} bytes"
        return ", ".join(part for part in (size, self.checksum) if part) or "size and checksum are not known"

    def install(self, name: str, root: Path, progress: Progress) -> None:
        """Check the archive in `root`, and put what it holds in place. Goes on where a process was killed.

        Args:
            name: of the archive in `dataset.archives`.
            root: of the data set.
            progress: shows how far it is.

        Raises:
            DataError: the archive is damaged or another one, would write elsewhere, or does not fit on the disk.
        """
        path, stage = root / self.file, self._stage(root)
        if not self.unpack:
            self.verify(name, path, progress)
            return
        content, known, ready = stage / "content", stage / "archive.json", stage / "ready"
        try:
            if not ready.exists():
                identity = json.dumps([path.stat().st_size, path.stat().st_mtime_ns])
                if not known.exists() or known.read_text(encoding="utf-8") != identity:
                    self.verify(name, path, progress)
                    shutil.rmtree(stage, ignore_errors=True)
                    content.mkdir(parents=True)
                    known.write_text(identity, encoding="utf-8")
                unpack(path, content, self.unpack, progress)
                self._check_content(path, content)
                ready.touch()
            settle(content, root)
            shutil.rmtree(stage)
        except OSError as error:
            raise DataError(f"'{path}' cannot be unpacked ({error})") from error

    def verify(self, name: str, path: Path, progress: Progress) -> None:
        """Compare size and checksum of a file with the published ones; see `install`.

        Raises:
            DataError: they differ.
        """
        size = path.stat().st_size
        hint = f"download it again, or, if its publisher has changed it, set dataset.archives.{name}.{{}}=null"
        if self.size is not None and size != self.size:
            raise DataError(f"'{path}' has {size:,} bytes, {self.size:,} as published: {hint.format('size')}")
        if self.checksum is None:
            return
        algorithm, _, expected = self.checksum.partition(":")
        if algorithm not in ("sha256", "md5"):
            raise ConfigError(f"dataset.archives.{name}.checksum={self.checksum}: expected sha256:… or md5:…")
        digest = hashlib.new(algorithm)
        with progress.open(path, "rb", description=f"Checking {path.name}") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            raise DataError(
                f"'{path}' is damaged: its {algorithm} is {digest.hexdigest()}, {expected} as published: "
                + hint.format("checksum")
            )

    def _check_content(self, path: Path, content: Path) -> None:
        absent = self.missing(content)
        if absent:
            folders = ", ".join(f"'{folder}'" for folder in self.unpack)
            raise DataError(
                f"'{path}' is not the archive that is published, or is cut short: {absent[0]} is not in it (looked in "
                f"{folders} of the archive)"
            )

    def _stage(self, root: Path) -> Path:
        return root / STATE / f"{self.file}.unpacking"


@dataclass(frozen=True)
class _Member:
    """A file or folder in an archive. `other` says what it is if it is neither."""

    name: str
    size: int
    is_folder: bool
    other: str
    open: Callable[[], IO[bytes]]


def unpack(path: Path, target: Path, folders: Mapping[str, str], progress: Progress) -> None:
    """Write the files of an archive into a folder. Nothing but folders and plain files is ever made, all inside it.

    Args:
        path: of the archive.
        target: the folder.
        folders: see `Archive.unpack`.
        progress: shows how far it is.

    Raises:
        DataError: the archive is damaged, holds a link, a device or a path that leads elsewhere, unpacks to far more
            than images do, or needs more space than there is.
    """
    limit = _SpaceLimit(path, target)
    try:
        with progress.open(path, "rb", description=f"Unpacking {path.name}") as file:
            for member in _members(path, file):
                inside = _safe_path(member, path.name, folders)
                if inside is not None:
                    _write(member, target / inside, f"{path.name}/{member.name}", limit)
    except (
        *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError),
        *(RuntimeError, NotImplementedError),  # a zip file that is encrypted, or compressed in an unknown way
    ) as error:
        raise DataError(f"'{path}' is damaged, or no archive ({_first_line(error)}): download it again") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def settle(source: Path, target: Path) -> None:
    """Move what is in a folder into another, which may have some of its folders and files already."""
    target.mkdir(parents=True, exist_ok=True)
    with os.scandir(source) as entries:
        for entry in list(entries):
            there = target / entry.name
            if there.is_dir() and not entry.is_dir():
                raise IsADirectoryError(f"'{there}' is a folder, and should be a file")
            if there.is_dir():
                settle(Path(entry.path), there)
            else:
                shutil.move(entry.path, there)  # also to another disk


class _SpaceLimit:
    """Watches how much an archive unpacks to."""

    def __init__(self, path: Path, target: Path) -> None:
        self.name, self.packed, self.target = path.name, path.stat().st_size, target
        self.written = 0
        if not any(target.iterdir()):  # otherwise, a killed process has written some of it
            self.check(self.packed)

    def take(self, size: int) -> None:
        """A file of some size is about to be written."""
        self.written += size
        if self.written > max(self.packed * _MAX_RATIO, _ALWAYS_ALLOWED):
            raise DataError(
                f"'{self.name}' unpacks to more than {_MAX_RATIO} times its size, which no archive of images does: it "
                "is damaged, or meant to fill the disk"
            )
        self.check(size)

    def check(self, size: int) -> None:
        free = shutil.disk_usage(self.target).free - _SPARE
        if size > free:
            raise DataError(
                f"'{self.name}' needs {size:,} bytes more on the disk of '{self.target}', and {max(free, 0):,} are "
                "free: make room, then run the same command again"
            )


def _write(member: _Member, path: Path, where: str, limit: _SpaceLimit) -> None:
    if member.is_folder:
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tar":
        _write_nested(member, path.with_suffix(""), where, limit)
        return
    limit.take(member.size)
    with member.open() as source, path.open("wb") as copy:
        shutil.copyfileobj(source, copy, _CHUNK)
    if path.stat().st_size != member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")


def _write_nested(outer: _Member, folder: Path, where: str, limit: _SpaceLimit) -> None:
    if folder.exists():
        return  # by a process that was killed later on
    draft = folder.with_name(f"{folder.name}.partial")
    draft.mkdir(exist_ok=True)
    with outer.open() as file:
        for member in _tar_members(file):
            inside = _safe_path(member, where, {".": "."})
            if inside is not None:
                _write(member, draft / inside, f"{where}/{member.name}", limit)
    draft.rename(folder)


def _safe_path(member: _Member, archive: str, folders: Mapping[str, str]) -> PurePosixPath | None:
    """Where a member goes, relative to the root; None: it is left out.

    Raises:
        DataError: it leads elsewhere, or is neither a file nor a folder.
    """
    name = member.name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    reason = member.other
    if name.startswith("/") or "\\" in name or re.match(r"[A-Za-z]:", name) or "\0" in name:
        reason = "is an absolute path, or one of another system"
    elif ".." in parts:
        reason = "leads out of the folder it is unpacked into"
    if reason:
        raise DataError(
            f"'{archive}' is not unpacked: its member '{name}' {reason}. Data sets hold nothing like that: get the "
            "archive from its publisher"
        )
    if "__MACOSX" in parts or (parts and parts[-1].startswith("._")):
        return None  # what macOS adds to archives
    path = PurePosixPath(*parts)
    for source, target in folders.items():
        if path.is_relative_to(source):
            return PurePosixPath(target) / path.relative_to(source)
    return None


def _members(path: Path, file: BinaryIO) -> Iterator[_Member]:
    if path.suffix == ".zip":
        return _zip_members(file)
    return _tar_members(file)


def _tar_members(file: IO[bytes]) -> Iterator[_Member]:
    # Not with tarfile's `data` filter: it keeps links, corrects names in silence and looks at no disk space, whereas
    # `_safe_path` and `_SpaceLimit` refuse all of that, in zip files too.
    with tarfile.open(fileobj=file, mode="r:*") as tar:
        for info in tar:
            other = "" if info.isreg() or info.isdir() else f"is {_kind(info)}"
            yield _Member(info.name, info.size, info.isdir(), other, lambda info=info: _opened(tar, info))  # type: ignore[misc]
            tar.members = []  # type: ignore[attr-defined]  # or it remembers a million of them


def _opened(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None  # links alone have none
    return file


def _kind(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return f"a link to '{info.linkname}'"
    return "a device or another special file"


def _zip_members(file: BinaryIO) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            other = "" if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "is a link or a special file"
            yield _Member(
                info.filename,
                info.file_size,
                info.is_dir(),
                other,
                lambda info=info: archive.open(info),  # type: ignore[misc]
            )
