"""Write checkpoints so that each one is there as a whole or not at all.

A checkpoint is written under another name, and gets its own name when it is complete. The run keeps the last two, in
case the disk damages the last one.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as Checkpointing
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from wsolkit.checkpoint import is_whole
from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.settings.conf import as_named
from wsolkit.system.signals import SIGNALS
from wsolkit.training.csv_log import RunLog
from wsolkit.training.loss_log import LossLog


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint as `best.ckpt`. A resumed run copies the one beside the checkpoint that it continues.

    A checkpoint says which file was the best. The run does not read, copy or delete the file of that name, because a
    checkpoint may come from anywhere.

    A method may choose some of its weights by another metric, for example its classifier by the accuracy. The best
    checkpoint then has these weights from the epoch that was best in that metric.

    Args:
        folder: the folder of the checkpoints.
        monitor: the metric that the best checkpoint maximises.
        resume: the checkpoint that the run continues, or None for a new run.
        apart: the metric that chooses the weights whose names begin with a prefix, by prefix.
        patience: the validations without a better value of any of these metrics after which training ends. None trains
            to the end.
    """

    def __init__(
        self,
        folder: Path,
        monitor: str,
        resume: str | Path | None,
        apart: Mapping[str, str] | None = None,
        patience: int | None = None,
    ) -> None:
        super().__init__(folder, filename="best", monitor=monitor, mode="max", enable_version_counter=False)
        self._here = folder / "best.ckpt"
        self._earlier = None if resume is None else Path(resume).parent / "best.ckpt"
        self._apart, self._patience = apart or {}, patience
        self._parts: dict[str, dict[str, torch.Tensor]] = {}
        self._scores: dict[str, float] = {}
        self._waited = 0
        self._joined: int | None = None  # The number of the file into which the parts were put.

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the best parts, and end training that no longer improves."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        assert self.monitor is not None
        improved = self._improved(trainer, self.monitor)
        better = [prefix for prefix, metric in self._apart.items() if self._improved(trainer, metric)]
        for prefix in better:
            weights = pl_module.state_dict()
            self._parts[prefix] = {n: w.detach().cpu().clone() for n, w in weights.items() if n.startswith(prefix)}
        self._joined = None if better else self._joined
        self._join(trainer)
        self._waited = 0 if improved or better else self._waited + 1
        if self._patience is not None and self._waited >= self._patience:
            rank_zero_info(f"Training ends: {self._waited} validations brought no better {self.monitor}")
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best checkpoint, if Lightning has not saved it after the validation, with the best parts."""
        super().on_train_epoch_end(trainer, pl_module)
        self._join(trainer)

    def _join(self, trainer: Trainer) -> None:
        """Put the best parts into the best checkpoint, unless they are in it."""
        if not self._parts or not trainer.is_global_zero or not self._here.is_file():
            return
        if self._here.stat().st_ino != self._joined:
            checkpoint = torch.load(self._here, map_location="cpu", weights_only=True)
            for part in self._parts.values():
                checkpoint["state_dict"] |= part
            AtomicCheckpointIO().save_checkpoint(checkpoint, self._here)
            self._joined = self._here.stat().st_ino

    def _improved(self, trainer: Trainer, metric: str) -> bool:
        """Note a metric's value, and say whether it is the best so far."""
        value = float(trainer.callback_metrics.get(metric, math.nan))
        better = value > self._scores.get(metric, -math.inf)
        if better:
            self._scores[metric] = value
        return better

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, and the parts that are chosen apart."""
        return {**super().state_dict(), "parts": self._parts, "scores": self._scores, "waited": self._waited}

    def found(self, max_epochs: int) -> str:
        """Return the file of the best checkpoint.

        Raises:
            CheckpointError: there is none, since no validation took place.
        """
        if not self.best_model_path:
            raise CheckpointError(
                "no checkpoint was written: no validation took place. Set trainer.check_val_every_n_epoch to at most "
                f"trainer.max_epochs={max_epochs}"
            )
        return self.best_model_path

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score of the earlier run, with the file of this run."""
        self._parts, self._scores = state_dict.get("parts", {}), state_dict.get("scores", {})
        self._waited = state_dict.get("waited", 0)
        score = state_dict.get("best_model_score")
        if self._earlier is None or not isinstance(score, torch.Tensor) or not self._earlier.is_file():
            return
        if self._earlier.resolve() != self._here.resolve():
            self._here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._earlier, self._here)
        self.best_model_score = self.kth_value = score
        self.best_model_path = self.kth_best_model_path = str(self._here)
        self.best_k_models = {str(self._here): score}


