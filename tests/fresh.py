"""Processes that begin at once: they are forked from one that has imported everything and computed nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import torch

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(
    ["wsolkit.train", "wsolkit.companions", "wsolkit.localizer", "wsolkit.methods.sat", "wsolkit.reporting.pictures"]
)


def command(
    name: str, *arguments: str | Path, cwd: Path, environment: dict[str, str] | None = None
) -> CompletedProcess[str]:
    """What `python -m wsolkit.<name> <arguments>` does, without the seconds that imports take, and without `atexit`.

    Args:
        environment: variables besides those of this process; what reads one as it is imported does not see it.
    """
    with tempfile.TemporaryDirectory() as folder:
        call, process = _start(name, *arguments, cwd=cwd, environment=environment, printed=Path(folder))
        return _finished(call, process, Path(folder))


def _start(
    name: str,
    *arguments: str | Path,
    cwd: Path,
    environment: dict[str, str] | None = None,
    printed: Path,
    processes: int = 1,
    before: Callable[[], None] | None = None,
) -> tuple[list[str], ForkServerProcess]:
    module = f"wsolkit.{name}"
    call = [module, *map(str, arguments)]
    variables = os.environ | {"HYDRA_FULL_ERROR": "0", "WANDB_MODE": "offline"} | (environment or {})
    process = FRESH.Process(target=_run, args=(call, cwd, variables, printed, processes, before))
    process.start()
    return call, process


def _finished(
    call: list[str], process: ForkServerProcess, printed: Path, timeout: float | None = None
) -> CompletedProcess[str]:
    process.join(timeout)
    assert process.exitcode is not None, f"it hangs: {(printed / 'stderr').read_text(encoding='utf-8')}"
    said = ((printed / stream).read_text(encoding="utf-8") for stream in ("stdout", "stderr"))
    return CompletedProcess(call, process.exitcode, *said)


class Running:
    """A command that runs, on several processes of this machine, as `python -m wsolkit.<name> <arguments>` would.

    Args:
        folder: for what it prints.
        processes: how many it starts.
        before: called in each of them before the command begins.
    """

    def __init__(
        self,
        name: str,
        *arguments: str | Path,
        cwd: Path,
        folder: Path,
        environment: dict[str, str] | None = None,
        processes: int = 1,
        before: Callable[[], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._call, self._process = _start(
            name,
            *arguments,
            cwd=cwd,
            environment=environment,
            printed=folder,
            processes=processes,
            before=before,
        )

    @property
    def numbers(self) -> list[int]:
        """The processes' numbers by rank, once they are there."""
        path = self.folder / "numbers"
        return list(json.loads(path.read_text())) if path.is_file() else []

    def finish(self, timeout: float) -> CompletedProcess[str]:
        """Wait for its end; an error if it does not end in time, or leaves a process behind."""
        try:
            _finished(self._call, self._process, self.folder, timeout)
            deadline = time.monotonic() + 5  # others look at the first process now and then
            while left := [number for number in self.numbers if _lives(number)]:
                assert time.monotonic() < deadline, f"processes stay: {left}"
                time.sleep(0.1)
            return _finished(self._call, self._process, self.folder)  # with what the others said last
        finally:
            for number in self.numbers:
                if _lives(number):
                    os.kill(number, 9)


def _lives(number: int) -> bool:
    """Whether a process runs; one that has ended stays in /proc until its parent looks, or init, which may be slow."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _run(
    call: list[str],
    cwd: Path,
    environment: Mapping[str, str],
    printed: Path,
    processes: int,
    before: Callable[[], None] | None,
) -> None:
    for descriptor, stream in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(printed / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if before is not None:
        before()
    if processes > 1:
        _fork_others(processes - 1, printed)
    _run_module(call)


def _run_module(call: list[str]) -> None:
    sys.argv = list(call)
    sys.modules.pop(call[0], None)
    runpy.run_module(call[0], run_name="__main__", alter_sys=True)


def _fork_others(count: int, printed: Path) -> None:
    """Fork the processes that DDP will want to start, and have it take those."""
    from lightning.pytorch.strategies.launchers import subprocess_script

    waiting: list[tuple[int, int]] = []
    for _ in range(count):
        orders, order = os.pipe()
        number = os.fork()
        if number == 0:
            for end in (order, *(other for _, other in waiting)):
                os.close(end)
            with os.fdopen(orders) as pipe:
                text = pipe.read()
            code = 1
            try:
                if text:
                    _obey(**json.loads(text))
                code = 0
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else 1
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(orders)
        waiting.append((number, order))
    (printed / "numbers.draft").write_text(json.dumps([os.getpid(), *(number for number, _ in waiting)]))
    (printed / "numbers.draft").rename(printed / "numbers")

    class Forked(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], env: dict[str, str], cwd: str) -> None:
            self.args, self.returncode, self._child_created = command, None, True
            self.stdin = self.stdout = self.stderr = None
            self._waitpid_lock = threading.Lock()
            self.pid, order = waiting.pop(0)
            with os.fdopen(order, "w") as pipe:
                pipe.write(json.dumps({"command": command[2:], "env": env, "cwd": cwd}))

    subprocess_script.subprocess = SimpleNamespace(Popen=Forked)  # type: ignore[assignment, attr-defined]


def _obey(command: list[str], env: dict[str, str], cwd: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    _run_module(command)
