"""The report of a sweep: tables, averages, plots, and what becomes of jobs that are not finished."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from omegaconf import OmegaConf

from tests import fresh
from wsolkit.errors import ConfigError
from wsolkit.reporting.charts import Shown
from wsolkit.reporting.examples import read_examples, write_examples
from wsolkit.settings.jobs import Job, State, duration
from wsolkit.sweep_report import gather
from wsolkit.sweeps.charts import axis, charts, file_name, line_chart, title
from wsolkit.sweeps.tables import Row, Run, Sweep, as_value, cells, counts, group_runs, markdown, remarks

SETTINGS = {
    "seed": 0,
    "method": {"_target_": "wsolkit.methods.sat.SAT", "name": "sat", "num_blocks": 3},
    "backbone": {"name": "vit_micro"},
    "dataset": {"name": "shapes"},
    "optimizer": {"lr": 1e-3},
    "trainer": {"_target_": "lightning.Trainer", "max_epochs": 5},
    "protocol": {"maxboxacc": {"threshold": None}, "maxboxacc_v2": {"threshold": None}},
}


def add_job(
    sweep: Path,
    name: str,
    *overrides: str,
    accuracy: float | None = None,
    state: State = "finished",
    error: str = "",
    started: float = 0.0,
) -> Path:
    """Write what a job leaves: its record, and if it has an accuracy, metrics."""
    folder = sweep / name
    Job(list(overrides), SETTINGS, state, started, 100.0, error).write(folder)
    if accuracy is not None:
        metrics = {
            "top1_cls": accuracy + 20,
            "maxboxacc/max_box_acc": accuracy,
            "maxboxacc/top1_loc": accuracy - 5,
            "maxboxacc/threshold": accuracy / 1000,
            "maxboxacc/pxap": None,  # 0/0
            "maxboxacc/curves/threshold": [0.0, 0.5],
            "class_names": ["a", "b"],
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two methods with two seeds each; the last job failed, and sat is the default that two jobs do not name."""
    folder = tmp_path / "my sweep, 1"
    add_job(folder, "a", "seed=0", "trainer.max_epochs=5", accuracy=60.0)
    add_job(folder, "b", "seed=1", "trainer.max_epochs=5", accuracy=64.0)
    add_job(folder, "c", "method=ts_cam", "seed=0", "trainer.max_epochs=5", accuracy=50.0)
    add_job(folder, "d", "method=ts_cam", "seed=1", "trainer.max_epochs=5", state="failed", error="error: no [memory]")
    return folder


def add_run(folder: Path, *overrides: str, accuracy: float | None = None, **settings: Any) -> Path:
    """Write what a run leaves that no sweep started: Hydra's files, its settings as used, and perhaps metrics."""
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(list(overrides), folder / ".hydra" / "overrides.yaml")
    OmegaConf.save(SETTINGS, folder / ".hydra" / "config.yaml")
    OmegaConf.save({**SETTINGS, **settings}, folder / "config.yaml")
    if accuracy is not None:
        (folder / "metrics.json").write_text(json.dumps({"maxboxacc/max_box_acc": accuracy}))
    return folder


def add_pictures(folder: Path) -> None:
    image, score_map, box = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8)), np.array([[0, 0, 3, 7]])
    write_examples(folder, [Shown("test/1", image, score_map, box, box, "a", "b", 1.0)], "maxboxacc", 0.3)


def grid(*keys: str, shape: tuple[int, ...], seeds: int = 1) -> Sweep:
    """A finished sweep over numbers from 1 for each key."""
    runs = []
    for number, place in enumerate(np.ndindex(*shape)):
        overrides = {key: index + 1 for key, index in zip(keys, place, strict=True)}
        for seed in range(seeds):
            metrics = {"maxboxacc/max_box_acc": 50.0 + number + 2 * seed}
            runs.append(Run(f"{number}_{seed}", "finished", {**overrides, "seed": seed}, SETTINGS, metrics))
    return group_runs(runs)


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return fresh.command("sweep_report", *arguments, cwd=cwd)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_files_may_begin_with_a_byte_order_mark(sweep: Path) -> None:
    add_run(sweep / "e", "seed=3", accuracy=3.0)
    add_pictures(sweep / "a")
    before = gather(sweep)
    for path in sorted(sweep.rglob("*")):
        if path.suffix in (".json", ".yaml"):
            path.write_text(path.read_text(), encoding="utf-8-sig")
    assert gather(sweep) == before
    assert len(read_examples(sweep / "a")) == 1


