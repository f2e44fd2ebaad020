"""Sweeps: jobs in processes of their own, what is kept of them, and running a sweep again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fresh import command
from wsolkit.errors import JobError
from wsolkit.settings.conf import CONF
from wsolkit.settings.jobs import Job, differences, job_name, read_job, run_job, watch_sweep
from wsolkit.settings.run_directory import LOCK
from wsolkit.system.locks import alone

SMOKE = (
    "trainer=smoke",
    "trainer.accelerator=cpu",
    "dataset.records.sizes={train: 48, val: 20, test: 21}",
    "dataset.batch_size=16",
    "num_examples=0",
    "protocol=[maxboxacc]",
)


def write_module(folder: Path, name: str, code: str) -> None:
    (folder / f"{name}.py").write_text(code)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for a command, which `python -m` finds."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = "import pathlib, sys\nfolder = pathlib.Path(sys.argv[-1].split('=')[1].strip('\"'))\n"
    write_module(tmp_path, "works", result + "(folder / 'metrics.json').write_text('{}')\nprint(sys.argv[1:])")
    write_module(tmp_path, "fails", "import sys\nprint('some output')\nsys.exit('error: method.x=1: expected 2')")
    write_module(tmp_path, "crashes", "import os\nos.abort()")
    write_module(tmp_path, "waits", "import time\ntime.sleep(60)")
    return tmp_path


def test_finished_job_is_not_run_again(modules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = modules / "job"
    run_job("works", ["seed=1"], ["--config-dir=x"], {"seed": 1}, folder)
    job = read_job(folder)
    assert job is not None
    assert (job.state, job.overrides, job.settings) == ("finished", ["seed=1"], {"seed": 1})
    assert "['--config-dir=x', 'seed=1', 'hydra.mode=RUN'" in (folder / "output.log").read_text()
    written = (folder / "output.log").stat().st_mtime_ns
    run_job("fails", ["seed=1"], [], {"seed": 1}, folder)  # would fail, but is not run
    assert (folder / "output.log").stat().st_mtime_ns == written
    assert "finished before" in capsys.readouterr().out


def test_failed_job_says_why_and_is_run_again(modules: Path) -> None:
    folder = modules / "job"
    with pytest.raises(JobError, match=r"output\.log: method\.x=1: expected 2"):
        run_job("fails", [], [], {}, folder)
    job = read_job(folder)
    assert job is not None
    assert (job.state, job.error) == ("failed", "error: method.x=1: expected 2")
    run_job("works", [], [], {}, folder)
    again = read_job(folder)
    assert again is not None
    assert again.state == "finished"


def test_crash_of_a_job_is_a_failure_of_that_job(modules: Path) -> None:
    with pytest.raises(JobError, match="ended by SIGABRT"):
        run_job("crashes", [], [], {}, modules / "job")


def test_finished_job_with_other_settings_is_kept(modules: Path) -> None:
    folder = modules / "job"
    run_job("works", [], [], {"method": {"iterations": 4, "name": "scm"}}, folder)
    with pytest.raises(JobError, match=r"settings have changed since: method\.iterations\. Delete it, or give"):
        run_job("works", [], [], {"method": {"iterations": 5, "name": "scm"}}, folder)


def test_running_job_is_left_to_the_process_that_runs_it(modules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = modules / "job"
    Job([], {}).write(folder)
    run_job("fails", [], [], {}, folder)
    assert "another process is running it" in capsys.readouterr().out
    os.utime(folder / "job.json", (time.time() - 300, time.time() - 300))  # silent for five minutes
    job = read_job(folder)
    assert job is not None
    assert job.state == "interrupted"
    run_job("works", [], [], {}, folder)


def test_job_whose_result_was_deleted_is_run_again(modules: Path) -> None:
    folder = modules / "job"
    run_job("works", [], [], {}, folder)
    (folder / "metrics.json").unlink()
    job = read_job(folder)
    assert job is not None
    assert job.state == "interrupted"


def test_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"overrides"')
    with pytest.raises(JobError, match=r"job\.json' is damaged .*Delete it"):
        read_job(tmp_path)
    assert read_job(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGKILL, False)])
def test_stopped_sweep_takes_its_job_along(modules: Path, number: signal.Signals, ends: bool) -> None:
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux ends a process with its killed parent")
    # A shell that starts tests in the background has them ignore SIGINT.
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = (
        f"{listens}; import pathlib, wsolkit.settings.jobs as j; j.run_job('waits', [], [], {{}}, pathlib.Path('job'))"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code], cwd=modules, stderr=subprocess.DEVNULL)
    while not (children := subprocess.run(["pgrep", "-P", str(sweep.pid)], capture_output=True, text=True).stdout):
        time.sleep(0.1)
    time.sleep(0.3)
    sweep.send_signal(number)
    sweep.wait(10)
    deadline = time.time() + 10
    while Path(f"/proc/{children.strip()}").exists() and time.time() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{children.strip()}").exists()
    written = json.loads((modules / "job" / "job.json").read_text())["state"]
    assert written == ("interrupted" if ends else "running")
    job = read_job(modules / "job")
    assert job is not None
    assert job.state == "interrupted"  # its sweep is gone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_sweep_takes_the_jobs_of_its_launcher_along(modules: Path, number: signal.Signals) -> None:
    """Joblib's processes do not notice; and what waited in them is not begun."""
    pytest.importorskip("joblib")
    result = "import pathlib, signal, sys, time\nfolder = pathlib.Path(sys.argv[-1].split('=')[1].strip('\"'))\n"
    leave = "def leave(*_):\n    (folder / 'saved').touch()\n    sys.exit(143)\n"
    write_module(
        modules, "saves", result + leave + "signal.signal(15, leave)\n(folder / 'begun').touch()\ntime.sleep(90)"
    )
    code = (
        "import joblib, pathlib, wsolkit.settings.jobs as j\n"
        "job = joblib.delayed(j.run_job)\n"
        "joblib.Parallel(2)(job('saves', [], [], {}, pathlib.Path(f'job{n}')) for n in range(6))"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code], cwd=modules, stderr=subprocess.DEVNULL)
    while len(list(modules.glob("job*/begun"))) < 2:
        assert sweep.poll() is None
        time.sleep(0.1)
    sweep.send_signal(number)
    sweep.wait(10)
    deadline = time.time() + 30
    while len(list(modules.glob("job*/saved"))) < 2 and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    jobs = [read_job(folder) for folder in sorted(modules.glob("job[0-9]")) if (folder / "job.json").is_file()]
    assert [job.state for job in jobs if job is not None] == ["interrupted"] * 2
    assert {path.parent.name for path in modules.glob("*/begun")} == {
        path.parent.name for path in modules.glob("*/saved")
    }


