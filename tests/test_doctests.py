"""The examples in the docstrings of what people call by hand."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from tests.test_export import save
from tests.test_import_checkpoint import golden

EXAMPLES = {
    "wsolkit.build": ["build_datamodule", "build_module"],
    "wsolkit.settings.compose": ["load_config"],
    "wsolkit.interop.official": ["from_official"],
    "wsolkit.localization.boxes": ["boxes_at_thresholds"],
    "wsolkit.localizer": ["Localizer"],
    "wsolkit.methods.bridging_gap": ["alignment_losses"],
    "wsolkit.methods.scm": ["ActivationDiffusionBlock", "diffuse"],
    "wsolkit.methods.spa": ["self_correlation"],
    "wsolkit.metrics.boxes": ["MaxBoxAccuracy"],
    "wsolkit.metrics.masks": ["PixelAveragePrecision"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    save(folder / "best.ckpt", "method=cam", "backbone.model=resnet10t", "backbone.pretrained=false")
    torch.save(golden("ts_cam"), folder / "ts_cam.pth")
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(folder / "photo.png")
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_as_they_stand(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    runner = doctest.DocTestRunner()
    tests = [test for test in doctest.DocTestFinder().find(import_module(name), globs={}) if test.examples]
    assert sorted(test.name.removeprefix(f"{name}.") for test in tests) == EXAMPLES[name]
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
