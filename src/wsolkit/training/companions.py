"""The processes of a run. They stop at the same point, and none waits for one that has died."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed
from torch.distributed.distributed_c10d import Store

from wsolkit.system.signals import LOOK, PARENT, PATIENCE, SIGNALS, Stopped, end, leave
from wsolkit.training.checkpointing import between_steps

SILENCE = 60.0
"""Seconds without a sign of life after which a process on another machine counts as dead."""
_BEAT = 2.0  # seconds between signs of life
_FURTHEST, _ALIVE, _LOST = "furthest", "alive", "lost"
_RUNS = itertools.count()  # The runs of this process. The other processes count in the same order.
_LEFT = 2**40  # No process gives this many signs of life.
_PASS = 2**40  # No pass over a split has this many points.


class Agreement:
    """Lets the processes of a run agree where they stop, without waiting for each other.

    All processes pass points that have the same numbers. A shared key-value store holds the number of the furthest
    point that any process has passed. A process that is asked to stop replaces this number by a promise to stop at the
    next point. Each process that comes to that point, or to a later one, finds the promise. This takes 0.1 ms.

    Args:
        store: the store that all processes share.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen = ""

    def ask(self, number: int) -> None:
        """Make all processes stop at the first point that none of them has passed.

        Args:
            number: the number of the signal that asks for it.
        """
        while " " not in self._seen:
            self._replace(f"{int(self._seen or 0) + 1} {number}")

    def passes(self, point: int) -> signal.Signals | None:
        """Pass a point. Return the signal if all processes are to stop there, else None."""
        while " " not in self._seen and int(self._seen or 0) < point:
            self._replace(str(point))
        promised, _, number = self._seen.partition(" ")
        return signal.Signals(int(number)) if number and int(promised) <= point else None

    def _replace(self, value: str) -> None:
        self._seen = self._store.compare_set(_FURTHEST, self._seen, value).decode()


class Companions(Callback):
    """Stops a run at the same point in all processes, and ends it when one of them has died.

    The points are the end of each optimizer step, of each evaluation batch and of each evaluation, and the beginning of
    each epoch. Processes may have different numbers of evaluation batches. They have the end of an evaluation in
    common, and they do not wait for each other before it.
    """

    def __init__(self) -> None:
        self._agreement: Agreement | None = None
        self._store: Store | None = None
        self._rank, self._processes = 0, 1
        self._point = self._begun_at = 0
        self._finished = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Connect to the store, now that the processes have met."""
        if trainer.world_size == 1 or self._store is not None:
            return
        self._rank, self._processes = trainer.global_rank, trainer.world_size
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(address, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
        self._store = distributed.PrefixStore(f"wsolkit/{next(_RUNS)}", store)  # type: ignore[attr-defined]
        self._agreement = Agreement(self._store)
        threading.Thread(target=self._give_signs_of_life, name="companions", daemon=True).start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass a point, or stop there."""
        self._stop_or_pass()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pass a point after a step. Lightning stops by itself when it has logged the step."""
        if between_steps(trainer):
            self._pass()
            trainer._signal_connector.received_sigterm = SIGNALS.reason is not None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the point at which the evaluation starts."""
        self._begun_at = self._point

    def on_validation_batch_end(self, *_: Any) -> None:
        """Pass a point, or stop there."""
        self._stop_or_pass()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass the point at the end of the evaluation, before the processes sum their counts."""
        self._point = self._begun_at + _PASS
        self._stop_or_pass()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the point at which the evaluation starts."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_end(self, *_: Any) -> None:
        """Pass a point, or stop there."""
        self._stop_or_pass()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass the point at the end of the evaluation."""
        self.on_validation_epoch_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop deferring signals after the test, when the first process works alone and passes no more points."""
        if stage == "test" and trainer.is_global_zero:
            SIGNALS.deferred = False
            if SIGNALS.received is not None:
                raise Stopped(SIGNALS.received)

    def close(self, failed: bool, patience: float) -> None:
        """Leave the other processes. The first process waits for them, because they need its store.

        Args:
            failed: whether this process failed. The others then end, too.
            patience: seconds in which the others may leave by themselves.
        """
        self._finished = True
        if self._store is not None:
            with suppress(RuntimeError):  # The store ended with the first process.
                if failed:
                    self._store.set(_LOST, "")
                self._store.add(f"{_ALIVE}/{self._rank}", _LEFT)
                if self._rank == 0:
                    _wait(patience, lambda: all(self._signs(rank) >= _LEFT for rank in range(1, self._processes)))
        end_children(patience)

    def _stop_or_pass(self) -> None:
        self._pass()
        if SIGNALS.reason is not None:
            raise SIGTERMException

    def _pass(self) -> None:
        self._point += 1
        if self._agreement is None:
            SIGNALS.reason = SIGNALS.received
            return
        if SIGNALS.received is not None:
            self._agreement.ask(SIGNALS.received)
        SIGNALS.reason = self._agreement.passes(self._point)

    def _signs(self, rank: int) -> int:
        assert self._store is not None
        return self._store.add(f"{_ALIVE}/{rank}", 0)

    def _give_signs_of_life(self) -> None:
        """Run in a thread: give signs of life. The first process also checks those of the others."""
        heard = dict.fromkeys(range(1, self._processes), (0, time.monotonic()))
        assert self._store is not None
        try:
            while not self._finished:
                time.sleep(_BEAT)
                self._store.add(f"{_ALIVE}/{self._rank}", 1)
                if self._store.check([_LOST]):
                    time.sleep(PATIENCE)
                    end("")
                for rank, (before, since) in heard.items() if self._rank == 0 else ():
                    signs = self._signs(rank)
                    if signs != before or signs >= _LEFT:
                        heard[rank] = signs, time.monotonic()
                    elif time.monotonic() - since > SILENCE:
                        self._store.set(_LOST, "")
                        time.sleep(2 * _BEAT)  # All processes need time to see it.
                        end(f"{_named(rank, self._processes)} gives no sign of life: it was killed")
        except RuntimeError:  # The store ended with the first process.
            time.sleep(4 * LOOK)  # The processes that it started know this already, and end.
            if not self._finished and SIGNALS.reason is None:
                end("process 0 was killed" if self._rank == 1 else "")


def _named(rank: int, processes: int) -> str:
    return f"process {rank} of {processes}, counted from 0,"


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of a run on this machine, and watches them.

    Lightning's own launcher kills the first process when another one ends with an error.
    """

    def _call_children_scripts(self) -> None:
        os.environ[PARENT] = str(os.getpid())
        super()._call_children_scripts()
        SIGNALS.children, self.procs = self.procs, []  # Lightning then watches none of them.
        threading.Thread(target=_watch_children, name="children", daemon=True).start()


