"""Whole commands in folders whose names have every sign that means something to a shell, to Hydra or to OmegaConf."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.conftest import write_listed
from tests.fresh import command
from tests.test_overrides import ALL

SMALL = (
    *("method=ts_cam", "backbone=vit_micro", "dataset.image_size=32", "dataset.resize=36", "dataset.batch_size=4"),
    *("trainer=smoke", "trainer.accelerator=cpu", "num_examples=1", "dataset.num_workers=0"),
)


def run(name: str, *arguments: str, cwd: Path) -> str:
    done = command(name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, prepared, and a run of two processes."""
    folder = tmp_path_factory.mktemp("signs") / f"here {ALL}"
    folder.mkdir()
    write_listed(folder / f"data {ALL}", {"train": 12, "val": 5})
    printed = run("prepare", "dataset=listed", f"dataset.root=data {ALL}", "progress=false", cwd=folder)
    (line,) = (line for line in printed.splitlines() if line.startswith("Train: "))
    given = shlex.split(line)[4:]
    assert given == ["dataset=listed", f"dataset.root=data {ALL}"]
    processes = ("trainer.devices=2", "trainer.strategy=ddp")
    run("train", *given, *SMALL, *processes, "resume=auto", f"hydra.run.dir=run {ALL}", cwd=folder)
    return folder


def test_training_of_two_processes(here: Path) -> None:
    folder = here / f"run {ALL}"
    assert (folder / "metrics.json").is_file()
    assert OmegaConf.load(folder / "config.yaml").dataset.root == f"data {ALL}"
    assert (folder / ".hydra" / "overrides.yaml").is_file()
    assert sorted(path.name for path in here.iterdir()) == [f"data {ALL}", f"run {ALL}"]


def test_evaluation_of_a_checkpoint_and_of_its_maps(here: Path) -> None:
    checkpoint = here / f"run {ALL}" / "checkpoints" / f"epoch={ALL}.ckpt"
    checkpoint.write_bytes((checkpoint.parent / "best.ckpt").read_bytes())
    maps, folder = f"maps {ALL}", here / f"evaluated {ALL}"
    small = ("trainer.accelerator=cpu", "num_examples=1", "dataset.num_workers=0")
    saved = (f"save_maps={maps}", f"hydra.run.dir={folder}")
    run("evaluate", f"checkpoint={checkpoint}", *saved, *small, cwd=here)
    data = ("dataset=listed", f"dataset.root=data {ALL}", "dataset.image_size=32")
    run("evaluate", f"score_maps={maps}", *data, *small, f"hydra.run.dir={folder} 2", cwd=here)
    first, second = (json.loads((here / name / "metrics.json").read_text()) for name in (folder, f"{folder} 2"))
    assert first["maxboxacc/max_box_acc"] == second["maxboxacc/max_box_acc"]


def test_predictions(here: Path) -> None:
    given = (f"checkpoint=run {ALL}/checkpoints/best.ckpt", f"source=data {ALL}/val", f"output=boxes {ALL}")
    run("predict", *given, "num_workers=0", "device=cpu", "progress=false", cwd=here)
    assert (here / f"boxes {ALL}" / "predictions.json").is_file()


def test_sweep(here: Path) -> None:
    given = ("dataset=listed", f"dataset.root=data {ALL}", f"hydra.sweep.dir=sweep {ALL}", *SMALL)
    run("train", "-m", *given, "seed=0", cwd=here)
    assert "finished before" in run("train", "-m", *given, "seed=0", cwd=here)
    assert len(list((here / f"sweep {ALL}").glob("*/metrics.json"))) == 1
    report = run("sweep_report", f"sweep {ALL}", f"output=report {ALL}", cwd=here)
    assert "1 finished" in report
    assert (here / f"report {ALL}" / "sweep.csv").is_file()
