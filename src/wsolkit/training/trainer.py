"""The trainer of a run, and what is open while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
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
    """Train and evaluate within: loggers, progress bar, profile and signals are taken care of, however it ends.

    Args:
        cfg: settings.
        folder: run directory.
        module: what is trained or evaluated.
        callbacks: those of the command.
        continued_at: the step from which the run in the directory goes on; its log is then continued.
        advice: what to tell somebody who stopped the run.

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
    """The trainer of `cfg.trainer`.

    Wherever Lightning chooses DDP by itself, buffers are not broadcast: that would be one more collective call in each
    evaluation batch, of which processes have different numbers, since every image counts once.
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
            use_distributed_sampler=False,  # evaluation must not repeat images to fill up the last batch
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(f"trainer: {error}") from error
    return trainer


def _environment() -> list[SLURMEnvironment]:
    """SLURM, if a job of it runs this; `LastCheckpoint` does what Lightning would do when the job is to stop."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


class SyncBatchNormPlugin(TorchSyncBatchNorm):
    """What Lightning calls to synchronise BatchNorm; its own would lose the activation in timm's layers."""

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
        """Lightning's hook: the layers stay. In evaluation they do what BatchNorm does."""
        return model
