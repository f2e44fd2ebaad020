"""Lock files between processes. The operating system releases a lock when its process ends, even if it is killed.

The library filelock is not used. Where a file system has no locks, it creates a file that outlives a killed process. It
also creates files when it only checks whether a lock is held.

A lock's file says who holds the lock and since when. This is for people only, and no code relies on it. After a kill,
it names a process that has ended, whose number may belong to another process by now.
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
"""The files of the locks that this process holds, with their descriptors."""


def _leave_to_parent() -> None:
    """Drop the locks in a forked process, which would otherwise hold them after its parent was killed."""
    while _held:
        os.close(_held.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def alone(path: Path, doing: str, instead: str = "", again: bool = False) -> Iterator[None]:
    """Keep other processes from doing the same thing.

    Args:
        path: the lock's file. It is created if it does not exist, and stays.
        doing: what this process does, for example "preparing 'DIR'".
        instead: what another process can do instead of waiting, if anything.
        again: whether this process may enter again while it holds the lock.

    Raises:
        BusyError: another process holds the lock.
        OSError: the file cannot be written.
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
        if _held.pop(path, None) is not None:  # A forked process has dropped the lock.
            os.close(descriptor)


def is_held(path: Path) -> bool:
    """Say whether a process holds the lock of a file. A fork of that process does not count."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _lock(descriptor, path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Take a lock, unless another process holds it. Return whether it was taken."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 2**30, os.SEEK_SET)  # The lock is far behind the text, which other processes read.
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        warnings.warn(
            f"the file system of '{path.parent}' has no locks ({error.strerror}): make sure that no other process "
            "writes there",
            stacklevel=3,
        )
    return True


def _note(descriptor: int) -> None:
    """Write down who holds a lock."""
    noted = {"process": os.getpid(), "host": platform.node(), "since": time.time()}
    with suppress(OSError):  # The disk may be full.
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(noted).encode())


def _holder(path: Path) -> str:
    """Say in words who holds a lock, or return "" if the file does not say it."""
    for _ in range(10):  # The holder may be about to write its name.
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
