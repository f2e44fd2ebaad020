"""Files that are there as a whole or not at all: each is written beside its place, and takes it when it is complete."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from wsolkit.system.names import AS_IN_FILES

_LONGEST = 240  # bytes: file systems allow 255, and a draft's name has a number more


def _short(name: str) -> str:
    """The name of a file, or what stands for one that leaves no room for a draft's number."""
    encoded = name.encode(errors="surrogatepass")
    return name if len(encoded) <= _LONGEST else hashlib.sha256(encoded).hexdigest()


@contextmanager
def draft(path: Path, mode: str = "w", sync: bool = True) -> Iterator[IO[Any]]:
    """Open a file to be written; when it is complete, it takes the place of the one that was there.

    Args:
        path: of the file.
        mode: "w" for text in UTF-8, whose line ends stay as they are and in which names of files that are no UTF-8 keep
            their bytes; "wb" for bytes.
        sync: whether it is on the disk, and a failing disk noticed, before it takes its place. One of many files that
            are easily made again may do without.

    Raises:
        OSError: it cannot be written, and is named; what was there before stays.
    """
    place = path.with_name(f".{_short(path.name)}.{os.getpid()}")
    how = {} if "b" in mode else {"encoding": "utf-8", "errors": AS_IN_FILES, "newline": ""}
    try:
        with place.open(mode, **how) as file:  # type: ignore[call-overload]
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        place.replace(path)
    except BaseException as error:
        with suppress(OSError):
            place.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(place)):
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step; see `draft`."""
    with draft(path) as file:
        file.write(text)


def remove_drafts(paths: Iterable[Path]) -> None:
    """Remove what killed processes have left of files that they were writing; nobody alive may be writing them.

    Args:
        paths: the files; a name may be a pattern, such as `checkpoints/*.ckpt`.
    """
    for path in paths:
        for found in path.parent.glob(f".{_short(path.name)}.*"):
            if re.search(r"\.(\d+|draft)$", found.name):  # .draft: of earlier versions
                with suppress(OSError):
                    found.unlink()
