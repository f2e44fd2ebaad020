"""Write checkpoints: each is there as a whole or not at all.

A checkpoint is written beside its place and then moved there. The last one stands beside the one before it, in case its
disk damages it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as Checkpointing
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_warn

from wsolkit.checkpoint import is_whole
from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.settings.conf import as_named
from wsolkit.system.signals import SIGNALS
from wsolkit.training.csv_log import RunLog
from wsolkit.training.loss_log import LossLog


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint as `best.ckpt`; a resumed run takes along the one beside the checkpoint it continues.

    A checkpoint says which file was the best. Nothing that it says is read, copied or deleted as a file: it may come
    from anywhere.

    Args:
        folder: of the checkpoints.
        monitor: the metric of which the best checkpoint has most.
        resume: the checkpoint that the run continues; None: it begins anew.
    """

    def __init__(self, folder: Path, monitor: str, resume: str | Path | None) -> None:
        super().__init__(folder, filename="best", monitor=monitor, mode="max", enable_version_counter=False)
        self._here = folder / "best.ckpt"
        self._earlier = None if resume is None else Path(resume).parent / "best.ckpt"

    def found(self, max_epochs: int) -> str:
        """The file of the best checkpoint.

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
        """Lightning's hook: make the score of the earlier run's best checkpoint, and the file, those of this run."""
        score = state_dict.get("best_model_score")
        if self._earlier is None or not isinstance(score, torch.Tensor) or not self._earlier.is_file():
            return
        if self._earlier.resolve() != self._here.resolve():
            self._here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._earlier, self._here)
        self.best_model_score = self.kth_value = score
        self.best_model_path = self.kth_best_model_path = str(self._here)
        self.best_k_models = {str(self._here): score}


_STEPS_BETWEEN_LOOKS = 16  # at the clock: to agree upon it, processes wait for each other

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and moves it there when it is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Lightning's hook.

        Raises:
            CheckpointError: it cannot be written; what was there before stays.
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
        except (OSError, RuntimeError) as error:  # torch's writer says of a full disk that it failed to write
            draft.unlink(missing_ok=True)
            reason, free = str(error).splitlines()[0], shutil.disk_usage(place.parent).free / 2**20
            raise CheckpointError(
                f"checkpoint '{place}' cannot be written ({reason}); {free:.0f} MiB are free there. Make room and "
                "continue from the checkpoint before with resume=auto"
            ) from error


class LastCheckpoint(Checkpointing):
    """Keeps checkpoints from which a run goes on exactly: `last.ckpt`, and the one before it as `previous.ckpt`.

    Written at the end of each epoch, after its validation; in between, now and then and when a signal stops the run.

    Args:
        folder: of the checkpoints.
        every_n_steps: also after so many optimizer steps.
        every_n_minutes: also after so many minutes.
        requeue: a run that SIGTERM stops puts its job back into SLURM's queue, if it is one.

    Attributes:
        saved_step: the optimizer step after which the last was written, or after which the run went on.
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
        """Lightning's hook."""
        self._saved_at, self.saved_step = time.monotonic(), trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook: a validation that is begun again counts from 0."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        if loop.restarted_mid_evaluation:
            loop.batch_progress.reset()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        if between_steps(trainer) and self._is_due(trainer):
            self._save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            return True
        if self.every_n_minutes is None or step % _STEPS_BETWEEN_LOOKS:
            return False
        late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        return bool(trainer.strategy.broadcast(late))  # the clocks of processes differ

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning's hook."""
        together = isinstance(exception, SIGTERMException)  # all processes are here
        if together and trainer.global_step > self.saved_step:
            if trainer.training and between_steps(trainer):
                self._save(trainer)
            elif trainer.validating and trainer.state.fn == TrainerFn.FITTING:
                _begin_validation_again(trainer)
                self._save(trainer)
        if self.requeue and trainer.is_global_zero and signal.SIGTERM in (SIGNALS.reason, SIGNALS.received):
            _requeue()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        self._save(trainer)

    def left(self) -> str:
        """What a run that ends now leaves to go on from, in a few words."""
        last = self.folder / LAST
        if not last.is_file():
            return "nothing was saved yet"
        return f"saved after step {self.saved_step} as '{as_named(last)}'"

    def _save(self, trainer: Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LossLog):
                callback.log_step(trainer)  # what comes before the checkpoint will not be logged again
        for logger in trainer.loggers:
            logger.sync() if isinstance(logger, RunLog) else logger.save()
        last = self.folder / LAST
        if trainer.is_global_zero and last.is_file():
            draft = self.folder / f".{PREVIOUS}.{os.getpid()}"
            draft.unlink(missing_ok=True)
            os.link(last, draft)  # so that last.ckpt is there at any moment
            draft.replace(self.folder / PREVIOUS)
        trainer.save_checkpoint(last)
        self._saved_at, self.saved_step = time.monotonic(), trainer.global_step


def between_steps(trainer: Trainer) -> bool:
    """Whether a run could go on exactly from here.

    Not at the end of an epoch: it would leave out its validation. Nor where gradients of several batches are being
    gathered: they are no part of a checkpoint.
    """
    loop = trainer.fit_loop.epoch_loop
    return not loop.batch_progress.is_last_batch and loop._accumulated_batches_reached()


def _begin_validation_again(trainer: Trainer) -> None:
    """Say that the validation of an epoch has begun, and none of its batches is done: a resumed run does them all.

    What was counted of the first ones is no part of a checkpoint.
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
    """The checkpoint from which the run in a directory goes on; None: it has not come to any.

    A damaged one is left out, with a warning.

    Raises:
        CheckpointError: all are damaged.
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
