"""What a run shows while it goes on and when it has ended: in W&B, TensorBoard and the CSV log."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from wandb_workspaces.reports import v2 as wr
from wandb_workspaces.workspaces import Workspace

from tests.offline import OfflineRun, read_offline
from tests.test_commands import TINY, config, metrics, run
from wsolkit import dashboard, load_config
from wsolkit.dashboard import build_workspace, logged_keys
from wsolkit.errors import ConfigError
from wsolkit.methods.base import WSOLModule
from wsolkit.metrics.errors import ERRORS
from wsolkit.settings.jobs import Job, swept
from wsolkit.train import train
from wsolkit.training import loggers

PROTOCOLS = ("maxboxacc", "maxboxacc_v2")


def rows(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's log: what was logged at a step."""
    with (folder / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_speed_and_memory_are_logged_with_the_losses(tmp_path: Path) -> None:
    train(load_config(*TINY, "trainer.max_epochs=2", "trainer.log_every_n_steps=2"), tmp_path)
    logged = [row for row in rows(tmp_path) if "speed/images_per_second" in row]
    assert [row["step"] for row in logged] == [1, 3, 5]
    assert [row["step"] for row in rows(tmp_path) if "train/loss_step" in row] == [1, 3, 5]
    for row in logged:
        assert 1 < row["speed/images_per_second"] < 1e5
        assert 0.1 < row["memory/process_gib"] < 100


class Reads(TorchDispatchMode):
    """Notes the step of each read of a tensor's value, for which a GPU would have to finish what it has to do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module: WSOLModule | None = None
        self.steps: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.module and self.module.trainer.training:
            self.steps.append(self.module.trainer.global_step)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sat", "scm", "bridging_gap"])
def test_steps_between_two_logs_read_nothing_from_the_device(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress bar included. SGD, because AdamW counts its steps in tensors that are on the CPU anyway."""
    reads, start = Reads(), WSOLModule.on_train_batch_start

    def begin(self: WSOLModule, batch: Any, batch_idx: int) -> None:
        reads.module = self
        start(self, batch, batch_idx)

    monkeypatch.setattr(WSOLModule, "on_train_batch_start", begin)
    settings = ("optimizer=sgd", "trainer.max_epochs=1", "dataset.batch_size=4", "trainer.log_every_n_steps=5")
    own = ["method.fine_tuning.new_from=layer4", "method.warmup_epochs=0"] if method == "bridging_gap" else []
    with reads:
        train(load_config(*TINY, *settings, "trainer.enable_progress_bar=true", f"method={method}", *own), tmp_path)
    assert set(reads.steps) == {5, 10, 12}  # every fifth step, and the end of the epoch


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sweep over two methods, logged everywhere: run directories by method."""
    folder = tmp_path_factory.mktemp("watched")
    loggers = ("logger=[wandb,tensorboard]", "trainer.log_every_n_steps=2", "hydra.sweep.dir=methods")
    run("train", "-m", "method=sat,scm", "method.num_blocks=2", *TINY, *loggers, cwd=folder, jobs=2)
    found = [path.parent for path in (folder / "methods").glob("*/metrics.json")]
    return {yaml.safe_load((path / "config.yaml").read_text())["method"]["name"]: path for path in found}


@pytest.fixture(scope="module")
def offline(sweep: dict[str, Path]) -> dict[str, OfflineRun]:
    return {method: read_offline(folder) for method, folder in sweep.items()}


def test_multirun_makes_a_directory_a_job(sweep: dict[str, Path]) -> None:
    assert sorted(sweep) == ["sat", "scm"]
    assert len({(folder / "metrics.json").read_text() for folder in sweep.values()}) == 2
    for folder in sweep.values():
        assert len(list((folder / "wandb").glob("offline-run-*"))) == 1  # a run of its own for each job


def test_wandb_has_what_there_is_to_watch(offline: dict[str, OfflineRun]) -> None:
    common = {
        *(
            f"val/{protocol}/{name}"
            for protocol in PROTOCOLS
            for name in ("gt_known_loc", "top1_loc", "max_box_acc_v2")
        ),
        *("val/top1_cls", "val/top5_cls", "train/loss_step", "train/loss_epoch", "lr/decay", "lr/no_decay"),
        *("speed/images_per_second", "memory/process_gib", "examples/val"),
        *(f"charts/{protocol}/threshold" for protocol in PROTOCOLS),
        *(f"{kind}" for protocol in PROTOCOLS for kind in (f"images/{protocol}", f"curves/{protocol}_table")),
    }
    own = {
        "sat": {"train/loss_cls_step", "train/loss_area_step", "train/loss_norm_step", "method/map_area_step"}
        | {"method/area_prior_step", "method/map_area_epoch"},
        "scm": {f"method/{what}_{block}_step" for what in ("semantic_weight", "threshold") for block in (1, 2)}
        | {"examples/inside"},
    }
    for method, logged in offline.items():
        assert common | own[method] <= logged.history.keys()


@pytest.mark.parametrize("method", ["sat", "scm"])
def test_wandb_has_the_numbers_of_the_log_and_of_the_result(
    method: str, sweep: dict[str, Path], offline: dict[str, OfflineRun]
) -> None:
    logged = offline[method]
    in_log: dict[str, list[float]] = {}
    for row in rows(sweep[method]):
        for key in row.keys() - {"step", "epoch"}:
            in_log.setdefault(key, []).append(row[key])
    assert len(in_log) > 100
    for key, values in in_log.items():
        assert logged.values(key) == pytest.approx(values, rel=1e-6, nan_ok=True), key
    result = metrics(sweep[method])
    numbers = {name: value for name, value in result.items() if isinstance(value, float)}
    assert {f"test/{name}" for name in numbers} <= logged.history.keys()
    for name, value in numbers.items():
        assert logged.values(f"test/{name}") == [pytest.approx(value, abs=1e-4)], name


def test_validation_is_drawn_against_epochs(sweep: dict[str, Path], offline: dict[str, OfflineRun]) -> None:
    result: Any = metrics(sweep["sat"])
    for name in ("top1_cls", "maxboxacc/max_box_acc", "maxboxacc_v2/pxap"):
        logged = offline["sat"].history[f"val/{name}"]
        assert offline["sat"].steps[f"val/{name}"] == "epoch"
        assert [row["epoch"] for row, _ in logged] == [0, 1]
        assert [value for _, value in logged] == pytest.approx(result[f"epochs/{name}"], abs=1e-4)


def test_sat_s_area_is_beside_its_prior(offline: dict[str, OfflineRun]) -> None:
    areas, priors = (offline["sat"].values(f"method/{name}_step") for name in ("map_area", "area_prior"))
    assert len(areas) == len(priors) == 3
    assert priors == pytest.approx(3 * [offline["sat"].config["method"]["area_prior"]])
    assert all(0 < area < 1 for area in areas)


def test_same_images_are_shown_after_every_epoch(offline: dict[str, OfflineRun]) -> None:
    for logged in offline.values():
        shown = logged.history["examples/val"]
        assert [row["epoch"] for row, _ in shown] == [0, 1]
        labels = [[caption.partition(",")[0] for caption in pictures["captions"]] for _, pictures in shown]
        assert labels[0] == labels[1] == ["red spots", "green spots", "yellow spots"]
        for _, pictures in shown:
            assert all((logged.folder / "files" / file).is_file() for file in pictures["filenames"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_table_of_images_adds_up_to_the_metrics(
    protocol: str, sweep: dict[str, Path], offline: dict[str, OfflineRun]
) -> None:
    for method, folder in sweep.items():
        table, result = offline[method].table(f"images/{protocol}"), metrics(folder)
        assert [row["image"] for row in table] == [f"test/{number:05d}" for number in range(21)]
        errors = Counter(row["error"] for row in table)
        for error in ERRORS:
            assert 100 * errors[error] / 21 == pytest.approx(result[f"{protocol}/error_{error}"], abs=1e-4)
        assert 100 * sum(row["correct"] for row in table) / 21 == pytest.approx(result[f"{protocol}/top1_loc"])
        assert 100 * sum(row["iou"] >= 0.5 for row in table) / 21 == pytest.approx(result[f"{protocol}/gt_known_loc"])
        assert 100 * sum(row["label"] == row["predicted"] for row in table) / 21 == pytest.approx(result["top1_cls"])
        with (folder / "images.csv").open(newline="") as file:
            listed = [row for row in csv.DictReader(file) if row.pop("protocol") == protocol]
        assert listed == [{key: str(value) for key, value in row.items()} for row in table]


def test_table_is_bounded(in_tmp: Path) -> None:
    train(config("num_table_images=5", "trainer.max_epochs=1"), in_tmp)
    with (in_tmp / "images.csv").open(newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [f"test/{n:05d}" for n in (0, 5, 10, 15, 20)]


def test_threshold_curves_are_those_of_the_result(sweep: dict[str, Path], offline: dict[str, OfflineRun]) -> None:
    result: Any = metrics(sweep["scm"])
    points = offline["scm"].table("curves/maxboxacc_table")
    for name in ("gt_known_loc_30", "gt_known_loc_50", "gt_known_loc_70", "top1_loc"):
        line = [point for point in points if point["lineKey"] == name]
        assert [point["step"] for point in line] == pytest.approx(result["maxboxacc/curves/threshold"])
        assert [point["lineVal"] for point in line] == pytest.approx(result[f"maxboxacc/curves/{name}"], abs=1e-4)


def test_runs_of_a_sweep_are_found_by_what_it_varies(offline: dict[str, OfflineRun]) -> None:
    for method, logged in offline.items():
        assert (logged.group, logged.job_type) == (f"{method}_shapes", "train")
        assert logged.tags == ["methods", f"method={method}"]  # and not what all jobs have in common
        assert logged.config["sweep"] == {"name": "methods", "method": method}
        assert logged.config["method"]["num_blocks"] == 2


def test_ready_grids_vary_their_settings(tmp_path: Path) -> None:
    hydra: dict[str, Any] = {
        "sweeper": {"params": {"method.num_blocks": "0,1", "seed": "range(3)", "method.iterations": 4}}
    }
    hydra["overrides"] = {"task": ["optimizer.lr=1e-3,1e-4", "protocol=[maxboxacc,sat]", "dataset.root='/a,b'"]}
    (tmp_path / "multirun.yaml").write_text(json.dumps({"hydra": hydra}))
    given = ["method.num_blocks=1", "seed=2", "method.iterations=4", "optimizer.lr=1e-4", "protocol=[maxboxacc,sat]"]
    Job([*given, "dataset.root='/a,b'"], {}).write(tmp_path / "job")
    assert swept(tmp_path / "job") == {"method.num_blocks": 1, "seed": 2, "optimizer.lr": 1e-4}
    assert swept(tmp_path) == {}


def named(workspace: Workspace) -> list[str]:
    """Every key that a panel names."""
    keys: list[str] = []
    for panel in (panel for section in workspace.sections for panel in section.panels):
        if isinstance(panel, wr.LinePlot):
            keys += [panel.x, *panel.y]
        elif isinstance(panel, wr.MediaBrowser):
            keys += panel.media_keys
        elif isinstance(panel, wr.BarPlot):
            keys += panel.metrics
        elif isinstance(panel, wr.WeavePanelSummaryTable):
            keys.append(panel.table_name)
        else:
            keys.append(panel.query["summaryTable"]["tableKey"])
    return keys


@pytest.mark.parametrize("method", ["sat", "scm"])
def test_dashboard_names_what_the_run_has(method: str, sweep: dict[str, Path], offline: dict[str, OfflineRun]) -> None:
    keys = logged_keys(sweep[method])
    workspace = build_workspace(keys, "me", "wsolkit", "mine", grouped=True)
    assert set(named(workspace)) <= offline[method].history.keys()
    assert workspace._to_model()  # what would be sent
    assert [section.name for section in workspace.sections] == [
        *("Localization", "Classification", "Losses", "Method", "Learning rate", "Speed and memory", "Examples"),
        *("Threshold curves", "Charts", "Images", "Test"),
    ]
    left_out = {
        key for key in offline[method].history if key.startswith(("train/", "method/", "lr", "speed/", "memory/"))
    }
    assert {key for key in left_out - set(named(workspace)) if not key.endswith("_epoch")} == set()


def test_dashboard_is_for_all_runs_in_a_directory(sweep: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sweep["sat"].parent
    assert logged_keys(folder) == logged_keys(sweep["sat"]) | logged_keys(sweep["scm"])
    assert "Method: 3\n" in run("dashboard", str(folder), "save=false", cwd=folder)
    with pytest.raises(ConfigError, match="there is no run in '.*': expected metrics.csv, in it or below"):
        logged_keys(folder / "nothing")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.yaml", None),
        ("config.yaml", b""),
        ("config.yaml", b"a: [\0"),
        ("metrics.json", b'{"a": 1'),
        ("images.csv", b"image\nx\n"),
        ("images.csv", b"protocol\n\xff\n"),
    ],
)
def test_dashboard_names_a_run_that_it_cannot_read(file: str, content: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"epoch,step,val/top1_cls\r\n0,\0")  # as a killed run may leave it
    (tmp_path / "config.yaml").write_text("num_examples: 0")
    assert logged_keys(tmp_path) == {"epoch", "trainer/global_step", "val/top1_cls"}
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=f"the run in '{tmp_path}' cannot be read .*: it has only just begun, or"):
        logged_keys(tmp_path)


def test_tensorboard_has_scalars_and_pictures(sweep: dict[str, Path]) -> None:
    events = EventAccumulator(str(sweep["sat"] / "tensorboard")).Reload()
    tags = events.Tags()
    for row in rows(sweep["sat"]):
        for key, value in row.items():
            if key not in ("step", "epoch"):
                logged = {event.step: event.value for event in events.Scalars(key)}
                assert logged[int(row["step"])] == pytest.approx(value, rel=1e-6, nan_ok=True), key
    examples = [f"examples/val/{number:05d}" for number in (0, 9, 19)]
    assert {*examples, "charts/maxboxacc/threshold", "charts/maxboxacc_v2/errors"} <= set(tags["images"])
    for name in examples:
        assert [(event.step, event.width, event.height) for event in events.Images(name)] == [
            (2, 644, 320),
            (5, 644, 320),
        ]


def test_tensorboard_shows_what_is_resumed_once(in_tmp: Path) -> None:
    """A run goes on from an epoch before the last one that it has logged."""
    settings = ("logger=tensorboard", "resume=auto", "protocol=[maxboxacc]", "num_examples=1")
    last = in_tmp / "checkpoints" / "last.ckpt"
    train(config(*settings, "trainer.max_epochs=1"), in_tmp)
    content = last.read_bytes()
    for _ in range(2):
        last.write_bytes(content)
        train(config(*settings, "trainer.max_epochs=2"), in_tmp)
    events = EventAccumulator(str(in_tmp / "tensorboard")).Reload()
    for name in ("train/loss_epoch", "val/maxboxacc/max_box_acc"):
        assert [event.step for event in events.Scalars(name)] == [2, 5]
    assert [event.step for event in events.Images("examples/val/00000")] == [2, 5]


def test_missing_extras_are_named(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs another package: pip install 'wsolkit\[tensorboard\]'"):
        train(config("logger=tensorboard"), in_tmp)
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs another package: pip install 'wsolkit\[dashboard\]'"):
        dashboard.dashboard(load_config(), in_tmp)
