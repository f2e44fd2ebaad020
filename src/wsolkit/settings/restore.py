"""Compose the settings of a checkpoint's model, and compare them with others."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from wsolkit.checkpoint import GROUPS, Checkpoint, choices, name_of, read_checkpoint
from wsolkit.errors import CheckpointError
from wsolkit.settings.compose import load_config, plain
from wsolkit.settings.conf import CONF
from wsolkit.settings.overrides import escaped


def check_known(path: Path, names: Mapping[str, str], config_dir: str | Path | None, remedy: str) -> None:
    """Check that the package or the user has YAML files for the names in a checkpoint.

    Args:
        path: the path of the checkpoint.
        names: the names by group, as `Checkpoint.names` returns them.
        config_dir: the user's folder, or None.
        remedy: tells the user how to name that folder.

    Raises:
        CheckpointError: a file is missing.
    """
    folders = [CONF] if config_dir is None else [CONF, Path(config_dir)]
    for group, name in names.items():
        if any((folder / group / f"{name}.yaml").is_file() for folder in folders):
            continue
        where = "wsolkit has" if config_dir is None else f"neither wsolkit nor '{config_dir}' has"
        raise CheckpointError(
            f"'{path}' was trained with {group}={name}, and {where} {'no' if config_dir is None else 'a'} file "
            f"{group}/{name}.yaml: name the folder of YAML files that has it, as in training, with {remedy}"
        )


def choose_groups(given: Sequence[str], with_protocol: bool = False) -> list[str]:
    """Return a command line with the checkpoint's groups before `checkpoint=…`, so that the user's settings prevail.

    Args:
        given: arguments in Hydra's grammar, including `checkpoint=…`.
        with_protocol: whether to add the first protocol of the checkpoint, too.

    Raises:
        CheckpointError: the checkpoint cannot be read, or another method or backbone than its own is given.
    """
    parse = OverridesParser.create().parse_override
    override = parse([argument for argument in given if argument.startswith("checkpoint=")][-1])
    if override.is_sweep_override():  # A sweep may run over checkpoints of one method.
        override = parse(f"checkpoint={next(override.sweep_string_iterator())}")
    path = override.value()
    if path is None:
        return list(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The command warns when it builds the model.
        checkpoint = read_checkpoint(str(OmegaConf.create({"path": path}).path))
    names = checkpoint.names()
    parts = [argument.partition("=") for argument in given if not argument.startswith("-")]
    chosen = {setting.lstrip("+~"): value for setting, _, value in parts}
    for group in ("method", "backbone"):
        if chosen.get(group, names[group]) != names[group]:
            raise CheckpointError(
                f"{group}={chosen[group]}: the checkpoint's {group} is {names[group]}. Leave the setting out"
            )
    folder = _config_dir(given)
    own = {group: name for group, name in names.items() if group not in chosen}
    check_known(checkpoint.path, own, folder, "--config-dir FOLDER")
    if choices(load_config(f"method={names['method']}", config_dir=folder))["postprocess"] == names["postprocess"]:
        del names["postprocess"]  # The post-process comes with the method, unless a ready grid has another one.
    if with_protocol:
        names["protocol"] = f"[{checkpoint.protocol}]"
    first = next(index for index, argument in enumerate(given) if argument.startswith("checkpoint="))
    added = [f"{group}={name}" for group, name in names.items() if group not in chosen]
    return [*given[:first], *added, *given[first:]]


def _config_dir(given: Sequence[str]) -> str | None:
    """Return the folder that a command line names with `--config-dir`, or None."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config-dir", "-cd")
    return flags.parse_known_args(given)[0].config_dir  # type: ignore[no-any-return]


def check_resumable(path: str | Path, cfg: DictConfig) -> Checkpoint:
    """Read a checkpoint. Check that it fits the method, the backbone and the part of the data set in these settings.

    `wsolkit.training.resume` checks what depends on the classes, the model and the images. For resume=auto, all
    settings that affect what the run learns must be the same.

    Raises:
        CheckpointError: it does not fit, or cannot be read.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.step == 0:
        raise CheckpointError(f"resume={path} was imported. It holds a model, and no training that could continue")
    for group, name in checkpoint.names().items():
        own = name_of(cfg, group)
        if own != name:
            raise CheckpointError(f"resume={path} belongs to a run with {group}={name}, but these settings say {own}")
    keys = ["fraction", "shots"]
    if not (cfg.dataset.fraction is None and cfg.dataset.shots is None):
        keys.append("subset_seed")
    for key in keys:
        saved, given = checkpoint.config["dataset"].get(key), cfg.dataset[key]
        if saved != given:
            raise CheckpointError(
                f"resume={path} belongs to a run with dataset.{key}={saved}, but these settings say {given}"
            )
    if cfg.resume == "auto":
        changed = changed_settings(cfg, checkpoint)
        if changed:
            difference = ", ".join(f"{key}={values}" for key, values in changed.items())
            raise CheckpointError(
                f"the run of '{path}' was started with other settings: {difference}. Give this run another directory "
                f"with hydra.run.dir=DIR, or continue that run with resume={path}"
            )
    return checkpoint


def changed_settings(cfg: DictConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the settings that affect what a run learns and differ from a checkpoint's, as {name: "now (was then)"}."""
    now, before = _flat(plain(cfg)), _flat(checkpoint.config)
    keys = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
    keys = [key for key in keys if not (_is_moved(key, now) and _is_moved(key, before))]
    return {key: f"{now.get(key)} (was {before.get(key)})" for key in keys}


