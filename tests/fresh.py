"""Processes that begin at once: they are forked from one that has imported everything, see `tests.warm`."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["tests.warm"])


def draw_no_report() -> None:
    """Have the runs of this process write no report: it takes most of a small run's time."""
    from wsolkit.reporting import pictures
    from wsolkit.training import report

    pictures.write_report = report.write_report = lambda *_: None  # type: ignore[attr-defined]


def command(
    name: str,
    *arguments: str | Path,
    cwd: Path,
    environment: dict[str, str] | None = None,
    report: bool = False,
    processes: int = 1,
    jobs: int = 0,
) -> CompletedProcess[str]:
    """What `python -m wsolkit.<name> <arguments>` does, without the seconds that imports take, and without `atexit`.

    Args:
        environment: variables besides those of this process; what reads one as it is imported does not see it.
        report: whether the run draws its report.
        processes: of the run, or of each job of a sweep.
        jobs: of a sweep; more than these are started as a user's are, from Python's beginning.
    """
    with tempfile.TemporaryDirectory() as folder:
        call, process = _start(
            name,
            *arguments,
            cwd=cwd,
            environment=environment,
            printed=Path(folder),
            report=report,
            processes=processes,
            jobs=jobs,
        )
        return _finished(call, process, Path(folder))


def run_main(folder: Path, module: str, arguments: list[str]) -> None:
    """What `python -m <module> <arguments>` does in a folder, in a process of its own."""
    os.chdir(folder)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    draw_no_report()
    sys.exit(exit_code(module, arguments))  # type: ignore[arg-type]


def exit_code(module: str, arguments: list[str]) -> object:
    """Run a command in this process."""
    sys.argv = [module, *arguments]
    try:
        import_module(module).main()
    except SystemExit as end:
        return end.code or 0
    return 0


def _start(
    name: str,
    *arguments: str | Path,
    cwd: Path,
    environment: dict[str, str] | None = None,
    printed: Path,
    report: bool = False,
    processes: int = 1,
    jobs: int = 0,
    before: Callable[[], None] | None = None,
) -> tuple[list[str], ForkServerProcess]:
    module = f"wsolkit.{name}"
    call = [module, *map(str, arguments)]
    variables = os.environ | {"HYDRA_FULL_ERROR": "0", "WANDB_MODE": "offline"} | (environment or {})
    process = FRESH.Process(target=_run, args=(call, cwd, variables, printed, report, processes, jobs, before))
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

    def kill(self) -> None:
        """End its first process as SIGKILL does."""
        self._process.kill()
        self._process.join()

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
    report: bool,
    processes: int,
    jobs: int,
    before: Callable[[], None] | None,
) -> None:
    for descriptor, stream in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(printed / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if not report:
        draw_no_report()
    if before is not None:
        before()
    if jobs:
        from wsolkit.settings import jobs as sweep

        _fork_ahead(jobs, sweep, processes)
    elif processes > 1:
        _fork_companions(processes, printed)
    _run_module(call)


def _run_module(call: list[str]) -> None:
    sys.argv = list(call)
    sys.modules.pop(call[0], None)
    runpy.run_module(call[0], run_name="__main__", alter_sys=True)


def _fork_companions(processes: int, printed: Path | None = None) -> None:
    """Fork the processes that DDP will want to start, and note the numbers of all."""
    from lightning.pytorch.strategies.launchers import subprocess_script

    numbers = [os.getpid(), *_fork_ahead(processes - 1, subprocess_script)]
    if printed is not None:
        (printed / "numbers.draft").write_text(json.dumps(numbers))
        (printed / "numbers.draft").rename(printed / "numbers")


def _fork_ahead(count: int, module: ModuleType, processes: int = 1) -> list[int]:
    """Fork processes that a module will want to start, while nothing is computed yet, and have it take those.

    Args:
        count: how many; any that the module starts beyond them is a new Python.
        module: calls `subprocess.Popen([sys.executable, "-m", …], …)`.
        processes: that each of them may start itself.

    Returns:
        Their numbers.
    """
    waiting: list[tuple[int, int]] = []
    for _ in range(count):
        orders, order = os.pipe()
        number = os.fork()
        if number == 0:
            for end in (order, *(other for _, other in waiting)):
                os.close(end)
            with os.fdopen(orders, "rb") as pipe:
                content = pipe.read()
            code = 1
            try:
                if content:
                    _obey(processes, **pickle.loads(content))
                code = 0
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else 1
                if isinstance(leaving.code, str):
                    print(leaving.code, file=sys.stderr)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(orders)
        waiting.append((number, order))
    numbers = [number for number, _ in waiting]

    class Forked(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], env: dict[str, str], **options: Any) -> None:
            if not waiting:
                super().__init__(command, env=env, **options)
                return
            self.args, self.returncode, self._child_created = command, None, True
            self.stdin = self.stdout = self.stderr = None
            self._waitpid_lock = threading.Lock()
            self.pid, order = waiting.pop(0)
            output = options.get("stdout")
            orders = {
                "command": command[2:],
                "environment": env,
                "cwd": options.get("cwd") or os.getcwd(),  # noqa: PTH109
                "output": None if output is None else output.name,
                "first": options.get("preexec_fn"),
            }
            with os.fdopen(order, "wb") as pipe:
                pipe.write(pickle.dumps(orders))

    module.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": Forked})  # type: ignore[attr-defined]
    return numbers


def _obey(
    processes: int,
    command: list[str],
    environment: dict[str, str],
    cwd: str,
    output: str | None,
    first: Callable[[], None] | None,
) -> None:
    """What a process that was forked ahead does when it is wanted."""
    if first is not None:
        first()
    if output is not None:
        for descriptor in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    setattr(rank_zero_only, "rank", int(environment.get("LOCAL_RANK", 0)))  # noqa: B010  # noted at Lightning's import
    if processes > 1:
        _fork_companions(processes)
    _run_module(command)
