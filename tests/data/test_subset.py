"""Parts of a data set: few-shot training, fractions, some of the classes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.data.layouts import write_cub
from tests.fresh import command
from wsolkit import build_datamodule, build_module, load_config
from wsolkit.data.benchmarks.shapes import CLASSES, ShapesRecords
from wsolkit.data.records import Records, Split, file_records
from wsolkit.data.subset import part_of
from wsolkit.errors import CheckpointError, ConfigError, DataError
from wsolkit.settings.restore import check_resumable
from wsolkit.train import train

COUNTS = {"ant": 20, "bee": 7, "cat": 1, "dog": 12}


@pytest.fixture
def records() -> Records:
    """Images of four classes, of which there are differently many, in no order."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), list(COUNTS.values())))
    ids = [f"{list(COUNTS)[label]}/{number}.jpg" for number, label in enumerate(labels)]
    return file_records(Path(), ids, labels.tolist(), list(COUNTS), {}, None)


def part(records: Records, split: Split = "train", **settings: Any) -> Records:
    return part_of(records, split, **{"classes": None, "fraction": None, "shots": None, "seed": 0} | settings)


def names(records: Records) -> list[str]:
    return [records.name(index) for index in range(len(records.labels))]


def counts(records: Records) -> dict[str, int]:
    return dict(zip(records.classes, np.bincount(records.labels, minlength=len(records.classes)).tolist(), strict=True))


def test_shots_are_images_of_each_class(records: Records) -> None:
    few = part(records, shots=3, classes=["ant", "bee", "dog"])
    assert counts(few) == {"ant": 3, "bee": 3, "dog": 3}
    assert len(set(names(few))) == 9
    assert [few.classes[label] for label in few.labels] == [name.split("/")[0] for name in names(few)]


def test_the_seed_decides_and_nothing_else(records: Records) -> None:
    draws = [names(part(records, shots=1, seed=seed)) for seed in range(20)]
    assert draws[7] == names(part(records, shots=1, seed=7))
    assert len({tuple(draw) for draw in draws}) > 15
    # A class's images do not depend on the classes beside it.
    alone = names(part(records, classes=["dog"], shots=3))
    assert set(alone) < set(names(part(records, classes=["ant", "dog"], shots=3)))
    # Few are among more.
    for fewer, more in ((1, 3), (3, 5)):
        few, many = (names(part(records, shots=shots, classes=["ant", "bee"])) for shots in (fewer, more))
        assert set(few) < set(many)
    assert set(names(part(records, fraction=0.3))) < set(names(part(records, fraction=0.6)))


