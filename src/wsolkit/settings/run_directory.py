"""Give a run directory to one run at a time, before anything is written into it."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write
from omegaconf.errors import OmegaConfBaseException

from wsolkit.errors import ConfigError, TrainingError, WsolkitError
from wsolkit.system.drafts import remove_drafts
from wsolkit.system.locks import alone

LOCK = ".run.lock"
_FILES = (
    *("metrics.json", "metrics.csv", "hparams.yaml", "config.yaml", "images.csv", "report.html", "profile.json"),
    *("train_images.txt", "examples.png", "inside.png", "inside.npz", "checkpoints/*.ckpt", "examples/*"),
)
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Result = TypeVar("Result")


def leads() -> bool:
    """Say whether this is the first process of its run, which alone writes, by Lightning, torchrun or SLURM."""
    return not any(os.environ.get(name, "0") not in ("", "0") for name in _RANKS)


@contextmanager
def run_directory(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run directory, and remove the drafts that killed runs have left.

    The other processes of the run may enter, and so may calls from within.

    Raises:
        BusyError: another run uses the directory.
        ConfigError: the directory is not writable.
    """
    with ExitStack() as stack:
        if leads():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                instead = "give this run another place with hydra.run.dir=DIR"
                stack.enter_context(alone(folder / LOCK, f"running in '{folder}'", instead, again=True))
            except OSError as error:
                raise ConfigError(
                    f"the run directory '{folder}' cannot be written to ({error.strerror}): give another place with "
                    "hydra.run.dir=DIR"
                ) from error
            remove_drafts(folder / name for name in _FILES)
        yield


def one_run(task: Callable[[DictConfig, Path], Result]) -> Callable[[DictConfig, Path], Result]:
    """Give a command's task(settings, run directory) the directory to itself, and explain a full disk."""

    @functools.wraps(task)
    def run(cfg: DictConfig, folder: Path) -> Result:
        try:
            with run_directory(folder):
                return task(cfg, folder)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise TrainingError(
                f"'{error.filename or folder}' cannot be written ({error.strerror}). What was there before is whole. "
                "Make room and run the same command again: resume=auto continues a training from its last checkpoint"
            ) from error

    return run


class OneRun(Callback):  # type: ignore[misc]
    """Takes the run directory before Hydra writes its own files into it, and keeps it until the command ends."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take the run directory, or exit. Hydra would turn an error raised here into a warning."""
        if not leads():
            with read_write(config.hydra):
                config.hydra.output_subdir = None  # The first process writes it.
            return
        try:
            HydraConfig.instance().set_config(config)  # The name of the directory may contain ${hydra:…}.
            folder = Path(config.hydra.run.dir).absolute()
        except OmegaConfBaseException:
            return  # Hydra will fail in the same way, and explain it.
        self._held = ExitStack()
        try:
            self._held.enter_context(run_directory(folder))
        except WsolkitError as error:
            sys.exit(f"error: {error}")
