"""Continue a run with other settings: convert what can be converted, and refuse the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from omegaconf import DictConfig
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from wsolkit.checkpoint import Checkpoint
from wsolkit.data.classes import check_same_classes
from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.dataset import Place
from wsolkit.errors import CheckpointError
from wsolkit.methods.base import WSOLModule
from wsolkit.settings.restore import changed_settings, check_resumable
from wsolkit.training.checkpointing import latest_checkpoint
from wsolkit.training.optimization import Optimization

_FEW = 3  # An error message names this many weights.
_COUNTED = (("dataset", "batch_size"), ("trainer", "accumulate_grad_batches"), ("trainer", "limit_train_batches"))


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    path: the checkpoint that the run continues, as an absolute path, because names like "last" mean something else to
    Lightning; None for a new run. checkpoint: its content. step: the step at which the log in the run directory
    continues, None for a new run.
    """

    path: Path | None = None
    checkpoint: Checkpoint | None = None
    step: int | None = None

    @classmethod
    def of(cls, cfg: DictConfig, folder: Path) -> Start:
        """Find out where a run with these settings begins.

        Raises:
            CheckpointError: the checkpoint of `cfg.resume` cannot be read, or belongs to another run.
        """
        path = latest_checkpoint(folder) if cfg.resume == "auto" else cfg.resume
        if path is None:
            return cls()
        checkpoint = check_resumable(path, cfg)
        here = Path(path).resolve().parent == (folder / "checkpoints").resolve()
        return cls(Path(path).absolute(), checkpoint, checkpoint.step if here else None)

    def check(self, cfg: DictConfig, module: WSOLModule, datamodule: WSOLDataModule) -> None:
        """Check that the run can continue its checkpoint, see `check_continuation`."""
        if self.checkpoint is not None:
            check_continuation(self.checkpoint, cfg, module, datamodule)

    def callbacks(self) -> list[Callback]:
        """Return the callbacks that put the run where its checkpoint was."""
        return [] if self.checkpoint is None else [Continuation()]


def check_continuation(checkpoint: Checkpoint, cfg: DictConfig, module: WSOLModule, datamodule: WSOLDataModule) -> None:
    """Check that a run with these classes, model, optimizer and images can continue from its checkpoint.

    It warns once of all settings that have changed since.

    Raises:
        CheckpointError: the run cannot continue.
    """
    resume = f"resume={checkpoint.path}"
    changed = changed_settings(cfg, checkpoint)
    check_same_classes(checkpoint.class_names, datamodule.class_names, resume)
    _check_weights(resume, checkpoint, module, changed)
    _check_optimizer(resume, checkpoint, module, changed)
    limit = cfg.trainer.max_epochs
    if limit is not None and 0 <= limit < checkpoint.epochs:
        raise CheckpointError(
            f"{resume} has reached epoch {checkpoint.epochs}, and trainer.max_epochs={limit}: expected as many or more"
        )
    datamodule.check_position(cast(Place, checkpoint.place), resume)
    _check_earlier_version(resume, checkpoint, cfg)
    if changed:
        rank_zero_warn(f"{resume} continues with other settings: {_listed(changed)}")


def _check_weights(resume: str, checkpoint: Checkpoint, module: WSOLModule, changed: Mapping[str, str]) -> None:
    saved = {name: tuple(value.shape) for name, value in checkpoint.state_dict.items()}
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    others = [name for name in saved | own if saved.get(name) != own.get(name)]
    if others:
        shapes = [f"{name} {_shape(own.get(name))} (was {_shape(saved.get(name))})" for name in others[:_FEW]]
        raise CheckpointError(
            f"{resume} belongs to another model: {len(others)} of its weights differ, such as {', '.join(shapes)}. "
            f"{_as_it_was(changed)}"
        )


