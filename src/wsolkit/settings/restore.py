"""Compose the settings of the model in a checkpoint, and compare them with others."""

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
    """Check that there are YAML files of what a checkpoint names: the package's, or those of the user.

    Args:
        path: of the checkpoint.
        names: by group, as from `Checkpoint.names`.
        config_dir: the user's folder; None: none.
        remedy: how the user names that folder.

    Raises:
        CheckpointError: there is none.
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
    """A command line with the groups of its checkpoint before `checkpoint=…`, so that the user's settings prevail.

    Args:
        given: arguments in Hydra's grammar, one of them `checkpoint=…`.
        with_protocol: whether the first protocol of the checkpoint is chosen too.

    Raises:
        CheckpointError: the checkpoint cannot be read, or another method or backbone than its own is given.
    """
    parse = OverridesParser.create().parse_override
    override = parse([argument for argument in given if argument.startswith("checkpoint=")][-1])
    if override.is_sweep_override():  # over checkpoints of one method
        override = parse(f"checkpoint={next(override.sweep_string_iterator())}")
    path = override.value()
    if path is None:
        return list(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who builds the model says it
        checkpoint = read_checkpoint(str(OmegaConf.create({"path": path}).path))
    names = checkpoint.names()
    parts = [argument.partition("=") for argument in given if not argument.startswith("-")]
    chosen = {setting.lstrip("+~"): value for setting, _, value in parts}
    for group in ("method", "backbone"):
        if chosen.get(group, names[group]) != names[group]:
            raise CheckpointError(
                f"{group}={chosen[group]}: the checkpoint's {group} is {names[group]}; leave the setting out"
            )
    folder = _config_dir(given)
    own = {group: name for group, name in names.items() if group not in chosen}
    check_known(checkpoint.path, own, folder, "--config-dir FOLDER")
    if choices(load_config(f"method={names['method']}", config_dir=folder))["postprocess"] == names["postprocess"]:
        del names["postprocess"]  # comes with the method, unless a ready grid has another
    if with_protocol:
        names["protocol"] = f"[{checkpoint.protocol}]"
    first = next(index for index, argument in enumerate(given) if argument.startswith("checkpoint="))
    added = [f"{group}={name}" for group, name in names.items() if group not in chosen]
    return [*given[:first], *added, *given[first:]]


def _config_dir(given: Sequence[str]) -> str | None:
    """The folder that a command line names with `--config-dir`."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config-dir", "-cd")
    return flags.parse_known_args(given)[0].config_dir  # type: ignore[no-any-return]


def check_resumable(path: str | Path, cfg: DictConfig) -> Checkpoint:
    """Read a checkpoint and check that it continues a run of these settings' method, backbone and part of a data set.

    What depends on the classes, the model and the images, `wsolkit.training.resume` checks.
    Where the run in a directory goes on by itself (resume=auto), all settings have to be its own that make a difference
    to what it learns.

    Raises:
        CheckpointError: it does not, or cannot be read.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.step == 0:
        raise CheckpointError(f"resume={path} was imported: it holds a model, and no training that could go on")
    for group, name in checkpoint.names().items():
        own = name_of(cfg, group)
        if own != name:
            raise CheckpointError(f"resume={path} is of a run with {group}={name}, these settings say {own}")
    keys = ["fraction", "shots"]
    if not (cfg.dataset.fraction is None and cfg.dataset.shots is None):
        keys.append("subset_seed")
    for key in keys:
        saved, given = checkpoint.config["dataset"].get(key), cfg.dataset[key]
        if saved != given:
            raise CheckpointError(f"resume={path} is of a run with dataset.{key}={saved}, these settings say {given}")
    if cfg.resume == "auto":
        changed = changed_settings(cfg, checkpoint)
        if changed:
            difference = ", ".join(f"{key}={values}" for key, values in changed.items())
            raise CheckpointError(
                f"the run that '{path}' is of was begun with other settings: {difference}. Give the run another place "
                f"with hydra.run.dir=DIR, or go on all the same with resume={path}"
            )
    return checkpoint


def changed_settings(cfg: DictConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """Settings, of those that decide what a run learns, that differ from a checkpoint's: "now (was then)", by name."""
    now, before = _flat(plain(cfg)), _flat(checkpoint.config)
    keys = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
    keys = [key for key in keys if not (_is_moved(key, now) and _is_moved(key, before))]
    return {key: f"{now.get(key)} (was {before.get(key)})" for key in keys}


# Where and how a run goes, not what it learns.
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
    """Whether a setting names a class of this package: a class may have moved to another file meanwhile."""
    return key.endswith("_target_") and str(settings.get(key)).startswith("wsolkit.")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings that are to stay, by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if name in _FREE:
            continue
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def restore(cfg: DictConfig, checkpoint: Checkpoint, overrides: Iterable[str], protocols: bool = False) -> DictConfig:
    """Put a checkpoint's values into settings composed for its method, backbone and data set.

    Args:
        cfg: settings as composed.
        checkpoint: whose model is to be built. Values of its data set count only if `cfg` has the same data set.
        overrides: what the user gave on the command line, which prevails.
        protocols: whether the rules of evaluation are the checkpoint's too, where it has protocols of these names.
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
    cfg.dataset.image_size = saved["dataset"]["image_size"]
    cfg.backbone.pretrained, cfg.backbone.weights = False, None  # the weights are in the checkpoint
    cfg.dataset.cache = None  # it would write where the checkpoint says, and evaluation reads no cache
    if checkpoint.mean:
        cfg.backbone.mean, cfg.backbone.std = list(checkpoint.mean), list(checkpoint.std)
    for override in OverridesParser.create().parse_overrides(overrides=list(overrides)):
        key, value = override.key_or_group, override.value()
        present = OmegaConf.select(cfg, key, default=cfg)  # a choice from a group that adds nothing, as sweep=…, is not
        if not isinstance(present, DictConfig) or (isinstance(value, dict) and present is not cfg):
            OmegaConf.update(cfg, key, value)
    return cfg


def _merge(node: DictConfig, saved: Mapping[str, Any], derived: bool) -> None:
    """Put saved values into a node: those that stand for themselves, or those that it derives from others.

    A derived value stays so where it comes to the saved one anyway: it then follows what the user overrides.
    """
    for key, value in saved.items():
        if key not in list(node) or str(key).startswith("_"):  # `in node` says no of a value that is required: ???
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
