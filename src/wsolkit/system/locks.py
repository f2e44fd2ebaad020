"""Locks between processes. The system keeps them: each ends with the process that holds it, however that ends.

The library filelock would take another way where a file system has no locks: a file that outlasts a process which is
killed. It would also make files when it is only asked whether a lock is held.

What is written in a lock's file, who holds it and since when, is for people and decides nothing: after a kill it is of
a process that is no more, and its number may be that of another by now.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from wsolkit.errors import BusyError

_held: dict[Path, int] = {}
"""Files of the locks that this process holds, and their descriptors."""


def _leave_to_parent() -> None:
    """In a forked process, such as a loader's: or it would hold the lock on when its parent is killed."""
    while _held:
        os.close(_held.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def alone(path: Path, doing: str, instead: str = "", again: bool = False) -> Iterator[None]:
    """Keep other processes from doing the same.

    Args:
        path: of the lock's file; it is made if there is none, and stays.
        doing: what this process will be doing, such as "preparing 'DIR'".
        instead: what another process can do other than wait, if anything.
        again: whether this process may do it when it does so already.

    Raises:
        BusyError: another process is doing it. OSError: the file cannot be written.
    """
    path = path.resolve()
    if again and path in _held:
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if not _lock(descriptor, path):
        os.close(descriptor)
        choice = f", or {instead}" if instead else ""
        raise BusyError(f"another process{_holder(path)} is {doing}: wait until it ends{choice}")
    _held[path] = descriptor
    try:
        _note(descriptor)
        yield
    finally:
        if _held.pop(path, None) is not None:  # not so in a forked process
            os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a process, other than by forking from it, holds the lock of a file."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _lock(descriptor, path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Take a lock, unless another process holds it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 2**30, os.SEEK_SET)  # far behind the text, which others are to read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        warnings.warn(
            f"the file system of '{path.parent}' has no locks ({error.strerror}): see to it that no other process "
            "writes there",
            stacklevel=3,
        )
    return True


def _note(descriptor: int) -> None:
    """Write down who holds a lock."""
    noted = {"process": os.getpid(), "host": platform.node(), "since": time.time()}
    with suppress(OSError):  # a full disk
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(noted).encode())


def _holder(path: Path) -> str:
    """Who holds a lock, in words; nothing if the file does not know."""
    for _ in range(10):  # who has just taken it is about to write it down
        try:
            noted = json.loads(path.read_bytes())
            process, host = int(noted["process"]), str(noted["host"])
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(noted["since"])))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            host = ""
        if host and host != platform.node():
            return f" (number {process} on {host}, since {since}; if {host} is gone for good, delete '{path}')"
        if host and psutil.pid_exists(process):
            return f" (number {process} on {host}, since {since})"
        time.sleep(0.1)
    return ""
