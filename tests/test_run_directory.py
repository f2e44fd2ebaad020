"""One run directory, one run: others are refused, killed ones leave nothing, files are there as a whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.fresh import FRESH, command
from wsolkit.errors import BusyError, TrainingError
from wsolkit.interop.coco import prediction_files
from wsolkit.metrics.evaluation import Outcome
from wsolkit.reporting.images import ImageRow, write_images
from wsolkit.reporting.page import write_page
from wsolkit.reporting.report import describe
from wsolkit.reporting.table import write_metrics
from wsolkit.settings.compose import save_config
from wsolkit.settings.run_directory import LOCK, leads, one_run, run_directory
from wsolkit.system.drafts import draft, write_text
from wsolkit.system.locks import alone, is_held

PLACE = "give this run another place with hydra.run.dir=DIR\n"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_second_run_is_refused_and_touches_nothing(name: str, tmp_path: Path) -> None:
    """Not even Hydra's files: with other settings, they would be wrong."""
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    for file in ("metrics.csv", ".hydra/overrides.yaml", "checkpoints/.last.ckpt.12"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("first")
    with run_directory(tmp_path / "other"), run_directory(folder):
        (folder / "checkpoints" / ".last.ckpt.13").touch()  # being written
        before = content(folder)
        done = command(name, "seed=7", "hydra.run.dir=${hydra:runtime.cwd}/run", cwd=tmp_path)
        assert content(folder) == before
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines(keepends=True)
    assert line.startswith(f"error: another process (number {os.getpid()} on {platform.node()}, since 20")
    assert line.endswith(f") is running in '{folder}': wait until it ends, or {PLACE}")


@contextmanager
def held_by_another(path: Path, noted: str = "") -> Iterator[None]:
    """The lock as another process would hold it; what it has noted."""
    path.write_text(noted)
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize(
    ("noted", "named"),
    [
        ("", ""),
        ('{"process": ', ""),
        ('{"process": 1e99, "host": 3, "since": "x"}', ""),
        (f'{{"process": 999999999, "host": "{platform.node()}", "since": 0}}', ""),  # of a run that was killed
        (
            '{"process": 7, "host": "node-3", "since": 0}',
            r" \(number 7 on node-3, since 19.*; if node-3 is gone for good, delete '.*'\)",
        ),
    ],
)
def test_lock_decides_and_its_note_informs(noted: str, named: str, tmp_path: Path) -> None:
    with (
        held_by_another(tmp_path / "lock", noted),
        pytest.raises(BusyError, match=f"^another process{named} is here: wait"),
    ):
        alone(tmp_path / "lock", "here").__enter__()
    (tmp_path / "lock").write_text(f'{{"process": {os.getpid()}, "host": "{platform.node()}", "since": 0}}')
    with alone(tmp_path / "lock", "here"):  # the number is that of a process that lives, but nobody holds the lock
        assert json.loads((tmp_path / "lock").read_text())["since"] > time.time() - 60


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_other_processes_of_a_run_pass(rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with held_by_another(tmp_path / LOCK):
        monkeypatch.setenv(rank, "0")
        assert leads()
        with pytest.raises(BusyError):
            run_directory(tmp_path).__enter__()
        monkeypatch.setenv(rank, "2")
        with run_directory(tmp_path):
            pass


def _hold(path: Path, pipe: Connection) -> None:
    with alone(path, "here"):
        loader = os.fork()
        if loader == 0:
            time.sleep(60)
        pipe.send(loader)
        time.sleep(60)


def test_lock_ends_with_the_process_though_its_loaders_live_on(tmp_path: Path) -> None:
    here, there = FRESH.Pipe()
    process = FRESH.Process(target=_hold, args=(tmp_path / "lock", there))
    process.start()
    loader = here.recv()
    try:
        assert is_held(tmp_path / "lock")
        process.kill()
        process.join()
        os.kill(loader, 0)
        with alone(tmp_path / "lock", "here"):
            assert is_held(tmp_path / "lock")
        assert not is_held(tmp_path / "lock")
    finally:
        os.kill(loader, signal.SIGKILL)


def test_drafts_of_killed_runs_are_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [
        *(".metrics.json.12", ".metrics.csv.345", ".config.yaml.6", ".inside.npz.7", "examples/.00_map.jpg.8"),
        *("checkpoints/.last.ckpt.9", "checkpoints/.previous.ckpt.10", "checkpoints/.best.ckpt.11"),
    ]
    kept = ["metrics.json", "checkpoints/best.ckpt", "checkpoints/best.ckpt.1", ".notes.12", "metrics.json.2026"]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with run_directory(tmp_path):
        pass
    assert {path.relative_to(tmp_path).as_posix() for path in content(tmp_path)} == {*kept, LOCK}


OUTCOME = Outcome({"top1_cls": 50.0}, {})
PAGE = {
    **dict.fromkeys(("title", "method", "settings"), ""),
    **{name: [] for name in ("class_names", "worst", "best")},
    **{name: {} for name in ("results", "curves", "protocols", "chosen_on")},
}
WRITERS: dict[str, Callable[[Path], None]] = {
    "metrics.json": lambda path: write_metrics(OUTCOME, ["a", "b"], path),
    "images.csv": lambda path: write_images({"maxboxacc": [ImageRow("x.jpg", "a", "b", 0.5, "cls", False)]}, path),
    "config.yaml": lambda path: save_config(OmegaConf.create({"seed": 1}), path.parent),
    "report.html": lambda path: write_page(path, describe(**PAGE)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(
    name: str, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if failing == "fsync" else Path, failing, full)
    with pytest.raises(OSError, match="No space left") as raised:
        WRITERS[name](path)
    assert raised.value.filename == str(path)
    assert content(tmp_path) == {path: b"old"}


@contextmanager
def longest_file(length: int) -> Iterator[None]:
    """Files can grow to a length, and what is written beyond is refused, as by a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_draft_that_does_not_fit_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with longest_file(1000), pytest.raises(OSError, match="too large"):
        write_text(tmp_path / "file", "x" * 100_000)
    with pytest.raises(KeyboardInterrupt), draft(tmp_path / "file") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert content(tmp_path) == {tmp_path / "file": b"old"}


def test_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    @one_run
    def task(cfg: object, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "metrics.json"))

    with pytest.raises(TrainingError, match=r"metrics.json' cannot be written \(No space left on device\).* Make room"):
        task(OmegaConf.create(), tmp_path)


def test_folder_of_predictions_has_one_writer(tmp_path: Path) -> None:
    def open_it() -> None:
        with prediction_files(tmp_path, ["cat"], {"top_k": 1, "exif": "apply"}):
            pass

    with held_by_another(tmp_path / ".predict.lock"):
        with pytest.raises(
            BusyError, match=f"is writing to '{tmp_path}': wait until it ends, or choose another output"
        ):
            open_it()
        assert content(tmp_path) == {tmp_path / ".predict.lock": b""}
    for name in (".predictions.json.draft", ".settings.json.12", ".predictions.csv.13"):
        (tmp_path / name).touch()
    open_it()
    assert sorted(path.name for path in content(tmp_path)) == [".predict.lock", "progress.jsonl", "settings.json"]


def test_lock_is_given_back(tmp_path: Path) -> None:
    """A notebook trains, and then a command evaluates in the same place; within a run, others of its calls pass."""
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(run_directory(tmp_path))
        assert is_held(tmp_path / LOCK)
    assert not is_held(tmp_path / LOCK)