# These say where and how a run works, and not what it learns.
_FREE = (
    "resume",
    "checkpoints",
    "logger",
    "trainer",
    "compile",
    "backbone.channels_last",
    "num_examples",
    "examples",
    "num_table_images",
    "dataset.num_workers",
    "dataset.cache",
    "sweep",
)


def _is_moved(key: str, settings: Mapping[str, Any]) -> bool:
    """Say whether a setting names a class of this package, which may have moved to another file since."""
    return key.endswith("_target_") and str(settings.get(key)).startswith("wsolkit.")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings that must stay the same, by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if name in _FREE:
            continue
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def restore(cfg: DictConfig, checkpoint: Checkpoint, overrides: Iterable[str], protocols: bool = False) -> DictConfig:
    """Put a checkpoint's values into settings that were composed for its method, backbone and data set.

    Args:
        cfg: the composed settings.
        checkpoint: the checkpoint with the model. The values of its data set only count if `cfg` has the same data set.
        overrides: the user's overrides, which prevail.
        protocols: whether to take the checkpoint's rules of evaluation, too, for protocols that it knows.
    """
    cfg = cfg.copy()
    saved = checkpoint.config
    groups = [group for group in GROUPS if cfg.get(group) and name_of(cfg, group) == name_of(saved, group)]
    nodes = [(cfg[group], saved[group]) for group in groups]
    if protocols:
        known = saved.get("protocol") or {}
        nodes += [(rules, known[name]) for name, rules in cfg.protocol.items() if name in known]
        cfg.dataset.resize = saved["dataset"]["resize"]
    for derived in (False, True):
        for node, values in nodes:
            _merge(node, values, derived)
    for name, part in checkpoint.parts.items():
        if name in list(cfg.method) and not _mentions_target(part):
            cfg.method[name] = escaped(part)  # The checkpoint holds the weights of the other one, too.
    cfg.dataset.image_size = saved["dataset"]["image_size"]
    # Early checkpoints lack both.
    cfg.dataset.eval_image_size = escaped(saved["dataset"].get("eval_image_size"))
    cfg.dataset.eval_flip = escaped(saved["dataset"].get("eval_flip", False))
    cfg.backbone.pretrained, cfg.backbone.weights = False, None  # The checkpoint holds the weights.
    if "cache" in cfg.backbone:
        cfg.backbone.cache = None  # Each image is seen once, so there is nothing to gain.
    cfg.dataset.cache = None  # It would write to the folder in the checkpoint, and an evaluation reads no cache.
    if checkpoint.mean:
        cfg.backbone.mean, cfg.backbone.std = list(checkpoint.mean), list(checkpoint.std)
    for override in OverridesParser.create().parse_overrides(overrides=list(overrides)):
        key, value = override.key_or_group, override.value()
        # A choice from a group that adds nothing, such as sweep=…, is not there.
        present = OmegaConf.select(cfg, key, default=cfg)
        if not isinstance(present, DictConfig) or (isinstance(value, dict) and present is not cfg):
            OmegaConf.update(cfg, key, value)
    return cfg


def _merge(node: DictConfig, saved: Mapping[str, Any], derived: bool) -> None:
    """Put saved values into a node: either those that stand for themselves, or those that it derives from others.

    A derived value that already equals the saved one stays derived, so it follows what the user overrides.
    """
    for key, value in saved.items():
        if key not in list(node) or str(key).startswith("_"):  # `in node` is false for a required value (???).
            continue
        if OmegaConf.is_interpolation(node, key) != derived and not isinstance(value, Mapping):
            continue
        if isinstance(value, Mapping) and isinstance(node[key], DictConfig) and "_target_" in node[key]:
            _merge(node[key], value, derived)
        elif not _mentions_target(value) and not (derived and node[key] == value):
            node[key] = escaped(value)


def _mentions_target(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(str(key) == "_target_" or _mentions_target(inner) for key, inner in value.items())
    return isinstance(value, list) and any(_mentions_target(inner) for inner in value)
