"""Build the loggers of a run: metrics.csv, W&B and TensorBoard."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig

from wsolkit.errors import ConfigError
from wsolkit.settings.compose import built
from wsolkit.settings.jobs import swept
from wsolkit.system.names import readable, shortened
from wsolkit.training.csv_log import RunLog
from wsolkit.types import PlainConfig


def build_loggers(cfg: DictConfig, folder: Path, continued_at: int | None = None) -> list[Logger]:
    """Build the loggers of `cfg.logger`, which write into the run directory.

    Args:
        cfg: the settings.
        folder: the run directory.
        continued_at: the step from which the run continues, or None for a new run. The loggers then continue the log
            and the W&B run of the directory.
    """
    if getattr(rank_zero_only, "rank", 0):
        continued_at = None
    loggers: list[Logger] = []
    for node in cfg.logger.values():
        kind = str(node._target_).rpartition(".")[2]
        build = functools.partial(built, node, save_dir=str(folder))
        if kind == "WandbLogger":
            build = functools.partial(build, **_identity_in_wandb(cfg, node, folder))
            if continued_at is not None:
                build = functools.partial(build, **_earlier_wandb_run(folder))
        if kind == "TensorBoardLogger":
            if find_spec("tensorboard") is None:
                raise ConfigError("logger=tensorboard needs another package: pip install 'wsolkit[tensorboard]'")
            build = functools.partial(build, purge_step=continued_at)
        logger = build()
        if isinstance(logger, WandbLogger) and not _reaches_wandb(logger):
            logger = build(mode="offline")
        if isinstance(logger, RunLog) and continued_at is not None:
            logger.go_on(continued_at)
        loggers.append(logger)
    return loggers


_LONGEST_TAG, _LONGEST_NAME = 64, 128  # These are the limits of W&B.


def _identity_in_wandb(cfg: DictConfig, node: DictConfig, folder: Path) -> dict[str, Any]:
    """Return what identifies a run in W&B: names, its command, and for a job of a sweep the sweep and its settings."""
    found: dict[str, Any] = {"job_type": "evaluate" if "checkpoint" in cfg else "train"}
    found |= {key: shortened(str(node[key]), _LONGEST_NAME) for key in ("name", "group") if node.get(key)}
    settings = swept(folder)
    if settings:
        tags = [folder.absolute().parent.name, *(f"{key}={value}" for key, value in settings.items())]
        found["tags"] = [shortened(tag, _LONGEST_TAG) for tag in tags]
    return found


def log_settings(loggers: Sequence[Logger], settings: PlainConfig, folder: Path) -> None:
    """Log the settings of a run. For a job of a sweep, also log the sweep's name and what it varies as "sweep".

    W&B takes dots in names for levels, so they become underscores: {"name": "lr", "optimizer_lr": 0.001}.
    """
    varied = {key.replace(".", "_"): value for key, value in swept(folder).items()}
    if varied:
        settings = settings | {"sweep": {"name": folder.absolute().parent.name, **varied}}
    for logger in loggers:
        logger.log_hyperparams(settings if isinstance(logger, RunLog) else _readable(settings))


def _readable(setting: Any) -> Any:
    """Return settings as text that can be sent to W&B."""
    if isinstance(setting, dict):
        return {readable(str(key)): _readable(value) for key, value in setting.items()}
    if isinstance(setting, list):
        return [_readable(value) for value in setting]
    return readable(setting) if isinstance(setting, str) else setting


def _reaches_wandb(logger: WandbLogger) -> bool:
    """Say whether W&B accepts the run. If it does not, warn why, and how to send the run later."""
    from wandb.errors import CommError, UsageError

    try:
        _ = logger.experiment
    except (CommError, UsageError) as error:
        if "project name" in str(error):
            raise ConfigError(f"logger.wandb.project: {error}") from error
        rank_zero_warn(
            f"W&B cannot be reached, or does not accept your login ({str(error).splitlines()[0]}). The run is logged "
            f"offline, and `wandb sync {shlex.quote(str(logger.save_dir))}/wandb/offline-run-*` sends it later"
        )
        return False
    return True


def _earlier_wandb_run(folder: Path) -> dict[str, str]:
    """Return what continues the W&B run in a run directory, if there is one."""
    runs = sorted(folder.glob("wandb/*run-*-*"), key=lambda path: path.name.partition("run-")[2])
    return {"id": runs[-1].name.rpartition("-")[2], "resume": "allow"} if runs else {}


def close(loggers: Sequence[Logger]) -> None:
    """Close the W&B run, so that the next job of a sweep does not write into it."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish()