def test_job_on_other_systems_looks_for_its_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("wsolkit.settings.jobs._GLANCE", 0.01)
    monkeypatch.setattr("os.kill", lambda process, number: ended.set() if number == signal.SIGTERM else None)
    monkeypatch.setenv("WSOLKIT_SWEEP", str(os.getppid()))
    watch_sweep()
    assert "WSOLKIT_SWEEP" not in os.environ  # not for the processes that the job starts
    assert not ended.wait(0.2)
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert ended.wait(10)


def test_job_waits_for_the_one_that_a_killed_sweep_has_left(modules: Path) -> None:
    folder = modules / "job"
    folder.mkdir()
    left = ExitStack()
    left.enter_context(alone(folder / LOCK, "running"))
    (folder / ".job.json.12").touch()
    threading.Timer(1, left.close).start()
    write_module(
        modules,
        "looks",
        "import wsolkit.system.locks as l, wsolkit.settings.run_directory as r\nfrom works import folder\nassert not l.is_held(folder / r.LOCK)",
    )
    run_job("looks", [], [], {}, folder)
    assert not (folder / ".job.json.12").exists()


def test_of_two_sweeps_at_once_one_runs_the_job(modules: Path) -> None:
    write_module(modules, "slow", "import time, works; time.sleep(1)")
    code = "import pathlib, wsolkit.settings.jobs as j; j.run_job('slow', [], [], {}, pathlib.Path('job'))"
    sweeps = [
        subprocess.Popen([sys.executable, "-c", code], cwd=modules, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = [sweep.communicate()[0] for sweep in sweeps]
    assert sum("finished in" in text for text in said) == 1
    assert sum("another process is running it" in text or "finished before" in text for text in said) == 2


def test_names_are_safe_and_differ() -> None:
    names = [
        job_name(overrides)
        for overrides in (
            ["method.num_blocks=2", "seed=0"],
            ["method.num_blocks=2", "seed=1"],
            ["backbone.num_blocks=2", "seed=0"],
            ["backbone.weights=/some/where/x.pt", "method.iterations=[16,4,4,4]"],
            ["a=" + "x" * 300],
            [],
        )
    ]
    assert len(set(names)) == len(names)
    assert names[0].startswith("num_blocks_2-seed_0-")
    assert all(len(name) < 120 and not set(name) & set("/=,[] '\"$") for name in names)
    assert job_name(["seed=0", "method.num_blocks=2", "hydra.sweep.dir=elsewhere"]) == names[0]


def test_differences() -> None:
    assert differences({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": 2}) == {"a.c", "d", "e"}


def states(folder: Path) -> dict[str, str]:
    jobs = {path.parent.name: read_job(path.parent) for path in folder.glob("*/job.json")}
    return {name: job.state for name, job in jobs.items() if job is not None}


# A launcher's own processes begin as a user's do, which takes long.
@pytest.mark.parametrize(
    "launcher", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("parallel", "submitit_local"))]
)
def test_ready_grid_with_every_launcher(launcher: str | None, tmp_path: Path) -> None:
    """One job of two fails; run again with what it lacked, only that one runs."""
    if launcher == "parallel":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    if launcher == "submitit_local":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    chosen = [] if launcher is None else [f"hydra/launcher={launcher}"]
    arguments = ("sweep=sat_blocks", "method.num_blocks=6,7", "seed=0", *SMOKE, *chosen)
    # Not a forked process: a launcher's own processes would outlive it.
    call = [sys.executable, "-m", "wsolkit.train", *arguments]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "method.num_blocks=7: expected 1 to 6" in done.stdout + done.stderr
    folder = tmp_path / "outputs" / "sweeps" / "sat_blocks_shapes"
    good, bad = sorted(states(folder))
    assert (good[:12], bad[:12]) == ("num_blocks_6", "num_blocks_7")
    assert states(folder) == {good: "finished", bad: "failed"}
    result = (folder / good / "metrics.json").stat().st_mtime_ns
    if launcher is None:
        assert command("train", *arguments, cwd=tmp_path, jobs=1).returncode == 1
        assert (folder / good / "metrics.json").stat().st_mtime_ns == result


def test_what_a_job_lacks_is_said_by_the_job(tmp_path: Path) -> None:
    done = command("train", "-m", "dataset=listed", "seed=0", "hydra.sweep.dir=sweep", cwd=tmp_path, jobs=1)
    assert done.returncode == 1
    assert "output.log: required and not given: dataset.root" in done.stderr
    assert list(states(tmp_path / "sweep").values()) == ["failed"]


def test_presets_of_launchers_compose(tmp_path: Path) -> None:
    for path in (CONF / "hydra" / "launcher").glob("*.yaml"):
        done = command("train", f"hydra/launcher={path.stem}", "--cfg", "hydra", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "_target_: hydra_plugins" in done.stdout


def test_launcher_that_is_not_installed_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import pkgutil, sys; walk = pkgutil.walk_packages\n"
        "pkgutil.walk_packages = lambda *a, **k: (m for m in walk(*a, **k) if 'joblib' not in m.name)\n"
        "sys.argv[1:] = ['-m', 'seed=0,1', 'hydra/launcher=parallel']\n"
        "from wsolkit.train import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: hydra/launcher=joblib needs another package: pip install 'wsolkit[joblib]'\n"


@pytest.mark.parametrize("grid", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_ready_grids_compose(grid: str, tmp_path: Path) -> None:
    """Hydra's own listing of a grid: every job is composed, and none is run."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from wsolkit import load_config
    from wsolkit.settings.checks import check_config

    params = OmegaConf.load(CONF / "sweep" / f"{grid}.yaml").hydra.sweeper.params
    overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    assert len(jobs) >= 6
    method = grid.split("_")[0].replace("scg", "spa")
    for job in jobs:
        check_config(load_config(f"method={method}", *job))
