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

MODEL = "deit_small_patch16_224.fb_in1k"


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
    """A hub's cache that has the backbone's weights, random ones, and this Python as `python`."""
    torch.manual_seed(0)
    cached = tmp_path / "cache" / "hub" / f"models--timm--{MODEL}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    state = timm.create_model(MODEL).state_dict()
    safetensors.torch.save_file(state, cached / "snapshots" / ("0" * 40) / "model.safetensors")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": path}


def test_page_on_predictions(tmp_path: Path, environment: dict[str, str]) -> None:
    """Every command and the Python of docs/predict.md, in a folder with a few photos of two classes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.jpg")

    def call(*command: str) -> None:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)

    commands = python = 0
    for block in blocks(REPOSITORY / "docs" / "predict.md"):
        if block.startswith("python -m wsolkit"):
            for line in block.splitlines():
                call("bash", "-c", line)
                commands += 1
        elif block.startswith("from wsolkit import"):
            call("python", "-c", block)
            python += 1
    assert (commands, python) == (7, 1)
    assert len(list((tmp_path / "boxes" / "overlays").rglob("*.jpg"))) == 6
    for folder, count in {"boxes": 6, "cats": 3, "some": 2, "one": 1, "labels": 6}.items():
        assert len(COCO(str(tmp_path / folder / "pseudo_labels.json")).imgs) == count
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


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
