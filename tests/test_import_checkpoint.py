"""python -m wsolkit.import_checkpoint: the papers' files, made here as their training scripts save them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import wsolkit
from tests.conftest import GOLDEN, write_listed
from wsolkit import Localizer, build_datamodule, load_config
from wsolkit.build import build_protocols
from wsolkit.checkpoint import read_checkpoint
from wsolkit.errors import CheckpointError
from wsolkit.evaluate import main as evaluate
from wsolkit.import_checkpoint import main
from wsolkit.interop import from_official
from wsolkit.methods.base import WSOLModule
from wsolkit.metrics.evaluation import Evaluation, outcome
from wsolkit.settings.restore import check_resumable


def golden(method: str) -> dict[str, Tensor]:
    """A small model of the released code: 7 classes, 3 heads of 16 channels."""
    with np.load(GOLDEN / f"{'sat' if method == 'sat' else 'ts_cam'}_state.npz") as state:
        tensors = {name: torch.from_numpy(state[name]) for name in state.files}
    if method == "scm":  # TS-CAM's, and λ and β of the blocks
        for block in range(4):
            tensors[f"layers.{block}.thred"] = torch.tensor([0.5 + block / 10])
            tensors[f"layers.{block}.fuse._loss_rate"] = torch.tensor([1.0 - block / 10])
    return tensors


def released(method: str, folder: Path, **more: Any) -> Path:
    """A file with the entries, prefixes and format in which the method's training script leaves it."""
    state = OrderedDict((f"module.{name}", value) for name, value in golden(method).items())
    if method == "sat":
        path = folder / "best_loc.pth.tar"
        torch.save({"model": state, "best_thr": 0.35, "epoch": 3, **more}, path, _use_new_zipfile_serialization=False)
        return path
    path = folder / f"{method}.pth"
    best = np.float64(0.71) if method == "scm" else 0.71  # SCM's evaluation leaves a number of numpy's
    torch.save({"epoch": 3, "state_dict": state, "best_map": best, **more}, path)
    return path


