"""Run the jobs of a sweep. Each runs in a process of its own and keeps a record of its state.

A sweep directory holds a directory for each job, named after the settings that differ between the jobs. A job keeps its
directory when the sweep runs again. `job.json` in it says what the job is and how far it has come, and `output.log`
holds what it printed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import ListConfig, OmegaConf

from wsolkit.errors import JobError
from wsolkit.settings.overrides import escaped, quoted
from wsolkit.settings.run_directory import LOCK
from wsolkit.system.drafts import remove_drafts, write_text
from wsolkit.system.locks import is_held

RECORD, OUTPUT, RESULT = "job.json", "output.log", "metrics.json"
# Most sweeps vary these. They come first, because long names are cut at the end.
_FIRST = ("method", "optimizer", "seed")
_HEARTBEAT = 20.0
_GLANCE = 1.0  # Seconds between two looks at a job, and at the sweep that it belongs to.
_PATIENCE = 60.0  # Seconds that a stopped job has to write its checkpoint.
_SWEEP = "WSOLKIT_SWEEP"  # The environment variable of a job with the number of the process that runs the sweep.
_SILENCE = 120.0  # Seconds of silence after which a running job counts as interrupted.

State = Literal["running", "finished", "failed", "interrupted"]


@dataclass
class Job:
    """The content of `job.json`.

    overrides: the job's settings as on the command line; settings: all of its settings, as plain containers; started:
    seconds since the epoch; seconds: the time that it took, or has taken so far; error: the last line of its output, if
    it failed; host, process: the machine and the process number of the sweep.
    """

    overrides: list[str]
    settings: dict[str, Any]
    state: State = "running"
    started: float = field(default_factory=time.time)
    seconds: float = 0.0
    error: str = ""
    host: str = field(default_factory=platform.node)
    process: int = field(default_factory=os.getpid)

    @property
    def abandoned(self) -> bool:
        """Say whether the sweep of the job is known to be dead. On another machine, nobody knows."""
        return self.host == platform.node() and _is_gone(self.process)

    def write(self, folder: Path) -> None:
        """Write the record in one step, so that a reader finds the old one or the new one."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECORD, json.dumps(asdict(self), indent=1))


def read_job(folder: Path) -> Job | None:
    """Read the record of a job, or return None if the directory has none.

    A running job counts as interrupted if its sweep has ended, or if it has been silent for two minutes. Its machine
    then stopped, or it was killed.
    """
    path = folder / RECORD
    try:
        job = Job(**json.loads(path.read_text(encoding="utf-8-sig")))
        silent = time.time() - path.stat().st_mtime > _SILENCE
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise JobError(f"'{path}' is damaged ({error}). Delete it, and the job counts as not run") from error
    if job.state == "running" and (silent or job.abandoned):
        job.state = "interrupted"
    if job.state == "finished" and not (folder / RESULT).is_file():
        job.state = "interrupted"  # Its result was deleted, so it runs again.
    return job


def job_name(overrides: Sequence[str]) -> str:
    """Return a readable directory name for a job, safe for every file system and unique for each set of overrides."""
    if isinstance(overrides, ListConfig):  # In a ListConfig, an override may look like an interpolation.
        overrides = OmegaConf.to_container(overrides, resolve=False)  # type: ignore[assignment]
    own = _own(overrides)
    readable = []
    for override in own:
        key, _, value = override.lstrip("+~").partition("=")
        if "/" not in value:  # Paths do not belong in a name.
            readable.append(f"{key.rpartition('.')[2]}_{re.sub(r'[^A-Za-z0-9.+-]+', '_', value)}")
    digest = hashlib.sha256("\n".join(own).encode(errors="surrogateescape")).hexdigest()[:8]
    return "-".join(["-".join(readable)[:100].strip("-._") or "job", digest])


