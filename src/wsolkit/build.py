"""Build the module, the datamodule and their parts from settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from torch import nn

from wsolkit.backbones.pretrained import normalization
from wsolkit.backbones.tokens import TokenBackbone
from wsolkit.checkpoint import describe_part, read_checkpoint, read_part
from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.preparing.index import Indexed
from wsolkit.data.records import Records, Split
from wsolkit.errors import ConfigError
from wsolkit.localization.protocol import Protocol
from wsolkit.methods.base import Network, WSOLModule
from wsolkit.metrics.evaluation import Evaluation
from wsolkit.settings.checks import accepted, check_config, locate
from wsolkit.settings.compose import arguments, built, load_config, plain
from wsolkit.settings.conf import CONF
from wsolkit.settings.restore import check_known, restore
from wsolkit.training.evaluator import Evaluator
from wsolkit.training.loss_log import LossLog
from wsolkit.training.noise import StepNoise
from wsolkit.training.optimization import Optimization
from wsolkit.types import Description, PlainConfig, TrainingBatch


def build_datamodule(cfg: DictConfig, model_classes: Sequence[str] | None = None) -> WSOLDataModule:
    """Build the data set of `cfg.dataset`, normalised for the backbone.

    Args:
        cfg: the settings.
        model_classes: the classes of the model that is evaluated on it, see `WSOLDataModule`.

    Raises:
        ConfigError: a setting is wrong. `setup` reads the files, and raises DataError.

    >>> from wsolkit import build_datamodule, load_config
    >>> datamodule = build_datamodule(load_config("dataset=shapes"))
    >>> datamodule.class_names[:2]
    ['red spots', 'green spots']
    """
    check_config(cfg)
    mean, std = normalization(cfg.backbone.get("model"), cfg.backbone.get("mean"), cfg.backbone.get("std"))
    node = arguments(cfg.dataset)
    known = inspect.signature(WSOLDataModule).parameters.keys() & node.keys()
    settings = {key: node[key] for key in known} | {"records": _indexed(cfg)}
    protocols = build_protocols(cfg).values()
    selection = cfg.get("selection", "test")  # Commands that select nothing have none.
    settings["held_out"] = node["held_out"] and selection != "test"
    by_pseudo = "selection" in cfg and any(rules.selection == "pseudo" for rules in protocols)
    settings["pseudo_boxes"] = node["pseudo_boxes"] if by_pseudo else None
    if by_pseudo and node["pseudo_boxes"] is None:
        raise ConfigError("selection=pseudo chooses by boxes from a file: give dataset.pseudo_boxes=PATH")
    datamodule: WSOLDataModule = locate(cfg.dataset._target_, "dataset.")(
        **settings,
        mean=mean,
        std=std,
        seed=cfg.get("seed", 0),  # Commands that draw nothing have no seed.
        uncropped=any(rules.input != "resize" or rules.classification == "ten_crop" for rules in protocols),
        model_classes=model_classes,
        pairs="method" in cfg and getattr(locate(cfg.method._target_, "method."), "pairs", False),
    )
    return datamodule


def build_records(cfg: DictConfig) -> Callable[[Split], Records]:
    """Return a function that reads a split of `cfg.dataset` from its official files."""
    read: Callable[[Split], Records] = built(cfg.dataset.records)
    return read


def _indexed(cfg: DictConfig) -> Callable[[Split], Records]:
    """Return a function that reads a split from the data set's index if it has a valid one, or else from the files."""
    node, read = plain(cfg)["dataset"], build_records(cfg)
    if node.get("index") is None:
        return read
    return Indexed(read, node["records"], Path(node["root"]), Path(node["index"]), rank_zero_warn)


_NO_PROTOCOLS = ("epochs", "norms")  # metrics.json also has numbers under these names.


