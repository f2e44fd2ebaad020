"""The jobs of a sweep: each runs in a process of its own and keeps a record of how it went.

A sweep directory holds a directory for each job, named after what differs between them. The same job has the same
directory whenever the sweep is run again. In it, `job.json` says what the job is and how it stands, `output.log` what
it printed.
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
_FIRST = ("method", "optimizer", "seed")  # what sweeps are mostly over: long names are cut at the end
_HEARTBEAT = 20.0
_GLANCE = 1.0  # seconds between two looks at a job, and at the sweep that it belongs to
_PATIENCE = 60.0  # seconds that a job has to write its checkpoint when it is stopped
_SWEEP = "WSOLKIT_SWEEP"  # variable of a job's environment: the number of the process that runs it
_SILENCE = 120.0  # seconds after which a running job that says nothing is taken for interrupted

State = Literal["running", "finished", "failed", "interrupted"]


@dataclass
class Job:
    """What `job.json` says.

    overrides: the job's settings as on the command line; settings: all of them, as plain containers;
    started: seconds since the epoch; seconds: how long it took, or takes; error: the last line of its output, if it
    failed; host, process: where the sweep runs, and its number there.
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
        """Whether the sweep that runs the job is known to be dead; on another machine, nobody knows."""
        return self.host == platform.node() and _is_gone(self.process)

    def write(self, folder: Path) -> None:
        """Write the record, so that a reader finds the old one or the new one."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECORD, json.dumps(asdict(self), indent=1))


def read_job(folder: Path) -> Job | None:
    """Read the record of a job, or None if the directory has none.

    A job that was running is interrupted if its sweep has ended, or has said nothing for two minutes: its machine
    stopped, or it was killed.
    """
    path = folder / RECORD
    try:
        job = Job(**json.loads(path.read_text(encoding="utf-8-sig")))
        silent = time.time() - path.stat().st_mtime > _SILENCE
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise JobError(f"'{path}' is damaged ({error}); delete it, and the job counts as not run") from error
    if job.state == "running" and (silent or job.abandoned):
        job.state = "interrupted"
    if job.state == "finished" and not (folder / RESULT).is_file():
        job.state = "interrupted"  # its result was deleted: to be run again
    return job


def job_name(overrides: Sequence[str]) -> str:
    """A directory name for a job: readable, safe for every file system, and its own for each set of overrides."""
    if isinstance(overrides, ListConfig):  # in which an override may look like an interpolation
        overrides = OmegaConf.to_container(overrides, resolve=False)  # type: ignore[assignment]
    own = _own(overrides)
    readable = []
    for override in own:
        key, _, value = override.lstrip("+~").partition("=")
        if "/" not in value:  # no paths
            readable.append(f"{key.rpartition('.')[2]}_{re.sub(r'[^A-Za-z0-9.+-]+', '_', value)}")
    digest = hashlib.sha256("\n".join(own).encode(errors="surrogateescape")).hexdigest()[:8]
    return "-".join(["-".join(readable)[:100].strip("-._") or "job", digest])


def _own(overrides: Sequence[str]) -> list[str]:
    """Return overrides without Hydra's and those of a resumed run, in the order in which names have them."""
    own = sorted(override for override in overrides if not override.startswith(("hydra", "resume=")))
    return sorted(own, key=lambda override: not override.startswith(_FIRST))


_PLAIN = re.compile(r"[A-Za-z0-9._+-]+")
_NUMBERS = re.compile(r"\[[0-9.,-]+\]")
_LONGEST = 80