def _shape(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else "×".join(map(str, shape)) or "a number"


def _check_optimizer(resume: str, checkpoint: Checkpoint, module: WSOLModule, changed: Mapping[str, str]) -> None:
    target = "optimizer._target_"
    if target in changed:
        raise CheckpointError(f"{resume} has the state of another optimizer: {target}={changed[target]}")
    optimizer = _optimization(module).optimizer(module)
    saved = [(group.get("name"), len(group["params"])) for group in checkpoint.optimizer]
    own = [(group.get("name"), len(group["params"])) for group in optimizer.param_groups]
    if saved and saved != own:
        raise CheckpointError(
            f"{resume} has the state of an optimizer with other parameters: {_groups(own)} (was {_groups(saved)}). "
            f"{_as_it_was(changed)}"
        )
    lacking = _state_of_one(module) - checkpoint.optimizer_state
    if saved and lacking:
        raise CheckpointError(
            f"{resume} has the state of another optimizer, without {', '.join(sorted(lacking))}. {_as_it_was(changed)}"
        )


def _state_of_one(module: WSOLModule) -> set[str]:
    """Return the names of what an optimizer remembers of each parameter, found by trying it on one parameter."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = _optimization(module).create([{"params": [parameter]}])
    optimizer.step()
    return set(optimizer.state[parameter])


def _optimization(module: WSOLModule) -> Optimization:
    assert isinstance(module.optimization, Optimization)
    return module.optimization


def _groups(groups: Sequence[tuple[str | None, int]]) -> str:
    return " + ".join(f"{count} {name}" for name, count in groups)


def _check_earlier_version(resume: str, checkpoint: Checkpoint, cfg: DictConfig) -> None:
    """Check the batch size, which must not change, because early checkpoints do not store it."""
    if not checkpoint.place or "batch" in checkpoint.place:
        return
    for group, key in _COUNTED:
        now, before = cfg[group].get(key), checkpoint.config.get(group, {}).get(key)
        if now != before:
            raise CheckpointError(
                f"{resume} comes from an earlier version, which counted batches: {group}.{key}={now} (was {before}). "
                "Continue with the old value"
            )


def _as_it_was(changed: Mapping[str, str]) -> str:
    return f"Settings that differ: {_listed(changed)}" if changed else "No setting differs: the files of the model do"


def _listed(changed: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={difference}" for key, difference in changed.items())


class Continuation(Callback):
    """Puts a run where its checkpoint was, counted in batches of the new size, with the new settings of its optimizer.

    The weights, the moments and the number of steps come from the checkpoint. The learning rate is the one that the
    schedule has at this epoch, no matter how many steps led to it.
    """

    def __init__(self) -> None:
        self._groups: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the optimizer's settings, before Lightning replaces them with those of the checkpoint."""
        (optimizer,) = trainer.optimizers
        self._groups = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the loops, the optimizer and the schedule, which have the checkpoint's state by now."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, WSOLDataModule)
        epoch, taken, within = datamodule.start
        if within:
            _move(trainer, taken)
        elif not trainer.fit_loop.epoch_loop.val_loop.restarted_mid_evaluation:
            _begin_epoch(trainer)
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        self._set_rates(trainer, epoch * steps + taken // trainer.accumulate_grad_batches)

    def _set_rates(self, trainer: Trainer, step: int) -> None:
        """Give the optimizer its new settings, and the schedule's rates at a step, counted in steps of the new run."""
        (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
        scheduler = config.scheduler
        assert isinstance(scheduler, LambdaLR)
        scheduler.last_epoch = step
        scheduler.base_lrs = [group["initial_lr"] for group in self._groups]
        before = optimizer.param_groups[0]["lr"]
        factors = [factor(step) for factor in scheduler.lr_lambdas]
        for group, own, factor in zip(optimizer.param_groups, self._groups, factors, strict=True):
            group |= own | {"lr": own["initial_lr"] * factor}
        now = optimizer.param_groups[0]["lr"]
        if not math.isclose(now, before):
            rank_zero_warn(f"the learning rate continues at {now:.3g}. At the checkpoint it was {before:.3g}")


def _move(trainer: Trainer, taken: int) -> None:
    """Make Lightning count this many batches of the epoch as done."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    moved = taken - progress.ready
    for name in ("ready", "started", "processed", "completed"):
        setattr(progress, name, getattr(progress, name) + moved)


def _begin_epoch(trainer: Trainer) -> None:
    """Make Lightning begin an epoch. With trainer.max_steps it would take the epoch before for unfinished."""
    loop = trainer.fit_loop
    if loop.restarting:
        loop.epoch_loop.restarting = False
        loop.reset_restart_stage()
        for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
            progress.completed = progress.processed  # type: ignore[attr-defined]
