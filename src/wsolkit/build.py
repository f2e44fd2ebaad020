"""From settings to objects: the module, the datamodule, the trainer."""

from __future__ import annotations

import functools
import inspect
import logging
import typing
import warnings
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from omegaconf import DictConfig, OmegaConf

from wsolkit.backbones.pretrained import normalization
from wsolkit.config import CONF, arguments, check_config, locate, plain
from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.errors import ConfigError
from wsolkit.localization.protocol import Protocol
from wsolkit.methods.base import Training, WSOLModule
from wsolkit.metrics.evaluation import Evaluation


def build_datamodule(cfg: DictConfig) -> WSOLDataModule:
    """The data set of `cfg.dataset`, normalised for the backbone.

    Raises:
        ConfigError: a setting is wrong. Files are read in `setup`, which raises DataError.
    """
    check_config(cfg)
    mean, std = normalization(cfg.backbone.model, cfg.backbone.get("mean"), cfg.backbone.get("std"))
    node = arguments(cfg.dataset)
    known = inspect.signature(WSOLDataModule).parameters.keys() & node.keys()
    settings = {key: node[key] for key in known} | {"records": instantiate(node["records"], _convert_="all")}
    protocols = build_protocols(cfg).values()
    settings["held_out"] = node["held_out"] and cfg.selection == "val"
    datamodule: WSOLDataModule = locate(cfg.dataset._target_, "dataset.")(
        **settings,
        mean=mean,
        std=std,
        seed=cfg.seed,
        uncropped=any(rules.input != "resize" or rules.classification == "ten_crop" for rules in protocols),
    )
    return datamodule


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
    """
    check_config(cfg)
    if class_names is None:
        known = None if cfg.dataset.classes else cfg.dataset.num_classes
        class_names = [str(label) for label in range(known)] if known else build_datamodule(cfg).class_names
    mean, std = normalization(cfg.backbone.model, cfg.backbone.get("mean"), cfg.backbone.get("std"))
    training = Training(
        optimizer=functools.partial(locate(cfg.optimizer._target_, "optimizer."), **arguments(cfg.optimizer)),
        schedule=instantiate(cfg.schedule, _convert_="all"),
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
    return module


def _check_backbone(cfg: DictConfig, method: type[WSOLModule], backbone: type) -> None:
    needed = typing.get_type_hints(method.__init__)["backbone"]
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
    if "postprocess" in inspect.signature(method).parameters:
        return {"postprocess": locate(node._target_, "postprocess.")(**arguments(node)) if node else None}
    if node:
        raise ConfigError(
            f"postprocess={node.name} refines the maps of methods on convolutional networks, and "
            f"method={cfg.method.name} is none: leave it out"
        )
    return {}


def build_loggers(cfg: DictConfig, folder: Path) -> list[Logger]:
    """The loggers of `cfg.logger`, writing into the run directory."""
    return [instantiate(node, save_dir=str(folder), _convert_="all") for node in cfg.logger.values()]


def build_trainer(cfg: DictConfig, folder: Path, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """The trainer of `cfg.trainer`.

    Wherever Lightning chooses DDP by itself, buffers are not broadcast: that would be one more collective call in each
    evaluation batch, of which processes have different numbers, since every image counts once.
    """
    StrategyRegistry.register("ddp", DDPStrategy, override=True, broadcast_buffers=False)
    try:
        trainer: Trainer = locate(cfg.trainer._target_, "trainer.")(
            **arguments(cfg.trainer),
            default_root_dir=str(folder),
            callbacks=callbacks,
            logger=loggers,
            use_distributed_sampler=False,  # evaluation must not repeat images to fill up the last batch
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(f"trainer: {error}") from error
    return trainer


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
        ".*compute.*method of metric .* was called before",  # a process may get no image of a small split
    ):
        warnings.filterwarnings("ignore", message=message)
