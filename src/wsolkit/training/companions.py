"""The processes of a run: they stop at the same point, and none waits for one that is gone."""

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
"""Seconds after which a process on another machine that gives no sign of life is taken for dead."""
_BEAT = 2.0  # seconds between signs of life
_FURTHEST, _ALIVE, _LOST = "furthest", "alive", "lost"
_RUNS = itertools.count()  # of this process; the others count alike
_LEFT = 2**40  # more signs of life than anybody gives
_PASS = 2**40  # more points than a pass over a split has batches


class Agreement:
    """Where the processes of a run stop, which nobody waits for.

    Each passes points that are numbered alike. What they met through, a store of keys, holds the number of the furthest
    point that any has passed. Who is asked to stop replaces it by the promise to stop at the next: all who come there,
    or further, find it. That takes 0.1 ms, and no process waits for another.

    Args:
        store: of all processes.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen = ""

    def ask(self, number: int) -> None:
        """Have all processes stop at the first of their points that none has passed.

        Args:
            number: of the signal that asked for it.
        """
        while " " not in self._seen:
            self._replace(f"{int(self._seen or 0) + 1} {number}")

    def passes(self, point: int) -> signal.Signals | None:
        """Pass a point, or find that all are to stop there: by which signal."""
        while " " not in self._seen and int(self._seen or 0) < point:
            self._replace(str(point))
        promised, _, number = self._seen.partition(" ")
        return signal.Signals(int(number)) if number and int(promised) <= point else None

    def _replace(self, value: str) -> None:
        self._seen = self._store.compare_set(_FURTHEST, self._seen, value).decode()


class Companions(Callback):
    """Stops a run where it has been asked to, at the same point in all processes, and ends it when one has died.

    Points are the ends of optimizer steps, of the batches of an evaluation and of the evaluation, and the beginnings of
    epochs. An evaluation's batches need not be the same in all processes: its end is, and before it nobody waits.
    """

    def __init__(self) -> None:
        self._agreement: Agreement | None = None
        self._store: Store | None = None
        self._rank, self._processes = 0, 1
        self._point = self._begun_at = 0
        self._finished = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning's hook: the processes have met."""
        if trainer.world_size == 1 or self._store is not None:
            return
        self._rank, self._processes = trainer.global_rank, trainer.world_size
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(address, port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
        self._store = distributed.PrefixStore(f"wsolkit/{next(_RUNS)}", store)  # type: ignore[attr-defined]
        self._agreement = Agreement(self._store)
        threading.Thread(target=self._give_signs_of_life, name="companions", daemon=True).start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        self._stop_or_pass()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook: Lightning stops by itself when it has logged the step."""
        if between_steps(trainer):
            self._pass()
            trainer._signal_connector.received_sigterm = SIGNALS.reason is not None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        self._begun_at = self._point

    def on_validation_batch_end(self, *_: Any) -> None:
        """Lightning's hook."""
        self._stop_or_pass()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook, before processes add up what they have counted."""
        self._point = self._begun_at + _PASS
        self._stop_or_pass()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_end(self, *_: Any) -> None:
        """Lightning's hook."""
        self._stop_or_pass()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        self.on_validation_epoch_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning's hook: after the test the first process works on alone, and no point comes any more."""
        if stage == "test" and trainer.is_global_zero:
            SIGNALS.deferred = False
            if SIGNALS.received is not None:
                raise Stopped(SIGNALS.received)

    def close(self, failed: bool, patience: float) -> None:
        """Leave the others; the first process waits for them, who need its store.

        Args:
            failed: whether that was not to be: the others end, too.
            patience: seconds in which they may leave by themselves.
        """
        self._finished = True
        if self._store is not None:
            with suppress(RuntimeError):  # the store has gone with the first process
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
        """Run in a thread: give signs of life; the first process looks whether the others do."""
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
                        time.sleep(2 * _BEAT)  # for all to see it
                        end(f"{_named(rank, self._processes)} gives no sign of life: it was killed")
        except RuntimeError:  # the store has gone with the first process
            time.sleep(4 * LOOK)  # those that it has started know it already, and end
            if not self._finished and SIGNALS.reason is None:
                end("process 0 was killed" if self._rank == 1 else "")


def _named(rank: int, processes: int) -> str:
    return f"process {rank} of {processes}, counted from 0,"


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of a run on this machine, and looks after them.

    Lightning's own kills the first process when another has ended in any other way than well.
    """

    def _call_children_scripts(self) -> None:
        os.environ[PARENT] = str(os.getpid())
        super()._call_children_scripts()
        SIGNALS.children, self.procs = self.procs, []  # Lightning then looks after none
        threading.Thread(target=_watch_children, name="children", daemon=True).start()


def _of_lost_connection(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and bool(
        re.search(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|failed to recv", str(error))
    )


def _wait_for_the_reason() -> None:
    """Wait until somebody knows who has died, and ends this process.

    Raises:
        Stopped: nobody has: the other was asked to stop before there were points to stop at.
        SystemExit: the other has failed, and said so.
    """

    def known() -> bool:
        return SIGNALS.received is not None or any(child.poll() for child in SIGNALS.children)

    _wait(SILENCE + PATIENCE, known)
    time.sleep(3 * LOOK)  # for the others to be looked at, and a killed one to be named
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
    children, SIGNALS.children = SIGNALS.children, []  # what they leave with is of no interest any more
    _wait(patience, lambda: all(child.poll() is not None for child in children))
    for child in children:
        child.kill()
        child.wait()


def _watch_children() -> None:
    """Run in a thread: end this process if one that it started has died, or has left and this one does not follow."""
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
                # Without points to stop at, it has left unless it waits where it hears no signals.
                deadline = time.monotonic() + (PATIENCE if SIGNALS.deferred or number is None else 4 * LOOK)
                if number is not None and SIGNALS.received is None:
                    os.kill(os.getpid(), number)
            elif time.monotonic() > deadline:
                leave(number) if number is not None else end("")


_STOPPED = {code: number for number in (signal.SIGTERM, signal.SIGINT) for code in (-number, 128 + number)}


class _DeferredSignals(_SignalConnector):
    """What Lightning calls to hear signals; its own would broadcast while other processes are elsewhere."""

    def register_signal_handlers(self) -> None:
        """Lightning's hook: from now on there are points to stop at."""
        SIGNALS.deferred = True

    def teardown(self) -> None:
        """Lightning's hook: between training and test, too."""


@contextmanager
def stoppable(trainer: Trainer) -> Iterator[None]:
    """Train and test within: signals stop the run where nothing is lost, and no process waits for a dead one.

    Raises:
        Stopped: a signal has stopped the run.
    """
    companions = Companions()
    trainer.callbacks.insert(0, companions)  # type: ignore[attr-defined]
    trainer._signal_connector = _DeferredSignals(trainer)
    # In each step, Lightning would have all processes wait for the first to say whether they stop.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        trainer.strategy._launcher = Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
    failed, patience = True, 10 * LOOK  # others may have failed alike, and are about to say so
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
