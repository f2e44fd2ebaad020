"""Methods in several steps, each a command that hands its files to the next: PSOL, SPOL and ORNet."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.fresh import exit_code
from wsolkit import Localizer, build_datamodule, load_config
from wsolkit.data.records import read_grey
from wsolkit.errors import ConfigError
from wsolkit.pseudo_boxes import in_pixels
from wsolkit.train import train

SIZES = "dataset.records.sizes={train: 24, val: 8, test: 8}"
TINY = (
    *(SIZES, "trainer=cpu", "trainer.max_steps=1", "trainer.limit_train_batches=1", "num_examples=0"),
    *("trainer.enable_progress_bar=false", "protocol=[maxboxacc]", "dataset.batch_size=8"),
)
CLASSIFIER = "method.classifier=cam/checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of a classifier, `cam`, and of first stages: `spol` and `ornet`."""
    folder = tmp_path_factory.mktemp("steps")
    for method in ("cam", "spol", "ornet"):
        train(load_config(f"method={method}", *TINY), folder / method)
    return folder


@pytest.fixture(autouse=True)
def _in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # It is put back afterwards.
    monkeypatch.setattr("sys.argv", [])


def run(command: str, *arguments: str) -> object:
    """Run a command in this process and return its exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "0"  # Commands set it.
    return exit_code(f"wsolkit.{command}", list(arguments))


def trained(*arguments: str, folder: str) -> Localizer:
    """Train by the command, on a classifier's checkpoint, and read the result without the files that it was made of."""
    assert run("train", *TINY, *arguments, f"hydra.run.dir={folder}") == 0
    return Localizer.from_checkpoint(f"{folder}/checkpoints/best.ckpt", device="cpu")


def test_psol(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = ("pseudo_boxes", "checkpoint=cam/checkpoints/best.ckpt", "output=boxes", "progress=false", "device=cpu")
    assert run(*boxes) == 0
    lines = (place / "boxes" / "localization.txt").read_text().splitlines()
    assert sorted(line.split(",")[0] for line in lines) == [f"train/{index:05d}" for index in range(24)]
    corners = np.array([line.split(",")[1:] for line in lines], int)
    assert (corners[:, :2] <= corners[:, 2:]).all()
    assert corners.min() >= 0
    assert corners.max() < 64
    found = trained("method=psol", "dataset.train_boxes=boxes", CLASSIFIER, folder="psol")
    images = build_datamodule(load_config(SIZES)).dataset("test").records
    picture = images.image(0)
    only_classifier = Localizer.from_checkpoint("cam/checkpoints/best.ckpt", device="cpu")(picture)
    monkeypatch.chdir(place / "psol")
    both = found(picture)
    assert both.score == pytest.approx(only_classifier.score)
    assert both.label == only_classifier.label
    assert set(np.unique(both.score_map)) <= {0.0, 1.0}
    assert len(both.boxes) == 1


def test_boxes_continue_with_the_next_class(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["checkpoint=cam/checkpoints/best.ckpt", "progress=false", "device=cpu", "output=again"]
    assert run("pseudo_boxes", *arguments) == 0
    whole = (place / "again" / "localization.txt").read_bytes()
    (place / "again" / "settings.json").rename(place / "again" / "unfinished.json")
    (place / "again" / "localization.txt").unlink()
    (place / "again" / "classes" / "3.txt").unlink()
    kept = (place / "again" / "classes" / "2.txt").stat().st_mtime_ns
    assert run("pseudo_boxes", *arguments) == 0
    assert (place / "again" / "localization.txt").read_bytes() == whole
    assert (place / "again" / "classes" / "2.txt").stat().st_mtime_ns == kept
    assert run("pseudo_boxes", *arguments, "image_size=0") == 1
    assert "image_size=0: expected 1 or more" in capsys.readouterr().err
    assert run("pseudo_boxes", *arguments, "image_size=64") == 1
    assert "was made with other settings: image_size=64 (was 128)" in capsys.readouterr().err
    assert run("pseudo_boxes", *arguments[:-1], "output=cam") == 1
    assert "the folder holds other files" in capsys.readouterr().err


def test_spol(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = ("checkpoint=spol/checkpoints/best.ckpt", "output=masks", "size=64", "progress=false", "device=cpu")
    assert run("pseudo_masks", *masks) == 0
    files = sorted((place / "masks" / "train").glob("*.png"))
    assert len(files) == 24
    assert read_grey(files[0]).shape == (64, 64)
    assert json.loads((place / "masks" / "settings.json").read_text())["threshold"] == 0.25
    (place / "masks" / "settings.json").rename(place / "masks" / "unfinished.json")
    files[5].unlink()
    assert run("pseudo_masks", *masks) == 0
    assert "24 training images have a mask, 1 of them new" in capsys.readouterr().out
    given = ("method=spol", "method.stage=segment", "dataset.train_masks=masks", CLASSIFIER)
    found = trained(*given, folder="segment")
    assert found.threshold_origin == "validation"
    picture = build_datamodule(load_config(SIZES)).dataset("test").records.image(0)
    only_classifier = Localizer.from_checkpoint("cam/checkpoints/best.ckpt", device="cpu")(picture)
    assert found(picture).score == pytest.approx(only_classifier.score)


def test_ornet() -> None:
    given = ("method=ornet", "method.stage=fine", "method.coarse=ornet/checkpoints/best.ckpt", "optimizer=adam")
    found = trained(*given, "method.evaluator=cam/checkpoints/best.ckpt", folder="fine")
    assert found.method == "ornet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=psol"], r"method=psol learns boxes: give dataset\.train_boxes=PATH, which python -m wsolkit\.pseudo"),
        (["method=cam", "dataset.train_boxes=boxes"], r"dataset\.train_boxes=boxes: there is no|does not learn from"),
        (["method=spol", "method.stage=segment", CLASSIFIER], r"method=spol learns masks: give dataset\.train_masks="),
    ],
)
def test_training_has_what_its_method_learns(arguments: list[str], message: str, tmp_path: Path) -> None:
    (Path("boxes.txt")).write_text("train/00000,0,0,3,3\n")
    arguments = [argument.replace("=boxes", "=boxes.txt") for argument in arguments]
    with pytest.raises(ConfigError, match=message.replace("=boxes", r"=boxes\.txt")):
        train(load_config(*TINY, *arguments), tmp_path)


def test_shares_become_pixels_inside_the_image() -> None:
    assert in_pixels((0.25, 0.5, 0.5, 0.5), 40, 20) == [10, 10, 29, 19]
    assert in_pixels((0.0, 0.0, 1.0, 1.0), 7, 3) == [0, 0, 6, 2]
    assert in_pixels((0.99, 0.99, 0.01, 0.01), 3, 3) == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("band=[0.5,0.1]", "the lowest and the highest"),
        ("shrink=0", "above 0"),
        ("threshold=1.5", "share of the map's maximum"),
        ("size=0", "1 or more"),
    ],
)
def test_settings_of_masks_have_ranges(setting: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pseudo_masks", "checkpoint=spol/checkpoints/best.ckpt", "output=none", setting) == 1
    assert message in capsys.readouterr().err
    assert not list(Path("none").iterdir())
