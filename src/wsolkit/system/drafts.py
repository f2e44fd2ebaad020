"""Write files that are there as a whole or not at all. Each is written under another name, and then renamed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from wsolkit.system.names import AS_IN_FILES

_LONGEST = 240  # In bytes. File systems allow 255, and the name of a draft is longer by a number.


def _short(name: str) -> str:
    """Return the name of a file, or a digest of it if it leaves no room for a draft's number."""
    encoded = name.encode(errors="surrogatepass")
    return name if len(encoded) <= _LONGEST else hashlib.sha256(encoded).hexdigest()


@contextmanager
def draft(path: Path, mode: str = "w", sync: bool = True) -> Iterator[IO[Any]]:
    """Open a file to write. When it is complete, it replaces the file of the given path.

    Args:
        path: the path of the file.
        mode: "w" for UTF-8 text, or "wb" for bytes. In text, line ends stay as they are, and file names that are not
            UTF-8 keep their bytes.
        sync: whether to put the file on the disk before it replaces the other one, which also reveals a failing disk.
            It is not worth its time for many files that are easily made again.

    Raises:
        OSError: the file cannot be written. The error names it, and the old file stays.
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
    """Write a text file in one step, see `draft`."""
    with draft(path) as file:
        file.write(text)


def remove_drafts(paths: Iterable[Path]) -> None:
    """Remove the drafts that killed processes have left. No living process may be writing these files.

    Args:
        paths: the files. A name may be a pattern, for example `checkpoints/*.ckpt`.
    """
    for path in paths:
        for found in path.parent.glob(f".{_short(path.name)}.*"):
            if re.search(r"\.(\d+|draft)$", found.name):  # Earlier versions wrote .draft.
                with suppress(OSError):
                    found.unlink()