def build_protocols(cfg: DictConfig) -> dict[str, Protocol]:
    """Build the protocols of `cfg.protocol` by name.

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
            raise ConfigError(f"protocol.{name}: metrics are named <protocol>/<metric>, so choose another name")
        protocols[str(name)] = protocol
    if not protocols:
        raise ConfigError("protocol=[]: name one or more, such as protocol=[maxboxacc]")
    return protocols


def build_module(cfg: DictConfig, class_names: list[str] | None = None) -> WSOLModule:
    """Build the method of `cfg.method` with an optimizer, a schedule and an evaluation, ready for Lightning's Trainer.

    Args:
        cfg: the settings, as `load_config` returns them.
        class_names: see `build_model`.

    Raises:
        ConfigError: a setting is wrong.
        CheckpointError: the backbone's weights do not fit.

    >>> import torch
    >>> from wsolkit import build_module, load_config
    >>> module = build_module(load_config("method=cam"), ["cat", "dog"])
    >>> module(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 2])
    """
    return attach_training(cfg, build_model(cfg, class_names))


def attach_training(cfg: DictConfig, module: WSOLModule) -> WSOLModule:
    """Give a module an optimizer, a schedule, an evaluation, and what changes its training images.

    Raises:
        ConfigError: a setting is wrong.
    """
    module.optimization = build_optimization(cfg)
    module.augment = build_augment(cfg)
    losses = LossLog()
    module.watch_losses = losses.add
    module.callbacks = [StepNoise(cfg.seed), losses, build_evaluator(cfg, module)]
    return module


def build_augment(cfg: DictConfig) -> Callable[[TrainingBatch], TrainingBatch] | None:
    """Build the transform of training batches in `cfg.augment`, or None if there is none.

    Raises:
        ConfigError: a setting is wrong, or the method trains on tokens of images.
    """
    node = cfg.get("augment")
    if not node or "_target_" not in node:  # A recipe may have settings for a transform that the user left out.
        return None
    if issubclass(locate(cfg.backbone._target_, "backbone."), TokenBackbone):
        raise ConfigError(
            f"augment={node.name} changes images, and method={cfg.method.name} trains on the tokens of a frozen "
            "transformer, which are computed once for each image: leave it out"
        )
    transform: Callable[[TrainingBatch], TrainingBatch] = locate(node._target_, "augment.")(**arguments(node))
    return transform


def build_optimization(cfg: DictConfig) -> Optimization:
    """Build the optimizer of `cfg.optimizer` with the schedule of `cfg.schedule`."""
    create = functools.partial(locate(cfg.optimizer._target_, "optimizer."), **arguments(cfg.optimizer))
    return Optimization(create, built(cfg.schedule))


def build_evaluator(cfg: DictConfig, module: WSOLModule) -> Evaluator:
    """Build the callback that evaluates a module under the protocols of `cfg.protocol`."""
    return Evaluator(
        Evaluation(build_protocols(cfg), len(module.description.class_names), module.maps_are_probabilities)
    )


def build_model(cfg: DictConfig, class_names: list[str] | None = None) -> WSOLModule:
    """Build the method of `cfg.method` on the backbone of `cfg.backbone`, without an optimizer or an evaluation.

    Args:
        cfg: the settings, as `load_config` returns them.
        class_names: the names of the classes by label. None takes as many numbers as `dataset.num_classes`, or the
            names in the data set, or in the part of it that `dataset.classes` keeps.

    Raises:
        ConfigError: a setting is wrong.
        CheckpointError: the backbone's weights do not fit.
    """
    check_config(cfg)
    if class_names is None:
        known = None if cfg.dataset.classes else cfg.dataset.num_classes
        class_names = [str(label) for label in range(known)] if known else build_datamodule(cfg).class_names
    mean, std = normalization(cfg.backbone.get("model"), cfg.backbone.get("mean"), cfg.backbone.get("std"))
    method, backbone = locate(cfg.method._target_, "method."), locate(cfg.backbone._target_, "backbone.")
    _check_backbone(cfg, method, backbone)
    models, parts = _models(cfg, method)
    module: WSOLModule = method(
        backbone=backbone(**arguments(cfg.backbone)),
        num_classes=len(class_names),
        **_postprocess(cfg, method, backbone),
        **({"models": models} if method.model_settings else {}),
        **arguments(cfg.method),
    )
    _check_sizes(cfg, module)
    start = None if method.start_setting is None else cfg.method[method.start_setting]
    if start is not None:
        module.start_from(read_checkpoint(start))
        parts[str(method.start_setting)] = None
    module.description = Description(plain(cfg), class_names, mean, std, parts)
    if cfg.get("compile"):
        compile_network(module.network, **_compilation(cfg.compile))
    return module


def _models(cfg: DictConfig, method: type[WSOLModule]) -> tuple[dict[str, WSOLModule], dict[str, PlainConfig | None]]:
    """Build the models of other checkpoints that become parts of a method.

    A setting names a checkpoint. In the settings of a checkpoint that contains the model already, it describes the
    model instead.

    Returns:
        the models, and their descriptions, each by the name of the setting.

    Raises:
        CheckpointError: a checkpoint cannot be read, or its model cannot be built.
    """
    models: dict[str, WSOLModule] = {}
    parts: dict[str, PlainConfig | None] = {}
    for name in method.model_settings:
        given = plain(cfg)["method"][name]
        if given is None:
            continue
        checkpoint = read_part(Path("checkpoint"), name, given) if isinstance(given, dict) else read_checkpoint(given)
        parts[name] = given if isinstance(given, dict) else describe_part(checkpoint)
        groups = {group: checkpoint.names()[group] for group in ("method", "backbone")}
        check_known(checkpoint.path, groups, None, "--config-dir FOLDER")
        chosen = [f"{group}={choice}" for group, choice in groups.items()]
        model_cfg = load_config(*chosen, "postprocess=none", "dataset=folder", "dataset.root=.")
        model = build_model(restore(model_cfg, checkpoint, ()), checkpoint.class_names)
        if checkpoint.state_dict:
            checkpoint.load_into(model)
        models[name] = model.eval().requires_grad_(False)
    return models, parts


def compile_network(network: Network, **options: Any) -> None:
    """Make `torch.compile` compile each pass of a network when it first runs. The names of the weights stay.

    Args:
        options: the options of `torch.compile`.
    """
    for name in network.passes:
        setattr(network, name, torch.compile(getattr(network, name), **options))


def _compilation(setting: object) -> dict[str, Any]:
    if setting is True:
        return {}
    if setting == "max-autotune":
        # CUDA graphs would overwrite the maps of a batch with those of the next one, while its boxes are drawn.
        return {"mode": "max-autotune-no-cudagraphs"}
    raise ConfigError(f"compile={setting}: expected false, true or max-autotune")


def _check_backbone(cfg: DictConfig, method: type[WSOLModule], backbone: type) -> None:
    if not (inspect.isclass(method) and issubclass(method, WSOLModule)):
        raise ConfigError(f"method._target_={cfg.method._target_}: expected a class that extends WSOLModule")
    needed = accepted(method)[0].get("backbone", nn.Module)
    if not issubclass(backbone, needed):
        choices = [
            path.stem
            for path in sorted((CONF / "backbone").glob("*.yaml"))
            if issubclass(locate(str(OmegaConf.select(OmegaConf.load(path), "_target_")), "backbone."), needed)
        ]
        raise ConfigError(
            f"method={cfg.method.name} needs a {needed.__name__}, and backbone={cfg.backbone.name} is a "
            f"{backbone.__name__}; choose from: {', '.join(choices)}"
        )


def _check_sizes(cfg: DictConfig, module: WSOLModule) -> None:
    """Check, before a run trains, that the backbone can divide the images of the evaluation into patches.

    Raises:
        ConfigError: it cannot.
    """
    patch = getattr(getattr(module.network, "backbone", None), "patch_size", 1)
    sizes = cfg.dataset.eval_image_size or []
    for name, size in [("image_size", cfg.dataset.image_size)] + [
        ("eval_image_size", size) for size in ([sizes] if isinstance(sizes, int) else sizes)
    ]:
        if size % patch:
            raise ConfigError(
                f"dataset.{name}: {size} is not a multiple of the patch size {patch} of backbone={cfg.backbone.name}: "
                f"use {size // patch * patch or patch} or {(size // patch + 1) * patch}"
            )


def _postprocess(cfg: DictConfig, method: type[WSOLModule], backbone: type) -> dict[str, Any]:
    """Return the post-process of `cfg.postprocess`, or None, as an argument of a method that accepts one.

    Raises:
        ConfigError: the post-process does not refine the maps of this method or backbone.
    """
    node, accepts = cfg.get("postprocess"), "postprocess" in accepted(method)[0]
    if not node:
        return {"postprocess": None} if accepts else {}
    kind = locate(node._target_, "postprocess.")
    if not accepts or not issubclass(backbone, kind.backbones):
        raise ConfigError(
            f"postprocess={node.name} refines the maps of methods on {kind.networks}, and method={cfg.method.name} on "
            f"backbone={cfg.backbone.name} is none: leave it out"
        )
    return {"postprocess": kind(**arguments(node))}
