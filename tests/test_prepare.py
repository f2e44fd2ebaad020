"""python -m wsolkit.prepare: from official archives to a data set that is trained on, in one command."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.conftest import write_imagenet, write_listed
from tests.data.layouts import (
    write_aircraft,
    write_cars,
    write_cub,
    write_dogs,
    write_imagenet_v2,
    write_lists,
    write_openimages,
)
from tests.data.packing import pack, pack_each, tar_of, tree
from tests.data.serving import serving
from tests.fresh import command
from wsolkit.prepare import main
from wsolkit.settings.conf import CONF
from wsolkit.system.locks import alone

LISTS = "wsolevaluation-e9972606b18064ea886f098f2b5b29b9ade75f09"
SMALL = ("dataset.num_classes=2", "dataset.expected=null")


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Prepare = Callable[..., Done]


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """The command, in this process and an empty folder: importing takes longer than what it does here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        code: object = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # Python prints it
            return Done(1, out, f"{code}\n")
        return Done(int(str(code)), out, err)

    return run


def unknown(name: str) -> list[str]:
    """Small copies have other sizes and checksums than the published archives."""
    archives = yaml.safe_load((CONF / "dataset" / f"{name}.yaml").read_text())["archives"]
    return [f"dataset.archives.{key}.{what}=null" for key in archives for what in ("size", "checksum")]


def pack_lists(path: Path, metadata: Path, name: str) -> None:
    """The repository of the WSOL benchmark as GitHub packs it."""
    place = path.parent / "repository"
    shutil.copytree(metadata, place / "metadata" / name)
    (place / "README.md").write_text("not needed")
    pack(path, place, LISTS)
    shutil.rmtree(place)


