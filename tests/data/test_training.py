"""From a benchmark's official files to trained, evaluated and reported: two steps of everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.layouts import write_aircraft, write_cars, write_cub, write_dogs, write_openimages
from tests.data.test_folder import coco, save, write_folder
from wsolkit import build_datamodule, load_config
from wsolkit.train import train

SMALL = (
    *("backbone=vit_micro", "dataset.image_size=32", "dataset.resize=36", "dataset.batch_size=4"),
    *("dataset.num_workers=0", "trainer=smoke", "trainer.enable_progress_bar=false", "logger=none"),
)


@pytest.fixture
def cub(tmp_path: Path) -> list[str]:
    root = write_cub(tmp_path / "CUB_200_2011")
    return ["dataset=cub", f"dataset.root={root}", "dataset.num_classes=2", "dataset.expected=null", *SMALL]


@pytest.mark.report
def test_cub_is_trained_and_evaluated(cub: list[str], in_tmp: Path) -> None:
    cfg = load_config(*cub, "protocol=[maxboxacc,sat,spa]")
    assert cfg.protocol.sat.threshold == 0.4
    assert cfg.protocol.spa.far_corner_shift == -1
    assert cfg.method.area_prior == 0.25  # the recipe sat_cub
    results = train(cfg, in_tmp)
    for name in ("maxboxacc", "sat", "spa"):
        assert {f"{name}/{metric}" for metric in ("gt_known_loc", "top1_loc", "pxap", "peak_iou")} <= results.keys()
    assert (in_tmp / "report.html").is_file()


def test_batches_of_cub_have_boxes_and_masks(cub: list[str]) -> None:
    datamodule = build_datamodule(load_config(*cub))
    datamodule.setup("fit")
    datamodule.setup("test")
    assert datamodule.held_out
    held_out, test = next(iter(datamodule.val_dataloader())), next(iter(datamodule.test_dataloader()))
    assert held_out["mask"] is None
    assert held_out["boxes"][1].tolist() == [[0, 0, 39, 29]]
    assert test["boxes"][1].tolist() == [[0, 0, 39, 29]]
    assert test["uncut_boxes"][1].tolist() == [[0, 0, 40, 30]]
    assert test["mask"].shape == (6, 32, 32)
    assert test["mask"].unique().tolist() == [0, 1]
    assert bool((test["mask"][1] == 1).all())


def test_openimages_is_trained_and_evaluated_by_masks(tmp_path: Path, in_tmp: Path) -> None:
    root = write_openimages(tmp_path / "OpenImages")
    cfg = load_config(
        "dataset=openimages", f"dataset.root={root}", "dataset.num_classes=2", "dataset.expected=null", *SMALL
    )
    datamodule = build_datamodule(cfg)
    datamodule.setup("test")
    mask = next(iter(datamodule.test_dataloader()))["mask"]
    assert mask[0].unique().tolist() == [0, 1, 255]
    assert mask[1].unique().tolist() == [0, 1]
    results = train(cfg, in_tmp)
    assert {"top1_cls", "maxboxacc/pxap"} <= results.keys()
    assert "maxboxacc/gt_known_loc" not in results
    assert (in_tmp / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize(
    ("name", "write", "num_classes", "settings"),
    [
        ("dogs", write_dogs, 2, []),
        ("cars", write_cars, 2, []),
        ("aircraft", write_aircraft, 3, []),
        ("aircraft", write_aircraft, 3, ["dataset.splits.train=trainval", "selection=test"]),
    ],
)
def test_data_sets_of_dogs_cars_and_aircraft(
    name: str, write: Callable[[Path], Path], num_classes: int, settings: list[str], tmp_path: Path, in_tmp: Path
) -> None:
    root = write(tmp_path / name)
    small = [f"dataset.num_classes={num_classes}", "dataset.expected=null", *SMALL, *settings]
    cfg = load_config(f"dataset={name}", f"dataset.root={root}", *small)
    assert cfg.method.area_prior == 0.25  # the recipe sat_<data set>
    results = train(cfg, in_tmp)
    assert {"top1_cls", "maxboxacc/gt_known_loc", "maxboxacc/top1_loc"} <= results.keys()
    assert build_datamodule(cfg).held_out == (name == "aircraft" and not settings)


@pytest.mark.report
def test_folders_are_trained_on_and_evaluated_by_what_there_is(tmp_path: Path, in_tmp: Path) -> None:
    root = write_folder(tmp_path / "my images", "train", "val")
    given = ["dataset=folder", f"dataset.root={root}", *SMALL]
    results = train(load_config(*given), in_tmp / "labels")
    assert "top1_cls" in results
    assert not any("loc" in name or "pxap" in name for name in results)
    assert (in_tmp / "labels" / "report.html").is_file()
    save(root, coco(root, {"image_id": 7, "category_id": 1, "segmentation": [[4, 3, 21, 3, 21, 18]]}))
    results = train(load_config(*given, "dataset.annotations=annotations/val.json"), in_tmp / "boxes")
    assert {"top1_cls", "maxboxacc/max_box_acc", "maxboxacc/pxap"} <= results.keys()


def test_folders_without_splits_are_trained_on(tmp_path: Path, in_tmp: Path) -> None:
    root = write_folder(tmp_path / "my images", "", images=5)
    results = train(load_config("dataset=folder", f"dataset.root={root}", "dataset.splits=null", *SMALL), in_tmp)
    assert "top1_cls" in results
