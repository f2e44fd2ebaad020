"""Settings that make a run useless are refused before it begins, by name and with what to do instead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from wsolkit.build import build_datamodule, build_module
from wsolkit.errors import ConfigError, DataError
from wsolkit.settings.checks import check_config
from wsolkit.settings.compose import built, load_config
from wsolkit.settings.limits import LIMITS
from wsolkit.training.optimization import Optimization
from wsolkit.training.trainer import build_trainer

NUMBERS = [
    ("seed=-1", "seed=-1: expected a whole number from 0 to 4294967295"),
    ("seed=4294967296", "seed=4294967296: expected a whole number from 0 to 4294967295"),
    ("optimizer.lr=nan", "optimizer.lr=nan: expected a number above 0"),
    ("optimizer.lr=inf", "optimizer.lr=inf: expected a number above 0"),
    ("optimizer.lr=-1e-3", "optimizer.lr=-0.001: expected a number above 0"),
    ("optimizer.lr=0", "optimizer.lr=0: expected a number above 0"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1: expected 0 or more"),
    ("optimizer.betas=[0.9,1.0]", "optimizer.betas=1.0: expected a number from 0 to less than 1"),
    ("dataset.num_workers=-1", "dataset.num_workers=-1: expected 0 or more"),
    ("dataset.image_size=0", "dataset.image_size=0: expected 1 or more"),
    ("dataset.batch_size=-4", "dataset.batch_size=-4: expected 1 or more"),
    ("num_examples=-1", "num_examples=-1: expected 0 or more"),
    ("num_table_images=-1", "num_table_images=-1: expected 0 or more"),
    ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1: expected 0 or more"),
    ("trainer.gradient_clip_val=nan", "trainer.gradient_clip_val=nan: expected 0 or more"),
    ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0: expected 1 or more"),
    ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0: expected 1 or more"),
    ("trainer.max_epochs=0", "trainer.max_epochs=0: expected 1 or more"),
    ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch=0: expected 1 or more"),
    ("backbone.drop_path_rate=1.2", "backbone.drop_path_rate=1.2: expected a number from 0 to less than 1"),
    ("schedule.warmup_epochs=-2", "schedule.warmup_epochs=-2: expected 0 or more"),
    ("schedule.gamma=nan", "schedule.gamma=nan: expected a finite number"),
    ("checkpoints.every_n_minutes=0", "checkpoints.every_n_minutes=0: expected a number above 0"),
]


@pytest.mark.parametrize(("override", "message"), NUMBERS)
def test_numbers_out_of_range(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(load_config(override))
    assert str(caught.value) == message


def test_every_limit_is_of_a_setting_that_a_command_has() -> None:
    conf = Path(__file__).parents[1] / "conf"
    text = "\n".join(path.read_text() for path in conf.rglob("*.yaml"))
    for key in LIMITS:
        assert f"{key.rpartition('.')[2]}:" in text, key


SMALL = ("dataset.records.sizes={train: 32, val: 4, test: 3}", "dataset.batch_size=8", "trainer.accelerator=cpu")


def check_run(folder: Path, *overrides: str) -> None:
    cfg = load_config(*SMALL, "logger=none", "trainer.devices=1", *overrides)
    check_config(cfg)
    datamodule = build_datamodule(cfg)
    datamodule.check(build_trainer(cfg, folder, [], []))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.check_val_every_n_epoch=5", "trainer.max_epochs=2"],
            r"trainer.check_val_every_n_epoch=5 is above trainer.max_epochs=2: .* Set it to 2 at most",
        ),
        (
            ["trainer.max_steps=3"],
            r"trainer.max_steps=3 ends the run before its first validation, after step 4: .*limit_train_batches=3",
        ),
        (["trainer.max_steps=0"], r"trainer.max_steps=0 ends the run before its first validation"),
        (
            ["trainer.max_steps=7", "trainer.check_val_every_n_epoch=2"],
            r"trainer.max_steps=7 ends the run before its first validation, after step 8",
        ),
        (
            ["trainer.max_steps=7", "trainer.accumulate_grad_batches=2", "trainer.check_val_every_n_epoch=2"],
            r"trainer.max_steps=7 .* after step 8: .*limit_train_batches=6",
        ),
        (["trainer.limit_train_batches=0.1"], "trainer.limit_train_batches leaves no batch of the train split"),
        (["trainer.limit_val_batches=0"], "trainer.limit_val_batches leaves no batch of the val split"),
        (["trainer.limit_test_batches=0.1"], "trainer.limit_test_batches leaves no batch of the test split"),
    ],
)
def test_runs_without_a_validation(overrides: Sequence[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run(tmp_path, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.max_steps=4"],
        ["trainer.max_steps=3", "trainer.limit_train_batches=3"],
        ["trainer.max_steps=4", "trainer.accumulate_grad_batches=2"],
        ["trainer.max_steps=7", "trainer.limit_train_batches=6", "trainer.accumulate_grad_batches=2"],
        ["trainer.max_steps=2", "+trainer.val_check_interval=2"],
        ["trainer.max_steps=2", "+trainer.val_check_interval=0.5"],
        ["trainer=smoke"],
        ["trainer=profile"],
        ["trainer.max_epochs=3", "trainer.check_val_every_n_epoch=3"],
    ],
)
def test_runs_with_a_validation(overrides: Sequence[str], tmp_path: Path) -> None:
    check_run(tmp_path, *overrides)


def test_more_processes_than_test_images(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="the test split has 3 images, and this run has 4 processes.*trainer.devices to 3"
    ):
        check_run(tmp_path, "trainer.devices=4")


@pytest.mark.parametrize("accelerator", ["tpu9", "gpu"])
def test_accelerators_that_are_not_there(accelerator: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^trainer: "):
        check_run(tmp_path, f"trainer.accelerator={accelerator}", "trainer.devices=64")


def test_an_optimizer_that_does_not_take_its_settings() -> None:
    def create(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1.0, nesterov=True)

    cfg = load_config("backbone=vit_micro")
    with pytest.raises(ConfigError, match="optimizer: Nesterov momentum requires a momentum"):
        Optimization(create, built(cfg.schedule)).optimizer(build_module(cfg))


def test_an_error_of_a_loader_s_process_is_one_line() -> None:
    from torch.utils.data import DataLoader, TensorDataset

    def missing(_: object) -> None:
        raise DataError("image 'a.jpg' does not exist")

    with pytest.raises(DataError) as caught:
        next(iter(DataLoader(TensorDataset(torch.zeros(2)), num_workers=1, collate_fn=missing)))
    assert str(caught.value) == "image 'a.jpg' does not exist"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no /proc")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wsolkit.sweep_report", f"directory={tmp_path}", "hydra.run.dir=/proc/none/x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: '/proc/none")
    assert "output=DIR" in done.stderr
