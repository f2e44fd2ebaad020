"""Fixtures: small data sets, a browser, and the folder of reference data that may lie beside the project."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from tests.fresh import draw_no_report
from wsolkit import load_config
from wsolkit.build import build_protocols
from wsolkit.localization.protocol import Protocol
from wsolkit.reporting import pictures
from wsolkit.train import train
from wsolkit.training import report

REPOSITORY = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
METHODS = tuple(sorted(path.stem for path in (REPOSITORY / "conf" / "method").glob("*.yaml")))


def _methods_on(architecture: str) -> tuple[str, ...]:
    files = {name: REPOSITORY / "conf" / "method" / f"{name}.yaml" for name in METHODS}
    return tuple(name for name in METHODS if f"architecture: {architecture}" in files[name].read_text(encoding="utf-8"))


CNN_METHODS, TOKEN_METHODS = _methods_on("cnn"), _methods_on("tokens")

# One on each kind of network: what is expensive is tested on these, and on the other methods in the slow tests.
TYPICAL = ("cam", "sat", "ffe")


def or_slow(names: Iterable[str], quick: Collection[str] = TYPICAL) -> list[Any]:
    """Values for `parametrize`, of which those that are not among the quick ones are for the slow tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def targets(count: int, side: int = 64) -> dict[str, torch.Tensor]:
    """What a batch has besides images and labels, for methods that learn boxes or masks."""
    box = torch.tensor([0.25, 0.25, 0.5, 0.5])
    mask = torch.zeros(count, side, side, dtype=torch.uint8)
    mask[:, side // 4 : side // 2, side // 4 : side // 2] = 1
    return {"pseudo_box": box.expand(count, -1).clone(), "pseudo_mask": mask}


_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def learned(method: str) -> tuple[str, ...]:
    """The settings that a method needs to learn from the built-in data set."""
    if method != "psol":
        return ()
    path = Path(_FOLDER.name) / "predictions.csv"
    lines = [f"train/{index:05d},64,64,0,16,16,32,32" for index in range(4000)]
    path.write_text("\n".join(["file_name,image_width,image_height,category_id,x,y,width,height", *lines]) + "\n")
    return (f"dataset.train_boxes={path}",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of whole runs first: those given out last, one to each worker, are short. A browser takes long."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """Two, or one where tests run side by side: threads that wait for each other are slow on cores that are taken."""
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("WANDB_MODE", "offline")


WRITE_REPORT = pictures.write_report


@pytest.fixture(autouse=True, scope="session")
def _no_report() -> None:
    """Runs draw no report, which takes most of a small run's time."""
    draw_no_report()


@pytest.fixture(autouse=True)
def _report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """But those of a test that is marked with `report` do."""
    if request.node.get_closest_marker("report") is not None:
        for module in (pictures, report):
            monkeypatch.setattr(module, "write_report", WRITE_REPORT)


@pytest.fixture
def shared() -> Path:
    """The folder of full reference arrays and real images; the test is skipped where it is absent."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip(f"the reference data is not at {folder}")
    return folder


def write_listed(root: Path, counts: dict[str, int], size: tuple[int, int] = (40, 30)) -> Path:
    """Write a data set in the form of the benchmark lists: two classes, told by the colour of a square."""
    rng = np.random.default_rng(0)
    width, height = size
    for split, count in counts.items():
        folder = root / "metadata" / split
        folder.mkdir(parents=True)
        (root / split).mkdir()
        ids, labels, sizes, boxes = [], [], [], []
        for number in range(count):
            name, label = f"{split}/image {number}, x.png", number % 2  # a comma and a space in the name
            pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
            x, y = int(rng.integers(0, width - 12)), int(rng.integers(0, height - 12))
            pixels[y : y + 10, x : x + 10, label] = 255
            PIL.Image.fromarray(pixels).save(root / name)
            ids.append(name)
            labels.append(f"{name},{label}")
            sizes.append(f"{name},{width},{height}")
            boxes.append(f"{name},{x},{y},{x + 9},{y + 9}")
        boxes.append(f"{ids[0]},0,0,3,3")  # a second box for the first image
        for file, lines in {
            "image_ids.txt": ids,
            "class_labels.txt": labels,
            "image_sizes.txt": sizes,
            "localization.txt": boxes,
        }.items():
            (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A listed data set of 12 training and 5 validation images."""
    return write_listed(tmp_path / "listed", {"train": 12, "val": 5})


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """ILSVRC's official layout with two classes: training folders, flat validation images, XML boxes."""
    return write_imagenet(tmp_path / "ILSVRC2012")


def write_imagenet(root: Path) -> Path:
    """Write two classes in ILSVRC's official layout."""
    rng = np.random.default_rng(0)
    for wnid in ("n01440764", "n02102040"):
        (root / "train" / wnid).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
            # As in the real one, a PNG goes by the name of a JPEG.
            kind = "PNG" if number == 2 else "JPEG"
            PIL.Image.fromarray(pixels).save(root / "train" / wnid / f"{wnid}_{number}.JPEG", kind)
    (root / "val").mkdir()
    boxes = root / "Annotations" / "CLS-LOC" / "val"
    boxes.mkdir(parents=True)
    for number, wnid in enumerate(("n02102040", "n01440764"), start=1):
        name = f"ILSVRC2012_val_{number:08d}"
        PIL.Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(root / "val" / f"{name}.JPEG")
        objects = "".join(
            f"<object><name>{wnid}</name><bndbox><xmin>{k}</xmin><ymin>2</ymin><xmax>20</xmax><ymax>24</ymax></bndbox>"
            "</object>"
            for k in range(1, number + 1)
        )
        size = "<size><width>32</width><height>24</height><depth>3</depth></size>"
        (boxes / f"{name}.xml").write_text(f"<annotation><filename>{name}</filename>{size}{objects}</annotation>")
    return root


@pytest.fixture(scope="session")
def shapes_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows the eight classes of the built-in data set, after two steps of training."""
    folder = tmp_path_factory.mktemp("shapes")
    cfg = load_config(
        *("method=ts_cam", "dataset.records.sizes={train: 32, val: 16, test: 8}", "dataset.batch_size=16"),
        *("trainer=smoke", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "num_examples=0"),
    )
    train(cfg, folder)
    return folder / "checkpoints" / "best.ckpt"


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in an empty folder, so that runs leave nothing in the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def protocol(name: str, **changes: object) -> Protocol:
    """The rules of `conf/protocol/<name>.yaml` for 224×224 pixels, some of them changed."""
    cfg = load_config(f"protocol={name}", "dataset=listed", "dataset.root=none")
    return dataclasses.replace(build_protocols(cfg)[name], **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium or Chrome on this machine to open the page with")


def browse(chromium: str, folder: Path, page: str, width: int, *options: str) -> str:
    """Open a page in a frame of some width (a window is never narrower than 500); the DOM afterwards."""
    frame = (
        '<!doctype html><meta charset="utf-8"><body style="margin: 0">'
        f'<iframe srcdoc="{escape(page)}" style="border: 0; width: {width}px; height: 14000px"></iframe>'
    )
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command = [chromium, *flags, f"--window-size={width},14000", *options]
    run = subprocess.run([*command, (folder / "frame.html").as_uri()], capture_output=True, timeout=120, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout
