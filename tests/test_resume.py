"""Runs that are killed, stopped or find their checkpoint damaged go on as if nothing had been."""

from __future__ import annotations

import csv
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from tests.fresh import FRESH, draw_no_report
from tests.test_commands import Interrupted, config, metrics, weights
from wsolkit.checkpoint import read_checkpoint
from wsolkit.errors import CheckpointError
from wsolkit.methods.sat import SAT
from wsolkit.settings.jobs import job_name, run_name
from wsolkit.settings.run_directory import LOCK
from wsolkit.train import train
from wsolkit.training.checkpointing import latest_checkpoint

SETTINGS = (
    *("trainer.max_epochs=4", "schedule.name=cosine", "backbone.drop_path_rate=0.2", "dataset.num_workers=0"),
    *("resume=auto", "checkpoints.every_n_steps=1", "trainer.log_every_n_steps=1"),
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
    draw_no_report()
    train(config(*SETTINGS, *settings), folder)


def finish(process: ForkServerProcess, folder: Path) -> str:
    """Wait for the end of a run; returns what it printed."""
    process.join()
    printed = folder.with_suffix(".log").read_text()
    assert process.exitcode == 0, printed
    return printed


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    finish(begin(folder), folder)
    return folder


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
    """Rows of the log, without what the machine makes of it."""
    with (folder / "metrics.csv").open() as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [{key: value for key, value in row.items() if not key.startswith(("speed/", "memory/"))} for row in rows]


@pytest.mark.slow
def test_killed_twenty_times(unbroken: Path, tmp_path: Path) -> None:
    """At random moments: in a step, in validation, while a checkpoint is being written."""
    start = time.monotonic()
    finish(begin(tmp_path / "whole"), tmp_path / "whole")
    seconds = time.monotonic() - start
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
    assert_same(tmp_path / "run", unbroken)


def stop(folder: Path, step: int, queue: Path, *settings: str, within: str = "training_step") -> None:
    """Begin a run that SIGTERM stops in a step, or in the validation after it; scontrol is looked for in `queue`."""
    process = FRESH.Process(target=_train_until_sigterm, args=(folder, step, queue, settings, within))
    process.start()
    process.join()
    assert process.exitcode == 143, folder.with_suffix(".log").read_text()


def _train_until_sigterm(folder: Path, step: int, queue: Path, settings: tuple[str, ...], within: str) -> None:
    """What a cluster does that needs the machine: SIGTERM, here in the middle of a step."""
    hook = getattr(SAT, within)

    def interrupted(self: SAT, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return hook(self, batch, batch_idx)

    setattr(SAT, within, interrupted)
    os.environ |= {"SLURM_JOB_ID": "17", "PATH": f"{queue}:{os.environ['PATH']}"}
    _train(folder, settings)


def test_sigterm_saves_and_requeues(unbroken: Path, tmp_path: Path) -> None:
    folder, queue = tmp_path / "run", tmp_path / "bin" / "scontrol"
    queue.parent.mkdir()
    queue.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/queue\n")
    queue.chmod(0o755)
    stop(folder, 4, queue.parent, "checkpoints.every_n_steps=null")
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt").step == 5  # the step was finished
    assert (tmp_path / "queue").read_text() == "requeue 17\n"
    finish(begin(folder), folder)
    assert_same(folder, unbroken)


@pytest.mark.parametrize("step", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 12))])
def test_sigterm_in_validation_saves_what_was_trained(step: int, unbroken: Path, tmp_path: Path) -> None:
    """After the first, second and last epoch; stopped twice there, the run does all of the validation."""
    folder, rare = tmp_path / "run", "checkpoints.every_n_steps=null"
    for _ in range(2):
        stop(folder, step, tmp_path, rare, within="validation_step")
        assert read_checkpoint(folder / "checkpoints" / "last.ckpt").step == step
    finish(begin(folder, rare), folder)
    assert_same(folder, unbroken)


@pytest.mark.parametrize(("damage", "resume"), [(truncate, "auto"), (flip, "PREVIOUS")])
def test_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None], resume: str, unbroken: Path, tmp_path: Path
) -> None:
    """By itself, or as it is told to; the log, which is damaged too, is gone on with."""
    folder = tmp_path / "run"
    stop(folder, 7, tmp_path, "checkpoints.requeue=false")
    damage(folder / "checkpoints" / "last.ckpt")
    with (folder / "metrics.csv").open("ab") as file:
        file.write(b"0.0,1e-3,\0\0\xff")
    assert read_checkpoint(folder / "checkpoints" / "previous.ckpt").step == 7
    previous = folder / "checkpoints" / "previous.ckpt"
    printed = finish(begin(folder, f"resume={resume.replace('PREVIOUS', str(previous))}"), folder)
    passed_over = "last.ckpt' is damaged or was cut short: the checkpoint before it is used" in printed
    assert passed_over == (resume == "auto")
    assert "metrics.csv' is damaged: 1 line left out, " in printed
    assert_same(folder, unbroken)
    for name in ("last.ckpt", "previous.ckpt"):
        damage(folder / "checkpoints" / name)
    with pytest.raises(CheckpointError, match="no checkpoint in '.*' is whole: delete them to begin anew"):
        latest_checkpoint(folder)


def test_changed_settings_are_named(unbroken: Path) -> None:
    with pytest.raises(CheckpointError, match=r"was started with other settings: optimizer.lr=0.5 \(was 0.001\). Give"):
        train(config(*SETTINGS, "optimizer.lr=0.5"), unbroken)


