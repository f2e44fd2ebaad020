"""Runs of several processes stop together, wherever a signal finds which of them, and none waits for a dead one."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.distributed_c10d import Store

from tests.fresh import Running, command
from tests.test_commands import metrics, weights
from tests.test_resume import log
from wsolkit.checkpoint import is_whole, read_checkpoint
from wsolkit.system.signals import PARENT, SIGNALS, Stopped
from wsolkit.training.companions import Agreement

SETTINGS = (
    *("method=sat", "protocol=[maxboxacc]", "dataset.records.sizes={train: 48, val: 21, test: 21}"),
    *("dataset.batch_size=12", "dataset.eval_batch_size=3", "dataset.num_workers=0", "backbone.drop_path_rate=0.2"),
    *("schedule.name=cosine", "trainer=cpu", "trainer.strategy=ddp", "trainer.max_epochs=2", "num_examples=0"),
    *("trainer.enable_progress_bar=false", "hydra.run.dir=run", "resume=auto"),
)


class Process:
    """A process of a simulated run: four steps and an evaluation in each epoch, with more batches in some."""

    def __init__(self, store: Store, batches: int) -> None:
        self.agreement = Agreement(store)
        self.left = []  # points by number; None: where all meet
        point = 0
        for _ in range(3):
            for _ in range(4):
                point += 1
                self.left += [None, point]
            self.left += [None, *range(point + 1, point + batches + 1), point + 100, None, point + 101]
            point += 101
        self.meetings, self.passed, self.stopped = 0, 0, False
        self.asked_at: int | None = None

    def go(self) -> None:
        point = self.left.pop(0)
        assert point is not None
        if self.asked_at is not None:
            self.agreement.ask(signal.SIGTERM)
        self.stopped = self.agreement.passes(point) == signal.SIGTERM
        self.passed += 1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_all_stop_before_they_meet_again(count: int) -> None:
    """In any order, whoever is asked: nobody waits where another never comes, and all have done the same steps."""
    chance = random.Random(count)
    for _ in range(300):
        store = distributed.HashStore()  # type: ignore[attr-defined]
        processes = [Process(store, batches=chance.randint(5, 6)) for _ in range(count)]
        asked = {chance.randrange(count): chance.randrange(30) for _ in range(chance.choice([1, 1, count]))}
        while True:
            ready = [process for process in processes if process.left and not process.stopped]
            if ready and all(process.left[0] is None for process in ready):
                assert len(ready) == count, "some wait for others that have stopped"
                for process in ready:
                    process.left.pop(0)
                    process.meetings += 1
                continue
            movable = [process for process in ready if process.left[0] is not None]
            if not movable:
                break
            process = chance.choice(movable)
            number = processes.index(process)
            if process.passed == asked.get(number) and process.asked_at is None:
                process.asked_at = process.passed
            process.go()
        assert len({process.meetings for process in processes}) == 1
        if all(process.asked_at is None for process in processes):
            assert not any(process.stopped for process in processes)
        for process in processes:
            if process.asked_at is not None and process.stopped:
                assert process.passed - process.asked_at <= 6 + 3  # at most an evaluation, whose end others have passed


def interrupt(number: int, rank: str, within: str, step: int, apart: float | None) -> None:
    """Have a process get a signal in a step, or in an evaluation after it; others so many seconds later."""
    from wsolkit.methods.sat import SAT

    hook = getattr(SAT, within)

    def interrupted(self: SAT, batch: Any, batch_idx: int) -> Any:
        done = hook(self, batch, batch_idx)
        if self.global_step == step:
            mine = os.environ.get("LOCAL_RANK", "0") == rank
            if mine or apart is not None:
                time.sleep(0 if mine else apart or 0)
                os.kill(os.getpid(), number)
        return done

    setattr(SAT, within, interrupted)


def interrupt_save() -> None:
    """Have the process that writes checkpoints get SIGTERM twice while it writes one."""
    save = torch.save

    def interrupted(*arguments: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    torch.save = interrupted  # type: ignore[assignment]


def begin(folder: Path, *settings: str, processes: int = 2, before: Any = None, name: str = "train") -> Running:
    given = SETTINGS if name == "train" else ()
    return Running(
        *(name, *given, f"trainer.devices={processes}", *settings),
        cwd=folder,
        folder=folder / f"printed{time.monotonic_ns()}",
        environment={"OMP_NUM_THREADS": "1"},
        processes=processes,
        before=before,
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing interrupts."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = begin(folder).finish(600)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def assert_goes_on(folder: Path, unbroken: Path) -> None:
    done = begin(folder).finish(600)
    assert done.returncode == 0, done.stderr
    assert metrics(folder / "run") == metrics(unbroken)
    for name, value in weights(unbroken).items():
        assert torch.equal(weights(folder / "run")[name], value), name
    assert log(folder / "run") == log(unbroken)


def stop(
    folder: Path, number: signal.Signals, rank: str, within: str, step: int, apart: float | None, saved: set[int]
) -> None:
    """Stop a run of two processes, and check what it says and leaves: one of some steps."""
    before = functools.partial(interrupt, number, rank, within, step, apart)
    done = begin(folder, before=before).finish(600)
    assert done.returncode == 128 + number, done.stderr
    assert read_checkpoint(folder / "run" / "checkpoints" / "last.ckpt").step in saved
    (said,) = done.stderr.strip().splitlines()
    assert said.startswith("interrupted: " if number == signal.SIGINT else "stopped by SIGTERM: ")
    assert " as 'run/checkpoints/last.ckpt'. Continue with python -m wsolkit.train method=sat" in said
    assert said.endswith(" resume=auto hydra.run.dir=run")


def test_signal_to_one_process_stops_all(tmp_path: Path) -> None:
    stop(tmp_path, signal.SIGTERM, "1", "training_step", 1, None, {2, 3})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "rank", "within", "step", "apart", "saved"),
    [
        (signal.SIGTERM, "1", "training_step", 1, None, {2, 3}),
        (signal.SIGTERM, "0", "training_step", 1, None, {2, 3}),
        (signal.SIGTERM, "0", "training_step", 2, 0.2, {3, 4}),
        (signal.SIGTERM, "1", "training_step", 3, 0.0, {4}),  # the last of the epoch: stops in validation
        (signal.SIGTERM, "0", "validation_step", 4, None, {4}),
        (signal.SIGTERM, "1", "validation_step", 4, 0.5, {4}),
        (signal.SIGTERM, "1", "test_step", 8, None, {8}),
        (signal.SIGINT, "0", "training_step", 5, 0.0, {6, 7}),
        (signal.SIGINT, "1", "validation_step", 8, None, {8}),
    ],
)
def test_processes_stop_together_and_go_on(
    number: signal.Signals,
    rank: str,
    within: str,
    step: int,
    apart: float | None,
    saved: set[int],
    unbroken: Path,
    tmp_path: Path,
) -> None:
    """Whoever gets which signal where, and the others `apart` seconds later or not at all."""
    stop(tmp_path, number, rank, within, step, apart, saved)
    assert_goes_on(tmp_path, unbroken)


@pytest.mark.slow
def test_signal_within_accumulated_gradients(tmp_path: Path) -> None:
    """The step is finished: gradients are no part of a checkpoint."""
    settings, expected = ("trainer.accumulate_grad_batches=3",), tmp_path / "expected"
    expected.mkdir()
    assert begin(expected, *settings).finish(600).returncode == 0
    before = functools.partial(interrupt, signal.SIGTERM, "1", "training_step", 1, None)
    done = begin(tmp_path, *settings, before=before).finish(600)
    assert done.returncode == 143, done.stderr
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").step in (2, 3)
    assert begin(tmp_path, *settings).finish(600).returncode == 0
    assert metrics(tmp_path / "run") == metrics(expected / "run")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_signals_while_a_checkpoint_is_written_leave_it_whole(processes: int, tmp_path: Path) -> None:
    done = begin(tmp_path, processes=processes, before=interrupt_save).finish(600)
    assert done.returncode == 143, done.stderr
    assert is_whole(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").step in (
        4,
        5,
    )  # other processes may be in the next step


@pytest.mark.parametrize("rank", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_others_end_with_a_killed_process(rank: str, tmp_path: Path) -> None:
    """In time, with one line that says which; the first process's code is its own where it is the one."""
    run = begin(tmp_path, before=functools.partial(interrupt, signal.SIGKILL, rank, "training_step", 2, None))
    done = run.finish(600)
    assert done.returncode == (1 if rank == "1" else -signal.SIGKILL), done.stderr
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    named = "process 1 of 2, counted from 0, was killed by SIGKILL" if rank == "1" else "process 0 was killed"
    assert said.startswith(f"error: {named}, often because the machine's memory is full. The others end, too.")


