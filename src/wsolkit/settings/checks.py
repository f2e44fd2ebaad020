"""Check settings against the signatures of the classes that they configure."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
import hydra.core.utils
from omegaconf import DictConfig, OmegaConf

from wsolkit.errors import ConfigError
from wsolkit.settings.compose import plain
from wsolkit.settings.conf import CONF, HYDRA_KEYS, LABELS, own_folders
from wsolkit.settings.explain import suggestion
from wsolkit.settings.limits import check_limits


def check_config(cfg: DictConfig, own: type | None = None) -> None:
    """Check settings against their types, and each node with a `_target_` against the signature of that target.

    Args:
        cfg: the settings.
        own: a dataclass of the settings that belong to no group. None leaves these unchecked.

    Raises:
        ConfigError: a setting is missing (`???`), unknown to the target, or of the wrong type.
    """
    missing = sorted(_missing(cfg, ""))
    if missing:
        raise ConfigError(
            f"required and not given: {', '.join(missing)}. Add {' '.join(f'{key}=…' for key in missing)}"
        )
    settings = plain(cfg)
    check_limits(settings)
    if own is not None:
        _check_types(settings, typing.get_type_hints(own), "")
    _check_node(settings, "")


def _missing(node: DictConfig, path: str) -> Iterator[str]:
    for key in map(str, node):
        if OmegaConf.is_missing(node, key):
            yield f"{path}{key}"
        elif not OmegaConf.is_interpolation(node, key) and isinstance(node[key], DictConfig):
            yield from _missing(node[key], f"{path}{key}.")


def _check_node(node: Any, path: str) -> None:
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, Mapping):
        return
    if "_target_" in node:
        _check_signature(node, path)
    for key, value in node.items():
        _check_node(value, f"{path}{key}.")


def _check_signature(node: Mapping[str, Any], path: str) -> None:
    target = locate(str(node["_target_"]), path)
    parameters, open_ended = accepted(target)
    unknown = [key for key in node if key not in HYDRA_KEYS | LABELS | parameters.keys()]
    # The node of a data set also holds arguments of its reader, for example dataset.root.
    if unknown and not open_ended and path != "dataset.":
        raise ConfigError(f"there is no setting '{path}{unknown[0]}'{suggestion(unknown[0], parameters)}")
    _check_types({key: node[key] for key in node.keys() & parameters.keys()}, parameters, path)


def accepted(target: Any) -> tuple[dict[str, Any], bool]:
    """Return the arguments of a class or function with their types, and whether it accepts any others.

    Arguments that are declared together as `**settings: Unpack[SomeTypedDict]` count one by one. A constructor with
    `**others` passes these on, so it also accepts the arguments of its base class. A type is `Any` if a library's
    annotation cannot be resolved, and the library then checks the value itself.
    """
    takers = [target]
    if inspect.isclass(target):
        takers = [vars(kind)["__init__"] for kind in target.__mro__[:-1] if "__init__" in vars(kind)]
    found: dict[str, Any] = {}
    open_ended = False
    for taker in takers:
        try:
            hints = typing.get_type_hints(taker)
        except (NameError, TypeError):
            hints = {}
        open_ended = False
        for name, parameter in inspect.signature(taker).parameters.items():
            together = typing.get_args(hints.get(name)) if parameter.kind is inspect.Parameter.VAR_KEYWORD else ()
            if together:
                found = typing.get_type_hints(together[0]) | found
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                open_ended = True
            else:
                found.setdefault(name, hints.get(name, Any))
        if not open_ended:
            break
    if inspect.isclass(target):
        found.pop("self", None)
    return found, open_ended


def _check_types(values: Mapping[str, Any], hints: Mapping[str, Any], path: str) -> None:
    import pydantic  # Imported here, because --help does not need it.

    for key, value in values.items():
        built_later = isinstance(value, Mapping) and "_target_" in value
        if key not in hints or built_later:
            continue
        grouped = typing.is_typeddict(hints[key]) or dataclasses.is_dataclass(hints[key])
        if grouped and isinstance(value, Mapping):
            _check_types(value, typing.get_type_hints(hints[key]), f"{path}{key}.")
            continue
        adapter = pydantic.TypeAdapter(hints[key], config=pydantic.ConfigDict(arbitrary_types_allowed=True))
        try:
            # YAML only has lists, so a list may stand for a tuple.
            adapter.validate_python(value, strict=not isinstance(value, list))
        except pydantic.ValidationError as error:
            reasons = "; ".join(dict.fromkeys(detail["msg"] for detail in error.errors()))
            raise ConfigError(f"{path}{key}={value!r}: {reasons}") from None


def locate(target: str, path: str) -> Any:
    """Import the `_target_` of a node, if a YAML file of the package or of `--config-dir` names it.

    Settings from any other place, such as a checkpoint, can therefore run nothing else.

    Raises:
        ConfigError: no such file names it, or it does not exist.
    """
    folders = [CONF, *own_folders()]
    if not any(target in _targets(folder) for folder in folders):
        known = sorted(frozenset[str]().union(*map(_targets, folders)))
        close = difflib.get_close_matches(target, known, n=1)
        raise ConfigError(
            f"{path}_target_={target}: wsolkit runs only what its own YAML files or those of --config-dir=FOLDER name "
            "as a _target_" + (f" (did you mean '{close[0]}'?)" if close else "")
        )
    try:
        return hydra.utils.get_object(target)
    except Exception as error:
        raise ConfigError(f"{path}_target_={target}: cannot be imported ({error})") from error


@functools.cache
def _targets(folder: Path) -> frozenset[str]:
    """Return the `_target_` values in the YAML files of a folder and its groups."""
    paths = [*folder.glob("*.yaml"), *folder.glob("*/*.yaml"), *folder.glob("*/*/*.yaml")]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return frozenset(name for text in texts for name in re.findall(r"""_target_["']?\s*:\s*["']?([\w.]+)""", text))