def pack_cub(root: Path, source: Path) -> None:
    original = write_cub(source / "CUB_200_2011")
    pack_lists(root / "wsolevaluation.tar.gz", original / "metadata", "CUB")
    pack(root / "CUBV2.tar", original / "CUBV2")
    pack(root / "segmentations.tgz", original / "segmentations", "segmentations")
    for part in ("metadata", "CUBV2", "segmentations"):
        shutil.rmtree(original / part)
    (source / "attributes.txt").write_text("beside the folder, as in the official archive")
    pack(root / "CUB_200_2011.tgz", source)


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONF / "dataset").glob("*.yaml"))])
def test_archives_are_described_as_they_should_be(name: str) -> None:
    dataset = yaml.safe_load((CONF / "dataset" / f"{name}.yaml").read_text())
    for key, archive in dataset.get("archives", {}).items():
        checksum, url = archive["checksum"], archive["url"]
        assert checksum is None or re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", checksum), key
        # What is downloaded is compared with a published checksum, or named by what is in it: a commit.
        assert url is None or checksum is not None or re.search(r"github.com/.*/[0-9a-f]{40}\.tar\.gz$", url), key
        assert archive["setting"] is None or archive["setting"] in dataset, key
        assert archive["holds"], key


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_cub_is_prepared_and_trained_on(root: Path, tmp_path: Path, prepare: Prepare) -> None:
    pack_cub(root, tmp_path / "source")
    given = ["dataset=cub", f"dataset.root={root}", *SMALL]
    done = prepare(*given, *unknown("cub"))
    assert done.returncode == 0, done.stderr
    assert tree(root) == tree(write_cub(tmp_path / "expected"))
    for line in ("train │      6 │       2 │     0 │     0", "val   │      4 │       2 │     4 │     0"):
        assert line in done.stdout
    assert "test  │      6 │       2 │     6 │     6" in done.stdout
    assert f"Index: {root}/.wsolkit/index.arrow (0.0 MiB)" in done.stdout
    assert "No longer needed: " in done.stdout
    assert f"Train: python -m wsolkit.train dataset=cub dataset.root={root} dataset.num_classes=2" in done.stdout

    again = prepare(*given)  # nothing is left to unpack, and nobody asks for checksums
    assert again.returncode == 0, again.stderr
    assert "Unpacking" not in again.stdout
    for path in root.glob("*.t*gz"):
        path.unlink()
    assert prepare(*given).returncode == 0  # nor for archives

    (line,) = (line for line in again.stdout.splitlines() if "Train: python -m wsolkit.train " in line)
    small = (
        *("backbone=vit_micro", "dataset.image_size=32", "dataset.resize=36", "dataset.batch_size=4"),
        *("trainer=smoke", "trainer.accelerator=cpu", "logger=none", "hydra.run.dir=run"),
    )
    trained = command("train", *line.partition("wsolkit.train ")[2].split(), *small, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "is not used" not in trained.stderr


def test_imagenet_is_prepared(root: Path, tmp_path: Path, prepare: Prepare) -> None:
    original = write_imagenet(tmp_path / "source")
    write_imagenet_v2(original)
    pack_each(root / "ILSVRC2012_img_train.tar", original / "train")
    pack(root / "ILSVRC2012_img_val.tar", original / "val")
    pack(root / "ILSVRC2012_bbox_val_v3.tgz", original / "Annotations" / "CLS-LOC" / "val", "val")
    pack(root / "imagenetv2-threshold0.7.tar.gz", original / "val2", "imagenetv2-threshold0.7-format-val")
    pack_lists(root / "wsolevaluation.tar.gz", original / "metadata", "ILSVRC")
    holds = [
        "dataset.archives.train.holds=[train/n01440764/*.JPEG,train/n02102040/*.JPEG]",
        "dataset.archives.held_out.holds=[val2/0/*.jpeg,val2/1/*.jpeg]",
    ]
    done = prepare("dataset=imagenet", f"dataset.root={root}", *SMALL, *unknown("imagenet"), *holds)
    assert done.returncode == 0, done.stderr
    assert tree(root) == tree(original)
    assert "train │      6 │       2 │     0 │     0" in done.stdout
    assert "test  │      2 │       2 │     3 │     0" in done.stdout


def test_openimages_is_prepared(root: Path, tmp_path: Path, prepare: Prepare) -> None:
    original = write_openimages(tmp_path / "source")
    pack_lists(root / "wsolevaluation.tar.gz", original / "metadata", "OpenImages")
    shutil.rmtree(original / "metadata")
    masks = tmp_path / "masks"
    for path in original.rglob("*.png"):
        (masks / path.relative_to(original)).parent.mkdir(parents=True, exist_ok=True)
        path.rename(masks / path.relative_to(original))
    pack(root / "OpenImages_images.zip", original)
    pack(root / "OpenImages_annotations.zip", masks)
    done = prepare("dataset=openimages", f"dataset.root={root}", *SMALL)
    assert done.returncode == 0, done.stderr
    assert tree(root) == tree(write_openimages(tmp_path / "expected"))
    assert "test  │      4 │       2 │     0 │     4" in done.stdout


def test_dogs_cars_and_aircraft_are_prepared(tmp_path: Path, prepare: Prepare) -> None:
    dogs, cars, aircraft = (tmp_path / name for name in ("dogs", "cars", "aircraft"))
    for folder in (dogs, cars, aircraft):
        folder.mkdir()
    original = write_dogs(tmp_path / "source dogs")
    pack(dogs / "images.tar", original / "Images", "Images")
    pack(dogs / "annotation.tar", original / "Annotation", "Annotation")
    (tmp_path / "lists").mkdir()
    for path in original.glob("*.mat"):
        shutil.copy(path, tmp_path / "lists")
    pack(dogs / "lists.tar", tmp_path / "lists")
    original = write_cars(tmp_path / "source cars")
    for part, file in (("cars_train", "cars_train"), ("cars_test", "cars_test"), ("devkit", "car_devkit")):
        pack(cars / f"{file}.tgz", original / part, part)
    shutil.copy(original / "cars_test_annos_withlabels.mat", cars)
    original = write_aircraft(tmp_path / "source aircraft")
    pack(aircraft / "fgvc-aircraft-2013b.tar.gz", original, "fgvc-aircraft-2013b")
    for folder, classes, numbers in ((dogs, 2, (4, 6)), (cars, 2, (4, 6)), (aircraft, 3, (3, 3))):
        settings = [f"dataset.num_classes={classes}", "dataset.expected=null", *unknown(folder.name)]
        done = prepare(f"dataset={folder.name}", f"dataset.root={folder}", *settings)
        assert done.returncode == 0, done.stderr
        assert tree(folder) == tree(tmp_path / f"source {folder.name}")
        for split, number in zip(("train", "test"), numbers, strict=True):
            assert f"{split:5} │ {number:6} │ {classes:7} │" in done.stdout


def move(root: Path, **places: str) -> None:
    """Move what is in a data set elsewhere: name, with "__" for "/", → path relative to the root."""
    for name, place in places.items():
        source = (root / name.replace("__", "/")).rename(root / "moving")
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        source.rename(root / place)


def imagenet_with_v2(root: Path) -> None:
    write_imagenet(root)
    write_imagenet_v2(root)


def imagenet_of_kaggle(root: Path) -> None:
    write_imagenet(root / "source")
    write_imagenet_v2(root)
    move(root, source__Annotations="ILSVRC/Annotations", source="ILSVRC/Data/CLS-LOC")


def imagenet_by_lists(root: Path) -> None:
    imagenet_with_v2(root)
    shutil.rmtree(root / "Annotations")
    boxes = {f"val/ILSVRC2012_val_0000000{number}.JPEG": (2 - number, [(1, 2, 20, 23)]) for number in (1, 2)}
    write_lists(root / "metadata" / "test", boxes)


KAGGLE = {
    "dogs": {"Images": "images/Images", "Annotation": "annotations/Annotation"},
    "cars": {
        **{"cars_train": "cars_train/cars_train", "cars_test": "cars_test/cars_test"},
        **{"devkit": "car_devkit/devkit"},
    },
}


@pytest.mark.parametrize(
    ("name", "write", "moved", "settings"),
    [
        ("cub", write_cub, {"segmentations": "../s", "CUBV2": "../v2"}, ["masks={}/../s", "held_out_root={}/../v2"]),
        ("cub", write_cub, {"metadata__val": "../lists"}, ["held_out_lists={}/../lists"]),
        ("imagenet", imagenet_with_v2, {"Annotations__CLS-LOC__val": "boxes"}, ["box_folders=[boxes]"]),
        ("imagenet", imagenet_by_lists, {"metadata": "../lists"}, ["lists={}/../lists"]),
        ("imagenet", imagenet_of_kaggle, {}, []),
        ("dogs", write_dogs, KAGGLE["dogs"], []),
        ("cars", write_cars, KAGGLE["cars"], []),
        ("openimages", write_openimages, {"metadata": "metadata/OpenImages"}, []),
        ("aircraft", write_aircraft, {"data": "fgvc-aircraft-2013b/fgvc-aircraft-2013b/data"}, []),
    ],
)
def test_what_can_be_read_needs_no_archives(
    name: str, write: Callable[[Path], object], moved: dict[str, str], settings: list[str], root: Path, prepare: Prepare
) -> None:
    write(root)
    move(root, **moved)
    classes = 3 if name == "aircraft" else 2
    given = [f"dataset={name}", f"dataset.root={root}", f"dataset.num_classes={classes}", "dataset.expected=null"]
    done = prepare(*given, *(f"dataset.{setting}".format(root) for setting in settings))
    assert done.returncode == 0, done.stderr
    assert (root / ".wsolkit" / "index.arrow").is_file()
    assert not list((root / ".wsolkit").glob("*.part"))


def test_only_archives_of_what_is_missing_are_asked_for(root: Path, tmp_path: Path, prepare: Prepare) -> None:
    """The official archive of CUB lies there unpacked, and the rest elsewhere; Kaggle's cars lack the test's labels."""
    original = write_cub(tmp_path / "source" / "CUB_200_2011")
    for part, place in (("segmentations", "s"), ("CUBV2", "v2"), ("metadata/val", "lists")):
        shutil.move(original / part, tmp_path / place)
    pack(root / "CUB_200_2011.tgz", tmp_path / "source")
    places = [f"dataset.masks={tmp_path}/s", f"dataset.held_out_root={tmp_path}/v2"]
    given = ["dataset=cub", f"dataset.root={root}", *SMALL, *unknown("cub"), *places]
    done = prepare(*given, f"dataset.held_out_lists={tmp_path}/lists")
    assert done.returncode == 0, done.stderr
    lacking = prepare(*given, f"dataset.held_out_lists={tmp_path}/gone")
    assert lacking.returncode == 1
    assert "there is no folder '" in lacking.stderr
    assert "gone': thresholds and checkpoints are chosen on CUBV2" in lacking.stderr

    cars = write_cars(tmp_path / "cars")
    move(cars, **KAGGLE["cars"])
    given = ["dataset=cars", f"dataset.root={cars}", *SMALL, *unknown("cars")]
    labels = cars / "cars_test_annos_withlabels.mat"
    content = labels.read_bytes()
    labels.unlink()
    done = prepare(*given)
    assert done.returncode == 1
    assert f"  {labels}, from https://github.com/" in done.stderr
    assert "Without them, the test split cannot be read: " in done.stderr
    assert ".tgz" not in done.stderr
    labels.write_bytes(content)
    done = prepare(*given)
    assert done.returncode == 0, done.stderr
    assert "No longer needed" not in done.stdout  # the labels are read in every run


def test_data_sets_without_archives_are_checked_and_indexed(tmp_path: Path, prepare: Prepare) -> None:
    listed = write_listed(tmp_path / "my lists", {"train": 12, "val": 5})
    done = prepare("dataset=listed", f"dataset.root={listed}")
    assert done.returncode == 0, done.stderr
    assert "train │     12 │       2 │     0 │     0" in done.stdout
    assert (listed / ".wsolkit" / "index.arrow").is_file()
    assert "No longer needed" not in done.stdout
    (listed / "metadata" / "val" / "class_labels.txt").write_text("")
    broken = prepare("dataset=listed", f"dataset.root={listed}")
    assert broken.returncode == 1
    assert "class_labels.txt' has no label for 5 images" in broken.stderr


def test_archives_are_downloaded(root: Path, tmp_path: Path, prepare: Prepare) -> None:
    source = tmp_path / "archives"
    source.mkdir()
    pack_cub(source, tmp_path / "source")
    shutil.move(source / "CUBV2.tar", root)
    given = ["dataset=cub", f"dataset.root={root}", *SMALL, *unknown("cub")]
    names = {"images": "CUB_200_2011.tgz", "masks": "segmentations.tgz", "lists": "wsolevaluation.tar.gz"}
    with serving() as server:
        server.files = {file: (source / file).read_bytes() for file in names.values()}
        server.cuts = [1000]
        urls = [f"dataset.archives.{key}.url={server.url}/{file}" for key, file in names.items()]
        done = prepare(*given, *urls)
    assert done.returncode == 0, done.stderr
    assert "Downloading CUB_200_2011.tgz" in done.stdout
    assert tree(root) == tree(write_cub(tmp_path / "expected"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataset=shapes"], "error: dataset=shapes is made in memory: there is nothing to prepare"),
        (["dataset=cub"], "error: required and not given: dataset.root. Add dataset.root=…"),
        (["dataset=cob", "dataset.root=x"], "error: there is no dataset 'cob' (did you mean 'cub'?); choose from: "),
        ([], "there is nothing to prepare; choose from: aircraft, cars, cub, dogs, folder, imagenet"),
        (["-m", "dataset=cub"], "error: data sets are prepared one by one: leave out -m"),
        (["dataset=listed", "dataset.root=gone"], "error: dataset.root: there is no folder 'gone'; dataset=listed"),
        (["dataset=cub", "dataset.root=x", "progress=much"], "error: progress='much': Input should be a valid boolean"),
        (
            ["dataset=cub", "dataset.root=x", "dataset.archives.images.size=big"],
            "error: dataset.archives.images.size='big': Input should be a valid integer",
        ),
        (
            ["dataset=imagenet", "dataset.root=new"],
            "new/ILSVRC2012_img_train.tar, from https://image-net.org/challenges/LSVRC/2012/2012-downloads.php "
            "(147,897,477,120 bytes, md5:1d675b47d978889d74fa0da5fadfb00e)",
        ),
        (
            ["dataset=cub", "dataset.root=new"],
            "new/CUBV2.tar, from https://drive.google.com/open?id=1U6cwKHS65wayT9FFvoLIA8cn1k0Ot2M1 (size and checksum "
            "are not known; not needed with dataset.held_out=false)",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_message(
    arguments: list[str], message: str, tmp_path: Path, prepare: Prepare
) -> None:
    done = prepare(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_hostile_and_damaged_archives_are_named(root: Path, tmp_path: Path, prepare: Prepare) -> None:
    given = ["dataset=dogs", f"dataset.root={root}"]
    for name in ("images.tar", "annotation.tar", "lists.tar"):
        tar_of(root / name, ("../evil", b"x"))
    done = prepare(*given)
    assert done.returncode == 1
    assert "images.tar' has 10,240 bytes, 793,579,520 as published: download it again, or, if its pub" in done.stderr
    done = prepare(*given, *unknown("dogs"))
    assert done.returncode == 1
    assert "error: 'images.tar' is not unpacked: its member '../evil' leads out of the folder" in done.stderr
    assert not (tmp_path / "evil").exists()


def test_incomplete_data_sets_are_named(root: Path, tmp_path: Path, prepare: Prepare) -> None:
    pack_cub(root, tmp_path / "source")
    done = prepare("dataset=cub", f"dataset.root={root}", "dataset.num_classes=2", *unknown("cub"))
    assert done.returncode == 1
    assert "the train split of CUB-200-2011 has 6 images here, 5994 as published" in done.stderr
    assert not (root / ".wsolkit" / "index.arrow").exists()


def test_two_processes_do_not_prepare_the_same_folder(root: Path, tmp_path: Path, prepare: Prepare) -> None:
    write_listed(root, {"train": 4, "val": 2})
    (root / ".wsolkit").mkdir()
    with alone(root / ".wsolkit" / ".index.arrow.lock", "preparing"):
        done = prepare("dataset=listed", f"dataset.root={root}")
    assert done.returncode == 1
    assert f"error: another process (number {os.getpid()} on {platform.node()}, since 2" in done.stderr
    assert f") is preparing '{root}': wait until it ends\n" in done.stderr


def test_killed_and_run_again_it_finishes(root: Path, tmp_path: Path, prepare: Prepare) -> None:
    pack_cub(root, tmp_path / "source")
    call = [sys.executable, "-m", "wsolkit.prepare", "dataset=cub", f"dataset.root={root}", *SMALL, *unknown("cub")]
    child = subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not (root / ".wsolkit" / "CUB_200_2011.tgz.unpacking" / "content").exists():
        assert child.poll() is None
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = [root / ".wsolkit" / name for name in (".index.arrow.12", "index.arrow.345", "tmp4k2x")]
    for path in left:
        path.touch()
    done = prepare(*call[3:])
    assert done.returncode == 0, done.stderr
    assert not [path for path in left if path.exists()]
    assert tree(root) == tree(write_cub(tmp_path / "expected"))


def test_nothing_is_written_where_a_data_set_lies_if_its_index_goes_elsewhere(
    root: Path, tmp_path: Path, prepare: Prepare
) -> None:
    write_listed(root, {"train": 4, "val": 2})
    before = sorted(root.rglob("*"))
    done = prepare("dataset=listed", f"dataset.root={root}", f"dataset.index={tmp_path}/own/index.arrow")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "own" / "index.arrow").is_file()
    assert sorted(root.rglob("*")) == before
