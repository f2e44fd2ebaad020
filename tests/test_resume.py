"""Runs that are killed, stopped or find their checkpoint damaged go on as if nothing had been."""

from __future__ import annotations

import csv
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fresh import FRESH
from tests.test_commands import config, metrics, weights
from wsolkit.checkpoint import latest_checkpoint, read_checkpoint
from wsolkit.errors import CheckpointError
from wsolkit.jobs import job_name, run_name
from wsolkit.train import train

SETTINGS = (
    *("trainer.max_epochs=4", "schedule.name=cosine", "backbone.drop_path_rate=0.2", "dataset.num_workers=0"),
    *("resume=auto", "checkpoints.every_n_steps=1"),
)


def begin(folder: Path, *settings: str) -> ForkServerProcess:
    """Train in a process of its own."""
    process = FRESH.Process(target=_train, args=(folder, settings))
    process.start()
    return process


def _train(folder: Path, settings: tuple[str, ...]) -> None:
    output = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    train(config(*SETTINGS, *settings), folder)


def finish(process: ForkServerProcess, folder: Path) -> str:
    """Wait for the end of a run; returns what it printed."""
    process.join()
    printed = folder.with_suffix(".log").read_text()
    assert process.exitcode == 0, printed
    return printed


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing interrupts, and how long it took."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    finish(begin(folder), folder)
    start = time.monotonic()
    finish(begin(folder.with_name("again")), folder.with_name("again"))
    return folder, time.monotonic() - start


def assert_same(folder: Path, expected: Path) -> None:
    assert metrics(folder) == metrics(expected)
    for name, value in weights(expected).items():
        assert torch.equal(weights(folder)[name], value), name
    assert log(folder) == log(expected)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """A single wrong byte, which weights would hide."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def log(folder: Path) -> list[dict[str, str]]:
    """Rows of the log but those of single steps, which are written now and then."""
    with (folder / "metrics.csv").open() as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    of_steps = {"train/loss_step", "lr/decay", "speed/images_per_second"}
    return [row for row in rows if not of_steps & row.keys()]


def test_killed_twenty_times(unbroken: tuple[Path, float], tmp_path: Path) -> None:
    """At random moments: in a step, in validation, while a checkpoint is being written."""
    expected, seconds = unbroken
    moment = random.Random(0)
    kills = 0
    while kills < 20:
        process = begin(tmp_path / "run")
        process.join(moment.uniform(0, 0.5 * seconds))
        if process.exitcode == 0:
            break
        assert process.exitcode is None, (tmp_path / "run.log").read_text()
        process.kill()
        process.join()
        kills += 1
    finish(begin(tmp_path / "run"), tmp_path / "run")
    assert_same(tmp_path / "run", expected)


def stop(folder: Path, step: int, queue: Path, *settings: str, within: str = "training_step") -> None:
    """Begin a run that SIGTERM stops in a step, or in the validation after it; scontrol is looked for in `queue`."""
    process = FRESH.Process(target=_train_until_sigterm, args=(folder, step, queue, settings, within))
    process.start()
    process.join()
    assert process.exitcode == 143, folder.with_suffix(".log").read_text()


def _train_until_sigterm(folder: Path, step: int, queue: Path, settings: tuple[str, ...], within: str) -> None:
    """What a cluster does that needs the machine: SIGTERM, here in the middle of a step."""
    from wsolkit.methods.sat import SAT

    hook = getattr(SAT, within)

    def interrupted(self: SAT, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return hook(self, batch, batch_idx)

    setattr(SAT, within, interrupted)
    os.environ |= {"SLURM_JOB_ID": "17", "PATH": f"{queue}:{os.environ['PATH']}"}
    _train(folder, settings)


def test_sigterm_saves_and_requeues(unbroken: tuple[Path, float], tmp_path: Path) -> None:
    folder, queue = tmp_path / "run", tmp_path / "bin" / "scontrol"
    queue.parent.mkdir()
    queue.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/queue\n")
    queue.chmod(0o755)
    stop(folder, 4, queue.parent, "checkpoints.every_n_steps=null")
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt").step == 5  # the step was finished
    assert (tmp_path / "queue").read_text() == "requeue 17\n"
    finish(begin(folder), folder)
    assert_same(folder, unbroken[0])


@pytest.mark.parametrize("step", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 12))])
def test_sigterm_in_validation_saves_what_was_trained(step: int, unbroken: tuple[Path, float], tmp_path: Path) -> None:
    """After the first, second and last epoch; stopped twice there, the run does all of the validation."""
    folder, rare = tmp_path / "run", "checkpoints.every_n_steps=null"
    for _ in range(2):
        stop(folder, step, tmp_path, rare, within="validation_step")
        assert read_checkpoint(folder / "checkpoints" / "last.ckpt").step == step
    finish(begin(folder, rare), folder)
    assert_same(folder, unbroken[0])


@pytest.mark.parametrize("damage", [truncate, flip])
def test_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None], unbroken: tuple[Path, float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    stop(folder, 7, tmp_path, "checkpoints.requeue=false")
    damage(folder / "checkpoints" / "last.ckpt")
    assert read_checkpoint(folder / "checkpoints" / "previous.ckpt").step == 7
    printed = finish(begin(folder), folder)
    assert "last.ckpt' is damaged or was cut short: the checkpoint before it is used" in printed
    assert_same(folder, unbroken[0])
    for name in ("last.ckpt", "previous.ckpt"):
        damage(folder / "checkpoints" / name)
    with pytest.raises(CheckpointError, match="no checkpoint in '.*' is whole: delete them to begin anew"):
        latest_checkpoint(folder)


def test_changed_settings_are_named(unbroken: tuple[Path, float]) -> None:
    with pytest.raises(CheckpointError, match=r"was begun with other settings: optimizer.lr=0.5 \(was 0.001\). Give"):
        train(config(*SETTINGS, "optimizer.lr=0.5"), unbroken[0])


def test_same_command_has_the_same_directory() -> None:
    settings = ["method=sat", "optimizer.lr=0.1"]
    named = run_name("auto", [*settings, "resume=auto"], "2026-01-01")
    assert named == run_name("auto", ["resume=auto", *reversed(settings)], "2026-01-02") == job_name(settings)
    assert named != run_name("auto", ["method=sat"], "2026-01-01")
    assert run_name(None, settings, "2026-01-01") == "2026-01-01"