def folder_name(sweep: Path, overrides: Sequence[str], varied: Sequence[str]) -> str:
    """Return the name of a job's directory: `lr_0.1-seed_0`, after the settings that differ between the jobs.

    A job that has a directory in the sweep's already, under whatever name, keeps it. A digest of all overrides follows
    the name where it could mean another job: where letters were lost, or the directory belongs to another command.

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
        if "/" not in text:  # no paths
            parts.append(f"{key if last[short] > 1 else short}_{re.sub(r'[^A-Za-z0-9._+-]+', '_', text)}")
    whole = "-".join(parts) or "job"
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", whole)[:_LONGEST].strip("-._") or "job"
    if exact and name == whole and not (sweep / name / RECORD).exists():
        return name
    digest = hashlib.sha256("\n".join(_own(overrides)).encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{name}-{digest}"


def _recorded(record: Path) -> list[str]:
    """Return the overrides of a job by its record; [] where that is damaged."""
    with suppress(OSError, ValueError, TypeError, LookupError, RecursionError):
        return [str(override) for override in json.loads(record.read_text(encoding="utf-8-sig"))["overrides"]]
    return []


def run_name(resume: str | None, overrides: Sequence[str], now: str) -> str:
    """A directory name for a run: by its time, or one under which the same command finds it again."""
    return job_name(overrides) if resume == "auto" else now


# hydra.sweep.subdir: ${job_name:${hydra.overrides.task}}
OmegaConf.register_new_resolver("job_name", job_name, replace=True)
OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def swept(folder: Path) -> dict[str, Any]:
    """What a sweep varies, and what the job in a directory has of it: {"method.num_blocks": 2, "seed": 0}.

    Args:
        folder: of a run; there is nothing if it is no sweep's job.
    """
    job, plan = read_job(folder), folder.parent / "multirun.yaml"  # Hydra's record of the sweep
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
    """Run one job of a sweep, unless it has been run: `python -m <module> <overrides>` in a process of its own.

    So a job that runs out of memory, or crashes, takes no other with it.

    Args:
        module: the command, such as "wsolkit.train".
        overrides: settings of this job.
        flags: options of Hydra that the sweep was started with.
        settings: all settings, plain.
        folder: of the job.

    Raises:
        JobError: it failed, or was run with other settings of the same name, or another process runs it.
    """
    _end_with_sweep()
    settings = json.loads(json.dumps(settings))
    with _alone(folder):  # of two sweeps that come upon a job at the same time, one runs it
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
                    with suppress(OSError):  # a full disk ends no job
                        job.write(folder)
        except BaseException:  # Ctrl-C, the end of a cluster's patience, or that of the sweep
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
    """Whether a job has to be run; if not, say why.

    Raises:
        JobError: it was run with other settings.
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
    """Keep other processes out of a directory, where the system can."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{RECORD}.lock").open("w") as lock:
        with suppress(ImportError, OSError):  # other systems than POSIX; file systems without locks
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _raise_at_termination() -> None:
    """Make SIGTERM an exception, unless somebody else takes care of it."""
    first = threading.current_thread() is threading.main_thread()
    if first and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _end_with_sweep() -> None:
    """End, if this is one of the processes among which a launcher divides a sweep, and the sweep was killed."""
    launcher = multiprocessing.parent_process()
    if launcher is not None and launcher.pid is not None and _is_gone(launcher.pid):
        sys.exit(128 + signal.SIGTERM)


def _is_gone(process: int) -> bool:
    """Whether a process has ended, by its number."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _await_end_of_run(folder: Path) -> None:
    """Wait for the job that a killed sweep has left to write its checkpoint and end."""
    deadline = time.monotonic() + _PATIENCE
    while is_held(folder / LOCK) and time.monotonic() < deadline:
        time.sleep(_GLANCE)


def _die_with(sweep: int) -> None:
    """In the process of a job, on Linux: end with the sweep, even if that is killed, rather than train on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
        if os.getppid() != sweep:  # killed meanwhile
            os.kill(os.getpid(), signal.SIGTERM)


def watch_sweep() -> None:
    """In the process of a job, on other systems: the same, by looking every second whether the sweep is there."""
    sweep = os.environ.pop(_SWEEP, None)
    if sweep is None or platform.system() == "Linux":
        return

    def watch() -> None:
        while os.getppid() == int(sweep):
            time.sleep(_GLANCE)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> set[str]:
    """Names of the settings in which two sets of plain settings differ."""
    found = set()
    for key in before.keys() | now.keys():
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, f"{path}{key}.")
        elif old != new:
            found.add(f"{path}{key}")
    return found


def duration(seconds: float) -> str:
    """Seconds in words: "45 s", "12 min", "3 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
