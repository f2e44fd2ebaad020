"""Log the speed and the memory of training beside the losses."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch
from lightning import Callback, LightningModule, Trainer

_GIB = 2**30


class Speed(Callback):
    """Logs `speed/images_per_second` and `memory/…` whenever losses are logged.

    The speed counts the images of all processes. It includes the time for loading images and for checkpoints, but not
    the time for validation. `memory/process_gib` is the resident memory of the first process without its loaders.
    `memory/device_peak_gib` is the peak memory of its tensors on a GPU.
    """

    def __init__(self) -> None:
        self._images, self._seconds = 0, 0.0
        self._running_since: float | None = None
        self._logged_step = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, unless it runs."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next batch."""
        self._stop_clock()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images, and log when losses are logged."""
        self._images += len(batch["label"]) * trainer.world_size
        step = trainer.global_step
        if step == self._logged_step or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self._stop_clock()
        values = {"speed/images_per_second": self._images / self._seconds} | memory(pl_module.device)
        # It logs at once, because Lightning would do so after it has written the checkpoint.
        for logger in pl_module.loggers:
            logger.log_metrics({"epoch": trainer.current_epoch} | values, step=step - 1)
        self._images, self._seconds, self._logged_step = 0, 0.0, step
        self._running_since = time.perf_counter()

    def _stop_clock(self) -> None:
        if self._running_since is not None:
            self._seconds += time.perf_counter() - self._running_since
            self._running_since = None


def memory(device: torch.device) -> dict[str, float]:
    """Return this process's current memory, and its peak memory on a GPU, in GiB."""
    values = {"memory/process_gib": psutil.Process().memory_info().rss / _GIB}
    if device.type == "cuda":
        values["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
    return values
