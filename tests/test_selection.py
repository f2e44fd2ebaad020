"""Runs that choose checkpoint and threshold without the boxes of the held-out split."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig

from tests.data.layouts import write_lines
from tests.data.test_folder import write_folder
from tests.test_score_maps import evaluate
from tests.test_score_maps import metrics as read_metrics
from wsolkit import build_datamodule, load_config
from wsolkit.checkpoint import read_checkpoint
from wsolkit.errors import ConfigError
from wsolkit.train import train

SIZES = "dataset.records.sizes={train: 16, val: 8, test: 8}"


def config(*overrides: str) -> DictConfig:
    small = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "num_examples=0", "protocol=[maxboxacc]")
    return load_config("method=ts_cam", *small, *overrides)


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    """Pseudo boxes of seven of the eight held-out images."""
    lines = [f"val/{index:05d},{index},4,{index + 40},50" for index in range(7)]
    write_lines(tmp_path / "boxes" / "localization.txt", lines)
    return tmp_path / "boxes"


@pytest.mark.filterwarnings("ignore:.*no box for 1 of 8 held-out images")
def test_pseudo_boxes_choose_checkpoint_and_threshold(
    tmp_path: Path, boxes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("selection=pseudo", f"dataset.pseudo_boxes={boxes}")
    train(config(SIZES, "dataset.batch_size=16", "trainer.max_epochs=2", *chosen), tmp_path / "run")
    metrics = read_metrics(tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/maxboxacc/pseudo_max_box_acc"]]
    by_boxes, by_accuracy, by_truth = (
        [float(row[f"val/{name}"]) for row in rows]
        for name in ("maxboxacc/pseudo_max_box_acc", "top1_cls", "maxboxacc/max_box_acc")
    )
    assert metrics["epochs/by_pseudo"] == 1 + np.argmax(by_boxes)
    assert metrics["epochs/by_classification"] == 1 + np.argmax(by_accuracy)
    assert metrics["epochs/by_truth"] == 1 + np.argmax(by_truth)
    best = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert best.metrics["maxboxacc/pseudo_max_box_acc"] == pytest.approx(max(by_boxes))
    assert metrics["maxboxacc/threshold"] == best.thresholds["maxboxacc/gt_known_loc"]
    printed = capsys.readouterr().out
    assert "checkpoint selected by pseudo boxes on the held-out val split" in printed
    assert [word for word in ("pseudo boxes (this run)", "ground truth (val)") if word not in printed] == []

    small = ("trainer.accelerator=cpu", "num_examples=0", "protocol=[maxboxacc]", "hydra.run.dir=again")
    evaluate(f"checkpoint={best.path}", SIZES, *chosen, *small, cwd=tmp_path)
    again = read_metrics(tmp_path / "again")
    for name in ("threshold", "threshold_by_truth", "gt_known_loc_by_truth"):
        assert again[f"maxboxacc/{name}"] == metrics[f"maxboxacc/{name}"]


def test_own_photos_without_any_ground_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "photos", "train", "val", images=2)
    write_lines(tmp_path / "boxes.txt", ["val/grey cat/gre 0.jpg,1,2,30,25"])
    photos = ("dataset=folder", f"dataset.root={root}", "dataset.image_size=64", "dataset.resize=72")
    small = ("backbone=vit_micro", "trainer.max_epochs=1", "dataset.batch_size=4", "dataset.num_workers=0")
    by = ("selection=pseudo", f"dataset.pseudo_boxes={tmp_path / 'boxes.txt'}")
    with pytest.warns(UserWarning, match="no box for 3 of 4 held-out images"):
        train(config(*photos, *small, *by), tmp_path / "run")
    best = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    chosen = read_metrics(tmp_path / "run")["maxboxacc/threshold_by_pseudo"]
    assert best.thresholds["maxboxacc/gt_known_loc"] == chosen
    printed = " ".join(capsys.readouterr().out.split())
    assert "classification is all that can be evaluated" in printed
    assert "pseudo boxes (this run) 1" in printed


def test_pseudo_boxes_have_to_be_given() -> None:
    with pytest.raises(ConfigError, match=r"selection=pseudo .* give dataset\.pseudo_boxes=PATH"):
        build_datamodule(config("selection=pseudo"))