def test_command_writes_and_prints_the_report(sweep: Path) -> None:
    done = command(sweep.name, cwd=sweep.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "4 jobs: 3 finished, 1 failed",
        "Same in all jobs: backbone=vit_micro, dataset=shapes, trainer.max_epochs=5",
    ]
    for text in ("62.0 ± 2.8", "1 of 2", "failed: d, after 100 s: no [memory]", "plots: 3"):  # std of 60, 64: 2√2
        assert text in done.stdout

    report = (sweep / "sweep.md").read_text()
    assert "| method | seeds | maxboxacc/max_box_acc | maxboxacc/top1_loc | top1_cls | time per run |" in report
    assert "| sat | 2 | 62.0 ± 2.8 | 57.0 ± 2.8 | 82.0 ± 2.8 | 100 s |" in report
    assert "| ts_cam | 1 of 2 | 50.0 | 45.0 | 70.0 | 100 s |" in report
    assert "| d | failed | after 100 s: no [memory] |" in report

    runs = table(sweep / "sweep.csv")
    assert [(run["job"], run["state"], run["method"], run["seed"]) for run in runs] == [
        ("a", "finished", "sat", "0"),
        ("b", "finished", "sat", "1"),
        ("c", "finished", "ts_cam", "0"),
        ("d", "failed", "ts_cam", "1"),
    ]
    assert [run["maxboxacc/threshold"] for run in runs] == ["0.06", "0.064", "0.05", ""]
    assert {"seconds", "top1_cls"} < runs[0].keys()
    assert not {"class_names", "maxboxacc/curves/threshold", "maxboxacc/pxap"} & runs[0].keys()

    sat, ts_cam = table(sweep / "sweep_mean.csv")
    assert float(sat["maxboxacc/max_box_acc_mean"]) == 62
    assert float(sat["maxboxacc/max_box_acc_std"]) == pytest.approx(8**0.5)
    assert (ts_cam["jobs"], ts_cam["runs"]) == ("2", "1")
    assert (ts_cam["maxboxacc/max_box_acc_std"], ts_cam["maxboxacc/max_box_acc_count"]) == ("", "1")

    plots = sorted(path.name for path in sweep.glob("*.png"))
    expected = [f"{metric}_by_method.png" for metric in ("maxboxacc_max_box_acc", "maxboxacc_top1_loc", "top1_cls")]
    assert plots == expected
    for name in plots:
        assert f"![{name}]({name})" in report
        with PIL.Image.open(sweep / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10  # something is drawn

    files = {"a", "b", "c", "d", "sweep.md", "sweep.csv", "sweep_mean.csv", *plots}
    assert {path.name for path in sweep.iterdir()} == files
    assert list(sweep.parent.iterdir()) == [sweep]


def test_settings_of_the_command(sweep: Path) -> None:
    done = command(sweep, "metrics=top1_cls", "keys=[method]", "x=method", "output=out/report", cwd=sweep.parent)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (sweep.parent / "out" / "report").iterdir()}
    assert names == {"sweep.md", "sweep.csv", "sweep_mean.csv", "top1_cls_by_method.png"}
    assert not list(sweep.glob("*.png"))


def test_rows_are_sorted_by_a_metric() -> None:
    runs = [
        Run(name, "finished", {"method": name}, {"method": {"name": name}}, metrics, seconds)
        for name, metrics, seconds in [
            ("a", {"top1_cls": 50.0}, 60.0),
            ("b", {}, None),
            ("c", {"top1_cls": 70.0}, 90.0),
        ]
    ]
    heading, rows = cells(group_runs(runs, sort="top1_cls"))
    assert heading == ["method", "runs", "top1_cls", "time per run"]
    assert rows == [["c", "1", "70.0", "90 s"], ["a", "1", "50.0", "60 s"], ["b", "1", "–", "–"]]
    with pytest.raises(ConfigError, match="sort: no job has a number 'top_cls'; did you mean top1_cls"):
        group_runs(runs, sort="top_cls")


