"""Whole runs, small: train, resume, evaluate, sweep, log."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import DictConfig

from tests.conftest import write_imagenet, write_listed
from tests.fresh import command
from wsolkit import load_config
from wsolkit.checkpoint import Checkpoint, read_checkpoint
from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.reporting.examples import read_examples
from wsolkit.settings.checks import check_config
from wsolkit.settings.compose import plain
from wsolkit.settings.restore import restore
from wsolkit.train import train
from wsolkit.training.report import Report

TINY = (
    "dataset.records.sizes={train: 48, val: 20, test: 21}",
    "dataset.batch_size=16",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
    "num_examples=3",
)


def run(name: str, *arguments: str, cwd: Path, report: bool = False, jobs: int = 0) -> str:
    done = command(name, *arguments, cwd=cwd, report=report, jobs=jobs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(folder: Path) -> dict[str, float]:
    values: dict[str, float] = json.loads((folder / "metrics.json").read_text())
    return values


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory left by the command."""
    folder = tmp_path_factory.mktemp("command")
    out = run("train", "method=ts_cam", *TINY, "hydra.run.dir=run", cwd=folder, report=True)
    assert "ts_cam, vit_micro, shapes; checkpoint selected on the held-out val split" in out
    for line in ("maxboxacc", "center_box", "gaussian", "full_image", "PxAP", "MaxBoxAcc,", "Written to run\n"):
        assert line in out
    opened, next_, *commands = out.splitlines()[-5:]
    assert (opened, next_) == ("Open run/report.html in a browser.", "Next:")
    assert [shlex.split(line, comments=True)[2:] for line in commands] == [
        ["wsolkit.demo", "checkpoint=run/checkpoints/best.ckpt"],
        ["wsolkit.predict", "checkpoint=run/checkpoints/best.ckpt", "source=FOLDER", "output=boxes"],
        ["wsolkit.train", "method=sat", "dataset=shapes"],
    ]
    return folder / "run"


def test_run_directory_holds_what_is_promised(trained: Path) -> None:
    values = metrics(trained)
    for protocol in ("maxboxacc", "maxboxacc_v2"):
        for name in (
            *("gt_known_loc", "gt_known_loc_predicted_class", "top1_loc", "top5_loc", "threshold"),
            *("max_box_acc", "max_box_acc_v2", "max_box_acc_30", "max_box_acc_50", "max_box_acc_70"),
            *("pxap", "peak_iou", "center_box/max_box_acc", "full_image/pxap"),
        ):
            assert 0 <= values[f"{protocol}/{name}"] <= 100, name
        assert values[f"{protocol}/threshold"] < 1
        assert values[f"{protocol}/top1_loc"] <= values[f"{protocol}/top5_loc"] <= values[f"{protocol}/gt_known_loc"]
        assert values[f"{protocol}/gt_known_loc"] <= values[f"{protocol}/max_box_acc"]
        assert 0 <= values[f"{protocol}/peak_threshold"] <= 255
    assert values["top1_cls"] <= values["top5_cls"]
    curves: Any = values
    assert len(curves["maxboxacc/curves/gt_known_loc_50"]) == len(curves["maxboxacc/curves/threshold"]) == 1000
    assert len(curves["class_names"]) == len(curves["maxboxacc/per_class/gt_known_loc"]) == 8
    assert sum(curves["maxboxacc/iou_histogram"]) == 21
    page = (trained / "report.html").read_text()
    for text in ("red spots", f"{values['maxboxacc/max_box_acc']:.1f}", "num_thresholds", "vit_micro", "Worst", "Best"):
        assert text in page, text
    assert (trained / "checkpoints" / "best.ckpt").is_file()
    assert (trained / "checkpoints" / "last.ckpt").is_file()
    assert (trained / "examples.png").read_bytes().startswith(b"\x89PNG")
    examples = read_examples(trained)
    assert [example.image for example in examples] == ["test/00000", "test/00010", "test/00020"]
    assert {example.threshold for example in examples} == {values["maxboxacc/threshold"]}
    assert {example.label for example in examples} < set(curves["class_names"])
    log = (trained / "metrics.csv").read_text().splitlines()
    assert "train/loss_epoch" in log[0]
    assert "val/maxboxacc/max_box_acc" in log[0]
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["method"]["name"] == "ts_cam"
    assert config["backbone"]["image_size"] == 64  # resolved


