"""A run directory belongs to one run at a time, from before anything is written into it."""

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
    """Whether this is the first process of its run, which alone writes; as Lightning, torchrun and SLURM say it."""
    return not any(os.environ.get(name, "0") not in ("", "0") for name in _RANKS)


@contextmanager
def run_directory(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run directory, and rid it of what killed ones had half written.

    The other processes of a run, and what this process calls within, pass.

    Raises:
        BusyError: another run is in it. ConfigError: it cannot be written to.
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
    """A command's task(settings, run directory) with the directory to itself; a full disk is named."""

    @functools.wraps(task)
    def run(cfg: DictConfig, folder: Path) -> Result:
        try:
            with run_directory(folder):
                return task(cfg, folder)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise TrainingError(
                f"'{error.filename or folder}' cannot be written ({error.strerror}); what was there before is whole. "
                "Make room and run the same command again: resume=auto goes on with a training from its last checkpoint"
            ) from error

    return run


class OneRun(Callback):  # type: ignore[misc]
    """Hydra's callback: has the run directory before Hydra writes its own files into it, until the command ends."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook. It exits, since Hydra makes warnings of errors here."""
        if not leads():
            with read_write(config.hydra):
                config.hydra.output_subdir = None  # the first process writes it
            return
        try:
            HydraConfig.instance().set_config(config)  # for ${hydra:…} in the directory's name
            folder = Path(config.hydra.run.dir).absolute()
        except OmegaConfBaseException:
            return  # Hydra will come upon it, too, and says so
        self._held = ExitStack()
        try:
            self._held.enter_context(run_directory(folder))
        except WsolkitError as error:
            sys.exit(f"error: {error}")
