"""python -m wsolkit.evaluate score_maps=DIR: maps out of one evaluation and into another."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import REPOSITORY, write_listed
from tests.fresh import command
from wsolkit.evaluate import main
from wsolkit.reporting.examples import read_examples

SIZES = "dataset.records.sizes={train: 32, val: 12, test: 15}"


def evaluate(*arguments: str, cwd: Path) -> None:
    """The command in this process, since starting one takes seconds; its errors as `SystemExit`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["wsolkit.evaluate", *arguments, "trainer.enable_progress_bar=false"])
        patch.setenv("HYDRA_FULL_ERROR", "0")  # put back afterwards: the command changes it
        main()


def metrics(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return content


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, with what evaluating it under several protocols left, and its maps."""
    folder = tmp_path_factory.mktemp("maps")
    smoke = ("trainer=smoke", SIZES, "dataset.batch_size=16", "num_examples=0", "hydra.run.dir=run")
    command("train", *smoke, cwd=folder).check_returncode()
    protocols = ("protocol=[maxboxacc_v2,ts_cam,scm,sat,spa]", "hydra.run.dir=own", "num_examples=2")
    done = command(
        "evaluate", "checkpoint=run/checkpoints/last.ckpt", "save_maps=maps", *protocols, cwd=folder, report=True
    )
    assert done.returncode == 0, done.stderr
    (folder / "table.txt").write_text(done.stdout)
    return folder


def test_one_table_has_a_row_for_each_protocol(run: Path) -> None:
    lines = (run / "table.txt").read_text().splitlines()
    rows = [line.split() for line in lines if re.match(r" ?(maxboxacc_v2|ts_cam|scm|sat|spa) +\d", line)]
    assert [row[0] for row in rows] == ["maxboxacc_v2", "ts_cam", "scm", "sat", "spa"]
    assert {row[2] for row in rows} == {"val"}
    assert {len(row) for row in rows} == {12}  # nothing is cut off
    values = metrics(run / "own")
    for row in rows:
        assert float(row[1]) == pytest.approx(values[f"{row[0]}/threshold"], abs=6e-4)
        assert float(row[4]) == pytest.approx(values[f"{row[0]}/gt_known_loc"], abs=0.06)
    assert sum("gaussian" in line for line in lines) == 5


@pytest.mark.report
def test_saved_maps_give_the_numbers_of_their_model(run: Path) -> None:
    evaluate("score_maps=maps", "dataset=shapes", SIZES, "protocol=[maxboxacc_v2]", "hydra.run.dir=again", cwd=run)
    own, again = metrics(run / "own"), metrics(run / "again")
    assert len(list((run / "maps").rglob("*.npy"))) == 27  # of both splits
    for name, value in again.items():
        if "/error_" not in name and name != "class_names":  # these need the predicted class
            assert value == own[name], name
    assert again["maxboxacc_v2/error_cls"] == 0
    assert not [name for name in again if "top1" in name or "predicted" in name]
    assert "score_maps: maps" in (run / "again" / "config.yaml").read_text()
    assert (run / "again" / "report.html").is_file()
    assert (run / "again" / "examples.png").is_file()
    own_boxes, boxes = (
        [(row["image"], row["label"], row["iou"]) for row in csv.DictReader((run / name / "images.csv").open())]
        for name in ("own", "again")
    )
    assert boxes == own_boxes[: len(boxes)]  # those of the first protocol
    before, after = read_examples(run / "own")[0], read_examples(run / "again")[0]
    assert before.predicted_label is not None
    assert after == replace(before, predicted_label=None, iou=after.iou)


def test_selection_on_the_reported_split_needs_its_maps_only(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "maps" / "test", tmp_path / "maps" / "test")
    common = ("dataset=shapes", SIZES, "score_maps=maps", "hydra.run.dir=x")
    with pytest.raises(SystemExit):
        evaluate(*common, cwd=tmp_path)
    assert "error: score map 'maps/val/00000.npy' is missing" in capsys.readouterr().err
    evaluate(*common, "selection=test", cwd=tmp_path)
    values = metrics(tmp_path / "x")
    assert values["maxboxacc/gt_known_loc"] == values["maxboxacc/max_box_acc"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score_maps=none", "dataset=shapes"], "score_maps: there is no folder 'none'"),
        (["score_maps=maps", "checkpoint=run/checkpoints/last.ckpt"], "goes with neither checkpoint=… nor save_maps=…"),
        (["score_maps=maps", "dataset=shapes", "protocol=[maxboxacc,sat]"], "maxboxacc (resize), sat (center_crop)"),
        (["score_maps=maps", "dataset=shapes", "dataset.image_size=32"], "is 64×64: expected 32×32 (height×width)"),
        (["score_maps=maps", "dataset=shapes", "protocol=[]"], "protocol=[]: name one or more"),
        (
            ["score_maps=maps", "dataset=shapes", "protocol.maxboxacc.threshold=2.0"],
            "protocol.maxboxacc: a protocol's threshold=2.0",
        ),
        ([], "required and not given: checkpoint. Add checkpoint=…, or score_maps=DIR"),
    ],
)
def test_wrong_calls(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate(*arguments, *([SIZES] if arguments else []), cwd=run)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")


@pytest.mark.report
def test_maps_of_a_listed_data_set_and_a_protocol_of_one_s_own(tmp_path: Path) -> None:
    """Boxes as maps are found again; the rules come from a YAML file of the user's."""
    write_listed(tmp_path / "data", {"train": 2, "val": 5})
    rules = (REPOSITORY / "conf" / "protocol" / "maxboxacc.yaml").read_text()
    own = rules.replace("\nmaxboxacc:", "\nmine:").replace("num_thresholds: 1000", "num_thresholds: 10")
    (tmp_path / "conf" / "protocol").mkdir(parents=True)
    (tmp_path / "conf" / "protocol" / "mine.yaml").write_text(own)
    boxes = [line.rsplit(",", 4) for line in (tmp_path / "data/metadata/val/localization.txt").read_text().splitlines()]
    for name, *corners in reversed(boxes):  # the first image's second box comes last
        x0, y0, x1, y1 = (np.array(corners, int) * 224 / [40, 30, 40, 30]).astype(int)
        score = np.zeros((224, 224))
        score[y0:y1, x0:x1] = 0.8
        path = tmp_path / "maps" / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, score)
    evaluate(
        *("--config-dir", "conf", "protocol=[mine]", "dataset=listed", "dataset.root=data", "score_maps=maps"),
        "hydra.run.dir=out",
        cwd=tmp_path,
    )
    assert metrics(tmp_path / "out")["mine/max_box_acc_70"] == 100
    # The same maps, judged at the images' own size; the gallery says so too.
    evaluate(
        *("protocol=[spa]", "dataset=listed", "dataset.root=data", "score_maps=maps", "hydra.run.dir=spa"),
        cwd=tmp_path,
    )
    assert metrics(tmp_path / "spa")["spa/max_box_acc"] == 100
    assert "IoU 0.00" not in (tmp_path / "spa" / "report.html").read_text()