def command(name: str, *arguments: str, cwd: Path) -> int:
    """A command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"wsolkit.{name}", *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "0")  # put back afterwards: the command changes it
        try:
            {"import_checkpoint": main, "evaluate": evaluate}[name]()
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return 0


def imported(path: Path, method: str, *arguments: str) -> int:
    given = (f"source={path.name}", f"method={method}", "num_heads=3", *arguments)
    return command("import_checkpoint", *given, cwd=path.parent)


def official(method: Any) -> WSOLModule:
    return from_official(golden(method), method, num_heads=3)


@pytest.mark.parametrize("method", ["ts_cam", "scm", "sat"])
def test_model_of_the_file_is_the_released_one(method: str, tmp_path: Path) -> None:
    """Logits and maps bit for bit, and what a checkpoint of wsolkit carries."""
    assert imported(released(method, tmp_path), method, "output=x.ckpt") == 0
    localizer = Localizer.from_checkpoint(tmp_path / "x.ckpt", device="cpu")
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected, found = (module.localize(image, "all") for module in (official(method), localizer.module))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.maps, expected.maps)
    own, of_release = localizer.module.state_dict(), official(method).state_dict()
    assert own.keys() == of_release.keys()
    assert all(torch.equal(own[name], of_release[name]) for name in own)

    assert (localizer.method, localizer.protocol, localizer.version) == (method, method, wsolkit.__version__)
    assert localizer.class_names == [str(label) for label in range(7)]
    assert (localizer.image_size, localizer.mean, localizer.std) == (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    selected = method == "sat"  # SAT's file has one
    assert localizer.threshold_origin == ("validation" if selected else "default")
    assert localizer.threshold == pytest.approx(0.35 if selected else 0.3)
    if method == "scm":
        blocks = localizer.module.calibration.blocks  # type: ignore[union-attr]
        assert [block.iterations for block in blocks] == [16, 4, 4, 4]  # type: ignore[union-attr]


def test_evaluation_gives_the_metrics_of_the_released_model(tmp_path: Path) -> None:
    write_listed(tmp_path / "data", {"train": 2, "val": 5}, (80, 60))
    assert imported(released("sat", tmp_path), "sat") == 0
    data = ("dataset=listed", "dataset.root=data", "protocol=[sat,maxboxacc]", "dataset.num_workers=0")
    quiet = ("trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "num_examples=0", "hydra.run.dir=run")
    assert command("evaluate", "checkpoint=best_loc.ckpt", *data, *quiet, cwd=tmp_path) == 0

    module = official("sat")
    cfg = load_config("method=sat", "dataset=listed", f"dataset.root={tmp_path / 'data'}", *data[2:])
    datamodule = build_datamodule(cfg)
    datamodule.setup("test")
    evaluation = Evaluation(build_protocols(cfg), num_classes=7)
    for batch in datamodule.test_dataloader():
        evaluation.update(batch, module.localize, module)
    results = outcome(evaluation.compute()).results
    expected = {name: value for name, value in results.items() if np.isfinite(value)}  # JSON has no NaN
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert expected["maxboxacc/max_box_acc"] > 0
    assert {name: found[name] for name in expected} == expected


def test_classes_may_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a text file, or by the data set that they are of, whose published threshold then counts."""
    names = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu"]
    path = released("sat", tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    assert imported(path, "sat", "classes=names.txt", "dataset=cub", "dataset.root=.") == 0
    localizer = Localizer.from_checkpoint(tmp_path / "best_loc.ckpt", device="cpu")
    assert (localizer.class_names, localizer.threshold) == (names, 0.4)

    for name in names:
        for split in ("train", "val"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            PIL.Image.new("RGB", (8, 8)).save(tmp_path / "data" / split / name / "0.png")
    assert imported(path, "sat", "dataset=folder", "dataset.root=data", "output=y.ckpt") == 0
    assert read_checkpoint(tmp_path / "y.ckpt").class_names == names

    (tmp_path / "names.txt").write_text("ant\nbee\n")
    assert imported(path, "sat", "classes=names.txt", "output=z.ckpt") == 1
    write_listed(tmp_path / "listed", {"train": 2, "val": 2})
    assert imported(path, "sat", "dataset=listed", "dataset.root=listed", "output=z.ckpt") == 1
    error = capsys.readouterr().err
    assert "'names.txt' has 2 classes, but the model in 'best_loc.pth.tar' knows 7" in error
    assert "dataset=listed has 2 classes, but the model in 'best_loc.pth.tar' knows 7" in error
    assert not (tmp_path / "z.ckpt").exists()


class CfgNode(dict[str, Any]):
    """As settings libraries have it: a dictionary with attributes of its own."""


@pytest.mark.parametrize("legacy", [False, True])
def test_what_research_code_leaves_in_files_is_no_obstacle(
    legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings, optimizer, numpy's numbers and arrays: the weights are read, the rest is not made, and named."""
    settings = CfgNode(lr=1.0, model=CfgNode())
    settings.__dict__["frozen"] = True
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": golden("ts_cam"),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, path=Path("data")),
        "cfg": settings,
        "best": np.float32(0.5),
        "curve": np.arange(3.0),
    }
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    assert imported(tmp_path / "x.pth", "ts_cam") == 0
    module = Localizer.from_checkpoint(tmp_path / "x.ckpt", device="cpu").module
    assert torch.equal(module.state_dict()["network.head.weight"], golden("ts_cam")["head.weight"])
    said = capsys.readouterr().out
    assert "Left out, and nothing of it was run: argparse.Namespace, " in said
    for name in ("numpy.ndarray", "PosixPath", "test_import_checkpoint.CfgNode"):
        assert name in said
    assert "scalar" not in said


class Evil:
    """Its making writes a file."""

    def __init__(self, call: Any, *arguments: str) -> None:
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_does_not_run(legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless it is trusted."""
    evil = Evil(exec, "open('evil', 'w').close()")
    torch.save({"model": golden("sat"), "x": evil}, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    assert imported(tmp_path / "x.pth", "sat") == 0
    assert not (tmp_path / "evil").exists()
    assert "nothing of it was run: builtins.exec" in capsys.readouterr().out
    assert imported(tmp_path / "x.pth", "sat", "trust=true", "overwrite=true") == 0
    assert (tmp_path / "evil").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_file_that_would_run_a_program_is_refused(
    legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"model": golden("sat"), "x": Evil(os.system, f"touch {tmp_path / 'evil'}")}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    assert imported(tmp_path / "x.pth", "sat") == 1
    assert not (tmp_path / "evil").exists()
    error = capsys.readouterr().err
    assert f"cannot be read without running what is in it ({os.system.__module__}.system), or is damaged" in error
    assert "If you trust it as you would a program, and have the packages it needs, add trust=true" in error
    assert not (tmp_path / "x.ckpt").exists()


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (
            lambda folder: released("scm", folder),
            "cam",
            "method=cam: released files of ts_cam, scm, sat, lctr are read",
        ),
        (lambda folder: folder / "gone.pth", "sat", "source: there is no file 'gone.pth'"),
        (lambda folder: released("ts_cam", folder), "scm", "it has no diffusion blocks"),
        (
            lambda folder: released("ts_cam", folder),
            "sat",
            "entries missing: loc_token, loc_embed; entries unknown: none",
        ),
        (lambda folder: released("scm", folder), "ts_cam", "entries unknown: layers.0.thred, "),
        (lambda folder: cut(released("sat", folder), 0.5), "sat", "is not a readable PyTorch file, perhaps cut short"),
        (lambda folder: cut(released("sat", folder), 0.01), "sat", "is not a readable PyTorch file, perhaps cut short"),
        (lambda folder: cut(released("scm", folder), 0.5), "scm", "is not a readable PyTorch file, perhaps cut short"),
        (lambda folder: cut(released("sat", folder), 0), "sat", "is not a readable PyTorch file, perhaps cut short"),
    ],
)
def test_messages(make: Any, method: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert imported(make(tmp_path), method) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.nn.Linear(2, 2), "Of torch.nn.modules.linear.Linear nothing was made"),
        ({"epoch": 3}, "holds no weights: expected a state dict, or one as 'state_dict' or 'model' or"),
        ([1], "found list"),
        ({"model": {"a.weight": torch.zeros(2)}}, "not a released sat model: entry"),
    ],
)
def test_other_files_are_described(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "x.pth")
    assert imported(tmp_path / "x.pth", "sat") == 1
    assert message in capsys.readouterr().err


def test_state_dict_alone_is_as_good(tmp_path: Path) -> None:
    torch.save(golden("sat"), tmp_path / "alone.pth")
    assert imported(tmp_path / "alone.pth", "sat") == 0
    assert read_checkpoint(tmp_path / "alone.ckpt").thresholds == {}


def test_method_is_required_and_files_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = released("sat", tmp_path)
    assert command("import_checkpoint", f"source={path.name}", cwd=tmp_path) == 1
    assert "You must specify 'method'" in capsys.readouterr().err
    (tmp_path / "best_loc.ckpt").write_text("mine")
    assert imported(path, "sat") == 1
    assert "'best_loc.ckpt' exists already: add overwrite=true" in capsys.readouterr().err
    assert (tmp_path / "best_loc.ckpt").read_text() == "mine"


def test_released_width_names_the_backbone(tmp_path: Path) -> None:
    cfg = load_config(
        "method=ts_cam", "backbone=deit_tiny", "backbone.pretrained=false", "dataset=folder", "dataset.root=."
    )
    module = wsolkit.build_module(cfg, ["a", "b"])
    names = {name: name.removeprefix("network.").removeprefix("backbone.network.") for name in module.state_dict()}
    state = {f"module.{names[name]}": value for name, value in module.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    assert command("import_checkpoint", "source=x.pth", "method=ts_cam", cwd=tmp_path) == 0
    localizer = Localizer.from_checkpoint(tmp_path / "x.ckpt", device="cpu")
    assert localizer.backbone == "deit_tiny"
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in localizer.module.state_dict().items())


def test_training_does_not_go_on_from_it(tmp_path: Path) -> None:
    assert imported(released("sat", tmp_path), "sat") == 0
    with pytest.raises(CheckpointError, match="was imported. It holds a model, and no training that could continue"):
        check_resumable(tmp_path / "best_loc.ckpt", load_config("method=sat"))
