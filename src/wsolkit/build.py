"""From settings to objects: the module, the datamodule, the trainer."""

from __future__ import annotations

import functools
import inspect
import logging
import shlex
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from timm.layers import convert_sync_batchnorm
from torch import nn

from wsolkit.backbones.pretrained import normalization
from wsolkit.checkpoint import AtomicCheckpointIO
from wsolkit.config import CONF, arguments, built, check_config, locate, plain, signature
from wsolkit.csv_log import RunLog
from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.index import Indexed
from wsolkit.data.records import Records, Split
from wsolkit.errors import ConfigError
from wsolkit.jobs import swept
from wsolkit.localization.protocol import Protocol
from wsolkit.methods.base import Network, Training, WSOLModule
from wsolkit.metrics.evaluation import Evaluation
from wsolkit.names import readable, shortened
from wsolkit.types import PlainConfig


def build_datamodule(cfg: DictConfig, model_classes: Sequence[str] | None = None) -> WSOLDataModule:
    """The data set of `cfg.dataset`, normalised for the backbone.

    Args:
        cfg: settings.
        model_classes: classes of the model that is evaluated on it, see `WSOLDataModule`.

    Raises:
        ConfigError: a setting is wrong. Files are read in `setup`, which raises DataError.

    >>> from wsolkit import build_datamodule, load_config
    >>> datamodule = build_datamodule(load_config("dataset=shapes"))
    >>> datamodule.class_names[:2]
    ['red spots', 'green spots']
    """
    check_config(cfg)
    mean, std = normalization(cfg.backbone.model, cfg.backbone.get("mean"), cfg.backbone.get("std"))
    node = arguments(cfg.dataset)
    known = inspect.signature(WSOLDataModule).parameters.keys() & node.keys()
    settings = {key: node[key] for key in known} | {"records": _indexed(cfg)}
    protocols = build_protocols(cfg).values()
    settings["held_out"] = node["held_out"] and cfg.selection == "val"
    datamodule: WSOLDataModule = locate(cfg.dataset._target_, "dataset.")(
        **settings,
        mean=mean,
        std=std,
        seed=cfg.seed,
        uncropped=any(rules.input != "resize" or rules.classification == "ten_crop" for rules in protocols),
        model_classes=model_classes,
    )
    return datamodule


def build_records(cfg: DictConfig) -> Callable[[Split], Records]:
    """What reads a split of `cfg.dataset` from its official files."""
    read: Callable[[Split], Records] = built(cfg.dataset.records)
    return read


def _indexed(cfg: DictConfig) -> Callable[[Split], Records]:
    """The same, from the data set's index where it has one that fits."""
    node, read = plain(cfg)["dataset"], build_records(cfg)
    if node.get("index") is None:
        return read
    return Indexed(read, node["records"], Path(node["root"]), Path(node["index"]), rank_zero_warn)


_NO_PROTOCOLS = ("epochs", "norms")  # what else metrics.json has numbers of


def build_protocols(cfg: DictConfig) -> dict[str, Protocol]:
    """The protocols of `cfg.protocol` by name.

    Raises:
        ConfigError: a rule is wrong.
    """
    protocols: dict[str, Protocol] = {}
    for name, rules in (cfg.get("protocol") or {}).items():
        if not isinstance(rules, DictConfig):
            raise ConfigError(f"protocol.{name}={rules}: expected the rules of a protocol, as in conf/protocol")
        try:
            protocol: Protocol = locate(rules._target_, f"protocol.{name}.")(**arguments(rules))
        except ConfigError as error:
            raise ConfigError(f"protocol.{name}: {error}") from error
        seen, meant = (cfg.dataset.image_size, cfg.dataset.resize), (protocol.resolution, protocol.resize)
        if protocol.input == "center_crop" and seen != meant:
            raise ConfigError(
                f"protocol.{name}: resolution and resize are {meant[0]} and {meant[1]}, but the images are cut by "
                f"dataset.image_size={seen[0]} and dataset.resize={seen[1]}: change those instead"
            )
        if "/" in str(name) or name in _NO_PROTOCOLS:
            raise ConfigError(f"protocol.{name}: numbers are named <protocol>/<metric>: choose a name other than that")
        protocols[str(name)] = protocol
    if not protocols:
        raise ConfigError("protocol=[]: name one or more, such as protocol=[maxboxacc]")
    return protocols