def _own(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without Hydra's and those of a resumed run, in the order that names use."""
    own = sorted(override for override in overrides if not override.startswith(("hydra", "resume=")))
    return sorted(own, key=lambda override: not override.startswith(_FIRST))


_PLAIN = re.compile(r"[A-Za-z0-9._+-]+")
_NUMBERS = re.compile(r"\[[0-9.,-]+\]")
_LONGEST = 80


def folder_name(sweep: Path, overrides: Sequence[str], varied: Sequence[str]) -> str:
    """Return the name of a job's directory, made of the settings that differ between jobs: `lr_0.1-seed_0`.

    A job that has a directory in the sweep already keeps its name. A digest of all overrides follows the name if the
    name could mean another job, because it has lost letters or because its directory belongs to another command.

    Args:
        sweep: the directory of the sweep.
        overrides: all overrides of the job.
        varied: those that differ between the jobs.
    """
    for record in sorted(sweep.glob(f"*/{RECORD}")):
        if _own(_recorded(record)) == _own(overrides):
            return record.parent.name
    pairs = [(key.lstrip("+~"), value) for key, _, value in (override.partition("=") for override in _own(varied))]
    last = Counter(key.rpartition(".")[2] for key, _ in pairs)
    parts, exact = [], True
    for key, value in pairs:
        short = key.rpartition(".")[2]
        text = value.strip("[]").replace(",", "_") if _NUMBERS.fullmatch(value) else value
        exact = exact and _PLAIN.fullmatch(text) is not None
        if "/" not in text:  # Paths do not belong in a name.
            parts.append(f"{key if last[short] > 1 else short}_{re.sub(r'[^A-Za-z0-9._+-]+', '_', text)}")
    whole = "-".join(parts) or "job"
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", whole)[:_LONGEST].strip("-._") or "job"
    if exact and name == whole and not (sweep / name / RECORD).exists():
        return name
    digest = hashlib.sha256("\n".join(_own(overrides)).encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{name}-{digest}"


def _recorded(record: Path) -> list[str]:
    """Return the overrides in a job's record, or [] if the record is damaged."""
    with suppress(OSError, ValueError, TypeError, LookupError, RecursionError):
        return [str(override) for override in json.loads(record.read_text(encoding="utf-8-sig"))["overrides"]]
    return []


def run_name(resume: str | None, overrides: Sequence[str], now: str) -> str:
    """Return the directory name of a run: its time, or for resume=auto a name that depends on the overrides alone."""
    return job_name(overrides) if resume == "auto" else now


# hydra.sweep.subdir: ${job_name:${hydra.overrides.task}}
OmegaConf.register_new_resolver("job_name", job_name, replace=True)
OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def swept(folder: Path) -> dict[str, Any]:
    """Return the settings that a sweep varies, with the values of the job in a directory: {"seed": 0}.

    Args:
        folder: the folder of a run. The result is empty if the run is not a job of a sweep.
    """
    job, plan = read_job(folder), folder.parent / "multirun.yaml"  # Hydra wrote the record of the sweep.
    if job is None or not plan.is_file():
        return {}
    hydra: Any = OmegaConf.to_container(OmegaConf.load(plan).hydra, resolve=False)
    grid = [f"{key}={values}" for key, values in (hydra["sweeper"].get("params") or {}).items()]
    parse = OverridesParser.create().parse_overrides
    asked = parse([*grid, *hydra["overrides"]["task"]])
    varied = {given.get_key_element() for given in asked if given.is_sweep_override()}
    own = {given.get_key_element(): given.value() for given in parse(job.overrides)}
    return {key: value for key, value in own.items() if key in varied}


def run_job(
    module: str, overrides: Sequence[str], flags: Sequence[str], settings: dict[str, Any], folder: Path
) -> None:
    """Run one job of a sweep in a process of its own, unless it has finished: `python -m <module> <overrides>`.

    A job that runs out of memory, or crashes, then leaves the others alone.

    Args:
        module: the module of the command, for example "wsolkit.train".
        overrides: the settings of this job.
        flags: the options of Hydra that the sweep was started with.
        settings: all settings as plain containers.
        folder: the directory of the job.

    Raises:
        JobError: it failed, or another process runs it, or it has finished with other settings under the same name.
    """
    _end_with_sweep()
    settings = json.loads(json.dumps(settings))
    with _alone(folder):  # If two sweeps come upon a job at the same time, one of them runs it.
        if not _is_due(folder, settings):
            return
        remove_drafts([folder / RECORD])
        job = Job(list(overrides), settings)
        job.write(folder)
    place = f"hydra.run.dir={quoted(escaped(str(folder)))}"
    command = [sys.executable, "-m", module, *flags, *overrides, "hydra.mode=RUN", place]
    _await_end_of_run(folder)
    with (folder / OUTPUT).open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(_die_with, os.getpid()),
            env=os.environ | {_SWEEP: str(os.getpid())},
        )
        try:
            _raise_at_termination()
            written = time.monotonic()
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GLANCE)
                _end_with_sweep()
                if time.monotonic() - written >= _HEARTBEAT:
                    job.seconds, written = time.time() - job.started, time.monotonic()
                    with suppress(OSError):  # A full disk must not end a job.
                        job.write(folder)
        except BaseException:  # This includes Ctrl-C, and signals from a cluster or from the sweep.
            process.terminate()
            job.state, job.error = "interrupted", "stopped from outside"
            with suppress(OSError):
                job.write(folder)
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    job.seconds = time.time() - job.started
    job.state = "failed" if process.returncode else "finished"
    if process.returncode:
        lines = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        killed = f"ended by {signal.Signals(-process.returncode).name}; " if process.returncode < 0 else ""
        job.error = killed + (lines[-1] if lines else f"exit status {process.returncode}")
    job.write(folder)
    if process.returncode:
        print(f"  {folder.name}: failed after {job.seconds:.0f} s", flush=True)
        raise JobError(f"{folder / OUTPUT}: {job.error.removeprefix('error: ')}")
    print(f"  {folder.name}: finished in {job.seconds:.0f} s", flush=True)


