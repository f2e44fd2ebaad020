"""Runs that are killed, stopped or find their checkpoint damaged go on as if nothing had been."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from tests.test_commands import config, metrics, weights

SETTINGS = (
    *("trainer.max_epochs=4", "schedule.name=cosine", "backbone.drop_path_rate=0.2", "dataset.num_workers=0"),
    *("resume=auto", "checkpoints.every_n_steps=1"),
)

# Processes are forked from one that has imported everything and computed nothing: they begin at once.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["wsolkit.train", "wsolkit.build", "wsolkit.methods.sat", "wsolkit.reporting.pictures"])


def begin(folder: Path, *settings: str) -> ForkServerProcess:
    """Train in a process of its own."""
    process = FRESH.Process(target=_train, args=(folder, settings))
    process.start()
    return process


def _train(folder: Path, settings: tuple[str, ...]) -> None:
    from wsolkit.train import train

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
    print(kills)
