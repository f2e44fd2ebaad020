"""Build the trainer of a run, and open and close what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from omegaconf import DictConfig
from timm.layers import convert_sync_batchnorm
from torch import nn

from wsolkit.errors import ConfigError
from wsolkit.methods.base import WSOLModule
from wsolkit.settings.checks import locate
from wsolkit.settings.compose import arguments, built
from wsolkit.system.signals import Stopped
from wsolkit.training.checkpointing import AtomicCheckpointIO
from wsolkit.training.companions import stoppable
from wsolkit.training.evaluator import Evaluator
from wsolkit.training.failures import named_compilation
from wsolkit.training.loggers import build_loggers, close, log_settings
from wsolkit.training.profiling import StepProfiler
from wsolkit.training.progress import Progress
from wsolkit.training.speed import Speed


@contextmanager
def running(
    cfg: DictConfig,
    folder: Path,
    module: WSOLModule,
    callbacks: Sequence[Callback],
    continued_at: int | None = None,
    advice: Callable[[], str] | None = None,
) -> Iterator[Trainer]:
    """Train and evaluate within this context, which manages loggers, progress bar, profile and signals.

    Args:
        cfg: the settings.
        folder: the run directory.
        module: the module to train or evaluate.
        callbacks: the callbacks of the command.
        continued_at: the step from which the run continues, or None for a new run. Its log then continues, too.
        advice: returns what to tell a user who stopped the run.

    Raises:
        Stopped: a signal has stopped the run.
    """
    loggers = build_loggers(cfg, folder, continued_at)
    own = [LearningRateMonitor("step"), Speed()] if loggers and module.optimization is not None else []
    bar = [Progress()] if cfg.trainer.enable_progress_bar else []
    trainer = build_trainer(cfg, folder, [*callbacks, *own, *bar], loggers)
    profiler = trainer.profiler  # type: ignore[attr-defined]
    if isinstance(profiler, StepProfiler):
        profiler.watch(module, module.attached(Evaluator).evaluation)
    try:
        with stoppable(trainer), named_compilation():
            log_settings(loggers, module.description.config, folder)
            yield trainer
    except Stopped as stop:
        if advice is not None:
            stop.advice = advice()
        raise
    finally:
        close(loggers)
    if isinstance(profiler, StepProfiler) and trainer.is_global_zero:
        profiler.report(folder)


def build_trainer(cfg: DictConfig, folder: Path, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """Build the trainer of `cfg.trainer`.

    Where Lightning chooses DDP by itself, it does not broadcast buffers. A broadcast would be a collective call in each
    evaluation batch, and processes have different numbers of these, since every image counts once.
    """
    settings = arguments(cfg.trainer)
    plugins: list[Any] = [AtomicCheckpointIO(), *_environment()]
    if isinstance(settings.get("profiler"), dict):
        settings["profiler"] = built(cfg.trainer.profiler)
    if settings.pop("sync_batchnorm", False):
        plugins.append(SyncBatchNormPlugin())
    StrategyRegistry.register("ddp", DDPStrategy, override=True, broadcast_buffers=False)
    try:
        trainer: Trainer = locate(cfg.trainer._target_, "trainer.")(
            **settings,
            default_root_dir=str(folder),
            callbacks=callbacks,
            logger=loggers,
            plugins=plugins,
            # Lightning's sampler would repeat images to fill up the last batch of an evaluation.
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(f"trainer: {error}") from error
    return trainer


class PrecisionTrainer(Trainer):
    """Lightning's trainer with one more precision.

    Args:
        precision: as in Lightning, or "auto", see `quick_precision`.
        accelerator: as in Lightning.
        others: further arguments of Lightning's trainer.
    """

    def __init__(self, precision: _PRECISION_INPUT | Literal["auto"] | None, accelerator: str, **others: Any) -> None:
        if precision == "auto":
            precision = quick_precision(accelerator)
        super().__init__(precision=precision, accelerator=accelerator, **others)


def quick_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """Return "bf16-mixed" where the hardware multiplies matrices in bfloat16, or else "32-true".

    Args:
        accelerator: as in Lightning.
    """
    # A CPU needs AMX. One with AVX-512's bfloat16 instructions but without AMX takes 1.6 times as long as in float32.
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        quick = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        quick = accelerator in ("auto", "cpu") and torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if quick else "32-true"


def _environment() -> list[SLURMEnvironment]:
    """Return SLURM's environment if a SLURM job runs this. `LastCheckpoint` handles the end of the job."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


class SyncBatchNormPlugin(TorchSyncBatchNorm):
    """Replaces Lightning's synchronised BatchNorm, which would lose the activation in timm's layers."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace the layers of the model.

        Raises:
            ConfigError: the model is on CPUs.
        """
        assert isinstance(model, WSOLModule)
        if model.trainer.strategy.root_device.type == "cpu":
            raise ConfigError(
                "trainer.sync_batchnorm=true needs GPUs, since PyTorch's SyncBatchNorm refuses CPUs: leave it out, or "
                "add backbone.batch_norm=frozen instead"
            )
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted

    def revert(self, model: nn.Module) -> nn.Module:
        """Return the module unchanged, because in evaluation the layers act like BatchNorm."""
        return model