def test_runs_with_a_common_image_are_compared(sweep: Path) -> None:
    for name in "abc":
        add_pictures(sweep / name)
    (sweep / "b" / "examples" / "examples.json").write_text("[")
    done = command(sweep, cwd=sweep.parent)
    assert done.returncode == 0, done.stderr
    assert "sweep_mean.csv, comparison.html; plots: 3" in done.stdout
    assert "[comparison.html](comparison.html)" in (sweep / "sweep.md").read_text()
    page = (sweep / "comparison.html").read_text()
    assert f"<title>{sweep.name}: the same images side by side</title>" in page
    for text in ("62.0 ± 2.8", "1 of 2", "seed=0", "IoU <b>1.00</b>, taken for b", "ts_cam"):
        assert text in page

    (sweep / "a" / "examples" / "examples.json").write_text("[")
    done = command(sweep, "output=other", cwd=sweep.parent)  # ts_cam alone has pictures
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pictures left out: ") == 2
    assert not (sweep.parent / "other" / "comparison.html").exists()


def test_runs_that_no_sweep_started(tmp_path: Path) -> None:
    add_run(tmp_path / "sat", "method=sat", "trainer.max_epochs=5", accuracy=60.0)
    # The settings as Hydra composed them, SETTINGS, do not know what is in the checkpoint: config.yaml does.
    method = {"name": "ts_cam", "head": 2}
    given = ("method=ts_cam", "checkpoint=runs/a.ckpt")
    checkpoint = {"method": method, "checkpoint": "runs/a.ckpt", "score_maps": None, "postprocess": {}}
    add_run(tmp_path / "evaluated", *given, "save_maps=/maps", accuracy=50.0, **checkpoint)
    refined = add_run(tmp_path / "refined", *given, "+postprocess=crf", accuracy=55.0, **checkpoint)
    add_run(tmp_path / "maps", "score_maps=/maps", accuracy=50.0, score_maps="/maps", checkpoint=None)
    add_run(tmp_path / "stopped", "method=scm")
    found = group_runs(gather(tmp_path))
    assert (found.keys, set(found.pooled)) == (
        ["method", "postprocess", "trainer.max_epochs"],
        {"checkpoint", "save_maps", "score_maps"},
    )
    assert "Averaged over" not in markdown(found)
    assert cells(found)[1] == [
        ["sat", "–", "5", "1", "60.0"],
        ["scm", "–", "5", "0 of 1", "–"],
        ["score maps", "–", "–", "1", "50.0"],
        ["ts_cam", "crf", "–", "1", "55.0"],
        ["ts_cam", "none", "–", "1", "50.0"],
    ]
    by_head = group_runs(gather(tmp_path), ["method.head"])
    assert [(row.values, len(row.runs)) for row in by_head.rows] == [((2,), 2), ((None,), 3)]
    (averaged,) = [line for line in markdown(by_head).splitlines() if line.startswith("Averaged over: ")]
    assert {"method", "postprocess"} < set(averaged.removeprefix("Averaged over: ").split(", "))

    (refined / "config.yaml").write_text("a: [")
    (note,) = [run.note for run in gather(tmp_path) if run.state == "damaged"]
    assert str(refined / "config.yaml") in note