@pytest.mark.slow
def test_error_of_one_process_ends_all(tmp_path: Path) -> None:
    done = begin(tmp_path, before=fail_in_second).finish(600)
    assert done.returncode == 1
    assert "error: only here" in done.stderr


def fail_in_second() -> None:
    from wsolkit.errors import DataError
    from wsolkit.methods.sat import SAT

    hook = SAT.training_step

    def failing(self: SAT, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and self.global_step == 2:
            raise DataError("only here")
        return hook(self, batch, batch_idx)

    SAT.training_step = failing  # type: ignore[assignment, method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_stops(processes: int, shapes_checkpoint: Path, tmp_path: Path) -> None:
    settings = (f"checkpoint={shapes_checkpoint}", "trainer=cpu", "dataset.eval_batch_size=1", "hydra.run.dir=run")
    before = functools.partial(interrupt_evaluation, signal.SIGINT)
    done = begin(tmp_path, *settings, processes=processes, before=before, name="evaluate").finish(600)
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == "interrupted: nothing is kept, and the same command starts anew"


def interrupt_evaluation(number: int) -> None:
    from wsolkit.methods.base import WSOLModule

    hook = WSOLModule.test_step

    def interrupted(self: WSOLModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and self.global_rank == 0:
            os.kill(os.getpid(), number)
        hook(self, batch, batch_idx)

    WSOLModule.test_step = interrupted


def test_signals_are_heard_once() -> None:
    """Before there are points to stop at, at once; then when the run looks; a second SIGTERM changes nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # jobs that ran in this process before may have left another
    with SIGNALS.listening():
        with pytest.raises(Stopped) as stop:
            signal.raise_signal(signal.SIGTERM)
        assert (stop.value.code, str(stop.value)) == (143, "stopped by SIGTERM")
        signal.raise_signal(signal.SIGTERM)
    with SIGNALS.listening():
        SIGNALS.deferred = True
        signal.raise_signal(signal.SIGINT)
        assert SIGNALS.received == signal.SIGINT
    with SIGNALS.listening(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_second_interrupt_ends_at_once() -> None:
    code = (
        "import signal; from wsolkit.system.signals import SIGNALS\n"
        "with SIGNALS.listening():\n"
        "    SIGNALS.deferred = True\n"
        "    for _ in range(2): signal.raise_signal(signal.SIGINT)\n"
        "print('too late')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")


def test_usr1_of_slurm_is_a_request_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with SIGNALS.listening(), pytest.raises(Stopped, match="stopped by SIGTERM"):
        signal.raise_signal(signal.SIGUSR1)


def test_command_that_a_first_process_starts_has_no_run_to_end_with(in_tmp: Path) -> None:
    """Lightning leaves LOCAL_RANK=0 in its environment, for instance in a notebook's."""
    environment = {PARENT: str(os.getpid()), "LOCAL_RANK": "0"}
    done = command("train", "--cfg", "job", cwd=in_tmp, environment=environment)
    assert done.returncode == 0, done.stderr
