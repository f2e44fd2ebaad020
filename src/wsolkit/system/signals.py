"""Hear the signals that ask a command to stop: SIGTERM, Ctrl-C and, under SLURM, SIGUSR1.

This module imports neither torch nor Lightning.
"""

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
"""The environment variable with the number of the process that starts the others of a run."""
LOOK = 0.5
"""Seconds between two looks at the other processes of a run."""
PATIENCE = 30.0
"""Seconds that a process has to leave by itself after others have left."""


class Stopped(SystemExit):
    """A signal has stopped the command. The exit code is 128 plus the signal's number, as in shells.

    Args:
        number: the number of the signal.

    Attributes:
        advice: says what is saved, and how to continue.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.advice = ""
        self._said = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"

    def __str__(self) -> str:
        return f"{self._said}: {self.advice}" if self.advice else self._said


class Signals:
    """Hears signals, and stops the command at once, or at the next point that suits a run.

    Attributes:
        received: the first signal that came to this process.
        reason: the signal for which all processes of the run stop now.
        deferred: whether a run looks at `received` by itself.
        children: the processes of the run, which end with it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.reason: signal.Signals | None = None
        self.deferred = False
        self.children: list[subprocess.Popen[bytes]] = []
        self._listening = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals within this context, and restore the earlier handlers after it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        if not self._listening:
            self.received = self.reason = None
        numbers = [signal.SIGTERM, signal.SIGINT]
        if "SLURM_JOB_ID" in os.environ:
            numbers.append(signal.SIGUSR1)  # SLURM sends it when the time is nearly over.
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
            if number == signal.SIGINT:  # The user does not want to wait.
                end("", 128 + number)
            return  # A second SIGTERM must not spoil what the first one has begun.
        self.received = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if self.deferred:
            return
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(self.received)


SIGNALS = Signals()


def is_first() -> bool:
    """Say whether this is the process that speaks for the whole run."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def has_parent() -> bool:
    """Say whether another process of the run has started this one, and is alive."""
    return os.environ.get(PARENT) == str(os.getppid())


def end_with_parent() -> None:
    """End this process when the process that started it has died, because nobody else would tell it.

    It would otherwise wait for hours to meet the others, or for a sum over all of them.
    """
    # The first process also has LOCAL_RANK=0, and its other children inherit it.
    if PARENT in os.environ and os.environ[PARENT] != str(os.getpid()) and os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=_watch_parent, name="parent", daemon=True).start()


def _watch_parent() -> None:
    while has_parent():
        time.sleep(LOOK)
    reason = SIGNALS.reason
    if reason is None:
        end("process 0 was killed" if os.environ["LOCAL_RANK"] == "1" else "")
    else:
        time.sleep(PATIENCE)  # All processes are leaving.
        leave(reason)


def leave_without_reader() -> None:
    """End in silence if the reader of this process's output has gone, with the exit code that shells give to SIGPIPE.

    Do nothing if another pipe is broken, for example one to a loader's process, because that is an error.
    """
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if any(event & select.POLLERR for _, event in output.poll(0)):
        # Python would complain when it flushes the output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def leave(number: signal.Signals) -> None:
    """End this process after a signal, if it cannot end by itself."""
    if is_first():
        _say(str(Stopped(number)))
    end("", 128 + number)


def end(lost: str, code: int = 1) -> None:
    """End this process and those that it has started, whatever they wait for.

    Args:
        lost: what has happened to another process, or "" to say nothing.
        code: the exit code.
    """
    if lost:
        _say(
            f"error: {lost}, often because the machine's memory is full. The others end, too. Continue from the last "
            "checkpoint with resume=auto"
        )
    for child in SIGNALS.children:
        child.kill()
    os._exit(code)


def _say(line: str) -> None:
    os.write(2, f"{line}\n".encode())  # Another thread may be stuck while it prints.