def test_checkpoints_of_one_method_are_rows(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        path = f"runs/{name}.ckpt"
        add_run(
            tmp_path / name, f"checkpoint={path}", f"save_maps=maps/{name}", accuracy=60.0 + number, checkpoint=path
        )
    found = group_runs(gather(tmp_path))
    assert found.keys == ["checkpoint"]
    assert cells(found)[1] == [["runs/a.ckpt", "1", "60.0"], ["runs/b.ckpt", "1", "61.0"]]


def test_jobs_that_evaluate_have_the_settings_of_their_checkpoint(tmp_path: Path) -> None:
    folder = add_job(tmp_path, "a", "checkpoint=a.ckpt", accuracy=60.0)
    Job(["checkpoint=a.ckpt"], {**SETTINGS, "checkpoint": "a.ckpt"}, "finished").write(folder)
    OmegaConf.save({"method": {"name": "sat", "num_blocks": 6}, "checkpoint": "a.ckpt"}, folder / "config.yaml")
    (run,) = gather(tmp_path)
    assert run.value("method.num_blocks") == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required and not given: directory"),
        (["nowhere"], "there is no directory 'nowhere'"),
        (["."], "there is no job in '.'"),
        (["-m", "sweep"], "leave out -m"),
        (["sweep", "metrics=pxap"], "no job has a number 'pxap'"),
        (["sweep", "metrics=max_box_acc"], "did you mean maxboxacc/max_box_acc"),
        (["sweep", "metrics=maxboxacc/max_boxacc"], "did you mean maxboxacc/max_box_acc"),
        (["sweep", "metrics=[1]"], "metrics=[1]: expected names, such as metrics=[a,b]"),
        (["sweep", "keys=optimiser.lr"], "no job has a setting 'optimiser.lr'; did you mean optimizer.lr"),
        (["sweep", "keys=num_blocks"], "did you mean method.num_blocks?"),
        (["sweep", "keys=seed"], "'seed' is what the metrics are averaged over"),
        (["sweep", "x=seed"], "x: 'seed' is not one of the keys in which the rows differ; choose from: method"),
        (["sweep", "output=file"], "cannot be written to 'file'"),
        (["sweep", "metric=top1_cls"], "there is no setting 'metric' (did you mean 'metrics'?)"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    if "." not in arguments:
        add_job(tmp_path / "sweep", "a", "method=sat", "seed=0", accuracy=60.0)
        add_job(tmp_path / "sweep", "b", "method=ts_cam", "seed=0", accuracy=50.0)
    (tmp_path / "file").touch()
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()
    assert not (tmp_path / "multirun").exists()


def test_question_is_answered_without_torch(sweep: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['wsolkit.sweep_report', sys.argv[1]]\n"
        "runpy.run_module('wsolkit.sweep_report', run_name='__main__', alter_sys=True)\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(sweep)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_states_are_told_apart(tmp_path: Path) -> None:
    now = time.time()
    add_job(tmp_path, "nested/finished", "seed=0", accuracy=60.0)
    add_job(tmp_path, "failed", "seed=1", state="failed", error="out of memory | 2 GiB")
    add_job(tmp_path, "running", "seed=2", state="running", started=now - 720)
    silent = add_job(tmp_path, "silent", "seed=3", state="running", started=now - 7200)
    os.utime(silent / "job.json", (now - 3600, now - 3600))
    add_job(tmp_path, "stopped", "seed=4", state="interrupted", error="stopped from outside")
    found = group_runs(gather(tmp_path))
    assert counts(found.runs) == "5 jobs: 1 finished, 1 failed, 1 running, 2 interrupted"
    assert cells(found)[1] == [["1 of 5", "60.0", "55.0", "80.0", "100 s"]]
    report = markdown(found)
    assert "| failed | failed | after 100 s: out of memory \\| 2 GiB |" in report
    assert ", for 12 min |" in report
    assert ", stopped from outside |" in report
    assert "nested/finished" not in report


def test_nothing_finished_yet(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    add_job(folder, "a", "method=sat", state="running", started=time.time())
    add_job(folder, "b", "method=ts_cam", state="failed", error="error: no memory")
    done = command(folder, "x=method", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 jobs: 1 failed, 1 running\n")
    assert "No job is finished yet" in done.stdout
    assert "failed: b, after 100 s: no memory" in done.stdout
    assert {path.name for path in folder.iterdir()} == {"a", "b", "sweep.md", "sweep.csv"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("job.json", "{", "damaged"),
        ("job.json", "[]", "damaged"),
        ("job.json", '{"overrides": null, "settings": {"seed": 0}}', "a field is missing or of a wrong type"),
        ("job.json", '{"overrides": ["a b"], "settings": {"seed": 0}, "state": "failed"}', "overrides cannot be read"),
        ("metrics.json", '{"top1_cls": ', "damaged"),
        ("metrics.json", "[1, 2]", "expected an object of metrics"),
    ],
)
def test_damaged_files_are_named_and_lose_nothing_else(file: str, content: str, message: str, sweep: Path) -> None:
    (sweep / "a" / file).write_text(content)
    found = group_runs(gather(sweep))
    assert counts(found.runs) == "4 jobs: 2 finished, 1 failed, 1 damaged"
    assert cells(found)[1][0][2] == "64.0"
    assert str(sweep / "a" / file) in found.runs[0].note
    assert message in found.runs[0].note


def test_sweeps_of_older_versions_have_hydra_s_files_only(tmp_path: Path) -> None:
    for number, method in enumerate(("sat", "ts_cam", "ts_cam")):
        folder = tmp_path / f"{number}" / ".hydra"
        folder.mkdir(parents=True)
        OmegaConf.save([f"method={method}", "seed=0", "hydra.sweep.dir=x"], folder / "overrides.yaml")
        OmegaConf.save({"method": {"name": method}, "lr": "${lr0}", "lr0": 0.1, "seed": 0}, folder / "config.yaml")
    (tmp_path / "0" / "metrics.json").write_text('{"top1_cls": 90.0}')
    (tmp_path / "1" / "metrics.json").write_text('{"top1_cls": 80.0}')
    found = group_runs(gather(tmp_path))
    assert found.keys == ["method"]
    assert cells(found)[1] == [["sat", "1", "90.0"], ["ts_cam", "1 of 2", "80.0"]]
    assert found.runs[0].value("lr") == 0.1
    assert counts(found.runs) == "3 jobs: 2 finished, 1 unfinished"
    assert found.runs[2].note == "no job.json says how it ended"


def test_jobs_on_different_classes_are_said_to_be() -> None:
    def remarks_on(*classes: tuple[str, ...]) -> list[str]:
        settings = {"dataset": {"name": "folder"}}
        runs = [
            Run(str(place), "finished", {}, settings, {"top1_cls": 1.0}, classes=c) for place, c in enumerate(classes)
        ]
        return [line for line in remarks(group_runs(runs)) if "classes" in line]

    assert remarks_on(("a", "b"), ("a", "b"), ()) == []
    assert remarks_on(("a", "b"), ("a", "b", "c")) == [
        "Not all jobs on folder tell the same classes apart: there are lists of 2, 3"
    ]


def test_a_seed_twice_counts_as_runs(sweep: Path) -> None:
    add_job(sweep, "again", "seed=0", "trainer.max_epochs=5", accuracy=62.0)
    found = group_runs(gather(sweep))
    assert found.unit == "runs"
    assert cells(found)[1][0] == ["sat", "3", "62.0 ± 2.0", "57.0 ± 2.0", "82.0 ± 2.0", "100 s"]
    assert "over runs" in markdown(found)


def test_rows_are_sorted_and_settings_that_are_not_keys_are_averaged_over() -> None:
    def run(name: str, lr: float, depth: str) -> Run:
        return Run(name, "finished", {"optimizer.lr": lr, "depth": depth, "seed": 0}, SETTINGS, {"top1_cls": lr})

    runs = [run("a", 10, "[16,4]"), run("b", 9, "[8,8]"), run("c", 9, "[16,4]"), run("d", 0.5, "[16,4]")]
    assert [row.values for row in group_runs(runs).rows] == [
        (0.5, "[16,4]"),
        (9, "[16,4]"),
        (9, "[8,8]"),
        (10, "[16,4]"),
    ]
    found = group_runs(runs, ["depth"])
    assert found.pooled == ["optimizer.lr"]
    assert "Averaged over: optimizer.lr" in markdown(found)
    assert [len(row.runs) for row in found.rows] == [3, 1]
    assert found.unit == "runs"


def test_settings_are_found_by_name() -> None:
    run = Run("a", "finished", {"optimizer.lr": 0.5, "recipe": None}, SETTINGS)
    assert run.value("optimizer.lr") == 0.5  # given
    assert run.value("trainer.max_epochs") == 5
    assert run.value("method") == "sat"
    assert run.value("protocol") == "[maxboxacc,maxboxacc_v2]"
    assert run.value("protocol.maxboxacc.threshold") == "null"
    assert [run.value(key) for key in ("trainer", "recipe", "nothing", "seed.nothing")] == [None] * 4
    assert Run("a", "finished", {}, {"postprocess": {}}).value("postprocess") == "none"
    assert as_value([16, 4, [True, None]]) == "[16,4,[true,null]]"
    assert as_value({"train": 48, "val": 20}) == "{train:48,val:20}"


def test_metrics_that_some_runs_lack_say_so() -> None:
    runs = [Run(f"{seed}", "finished", {"seed": seed}, SETTINGS, {"top1_cls": 80.0 + seed}) for seed in range(2)]
    runs.append(Run("2", "finished", {"seed": 2}, SETTINGS, {"threshold": 0.25}))
    found = group_runs(runs, metrics=["top1_cls", "threshold"])
    assert cells(found)[1] == [["3", "80.5 ± 0.7 (2)", "0.250 (1)"]]
    assert Row((), runs).average("nothing") is None
    with pytest.raises(ConfigError, match="none of the usual metrics is there"):
        group_runs(runs[2:])


@pytest.mark.parametrize(
    ("values", "places", "scale", "ordered"),
    [
        ([3, 1, 2, 1], [1, 2, 3], "linear", True),
        ([1e-4, 1e-3, 1e-2], [1e-4, 1e-3, 1e-2], "log", True),
        ([0, 1e-4, 1], [0, 1, 2], "linear", True),  # too close for their labels
        (["b", 2, "a", None], [0, 1, 2, 3], "linear", False),
        ([5], [0], "linear", True),
    ],
)
def test_values_on_an_axis(values: list[float | str | None], places: list[float], scale: str, ordered: bool) -> None:
    found = axis(values)
    assert (list(found.places.values()), found.scale, found.ordered, found.ticks) == (places, scale, ordered, True)
    assert not axis([number / 7 for number in range(11)]).ticks


def test_plots_have_the_mean_the_spread_and_each_run() -> None:
    figure = line_chart(grid("a", "b", shape=(3, 2), seeds=2), "maxboxacc/max_box_acc", "a")
    assert figure is not None
    axes: Any = figure.axes[0]
    lines, dots = axes.containers, [line for line in axes.lines if line.get_alpha()]
    assert [list(container.lines[0].get_ydata()) for container in lines] == [[51, 53, 55], [52, 54, 56]]
    bars = lines[0].lines[2][0].get_segments()
    assert np.ptp(bars[0][:, 1]) == pytest.approx(2 * 2**0.5)  # the std of 50 and 52 is √2
    assert sorted(y for line in dots for y in line.get_ydata()) == sorted([*range(50, 56), *range(52, 58)])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "3"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["1", "2"]
    assert title("maxboxacc/max_box_acc") == "MaxBoxAcc (%) under maxboxacc"
    assert title("sat/threshold") == "threshold under sat"


@pytest.mark.parametrize(
    ("shape", "panels", "lines"),
    [
        ((2, 8), 1, 8),
        ((2, 9), 9, 1),
        ((2, 2, 9), 9, 2),  # of the other two keys, the one with fewer values stays
        ((2, 3, 4), 3, 4),  # three panels rather than four
    ],
)
def test_more_than_eight_lines_become_panels(shape: tuple[int, ...], panels: int, lines: int) -> None:
    figure = line_chart(grid(*"abc"[: len(shape)], shape=shape), "maxboxacc/max_box_acc", "a")
    assert figure is not None
    assert [len(axes.containers) for axes in figure.axes] == [lines] * panels


def test_random_search_is_a_cloud_of_points() -> None:
    runs = [
        Run(f"{number}", "finished", {"lr": 10.0**-number, "decay": number / 7}, SETTINGS, {"top1_cls": float(number)})
        for number in range(12)
    ]
    found = group_runs(runs)
    figure = line_chart(found, "top1_cls", "lr")
    assert figure is not None
    points: Any = figure.axes[0].containers[0]
    assert sorted(points.lines[0].get_ydata()) == list(range(12))
    assert set(charts(found)) == {"top1_cls_by_lr", "top1_cls_by_decay"}  # too sparse for a heat map


def test_two_keys_are_a_heat_map() -> None:
    drawn = charts(grid("a", "method.b", shape=(3, 4)))
    names = [file_name("maxboxacc/max_box_acc", *keys) for keys in (["a"], ["method.b"], ["a", "method.b"])]
    assert list(drawn) == names
    assert names[2] == "maxboxacc_max_box_acc_by_a_and_method.b"
    axes = drawn[names[2]].axes[0]
    assert [text.get_text() for text in axes.texts] == [f"{50 + 4 * a + b:.1f}" for b in range(4) for a in range(3)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("a", "method.b")
    smallest = charts(grid("a", "method.b", shape=(2, 2)))
    assert [text.get_text() for text in smallest[names[2]].axes[0].texts] == ["50.0", "52.0", "51.0", "53.0"]
    turned = charts(grid("a", "method.b", shape=(3, 4)), "method.b")
    assert list(turned) == [names[1], "maxboxacc_max_box_acc_by_method.b_and_a"]


def test_durations_are_in_words() -> None:
    assert [duration(seconds) for seconds in (45.4, 720, 11100)] == ["45 s", "12 min", "3 h 5 min"]