def test_evaluate_gives_the_metrics_of_the_run(trained: Path) -> None:
    run(
        "evaluate",
        f"checkpoint={trained / 'checkpoints' / 'best.ckpt'}",
        "trainer.enable_progress_bar=false",
        "trainer.accelerator=cpu",
        "hydra.run.dir=evaluation",
        cwd=trained.parent,
        report=True,
    )
    of_the_run = {name: value for name, value in metrics(trained).items() if not name.startswith("epochs/")}
    assert metrics(trained.parent / "evaluation") == of_the_run
    assert (trained.parent / "evaluation" / "examples.png").is_file()
    assert len(read_examples(trained.parent / "evaluation")) == 8


def test_run_keeps_the_numbers_of_every_epoch(trained: Path) -> None:
    values: Any = metrics(trained)
    assert values["epochs/epoch"] == [1, 2]
    assert len(values["epochs/maxboxacc/max_box_acc"]) == len(values["epochs/top1_cls"]) == 2
    assert "epochs/maxboxacc/center_box/max_box_acc" not in values
    assert "Epoch by epoch" in (trained / "report.html").read_text()


def test_best_checkpoint_takes_no_epoch_away() -> None:
    shows = Report(Path(), 0, [], 0, "", "")
    shows.load_state_dict({"epochs": {"epoch": [1, 2], "top1_cls": [10.0, 20.0]}})
    assert shows.epochs["epoch"] == [1, 2]
    shows.load_state_dict({"epochs": {"epoch": [1], "top1_cls": [10.0]}})
    assert shows.state_dict()["epochs"]["top1_cls"] == [10.0, 20.0]


def test_evaluate_takes_protocols_and_settings_of_the_data_set(trained: Path) -> None:
    run(
        "evaluate",
        f"checkpoint={trained / 'checkpoints' / 'last.ckpt'}",
        "protocol=[maxboxacc_v2]",
        "protocol.maxboxacc_v2.num_thresholds=20",
        "selection=test",
        "dataset.records.sizes.test=9",
        "num_examples=0",
        "trainer.enable_progress_bar=false",
        "hydra.run.dir=other",
        cwd=trained.parent,
    )
    values = metrics(trained.parent / "other")
    assert not any(name.startswith("maxboxacc/") for name in values)
    assert values["maxboxacc_v2/gt_known_loc"] == values["maxboxacc_v2/max_box_acc"]  # selected on the split itself
    assert values["maxboxacc_v2/gt_known_loc"] * 9 / 100 == pytest.approx(
        round(values["maxboxacc_v2/gt_known_loc"] * 9 / 100)
    )


def test_checkpoint_says_values_and_never_what_runs(trained: Path) -> None:
    path = trained / "checkpoints" / "best.ckpt"
    checkpoint = read_checkpoint(path)
    assert checkpoint.names() == {
        "method": "ts_cam",
        "backbone": "vit_micro",
        "dataset": "shapes",
        "postprocess": "none",
    }
    assert checkpoint.class_names[0] == "red spots"
    hostile: Any = checkpoint.config
    hostile["method"]["_target_"] = "os.system"
    hostile["method"]["head_init"] = {"_target_": "os.system", "command": "touch evil"}
    hostile["dataset"]["records"]["_target_"] = "os.system"
    hostile["dataset"]["records"]["seed"] = 7
    restored = restore(load_config("method=ts_cam"), checkpoint, [])
    assert restored.method._target_ == "wsolkit.methods.ts_cam.TSCAM"
    assert restored.method.head_init == "default"
    assert restored.dataset.records._target_ == "wsolkit.data.benchmarks.shapes.ShapesRecords"
    assert restored.dataset.records.seed == 7
    assert restore(load_config("method=ts_cam"), checkpoint, ["dataset.records.seed=3"]).dataset.records.seed == 3


def test_place_of_the_data_set_is_the_checkpoint_s_unless_another_is_given() -> None:
    saved = plain(load_config("dataset=listed", "dataset.root=there"))
    checkpoint = Checkpoint(Path("x.ckpt"), {}, saved, ["a", "b"], "", 0)
    with pytest.raises(ConfigError, match=r"dataset\.root"):
        check_config(load_config("dataset=listed"))
    restored = restore(load_config("dataset=listed"), checkpoint, [])
    check_config(restored)
    assert restored.dataset.root == "there"
    assert restored.dataset.records.root == "there"
    assert restore(load_config("dataset=listed"), checkpoint, ["dataset.root=here"]).dataset.records.root == "here"


