"""Name what goes wrong in training: a loss that is not finite, full memory, a loader that died."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, distributed

from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.errors import TrainingError
from wsolkit.methods.base import WSOLModule

_NAMED = 5
_NONE = torch.iinfo(torch.int64).max


class FiniteLoss(Callback):
    """Stops a run whose loss is not finite, before it writes a checkpoint.

    The result of the check stays on the device. The run reads it every `every_n_steps` steps, when it logs losses, and
    before a checkpoint, because it waits for the device at these points anyway.

    Args:
        every_n_steps: the number of steps between two checks.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._first: Tensor | None = None
        """The number of the first batch of this epoch whose loss is not finite."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the batches of the epoch before."""
        self._first = torch.full((), _NONE, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note whether the loss is finite, and check it when losses are logged."""
        if self._first is None:  # The run was resumed within an epoch.
            self._first = torch.full((), _NONE, device=pl_module.device)
        here = torch.where(outputs["loss"].detach().isfinite(), _NONE, batch_idx)
        self._first = torch.minimum(self._first, here)
        if trainer.global_step % self.every_n_steps == 0:
            self.check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite."""
        self.check(trainer)
        weights = torch.stack([parameter.detach().isfinite().all() for parameter in pl_module.parameters()])
        if not weights.all():
            raise TrainingError(
                f"weights are not finite after step {trainer.global_step}: the loss was finite, but not its gradient. "
                f"{_ADVICE}"
            )

    def check(self, trainer: Trainer) -> None:
        """Stop if a loss was not finite in any process.

        Raises:
            TrainingError: a loss was not finite. The message names the epoch, the batch and its images.
        """
        if self._first is None:
            return
        first = self._first
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(first, distributed.ReduceOp.MIN)
        number = int(first.item())
        if number == _NONE:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, WSOLDataModule)
        images = datamodule.training_images(trainer.current_epoch, number)
        named = ", ".join(images[:_NAMED]) + (f" and {len(images) - _NAMED} more" if len(images) > _NAMED else "")
        raise TrainingError(
            f"the loss is not finite in epoch {trainer.current_epoch}, batch {number} (images {named}). {_ADVICE}"
        )


class FitMemory(Callback):
    """Divides a batch into parts that fit into the device's memory, and accumulates gradients over them.

    Each process finds the number of parts for its device by trying, before training. All processes then use the largest
    number.

    Args:
        parts: the number of parts of a batch, from `parts_that_fit`.
    """

    def __init__(self, parts: int) -> None:
        self.parts = parts

    @classmethod
    def tried(cls, module: WSOLModule, datamodule: WSOLDataModule, trainer: Trainer) -> FitMemory:
        """Find the number of parts by trying."""
        return cls(parts_that_fit(module, datamodule, trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the largest number of parts that any process needs."""
        parts = torch.tensor(self.parts, device=pl_module.device)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(parts, distributed.ReduceOp.MAX)
        trainer.accumulate_grad_batches = int(parts.item())


def parts_that_fit(module: WSOLModule, datamodule: WSOLDataModule, trainer: Trainer) -> int:
    """Return the number of parts of a global batch with which a training step fits into this device's memory.

    Raises:
        TrainingError: not even a single image fits.
    """
    module.to(trainer.strategy.root_device)
    module = trainer.precision_plugin.convert_module(module)  # type: ignore[assignment]
    share = datamodule.batch_size // trainer.world_size
    unit = 2 if module.pairs else 1
    for parts in range(1, share // unit + 1):
        if share % (parts * unit) == 0 and _fits(module, share // parts, datamodule.image_size, trainer):
            return parts
    raise TrainingError(
        f"not even one image of {datamodule.image_size} pixels fits into the memory of {trainer.strategy.root_device}: "
        "choose a smaller backbone, or trainer.precision=bf16-mixed"
    )


def _fits(module: WSOLModule, count: int, side: int, trainer: Trainer) -> bool:
    """Say whether a step on black images fits. The module stays as it was."""
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    device = trainer.strategy.root_device
    try:
        precision = trainer.precision_plugin
        with torch.random.fork_rng([device] if device.type == "cuda" else []), precision.forward_context():
            image = precision.convert_input(torch.zeros(count, 3, side, side, device=device))
            label = torch.zeros(count, dtype=torch.long, device=device)
            module.losses({"image": image, "label": label})["loss"].backward()
        for parameter in module.parameters():  # AdamW keeps two moments, and DDP keeps a copy of the gradients.
            parameter.new_zeros((3, *parameter.shape))
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        module.zero_grad(set_to_none=True)
        for name, value in module.named_buffers():
            value.copy_(buffers[name])
        if device.type == "cuda":
            torch.cuda.empty_cache()


_ADVICE = (
    "Set a smaller optimizer.lr, trainer.gradient_clip_val=1 or trainer.precision=32-true. The last checkpoint in "
    "checkpoints/ is from before that"
)


@contextmanager
def named_compilation() -> Iterator[None]:
    """Say what a user can do if `torch.compile` fails.

    Raises:
        TrainingError: it failed.
    """
    try:
        yield
    except RuntimeError as error:
        if "torch._dynamo" not in sys.modules or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrainingError(
            f"compile: torch.compile failed ({reason}). It needs a C++ compiler on a CPU (CXX names one) and "
            "Triton on a GPU. Set compile=false to train without it"
        ) from error


@contextmanager
def named_trouble(batch_size: int) -> Iterator[None]:
    """Say what a user can do about an error for which PyTorch gives no advice.

    Args:
        batch_size: the batch size of the run.

    Raises:
        TrainingError: the memory is full, or a loader's process died.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the device has no memory left with dataset.batch_size={batch_size}. trainer.accumulate_grad_batches=2 "
            "holds half as many images at a time and keeps the batch of each step. dataset.batch_size=auto finds out "
            f"how many. trainer.precision=bf16-mixed also needs less memory ({str(error).splitlines()[0]})"
        ) from error
    except RuntimeError as error:
        dead = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)", str(error))
        if dead is None:
            raise
        raise TrainingError(
            f"a process that loads images died (number {dead[1]}). Often the machine's memory, or /dev/shm in a "
            "container, is full. Set a smaller dataset.num_workers (0 loads in the main process) and continue with "
            "resume=auto"
        ) from error