def build_module(cfg: DictConfig, class_names: list[str] | None = None) -> WSOLModule:
    """The method of `cfg.method` on the backbone of `cfg.backbone`.

    Args:
        cfg: settings as from `load_config`.
        class_names: names of the classes by label; None: as many unnamed ones as `dataset.num_classes`, or those of
            the data set, or of its part that `dataset.classes` keeps.

    Raises:
        ConfigError: a setting is wrong. CheckpointError: the backbone's weights do not fit.

    >>> import torch
    >>> from wsolkit import build_module, load_config
    >>> module = build_module(load_config("method=cam"), ["cat", "dog"])
    >>> module(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 2])
    """
    check_config(cfg)
    if class_names is None:
        known = None if cfg.dataset.classes else cfg.dataset.num_classes
        class_names = [str(label) for label in range(known)] if known else build_datamodule(cfg).class_names
    mean, std = normalization(cfg.backbone.model, cfg.backbone.get("mean"), cfg.backbone.get("std"))
    training = Training(
        optimizer=functools.partial(locate(cfg.optimizer._target_, "optimizer."), **arguments(cfg.optimizer)),
        schedule=built(cfg.schedule),
        seed=cfg.seed,
        config=plain(cfg),
        class_names=class_names,
        mean=mean,
        std=std,
    )
    evaluation = Evaluation(build_protocols(cfg), len(class_names))
    method, backbone = locate(cfg.method._target_, "method."), locate(cfg.backbone._target_, "backbone.")
    _check_backbone(cfg, method, backbone)
    module: WSOLModule = method(
        backbone=backbone(**arguments(cfg.backbone)),
        num_classes=len(class_names),
        training=training,
        evaluation=evaluation,
        **_postprocess(cfg, method),
        **arguments(cfg.method),
    )
    if cfg.get("compile"):
        compile_network(module.network, **_compilation(cfg.compile))
    return module


def compile_network(network: Network, **options: Any) -> None:
    """Have `torch.compile` compile the passes of a network, at the first of each; names of weights stay.

    Args:
        options: of `torch.compile`.
    """
    for name in network.passes:
        setattr(network, name, torch.compile(getattr(network, name), **options))


def _compilation(setting: object) -> dict[str, Any]:
    if setting is True:
        return {}
    if setting == "max-autotune":
        # Not with CUDA graphs: boxes are drawn from a batch's maps while the next, which would overwrite them, is made.
        return {"mode": "max-autotune-no-cudagraphs"}
    raise ConfigError(f"compile={setting}: expected false, true or max-autotune")


def _check_backbone(cfg: DictConfig, method: type[WSOLModule], backbone: type) -> None:
    if not (inspect.isclass(method) and issubclass(method, WSOLModule)):
        raise ConfigError(f"method._target_={cfg.method._target_}: expected a class that extends WSOLModule")
    needed = signature(method)[1].get("backbone", nn.Module)
    if not issubclass(backbone, needed):
        choices = [
            path.stem
            for path in sorted((CONF / "backbone").glob("*.yaml"))
            if str(OmegaConf.select(OmegaConf.load(path), "_target_")).rpartition(".")[2] == needed.__name__
        ]
        raise ConfigError(
            f"method={cfg.method.name} needs a {needed.__name__}, and backbone={cfg.backbone.name} is a "
            f"{backbone.__name__}; choose from: {', '.join(choices)}"
        )


def _postprocess(cfg: DictConfig, method: type[WSOLModule]) -> dict[str, Any]:
    """The post-process of `cfg.postprocess`, or None, as an argument of a method that takes one."""
    node = cfg.get("postprocess")
    if "postprocess" in signature(method)[0]:
        return {"postprocess": locate(node._target_, "postprocess.")(**arguments(node)) if node else None}
    if node:
        raise ConfigError(
            f"postprocess={node.name} refines the maps of methods on convolutional networks, and "
            f"method={cfg.method.name} is none: leave it out"
        )
    return {}