def test_resume_takes_no_other_run(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="belongs to a run with method=ts_cam, but these settings say sat"):
        train(config("method=sat", f"resume={trained}/checkpoints/last.ckpt"), tmp_path)


def test_evaluate_takes_no_other_method(trained: Path) -> None:
    checkpoint = f"checkpoint={trained / 'checkpoints' / 'best.ckpt'}"
    done = command("evaluate", checkpoint, "method=sat", cwd=trained.parent)
    assert done.returncode == 1
    assert done.stderr == "error: method=sat: the checkpoint's method is ts_cam. Leave the setting out\n"


def test_checkpoint_of_an_unknown_method_is_refused(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    content["wsolkit"]["config"]["method"]["name"] = "mine"
    torch.save(content, tmp_path / "x.ckpt")
    done = command("evaluate", "checkpoint=x.ckpt", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "error: 'x.ckpt' was trained with method=mine, and wsolkit has no file method/mine.yaml: name the folder of YAML "
        "files that has it, as in training, with --config-dir FOLDER\n"
    )


def config(*overrides: str) -> DictConfig:
    return load_config(*TINY, "num_examples=0", "protocol=[maxboxacc]", *overrides)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_has_its_own_order_and_augmentations(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsolkit.methods.sat import SAT

    step, seen = SAT.training_step, []

    def remember(self: SAT, batch: Any, batch_idx: int) -> torch.Tensor:
        seen.append(round(batch["image"].sum().item(), 1))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SAT, "training_step", remember)
    train(config("trainer.max_epochs=3", f"dataset.num_workers={workers}"), tmp_path)
    assert len(seen) == len(set(seen)) == 9  # three epochs of three steps


def test_resume_continues_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the third of four epochs and resumed: the weights and metrics of an unbroken run, bit for bit."""
    settings = ("trainer.max_epochs=4", "schedule.name=cosine", "backbone.drop_path_rate=0.2", "dataset.num_workers=1")
    expected = train(config(*settings), tmp_path / "unbroken")

    from wsolkit.methods.sat import SAT

    step = SAT.training_step

    def interrupted(self: SAT, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.current_epoch == 2 and batch_idx == 1:
            raise Interrupted
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SAT, "training_step", interrupted)
    with pytest.raises(Interrupted):
        train(config(*settings), tmp_path / "broken")
    monkeypatch.undo()
    resumed = train(config(*settings, f"resume={tmp_path}/broken/checkpoints/last.ckpt"), tmp_path / "resumed")
    assert resumed == expected
    unbroken = weights(tmp_path / "unbroken")
    for name, value in weights(tmp_path / "resumed").items():
        assert torch.equal(value, unbroken[name]), name


def test_seeds_decide(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config("trainer.max_epochs=1", f"seed={seed}"), tmp_path / folder)
    first, again, other = (weights(tmp_path / folder) for folder in "abc")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_checkpoint_is_evaluated_on_fewer_classes_than_it_knows(trained: Path, tmp_path: Path) -> None:
    write_listed(tmp_path / "data", {"train": 2, "val": 5}, (64, 64))
    run(
        *("evaluate", f"checkpoint={trained}/checkpoints/best.ckpt", "dataset=listed", "dataset.root=data"),
        *("dataset.image_size=64", "dataset.resize=72", "trainer.accelerator=cpu", "hydra.run.dir=out"),
        cwd=tmp_path,
        report=True,
    )
    values: Any = metrics(tmp_path / "out")
    assert len(values["class_names"]) == len(values["maxboxacc/per_class/images"]) == 8
    assert "red spots" in (tmp_path / "out" / "report.html").read_text()


def test_best_checkpoint_is_by_the_first_protocol(tmp_path: Path) -> None:
    cfg = load_config(*TINY, "protocol=[sat]", "trainer.max_epochs=1")
    values = train(cfg, tmp_path)
    assert "sat/max_box_acc" in values
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


def test_test_split_may_select(tmp_path: Path) -> None:
    values = train(config("selection=test", "trainer.max_epochs=1"), tmp_path)
    assert values["maxboxacc/gt_known_loc"] == values["maxboxacc/max_box_acc"]


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.precision=bf16-mixed"],
        pytest.param(["trainer.precision=bf16-true", "num_examples=2"], marks=pytest.mark.report),
        ["logger=wandb"],
        ["trainer.gradient_clip_val=0.1"],
        ["trainer.accumulate_grad_batches=2"],
        ["schedule.name=step", "schedule.milestones=[1]"],
    ],
)
def test_training_settings_run(settings: list[str], tmp_path: Path) -> None:
    values = train(config(*settings), tmp_path)
    assert values["top5_cls"] > 0


def test_schedule_reaches_the_optimizer(tmp_path: Path) -> None:
    train(
        config(
            "schedule.name=step",
            "schedule.milestones=[1]",
            "schedule.warmup_epochs=0",
            "optimizer.lr=1e-3",
            "trainer.log_every_n_steps=1",
        ),
        tmp_path,
    )
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("lr/decay")
    rates = [float(line.split(",")[column]) for line in lines if line.split(",")[column]]
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 3)


@pytest.fixture(scope="module")
def scm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SCM, with images chosen by name."""
    folder = tmp_path_factory.mktemp("scm")
    run(
        "train",
        "method=scm",
        "method.num_blocks=2",
        "examples=[test/00003,test/00000]",
        *TINY,
        "hydra.run.dir=run",
        cwd=folder,
    )
    return folder / "run"


def test_scm_shows_what_its_blocks_do(scm: Path) -> None:
    with np.load(scm / "inside.npz") as maps:
        assert maps["image"].tolist() == ["test/00003", "test/00000"]
        assert maps["S"].shape == maps["F"].shape == (2, 3, 8, 8)
        assert maps["F"][:, 0].min() == 0
        assert maps["F"][:, 0].max() == 1
    assert (scm / "inside.png").read_bytes().startswith(b"\x89PNG")
    header = (scm / "metrics.csv").read_text().splitlines()[0].split(",")
    for level in (1, 2):
        assert {f"method/semantic_weight_{level}_epoch", f"method/threshold_{level}_epoch"} <= set(header)


def test_maps_of_every_pair_are_one_command(scm: Path) -> None:
    run(
        *("evaluate", "sweep=scm_pairs", f"checkpoint={scm}/checkpoints/best.ckpt", "protocol=[maxboxacc]"),
        *("method.semantic_level=0,2", "method.attention_level=0", "trainer.enable_progress_bar=false"),
        *("hydra.sweep.dir=pairs", "num_examples=0"),
        cwd=scm.parent,
        jobs=2,
    )
    folders = sorted(path.parent for path in (scm.parent / "pairs").glob("*/metrics.json"))
    for folder, level in zip(folders, (0, 2), strict=True):
        assert folder.name == f"semantic_level_{level}"
    first = metrics(folders[0])
    assert first["maxboxacc/max_box_acc"] == metrics(scm)["maxboxacc/max_box_acc"]  # S^0 · F^0 is the method's own
    assert first["top1_cls"] == metrics(folders[1])["top1_cls"]
    assert first["maxboxacc/pxap"] != metrics(folders[1])["maxboxacc/pxap"]


def test_sweep_over_checkpoints(trained: Path) -> None:
    both = ",".join(str(trained / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    run(
        *("evaluate", "-m", f"checkpoint={both}", "protocol=[maxboxacc]", "hydra.sweep.dir=both", "num_examples=0"),
        cwd=trained.parent,
        jobs=2,
    )
    assert len(list((trained.parent / "both").glob("*/metrics.json"))) == 2


def test_examples_must_exist(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="examples: the test split has no image 'x'. It has 'test/00000', for instance"
    ):
        train(config("examples=[x]"), tmp_path)


def test_wandb_gets_curves_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(config("logger=wandb", "trainer.max_epochs=1", "num_examples=3"), tmp_path)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert len(list((folder / "files" / "media" / "images").glob("examples/val_*.png"))) == 3
    content = next(folder.glob("*.wandb")).read_bytes()
    for chart in ("threshold", "iou", "errors", "size", "pixels"):
        assert list((folder / "files" / "media" / "images" / "charts" / "maxboxacc").glob(f"{chart}_*.png"))
    for key in (b"val/maxboxacc/max_box_acc", b"train/loss_epoch", b"test/top1_cls"):
        assert key in content
    assert (tmp_path / "metrics.csv").is_file()


def test_imagenet_trains_from_its_official_layout(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "data")
    cfg = load_config(
        *(
            "dataset=imagenet",
            f"dataset.root={root}",
            "dataset.num_classes=2",
            "dataset.expected=null",
            "dataset.held_out=false",
            "dataset.batch_size=4",
            "dataset.num_workers=0",
        ),
        *("backbone=vit_micro", "dataset.image_size=32", "dataset.resize=36", "trainer.enable_progress_bar=false"),
    )
    values = train(cfg, tmp_path / "run")
    assert "maxboxacc/max_box_acc" in values
    assert "maxboxacc/pxap" not in values  # no masks


@pytest.mark.report
@pytest.mark.parametrize("method", ["cam", "spa", "bridging_gap"])
def test_methods_on_convolutional_networks_run_like_the_others(method: str, in_tmp: Path) -> None:
    cfg = load_config(f"method={method}", *TINY, *([] if method == "cam" else ["method.fine_tuning.new_from=layer4"]))
    train(cfg, in_tmp / "run")
    values: Any = metrics(in_tmp / "run")
    assert 0 <= values["maxboxacc/max_box_acc"] <= 100
    assert 0 <= values["maxboxacc/pxap"] <= 100
    for kind in ("object", "background"):
        assert sum(values[f"norms/{kind}"]) == pytest.approx(100, abs=0.01)  # rounded values
    assert "Feature norms" in (in_tmp / "run" / "report.html").read_text()
    names = np.load(in_tmp / "run" / "inside.npz")
    assert {"norm", "similarity", "CAM"} <= set(names) - {"image"}
    terms = {"cam": [], "spa": ["cls", "activation"], "bridging_gap": ["cls", "drop", "similarity", "norm"]}[method]
    head = (in_tmp / "run" / "metrics.csv").read_text().splitlines()[0]
    assert all(f"train/loss_{term}_epoch" in head for term in terms)


def test_postprocess_refines_the_maps_of_a_trained_network(in_tmp: Path) -> None:
    run("train", "method=cam", *TINY, "hydra.run.dir=cam", cwd=in_tmp)
    checkpoint = "checkpoint=cam/checkpoints/best.ckpt"
    common = ("trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "num_examples=0")
    run("evaluate", checkpoint, *common, "+postprocess=scg", "hydra.run.dir=refined", cwd=in_tmp, report=True)
    run("evaluate", checkpoint, *common, "hydra.run.dir=plain", cwd=in_tmp)
    of_the_run = {name: value for name, value in metrics(in_tmp / "cam").items() if not name.startswith("epochs/")}
    assert metrics(in_tmp / "plain") == of_the_run
    assert "cam + scg, cnn_micro, shapes" in (in_tmp / "refined" / "report.html").read_text()
    refined = metrics(in_tmp / "refined")
    assert refined["top1_cls"] == of_the_run["top1_cls"]
    assert refined["maxboxacc/pxap"] != of_the_run["maxboxacc/pxap"]
    assert yaml.safe_load((in_tmp / "refined" / "config.yaml").read_text())["postprocess"]["name"] == "scg"


def test_checkpoint_brings_its_postprocess(in_tmp: Path) -> None:
    run("train", "method=spa", *TINY, "postprocess.object_threshold=0.3", "hydra.run.dir=spa", cwd=in_tmp)
    common = ("checkpoint=spa/checkpoints/best.ckpt", "trainer.enable_progress_bar=false", "num_examples=0")
    run("evaluate", *common, "hydra.run.dir=same", cwd=in_tmp)
    run("evaluate", *common, "postprocess=none", "hydra.run.dir=plain", cwd=in_tmp)
    of_the_run = {name: value for name, value in metrics(in_tmp / "spa").items() if not name.startswith("epochs/")}
    assert metrics(in_tmp / "same") == of_the_run
    assert yaml.safe_load((in_tmp / "same" / "config.yaml").read_text())["postprocess"]["object_threshold"] == 0.3
    assert metrics(in_tmp / "plain")["maxboxacc/pxap"] != of_the_run["maxboxacc/pxap"]
