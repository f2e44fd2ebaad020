"""Check the archives of data sets, and unpack them safely and completely.

The content of an archive is first written into a folder beside the data set's files (`ROOT/.wsolkit`), and moved into
place when all of it is there. If a process is killed, the next one continues from this folder.
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
"""The folder in a data set's root with what is known about it, and with what is unfinished."""

_SPARE = 100 * 2**20  # This many bytes stay free on the disk.
# Images do not shrink in archives, and lists and XML shrink by 10 to 30 times. Small archives may have any ratio.
_MAX_RATIO, _ALWAYS_ALLOWED = 200, 2**30
_CHUNK = 2**20


@dataclass(frozen=True)
class Archive:
    """An archive of a data set: zip, or tar with or without compression.

    A tar inside a tar is unpacked into a folder of its own name.

    Args:
        file: its name in the data set's root.
        page: the page where a person finds it.
        url: the address from which it can be downloaded without a login. None means that the user has to get it.
        size: its size in bytes, or None if unknown.
        checksum: "sha256:…" or "md5:…", or None if unknown.
        unpack: maps folders of the archive to folders of the root, where their content goes. "." is the whole archive,
            or the root. The content of other folders is left out. If empty, the file is used where it lies.
        holds: patterns of files that are in the root afterwards. "a|b" stands for either.
        setting: the setting of the data set that needs the archive, or None if it is always needed.
        splits: the splits that need the archive. It is not needed while they can be read.
        place: the setting of the data set that names the folder of the unpacked files, or None. If it names another
            folder, the archive is not needed.
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
        """Say whether all files of the archive lie in the root, or in folders of it."""
        from wsolkit.data.layout import folders_below  # The import stands here, because readers load torch.

        if self.started(root):
            return False
        return not self.missing(root) or (root.is_dir() and not self.missing(root, *folders_below(root)))

    def started(self, root: Path) -> bool:
        """Say whether a process that unpacked the archive did not finish."""
        return self._stage(root).exists()

    def missing(self, *places: Path) -> list[str]:
        """Return those of `holds` that are in none of some folders."""
        return [
            pattern
            for pattern in self.holds
            if not any(any(place.glob(alternative)) for alternative in pattern.split("|") for place in places)
        ]

    def is_looked_for(self, root: Path, places: Sequence[str]) -> bool:
        """Say whether the unpacked files are looked for in the root, or in folders relative to it."""
        targets = [root / target for target in self.unpack.values()]
        return any(
            target.is_relative_to(place) for target in targets for text in places for place in (Path(text), root / text)
        )

    def described(self) -> str:
        """Return size and checksum in words, as far as they are known."""
        size = None if self.size is None else f"{self.size:,} bytes"
        return ", ".join(part for part in (size, self.checksum) if part) or "size and checksum are not known"

    def install(self, name: str, root: Path, progress: Progress) -> None:
        """Check the archive in `root`, and put its content in place. Continue where a killed process stopped.

        Args:
            name: the name of the archive in `dataset.archives`.
            root: the root of the data set.
            progress: shows the progress.

        Raises:
            DataError: the archive is damaged or a different one, would write elsewhere, or does not fit on the disk.
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
        """Compare the size and the checksum of a file with the published ones, see `install`.

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
    """Write the files of an archive into a folder. It only creates folders and plain files, all inside that folder.

    Args:
        path: the path of the archive.
        target: the folder.
        folders: see `Archive.unpack`.
        progress: shows the progress.

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
        RuntimeError,  # The zip file is encrypted, or compressed in an unknown way.
    ) as error:
        raise DataError(f"'{path}' is damaged, or no archive ({_first_line(error)}): download it again") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def settle(source: Path, target: Path) -> None:
    """Move the content of a folder into another folder, which may have some of its folders and files already."""
    target.mkdir(parents=True, exist_ok=True)
    with os.scandir(source) as entries:
        for entry in list(entries):
            there = target / entry.name
            if there.is_dir() and not entry.is_dir():
                raise IsADirectoryError(f"'{there}' is a folder, and should be a file")
            if there.is_dir():
                settle(Path(entry.path), there)
            else:
                shutil.move(entry.path, there)  # This works for another disk, too.


class _SpaceLimit:
    """Limits the size to which an archive unpacks."""

    def __init__(self, path: Path, target: Path) -> None:
        self.name, self.packed, self.target = path.name, path.stat().st_size, target
        self.written = 0
        if not any(target.iterdir()):  # Otherwise, a killed process has written some of it.
            self.check(self.packed)

    def take(self, size: int) -> None:
        """Count a file that is about to be written, and refuse it if the total is too large."""
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
        return  # A process that was killed later wrote it.
    draft = folder.with_name(f"{folder.name}.partial")
    draft.mkdir(exist_ok=True)
    with outer.open() as file:
        for member in _tar_members(file):
            inside = _safe_path(member, where, {".": "."})
            if inside is not None:
                _write(member, draft / inside, f"{where}/{member.name}", limit)
    draft.rename(folder)


def _safe_path(member: _Member, archive: str, folders: Mapping[str, str]) -> PurePosixPath | None:
    """Return the path of a member relative to the root, or None to leave it out.

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
        return None  # macOS adds these to archives.
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
    # tarfile's `data` filter is not enough: it keeps links, corrects names in silence and ignores the disk space.
    # `_safe_path` and `_SpaceLimit` refuse all of that, in zip files too.
    with tarfile.open(fileobj=file, mode="r:*") as tar:
        for info in tar:
            other = "" if info.isreg() or info.isdir() else f"is {_kind(info)}"
            yield _Member(info.name, info.size, info.isdir(), other, lambda info=info: _opened(tar, info))  # type: ignore[misc]
            tar.members = []  # type: ignore[attr-defined]  # It would keep a million of them.


def _opened(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None  # Only links have no file.
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