def build_loggers(cfg: DictConfig, folder: Path, continued_at: int | None = None) -> list[Logger]:
    """The loggers of `cfg.logger`, writing into the run directory.

    Args:
        cfg: settings.
        folder: run directory.
        continued_at: the step from which the run in it goes on; its log and its W&B run are then continued.
    """
    if getattr(rank_zero_only, "rank", 0):
        continued_at = None
    loggers: list[Logger] = []
    for node in cfg.logger.values():
        kind = str(node._target_).rpartition(".")[2]
        build = functools.partial(built, node, save_dir=str(folder))
        if kind == "WandbLogger":
            build = functools.partial(build, **_place_in_wandb(cfg, node, folder))
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


_LONGEST_TAG, _LONGEST_NAME = 64, 128  # in W&B


def _place_in_wandb(cfg: DictConfig, node: DictConfig, folder: Path) -> dict[str, Any]:
    """By what a run is found in W&B: names, its command, and, of a sweep's, the sweep and its own settings as tags."""
    found: dict[str, Any] = {"job_type": "evaluate" if "checkpoint" in cfg else "train"}
    found |= {key: shortened(str(node[key]), _LONGEST_NAME) for key in ("name", "group") if node.get(key)}
    settings = swept(folder)
    if settings:
        tags = [folder.absolute().parent.name, *(f"{key}={value}" for key, value in settings.items())]
        found["tags"] = [shortened(tag, _LONGEST_TAG) for tag in tags]
    return found


def log_settings(loggers: Sequence[Logger], settings: PlainConfig, folder: Path) -> None:
    """Log a run's settings; of a sweep's job also, as "sweep", the sweep's name and what it varies.

    Dots in names, which W&B takes for levels, become lines: {"name": "lr", "optimizer_lr": 0.001}.
    """
    varied = {key.replace(".", "_"): value for key, value in swept(folder).items()}
    if varied:
        settings = settings | {"sweep": {"name": folder.absolute().parent.name, **varied}}
    for logger in loggers:
        logger.log_hyperparams(settings if isinstance(logger, RunLog) else _readable(settings))


def _readable(setting: Any) -> Any:
    """A setting, or all of them, as text that can be sent."""
    if isinstance(setting, dict):
        return {readable(str(key)): _readable(value) for key, value in setting.items()}
    if isinstance(setting, list):
        return [_readable(value) for value in setting]
    return readable(setting) if isinstance(setting, str) else setting


def _reaches_wandb(logger: WandbLogger) -> bool:
    """Whether W&B takes the run; otherwise says why, and how to send it later."""
    from wandb.errors import CommError, UsageError

    try:
        _ = logger.experiment
    except (CommError, UsageError) as error:
        if "project name" in str(error):
            raise ConfigError(f"logger.wandb.project: {error}") from error
        rank_zero_warn(
            f"W&B cannot be reached, or does not know you ({str(error).splitlines()[0]}): the run is logged offline; "
            f"`wandb sync {shlex.quote(str(logger.save_dir))}/wandb/offline-run-*` sends it later"
        )
        return False
    return True


def _earlier_wandb_run(folder: Path) -> dict[str, str]:
    """How to continue the W&B run in a run directory, if there is one."""
    runs = sorted(folder.glob("wandb/*run-*-*"), key=lambda path: path.name.partition("run-")[2])
    return {"id": runs[-1].name.rpartition("-")[2], "resume": "allow"} if runs else {}


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
        """Lightning's hook.

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


def quieten_libraries() -> None:
    """Leave warnings that a user can act upon, and drop what Lightning says of itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "Experiment logs directory",  # the run directory is meant to hold the log
        "Checkpoint directory .* exists and is not empty",
        ".*does not have many workers",  # the built-in data set needs none
        ".*treespec, LeafSpec.*",
        "The number of training batches",
        ".*sync_dist=True",  # what is logged is of all processes already
        "`broadcast_buffers` is deprecated",
        ".*compute.*method of metric .* was called before",  # a process may get no image of a small split
    ):
        warnings.filterwarnings("ignore", message=message)
