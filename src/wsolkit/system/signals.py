"""What asks a command to stop: SIGTERM, Ctrl-C and, under SLURM, SIGUSR1. Imports neither torch nor Lightning."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PARENT = "WSOLKIT_PARENT"
"""Environment variable: the number of the process that starts others for a run."""
LOOK = 0.5
"""Seconds between looks at other processes of a run."""
PATIENCE = 30.0
"""Seconds that a process has to leave by itself where others have left."""


class Stopped(SystemExit):
    """A signal has stopped the command; the exit code is the one of shells: 128 and the signal's number.

    Args:
        number: of the signal.

    Attributes:
        advice: what is left, and how to go on.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.advice = ""
        self._said = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"

    def __str__(self) -> str:
        return f"{self._said}: {self.advice}" if self.advice else self._said


class Signals:
    """Hears signals, and stops the command: at once, or where a run finds it best.

    Attributes:
        received: the first that came to this process.
        reason: that for which all processes of the run stop now.
        deferred: whether a run looks at `received` by itself.
        children: processes of the run, which end with it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.reason: signal.Signals | None = None
        self.deferred = False
        self.children: list[subprocess.Popen[bytes]] = []
        self._listening = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals within; outside, they do what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        if not self._listening:
            self.received = self.reason = None
        numbers = [signal.SIGTERM, signal.SIGINT]
        if "SLURM_JOB_ID" in os.environ:
            numbers.append(signal.SIGUSR1)  # "your time is nearly over"
        before = {number: signal.signal(number, self._hear) for number in numbers}
        self._listening += 1
        try:
            yield
        finally:
            self._listening -= 1
            self.deferred = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:  # somebody who does not want to wait
                end("", 128 + number)
            return  # a second SIGTERM must not spoil what the first has begun
        self.received = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if self.deferred:
            return
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(self.received)


SIGNALS = Signals()


def is_first() -> bool:
    """Whether this is the process of a run that speaks for all."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def has_parent() -> bool:
    """Whether another process of the run has started this one, and lives."""
    return os.environ.get(PARENT) == str(os.getppid())


def end_with_parent() -> None:
    """End this process when the one that started it for a run has gone: nobody else would tell it.

    It would wait for hours to meet the others, or for a sum over all of them.
    """
    # Lightning says LOCAL_RANK=0 to the first process, whose other children inherit it.
    if PARENT in os.environ and os.environ[PARENT] != str(os.getpid()) and os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=_watch_parent, name="parent", daemon=True).start()


def _watch_parent() -> None:
    while has_parent():
        time.sleep(LOOK)
    reason = SIGNALS.reason
    if reason is None:
        end("process 0 was killed" if os.environ["LOCAL_RANK"] == "1" else "")
    else:
        time.sleep(PATIENCE)  # all are leaving
        leave(reason)


def leave_without_reader() -> None:
    """Where whoever reads this process's output has gone: end in silence, with the code that shells give to SIGPIPE.

    Otherwise nothing is done: another pipe is broken, such as one to a loader's process, which is an error.
    """
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if any(event & select.POLLERR for _, event in output.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes
        sys.exit(128 + signal.SIGPIPE)


def leave(number: signal.Signals) -> None:
    """End this process, which a signal has stopped, where it cannot by itself."""
    if is_first():
        _say(str(Stopped(number)))
    end("", 128 + number)


def end(lost: str, code: int = 1) -> None:
    """End this process and those that it has started, whatever they wait for.

    Args:
        lost: what has happened to another process, if that is to be said.
        code: exit code.
    """
    if lost:
        _say(
            f"error: {lost}, often because the machine's memory is full; the others end, too. Continue from the last "
            "checkpoint with resume=auto"
        )
    for child in SIGNALS.children:
        child.kill()
    os._exit(code)


def _say(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # another thread may be amid printing, for good