def test_processes_draw_the_same() -> None:
    code = (
        "from wsolkit.data.benchmarks.shapes import ShapesRecords\n"
        "from wsolkit.data.subset import part_of\n"
        "few = part_of(ShapesRecords('train', {'train': 400}, 64, 0), 'train', None, None, 2, 5)\n"
        "print([few.name(index) for index in range(len(few.labels))])"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert (
        outputs[0] == outputs[1] == f"{names(part(ShapesRecords('train', {'train': 400}, 64, 0), shots=2, seed=5))}\n"
    )
    assert outputs[0].count("train/") == 16


def test_a_fraction_is_of_each_class(records: Records) -> None:
    assert counts(part(records, fraction=0.5)) == {"ant": 10, "bee": 4, "cat": 1, "dog": 6}
    assert counts(part(records, fraction=0.01)) == {"ant": 1, "bee": 1, "cat": 1, "dog": 1}
    assert names(part(records, fraction=1.0)) == names(records)
    assert counts(part(records, fraction=0.5, shots=4, classes=[0, 1])) == {"ant": 4, "bee": 4}
    assert set(names(part(records, fraction=0.5, shots=1))) < set(names(part(records, fraction=0.5)))


def test_classes_are_numbered_in_the_data_set_s_order(records: Records) -> None:
    for wanted in (["dog", "bee"], ["bee", 3], [3, 1, "dog"]):
        kept = part(records, classes=wanted)
        assert kept.classes == ["bee", "dog"]
        assert counts(kept) == {"bee": 7, "dog": 12}
        assert [kept.classes[label] for label in kept.labels] == [name.split("/")[0] for name in names(kept)]


def test_a_name_goes_before_a_label() -> None:
    records = file_records(Path(), ["a", "b", "c"], [0, 1, 2], ["2", "x", "1"], {}, None)
    assert part(records, classes=[1]).classes == ["1"]
    assert part(records, classes=["2", 0]).classes == ["2"]


def test_all_splits_have_the_classes_and_only_training_is_drawn() -> None:
    sizes = {"train": 80, "val": 40, "test": 40}
    splits: tuple[Split, ...] = ("val", "test")
    for split in splits:
        whole = ShapesRecords(split, sizes, 64, 0)
        kept = part(whole, split, classes=[CLASSES[5], CLASSES[2]], shots=1)
        assert counts(kept) == {CLASSES[2]: 5, CLASSES[5]: 5}
        for index, place in enumerate(np.flatnonzero(np.isin(whole.labels, [2, 5])).tolist()):
            assert kept.name(index) == whole.name(place)
            assert np.array_equal(kept.image(index), whole.image(place))
            assert np.array_equal(kept.boxes(index), whole.boxes(place))
            assert np.array_equal(kept.mask(index), whole.mask(place))  # type: ignore[arg-type]
            assert kept.size(index) is None
        assert part(whole, split, shots=1, fraction=0.1) is whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shots": 2},
            "dataset.shots=2: class 'cat' has 1 training images: ask for as many at most, or leave the class",
        ),
        (
            {"shots": 5, "fraction": 0.5, "classes": ["ant", "bee"]},
            "class 'bee' has 4 training images after dataset.fra",
        ),
        ({"shots": 0}, "dataset.shots=0: expected 1 or more training images of each class"),
        ({"fraction": 0.0}, "dataset.fraction=0.0: expected a share of the training images, above 0 and up to 1"),
        ({"fraction": 1.5}, "dataset.fraction=1.5: expected a share of the training images, above 0 and up to 1"),
        ({"seed": -1}, "dataset.subset_seed=-1: expected 0 or more"),
        ({"classes": []}, "dataset.classes=[]: name one class or more"),
        (
            {"classes": ["dot"]},
            "dataset.classes: there is no class 'dot' (did you mean 'dog'?); there are 4, by name or from",
        ),
        ({"classes": [4]}, "there is no class '4'; there are 4, by name or from 0 to 3: ant, bee, cat, dog"),
        ({"classes": [-1]}, "there is no class '-1'"),
    ],
)
def test_what_cannot_be_drawn_is_named(records: Records, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        part(records, **settings)
    assert message in str(caught.value)


SMALL = (
    *("dataset.records.sizes={train: 80, val: 24, test: 24}", "dataset.batch_size=4", "trainer=smoke"),
    *("trainer.enable_progress_bar=false", "logger=none"),
)


def test_the_network_has_the_classes_that_are_kept() -> None:
    cfg = load_config("dataset.classes=[blue spots,2,red spots]", "method=ts_cam", *SMALL)
    module, data = build_module(cfg), build_datamodule(cfg)
    assert data.class_names == ["red spots", "blue spots"]
    batch = next(iter(data.train_dataloader()))
    assert set(batch["label"].tolist()) <= {0, 1}
    assert module(batch["image"]).shape == (4, 2)


def test_the_draw_follows_the_run_s_seed_unless_it_has_its_own() -> None:
    def drawn(*overrides: str) -> list[str]:
        return names(build_datamodule(load_config("dataset.shots=1", *SMALL, *overrides)).dataset("train").records)

    assert drawn("seed=1") != drawn("seed=2")
    assert drawn("seed=1", "dataset.subset_seed=7") == drawn("seed=2", "dataset.subset_seed=7")


def test_wrong_types_are_named() -> None:
    for setting, message in {"shots=few": "dataset.shots='few'", "classes=red": "dataset.classes='red'"}.items():
        with pytest.raises(ConfigError, match=message):
            build_datamodule(load_config(f"dataset.{setting}", *SMALL))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    cfg = load_config("dataset.classes=[7,0,cyan spots]", "dataset.shots=2", "dataset.fraction=0.9", "seed=3", *SMALL)
    train(cfg, folder)
    return folder


def test_a_run_keeps_what_it_was_trained_on(trained: Path) -> None:
    saved = yaml.safe_load((trained / "config.yaml").read_text())["dataset"]
    assert (saved["classes"], saved["shots"], saved["fraction"]) == ([7, 0, "cyan spots"], 2, 0.9)
    assert saved["subset_seed"] == 3
    images = (trained / "train_images.txt").read_text().splitlines()
    assert len(images) == len(set(images)) == 6
    assert {int(name.removeprefix("train/")) % 8 for name in images} == {0, 5, 7}
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    assert content["wsolkit"]["class_names"] == ["red spots", "cyan spots", "black spots"]


def evaluate(trained: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "hydra.run.dir=out", *arguments)
    return command("evaluate", f"checkpoint={trained}/checkpoints/best.ckpt", *options, cwd=trained)


def test_a_checkpoint_is_evaluated_on_its_classes(trained: Path) -> None:
    done = evaluate(trained)
    assert done.returncode == 0, done.stderr
    metrics = yaml.safe_load((trained / "out" / "metrics.json").read_text())
    assert metrics["class_names"] == ["red spots", "cyan spots", "black spots"]
    assert metrics["maxboxacc/per_class/images"] == [3, 3, 3]
    done = evaluate(trained, "dataset.classes=[0,1,2]")
    assert done.returncode == 1
    assert "the model does not know 'blue spots' (did you mean 'black spots'?), 'green spots'" in done.stderr
    assert "it was trained on 3, of which the data set lacks 'cyan spots', 'black spots'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_is_resumed_on_the_same_part(trained: Path) -> None:
    path = str(trained / "checkpoints" / "last.ckpt")
    same = ("dataset.classes=[7,0,cyan spots]", "dataset.fraction=0.9")
    check_resumable(path, load_config(*same, "dataset.shots=2", "seed=3"))
    with pytest.raises(CheckpointError, match=r"belongs to a run with dataset.shots=2, but these settings say None"):
        check_resumable(path, load_config(*same))
    with pytest.raises(CheckpointError, match=r"belongs to a run with dataset.subset_seed=3, but these settings say 0"):
        check_resumable(path, load_config(*same, "dataset.shots=2"))


def test_all_of_a_data_set_is_no_part(tmp_path: Path) -> None:
    train(load_config(*SMALL, "dataset.classes=null"), tmp_path)
    assert not (tmp_path / "train_images.txt").exists()


def test_benchmarks_are_cut_like_any_other(tmp_path: Path) -> None:
    root = write_cub(tmp_path / "cub")
    given = ["dataset=cub", f"dataset.root={root}", "dataset.num_classes=2", "dataset.expected=null"]
    data = build_datamodule(load_config(*given, "dataset.classes=[002.Laysan_Albatross]", "dataset.shots=1"))
    splits: tuple[Split, ...] = ("train", "val", "test")
    assert [len(data.dataset(split)) for split in splits] == [1, 2, 3]
    test = data.dataset("test").records
    assert test.size(0) == (40, 30)
    assert test.boxes(1).tolist() == [[0, 0, 39, 29]]
    assert test.mask(1).sum() == 1200  # type: ignore[union-attr]
