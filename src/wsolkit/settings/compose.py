"""Compose settings, and build objects from them. This module imports neither torch nor Lightning."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import hydra.core.utils
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigSource
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wsolkit.errors import ConfigError
from wsolkit.settings.conf import CONF, HYDRA_KEYS, LABELS, named_folders
from wsolkit.settings.explain import explain
from wsolkit.settings.overrides import as_overrides, escaped, quoted
from wsolkit.settings.usage import groups
from wsolkit.settings.usage import settings as settings_of
from wsolkit.system.drafts import write_text


def _by_name(name: str, values: Mapping[str, Any], default: Any) -> Any:
    value = values.get(name, default)
    # Without this, `--cfg job --resolve` would fail.
    return OmegaConf.create(value) if isinstance(value, list | dict) else value


# It returns a paper's value for a data set or backbone, or a default: ${by_dataset:${dataset.name},{cub:0.1},null}.
OmegaConf.register_new_resolver("by_dataset", _by_name, replace=True)

OmegaConf.register_new_resolver("by_backbone", _by_name, replace=True)

OmegaConf.register_new_resolver("by_method", _by_name, replace=True)

OmegaConf.register_new_resolver("by_stage", _by_name, replace=True)

OmegaConf.register_new_resolver("times", lambda factor, number: factor * number, replace=True)

_header = ConfigSource._get_header_dict

# Without this, Hydra would not see the header "# @package …" behind a byte order mark in a user's YAML file.
ConfigSource._get_header_dict = staticmethod(lambda text: _header(text.lstrip("\ufeff")))

# Hydra copies the path of the run directory into its settings unchanged, and would resolve ${ in it.
_paths = types.SimpleNamespace(**vars(os.path) | {"abspath": lambda path: escaped(os.path.abspath(path))})  # noqa: PTH100

hydra.core.utils.os = types.SimpleNamespace(**vars(os) | {"path": _paths})


def load_config(*overrides: str, config_dir: str | Path | None = None) -> DictConfig:
    """Compose the settings of `python -m wsolkit.train` with overrides, such as "method=sat" or "optimizer.lr=1e-4".

    Args:
        overrides: as on the command line.
        config_dir: a folder of your own YAML files, as for `--config-dir`. Code that they name as a `_target_` may run.

    Raises:
        ConfigError: a group, key or value is wrong. The message names the choices.

    >>> from wsolkit import load_config
    >>> cfg = load_config("method=cam", "optimizer.lr=0.01")
    >>> cfg.method.name, cfg.optimizer.lr
    ('cam', 0.01)
    """
    more: list[str] = []
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise ConfigError(f"config_dir: there is no folder '{config_dir}'; expected one of YAML files, as in conf")
        named_folders.add(folder)
        more = [f"hydra.searchpath=[{quoted(escaped(f'file://{folder}'))}]"]
    try:
        with _apart(), hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg: DictConfig = hydra.compose("train", overrides=[*more, *as_overrides(overrides, referable("train"))])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return cfg


@contextmanager
def _apart() -> Iterator[None]:
    """Set the Hydra of a running command aside, since it allows no second one."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running


def save_config(cfg: DictConfig, folder: Path) -> None:
    """Write the resolved settings to config.yaml, with ${ escaped, so that OmegaConf can read them again."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(escaped(plain(cfg))))


def referable(config_name: str) -> set[str]:
    """Return the names that interpolations of a command's settings begin with.

    A command without groups of settings has nothing to refer to, so ${ in its paths is text.
    """
    own = settings_of(CONF, config_name) if groups(CONF, config_name) else []
    folders = (folder.name for folder in CONF.iterdir() if folder.is_dir())
    return {*(item.name.partition(".")[0] for item in own), *folders}


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return settings as plain containers, with interpolations resolved and `???` kept."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return typing.cast("dict[str, Any]", container)


def built(node: DictConfig, **more: Any) -> Any:
    """Build the `_target_` of a node from the node's settings and more arguments."""
    # It escapes twice, since Hydra resolves settings twice.
    return hydra.utils.instantiate(escaped(escaped(plain(node) | more)), _convert_="all")


def arguments(node: DictConfig) -> dict[str, Any]:
    """Return a node's settings as arguments of its target, without Hydra's keys and labels."""
    return {key: value for key, value in plain(node).items() if key not in HYDRA_KEYS | LABELS}