def _is_due(folder: Path, settings: dict[str, Any]) -> bool:
    """Say whether a job has to run. If it does not, print why.

    Raises:
        JobError: it has run with other settings.
    """
    earlier = read_job(folder)
    if earlier is None or earlier.state not in ("running", "finished"):
        return True
    changed = sorted(differences(earlier.settings, settings))
    if changed:
        raise JobError(
            f"{folder} is {earlier.state}, but its settings have changed since: {', '.join(changed)}. "
            "Delete it, or give the sweep another directory with hydra.sweep.dir=DIR"
        )
    if earlier.state == "running":
        print(f"  {folder.name}: another process is running it", flush=True)
        return False
    print(f"  {folder.name}: finished before", flush=True)
    return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a directory, if the system has locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{RECORD}.lock").open("w") as lock:
        with suppress(ImportError, OSError):  # Systems other than POSIX, and some file systems, have no locks.
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _raise_at_termination() -> None:
    """Turn SIGTERM into an exception, unless other code handles it already."""
    first = threading.current_thread() is threading.main_thread()
    if first and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _end_with_sweep() -> None:
    """End this process if a launcher started it for a sweep, and the sweep was killed."""
    launcher = multiprocessing.parent_process()
    if launcher is not None and launcher.pid is not None and _is_gone(launcher.pid):
        sys.exit(128 + signal.SIGTERM)


def _is_gone(process: int) -> bool:
    """Say whether the process of a number has ended."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _await_end_of_run(folder: Path) -> None:
    """Wait until the job of a killed sweep has written its checkpoint and ended."""
    deadline = time.monotonic() + _PATIENCE
    while is_held(folder / LOCK) and time.monotonic() < deadline:
        time.sleep(_GLANCE)


def _die_with(sweep: int) -> None:
    """Make a job's process on Linux end with its sweep, even if the sweep is killed. Else it would train on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
        if os.getppid() != sweep:  # The sweep was killed in the meantime.
            os.kill(os.getpid(), signal.SIGTERM)


def watch_sweep() -> None:
    """Make a job's process on other systems end with its sweep, by looking for the sweep every second."""
    sweep = os.environ.pop(_SWEEP, None)
    if sweep is None or platform.system() == "Linux":
        return

    def watch() -> None:
        while os.getppid() == int(sweep):
            time.sleep(_GLANCE)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> set[str]:
    """Return the names of the settings that differ between two sets of plain settings."""
    found = set()
    for key in before.keys() | now.keys():
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, f"{path}{key}.")
        elif old != new:
            found.add(f"{path}{key}")
    return found


def duration(seconds: float) -> str:
    """Return a time in words: "45 s", "12 min", "3 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