BATCHES = (
    "schedule.warmup_epochs=0.5",
    *("trainer.max_epochs=3", "schedule.name=cosine", "dataset.num_workers=0", "dataset.batch_size=8"),
    *("checkpoints.every_n_steps=1", "dataset.records.sizes={train: 48, val: 8, test: 8}", "num_examples=0"),
)


@pytest.fixture(scope="module")
def within(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after three of six batches of the second of three epochs."""
    folder = tmp_path_factory.mktemp("within")
    steps(folder, stop_at=9)
    return folder / "checkpoints" / "last.ckpt"


def steps(folder: Path, *settings: str, stop_at: int | None = None) -> list[tuple[int, int, int, float]]:
    """Train without the test at the end: epoch, batch, images and learning rate (in thousandths) of each step."""
    training_step, seen = SAT.training_step, []

    def watched(self: SAT, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == stop_at:
            raise Interrupted
        rate = 1000 * self.trainer.optimizers[0].param_groups[0]["lr"]
        seen.append((self.current_epoch, batch_idx, len(batch["label"]), round(rate, 3)))
        return training_step(self, batch, batch_idx)

    def tested(*_: Any, **__: Any) -> None:
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch, suppress(Interrupted):
        patch.setattr(SAT, "training_step", watched)
        patch.setattr(Trainer, "test", tested)
        train(config(*BATCHES, *settings), folder)
    return seen


def test_run_goes_on_in_batches_of_another_size(within: Path, tmp_path: Path) -> None:
    """24 of 48 images were trained on: with the next whole batch, at the schedule's rate there, in the same epoch."""
    with pytest.warns(
        UserWarning, match="epoch 1 continues after 32 of its 48 images: the checkpoint's run had trained on"
    ):
        seen = steps(tmp_path, f"resume={within}", "dataset.batch_size=16")
    assert seen == [(1, 2, 16, 0.552), (2, 0, 16, 0.345), (2, 1, 16, 0.165), (2, 2, 16, 0.043)]
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt").step == 9 + 4
    assert len((tmp_path / "metrics.csv").read_text().split("val/")) > 1  # validated at the end of each


def test_optimizer_takes_the_settings_of_today(within: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"continues with other settings: optimizer.lr=0.01 \(was 0.001\)"):
        seen = steps(tmp_path, f"resume={within}", "optimizer.lr=0.01", "trainer.accumulate_grad_batches=2", stop_at=10)
    assert seen == [(1, 6, 4, 6.545), (1, 7, 4, 6.545)]


def test_run_that_max_steps_ended_goes_on_with_the_next_epoch(within: Path, tmp_path: Path) -> None:
    steps(tmp_path / "a", f"resume={within}", "trainer.max_steps=10")
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    seen = steps(tmp_path / "b", f"resume={last}", "trainer.max_steps=17")
    assert [(epoch, batch) for epoch, batch, *_ in seen] == [(2, batch) for batch in range(6)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "optimizer=sgd",
            "has the state of another optimizer: optimizer._target_=torch.optim.SGD (was torch.optim.AdamW",
        ),
        (
            "+optimizer.amsgrad=true",
            "has the state of another optimizer, without max_exp_avg_sq. Settings that differ: ",
        ),
        ("trainer.max_epochs=1", "has reached epoch 2, and trainer.max_epochs=1: expected as many or more"),
        (
            "dataset.image_size=32",
            "such as network.backbone.network.pos_embed 1×17×128 (was 1×65×128). Settings that differ",
        ),
        (
            "seed=5",
            "stopped within epoch 1, and it is unclear which images are left: 5 as the seed of their order",
        ),
        (
            "dataset.records.sizes.train=40",
            "which images are left: 40 training images (was 48). Continue with the old value",
        ),
        (
            "dataset.classes=[7,1,0]",
            "belongs to a run on 8 classes, but these differ: the data set lacks 'blue spots', 'yell",
        ),
        ("dataset.shots=2", "belongs to a run with dataset.shots=None, but these settings say 2"),
        ("backbone=deit_tiny", "belongs to a run with backbone=vit_micro, but these settings say deit_tiny"),
    ],
)
def test_what_cannot_go_on_is_named(settings: str, message: str, within: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        train(config(*BATCHES, f"resume={within}", settings), tmp_path)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_earlier_versions_go_on_in_their_batches(within: Path, tmp_path: Path) -> None:
    content = torch.load(within, weights_only=True)
    place = content["WSOLDataModule"]
    content["WSOLDataModule"] = {key: place[key] for key in ("epoch", "taken")}
    content["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [content["WSOLDataModule"]]
    torch.save(content, tmp_path / "early.ckpt")
    seen = steps(tmp_path / "run", f"resume={tmp_path / 'early.ckpt'}", stop_at=10)
    assert seen == [(1, 3, 8, 0.655)]
    with pytest.raises(CheckpointError, match=r"which counted batches: dataset.batch_size=16 \(was 8\). Continue with"):
        steps(tmp_path / "other", f"resume={tmp_path / 'early.ckpt'}", "dataset.batch_size=16")


def test_same_command_has_the_same_directory() -> None:
    settings = ["method=sat", "optimizer.lr=0.1"]
    named = run_name("auto", [*settings, "resume=auto"], "2026-01-01")
    assert named == run_name("auto", ["resume=auto", *reversed(settings)], "2026-01-02") == job_name(settings)
    assert named != run_name("auto", ["method=sat"], "2026-01-01")
    assert run_name(None, settings, "2026-01-01") == "2026-01-01"
