"""What the pages say to type is typed, as it stands there."""

from __future__ import annotations

import os
import subprocess
import sys
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
