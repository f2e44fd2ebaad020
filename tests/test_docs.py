"""What the pages say to type is typed, as it stands there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import timm
import torch
from pycocotools.coco import COCO

from tests.conftest import REPOSITORY
from tests.data.layouts import write_cub
from tests.fresh import command
from tests.test_export import save
from wsolkit import build_module, load_config
from wsolkit.interop.official import _RELEASED_DEIT, _renamed

pytestmark = pytest.mark.slow

MODELS = ("deit_small_patch16_224.fb_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")


def blocks(page: Path) -> list[str]:
    """The indented blocks of a page, without their indent."""
    found: list[list[str]] = [[]]
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("    "):
            found[-1].append(line[4:])
        elif line.strip():
            found.append([])
        elif found[-1]:
            found[-1].append("")
    return ["\n".join(lines).strip() for lines in found if lines]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A hub's cache that has the backbones' weights, random ones, and this Python as `python`."""
    torch.manual_seed(0)
    for model in MODELS:
        cached = tmp_path / "cache" / "hub" / f"models--timm--{model}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
        state = timm.create_model(model).state_dict()
        safetensors.torch.save_file(state, cached / "snapshots" / ("0" * 40) / "model.safetensors")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": path}


def write_photos(folder: Path) -> None:
    """A few photos of two classes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.jpg")


def follow(page: str, folder: Path, environment: dict[str, str], added: dict[str, str] | None = None) -> str:
    """Type every command and run the Python of a page; how many there were, and what was printed.

    Args:
        added: what goes behind commands with a word, such as settings for a small copy of a data set.
    """
    commands = python = 0
    printed = ""

    def call(*words: str) -> str:
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def typed(line: str) -> str:
        _, _, module, *arguments = shlex.split(line, comments=True)
        if not module.startswith("wsolkit.") or module == "wsolkit.train":  # which looks for weights as it is imported
            return call("bash", "-c", line)
        done = command(module.removeprefix("wsolkit."), *arguments, cwd=folder)
        assert done.returncode == 0, (line, done.stderr)
        return done.stdout

    for block in blocks(REPOSITORY / "docs" / page):
        block = block.replace("\\\n", " ")
        if block.startswith("python "):
            for line in block.splitlines():
                line = " ".join([line, *(more for word, more in (added or {}).items() if word in line)])
                printed += typed(line)
                commands += 1
        elif block.startswith(("from wsolkit import", "import ")):
            printed += call("python", "-c", block)
            python += 1
    return f"{commands} commands, {python} Python\n{printed}"


def test_page_on_predictions(tmp_path: Path, environment: dict[str, str]) -> None:
    """Every command and the Python of docs/predict.md, in a folder with a few photos of two classes."""
    write_photos(tmp_path)
    assert follow("predict.md", tmp_path, environment).startswith("7 commands, 1 Python\n")
    assert len(list((tmp_path / "boxes" / "overlays").rglob("*.jpg"))) == 6
    for folder, count in {"boxes": 6, "cats": 3, "some": 2, "one": 1, "labels": 6}.items():
        assert len(COCO(str(tmp_path / folder / "pseudo_labels.json")).imgs) == count
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_page_on_exported_programs(tmp_path: Path, environment: dict[str, str]) -> None:
    """Everything on docs/export.md, with an untrained model."""
    write_photos(tmp_path)
    (tmp_path / "outputs" / "photos" / "checkpoints").mkdir(parents=True)
    save(tmp_path / "outputs" / "photos" / "checkpoints" / "best.ckpt", "method=ts_cam", "backbone=vit_micro", size=224)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    printed = follow("export.md", tmp_path, environment)
    assert printed.startswith("4 commands, 1 Python\n")
    assert '"label": "dog"' in printed
    assert "['cat', 'dog', 'emu'] torch.Size([2, 3]) torch.Size([2, 3, 28, 28])" in printed
    assert PIL.Image.open(tmp_path / "boxed.png").size == (120, 90)


def test_page_on_released_files(tmp_path: Path, environment: dict[str, str]) -> None:
    """Everything on docs/import_checkpoint.md, with files of the released form and a small copy of CUB."""
    write_photos(tmp_path)
    write_cub(tmp_path / "CUB_200_2011")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    torch.save({"model": released_state("sat"), "best_thr": 0.4, "epoch": 1}, tmp_path / "best_loc.pth.tar")
    torch.save({"state_dict": released_state("ts_cam"), "epoch": 1}, tmp_path / "model_best.pth")
    small = "dataset.num_classes=2 dataset.expected=null"
    added = {"dataset=cub": small, "evaluate": "num_examples=0 trainer.enable_progress_bar=false"}
    printed = follow("import_checkpoint.md", tmp_path, environment, added)
    assert printed.startswith("4 commands, 0 Python\n")
    assert "sat on deit_tiny, 2 classes (001.Black_footed_Albatross, …), 224 pixels" in printed
    assert len(COCO(str(tmp_path / "boxes" / "pseudo_labels.json")).imgs) == 6


def released_state(method: str) -> dict[str, torch.Tensor]:
    """The state dict of a random DeiT-Ti of four blocks with two classes, in released names."""
    model = ("backbone=deit_tiny", "+backbone.options.depth=4", "backbone.pretrained=false")
    state = build_module(
        load_config(f"method={method}", "dataset=folder", "dataset.root=.", *model), ["a", "b"]
    ).state_dict()
    return {f"module.{_renamed(name, _RELEASED_DEIT)}": value for name, value in state.items()}


WATCH = """
import os, sys

open(os.environ["ASKED"], "a").close()

def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments[0]
        with open(os.environ["ASKED"], "a") as file:
            file.write(f"{address!r}\\n")

sys.addaudithook(note)
"""


def test_page_on_the_demo(tmp_path: Path, shapes_checkpoint: Path) -> None:
    """The command of docs/demo.md serves until it is told to end, asks nothing of other machines, leaves nothing."""
    pytest.importorskip("gradio", reason="the extra 'demo' is not installed")
    (tmp_path / "photos").mkdir()
    PIL.Image.new("RGB", (40, 30)).save(tmp_path / "photos" / "grey.png")
    checkpoint = tmp_path / "outputs" / "photos" / "checkpoints" / "best.ckpt"
    checkpoint.parent.mkdir(parents=True)
    shutil.copy(shapes_checkpoint, checkpoint)
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)  # Python imports it first
    path = os.pathsep.join(filter(None, [str(tmp_path / "watch"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "ASKED": str(tmp_path / "asked.txt"), "TMPDIR": str(tmp_path)}
    before = {*tmp_path.rglob("*")}

    (line,) = [block for block in blocks(REPOSITORY / "docs" / "demo.md") if block.startswith("python -m wsolkit.demo")]
    command = [sys.executable, *shlex.split(line)[1:], "port=0"]  # the usual port may be taken
    serving = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert serving.stdout is not None
    url = re.search(r"http://127\.0\.0\.1:\d+", serving.stdout.readline())
    assert url
    with urllib.request.urlopen(url[0]) as answer:
        assert b"wsolkit" in answer.read()
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(timeout=30) == 0
    asked = [ast.literal_eval(line) for line in (tmp_path / "asked.txt").read_text().splitlines()]
    assert {address[0] if isinstance(address, tuple) else address for address in asked} <= {"127.0.0.1", "localhost"}
    assert {*tmp_path.rglob("*")} - before <= {tmp_path / "asked.txt", tmp_path / "watch" / "__pycache__"}