def _of_lost_connection(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and bool(
        re.search(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|failed to recv", str(error))
    )


def _wait_for_the_reason() -> None:
    """Wait until some process knows which one has died, and ends this one.

    Raises:
        Stopped: nobody knows. The other process was asked to stop before there were points to stop at.
        SystemExit: the other process has failed, and has said why.
    """

    def known() -> bool:
        return SIGNALS.received is not None or any(child.poll() for child in SIGNALS.children)

    _wait(SILENCE + PATIENCE, known)
    time.sleep(3 * LOOK)  # This leaves time to look at the others, and to name one that was killed.
    if SIGNALS.received is not None:
        raise Stopped(SIGNALS.received)
    if any(child.poll() for child in SIGNALS.children):
        raise SystemExit(1)


def _wait(seconds: float, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        time.sleep(LOOK / 5)


def end_children(patience: float) -> None:
    """End the processes that this one has started.

    Args:
        patience: seconds in which they may end by themselves.
    """
    children, SIGNALS.children = SIGNALS.children, []  # Their exit codes do not matter any more.
    _wait(patience, lambda: all(child.poll() is not None for child in children))
    for child in children:
        child.kill()
        child.wait()


def _watch_children() -> None:
    """Run in a thread: end this process if one that it started has died or left."""
    deadline: float | None = None
    while SIGNALS.children:
        time.sleep(LOOK)
        codes = [child.poll() for child in SIGNALS.children]
        for rank, code in enumerate(codes, start=1):
            if code is None or code == 0:
                continue
            number = _STOPPED.get(code)
            if code < 0 and number is None:
                end(f"{_named(rank, len(codes) + 1)} was killed by {signal.Signals(-code).name}")
            if SIGNALS.reason is not None:
                continue
            if deadline is None:
                # It left before there were points to stop at. Follow it, unless this process cannot hear signals yet.
                deadline = time.monotonic() + (PATIENCE if SIGNALS.deferred or number is None else 4 * LOOK)
                if number is not None and SIGNALS.received is None:
                    os.kill(os.getpid(), number)
            elif time.monotonic() > deadline:
                leave(number) if number is not None else end("")


_STOPPED = {code: number for number in (signal.SIGTERM, signal.SIGINT) for code in (-number, 128 + number)}


class _DeferredSignals(_SignalConnector):
    """Replaces Lightning's signal handling, which would broadcast while the other processes are elsewhere."""

    def register_signal_handlers(self) -> None:
        """Defer signals from now on, since there are points to stop at."""
        SIGNALS.deferred = True

    def teardown(self) -> None:
        """Keep deferring signals between training and test."""


@contextmanager
def stoppable(trainer: Trainer) -> Iterator[None]:
    """Train and test within this context.

    Signals stop the run where nothing is lost, and no process waits for a dead one.

    Raises:
        Stopped: a signal has stopped the run.
    """
    companions = Companions()
    trainer.callbacks.insert(0, companions)  # type: ignore[attr-defined]
    trainer._signal_connector = _DeferredSignals(trainer)
    # Otherwise all processes would wait in each step for the first one to say whether they stop.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        trainer.strategy._launcher = Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
    failed, patience = True, 10 * LOOK  # Other processes may have failed in the same way, and may be about to say so.
    with SIGNALS.listening():
        try:
            yield
            failed, patience = False, PATIENCE
        except (SystemExit, KeyboardInterrupt):
            asked = SIGNALS.reason or SIGNALS.received
            if asked is None:
                raise
            failed, patience = (True, 0.0) if SIGNALS.reason is None else (False, PATIENCE)
            raise Stopped(asked) from None
        except RuntimeError as error:
            if _of_lost_connection(error):
                _wait_for_the_reason()
            raise
        finally:
            companions.close(failed, patience)
