"""Processes that begin at once: they are forked from one that has imported everything and computed nothing."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess

import torch

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(
    ["wsolkit.train", "wsolkit.localizer", "wsolkit.methods.sat", "wsolkit.reporting.pictures"]
)


def command(
    name: str, *arguments: str | Path, cwd: Path, environment: dict[str, str] | None = None
) -> CompletedProcess[str]:
    """What `python -m wsolkit.<name> <arguments>` does, without the seconds that imports take, and without `atexit`.

    Args:
        environment: variables besides those of this process; what reads one as it is imported does not see it.
    """
    module = f"wsolkit.{name}"
    call = [module, *map(str, arguments)]
    variables = os.environ | {"HYDRA_FULL_ERROR": "0", "WANDB_MODE": "offline"} | (environment or {})
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, stream) for stream in ("stdout", "stderr")]
        process = FRESH.Process(target=_run, args=(call, cwd, variables, printed))
        process.start()
        process.join()
        assert process.exitcode is not None
        return CompletedProcess(call, process.exitcode, *(path.read_text(encoding="utf-8") for path in printed))


def _run(call: list[str], cwd: Path, environment: Mapping[str, str], printed: list[Path]) -> None:
    for descriptor, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, str(cwd))
    sys.argv = list(call)
    sys.modules.pop(call[0], None)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    runpy.run_module(call[0], run_name="__main__", alter_sys=True)