_STEPS_BETWEEN_LOOKS = 16  # The processes wait for each other when they compare clocks, so they do it this seldom.

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name, and renames it when it is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: it cannot be written. The file that was there before stays.
        """
        place = Path(path)
        draft = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(place)
        # PyTorch's writer only says that it failed to write when a disk is full.
        except (OSError, RuntimeError) as error:
            draft.unlink(missing_ok=True)
            reason, free = str(error).splitlines()[0], shutil.disk_usage(place.parent).free / 2**20
            raise CheckpointError(
                f"checkpoint '{place}' cannot be written ({reason}); {free:.0f} MiB are free there. Make room and "
                "continue from the checkpoint before with resume=auto"
            ) from error


class LastCheckpoint(Checkpointing):
    """Keeps checkpoints from which a run continues exactly: `last.ckpt`, and the one before it as `previous.ckpt`.

    The run writes one at the end of each epoch, after its validation. It also writes one at the given intervals, and
    when a signal stops it.

    Args:
        folder: the folder of the checkpoints.
        every_n_steps: the run also writes a checkpoint after this many optimizer steps.
        every_n_minutes: the run also writes a checkpoint after this many minutes.
        requeue: a run under SLURM puts its job back into the queue when SIGTERM stops it.

    Attributes:
        saved_step: the optimizer step after which the last checkpoint was written, or at which the run was resumed.
    """

    def __init__(self, folder: Path, every_n_steps: int | None, every_n_minutes: float | None, requeue: bool) -> None:
        for name, value in {"every_n_steps": every_n_steps, "every_n_minutes": every_n_minutes}.items():
            if value is not None and value <= 0:
                raise ConfigError(f"checkpoints.{name}={value}: expected more than 0, or null")
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.requeue = requeue
        self._saved_at = time.monotonic()
        self.saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the step at which the run starts."""
        self._saved_at, self.saved_step = time.monotonic(), trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batches from 0, also in a validation that starts again."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        if loop.restarted_mid_evaluation:
            loop.batch_progress.reset()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a checkpoint if one is due after this step."""
        if between_steps(trainer) and self._is_due(trainer):
            self._save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            return True
        if self.every_n_minutes is None or step % _STEPS_BETWEEN_LOOKS:
            return False
        late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        return bool(trainer.strategy.broadcast(late))  # The clocks of the processes differ.

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write a checkpoint when a signal stops the run."""
        together = isinstance(exception, SIGTERMException)  # All processes are at the same point.
        if together and trainer.global_step > self.saved_step:
            if trainer.training and between_steps(trainer):
                self._save(trainer)
            elif trainer.validating and trainer.state.fn == TrainerFn.FITTING:
                _begin_validation_again(trainer)
                self._save(trainer)
        if self.requeue and trainer.is_global_zero and signal.SIGTERM in (SIGNALS.reason, SIGNALS.received):
            _requeue()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint at the end of the epoch."""
        self._save(trainer)

    def left(self) -> str:
        """Say in a few words what a run that ends now has saved."""
        last = self.folder / LAST
        if not last.is_file():
            return "nothing was saved yet"
        return f"saved after step {self.saved_step} as '{as_named(last)}'"

    def _save(self, trainer: Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LossLog):
                callback.log_step(trainer)  # A resumed run does not log again what comes before the checkpoint.
        for logger in trainer.loggers:
            logger.sync() if isinstance(logger, RunLog) else logger.save()
        last = self.folder / LAST
        if trainer.is_global_zero and last.is_file():
            draft = self.folder / f".{PREVIOUS}.{os.getpid()}"
            draft.unlink(missing_ok=True)
            os.link(last, draft)  # This way, last.ckpt exists at every moment.
            draft.replace(self.folder / PREVIOUS)
        trainer.save_checkpoint(last)
        self._saved_at, self.saved_step = time.monotonic(), trainer.global_step


def between_steps(trainer: Trainer) -> bool:
    """Say whether a run could continue exactly from here.

    It cannot at the end of an epoch, because it would skip the validation. It also cannot while it accumulates
    gradients over several batches, because a checkpoint does not hold them.
    """
    loop = trainer.fit_loop.epoch_loop
    return not loop.batch_progress.is_last_batch and loop._accumulated_batches_reached()


def _begin_validation_again(trainer: Trainer) -> None:
    """Mark the validation of an epoch as begun, with none of its batches done, so that a resumed run does them all.

    A checkpoint does not hold the counts of the first batches.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset()
    progress.increment_ready()
    progress.increment_started()


def _requeue() -> None:
    """Put this job back into SLURM's queue."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        rank_zero_warn(f"SLURM did not take job {job} back into its queue: {reason}")


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint from which the run in a directory continues, or None if it has written none.

    It skips a damaged one, with a warning.

    Raises:
        CheckpointError: all of them are damaged.
    """
    there = [path for path in (folder / "checkpoints" / LAST, folder / "checkpoints" / PREVIOUS) if path.is_file()]
    for path in there:
        if is_whole(path):
            return path
        rank_zero_warn(f"'{path}' is damaged or was cut short: the checkpoint before it is used, if there is one")
    if there:
        raise CheckpointError(
            f"no checkpoint in '{folder / 'checkpoints'}' is whole: delete them to begin anew, or give another one as "
            "resume=PATH"
        )
    return None
