"""Translate what people type on the command line into Hydra's grammar.

Most characters that paths and names contain have a meaning in Hydra (= , [ ] { } ( ) # …), and Hydra cannot read some
others at all (& ; ! é …). This module therefore quotes the values of settings that hold paths or names, where Hydra
needs it. It also escapes ${ in them, which OmegaConf would take for an interpolation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from wsolkit.errors import ConfigError

PATHS = frozenset(
    {
        *("checkpoint", "resume", "score_maps", "save_maps", "source", "output", "directory", "backbone.weights"),
        *("dataset.root", "dataset.index", "dataset.cache", "dataset.lists", "dataset.masks", "dataset.annotations"),
        *("dataset.held_out_root", "dataset.held_out_lists", "dataset.box_folders", "dataset.splits"),
        *("dataset.pseudo_boxes", "dataset.train_boxes", "dataset.train_masks"),
        *("method.coarse", "method.evaluator", "method.classifier"),
        *("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"),
    }
)
"""The settings of all commands that hold paths."""
NAMES = frozenset({"classes", "dataset.classes", "examples", "name", "project", "entity"})
"""The settings that hold names of classes or images, or other names that people have chosen."""
_COLLECTIONS = {"dataset.annotations", "dataset.box_folders", "dataset.splits", "dataset.classes", "examples"}
_LABELLED = {"classes", "dataset.classes"}  # In these, a number is a label and not a name.

_PLAIN = re.compile(r"[\w./@%+*?|-]+", re.ASCII)  # Hydra reads these characters as they are.
_QUOTED = r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
_ESCAPED = re.compile(r"\\[\\()\[\]{}:=, \t]")  # Hydra takes these for escaped characters.
_PIECE = re.compile(rf"(\s*{_QUOTED}\s*|(?:\\[\\,]|[^,])*)(,|\Z)", re.DOTALL)
_BETWEEN_COLLECTIONS = re.compile(r"(?<=[\]}])\s*,\s*(?=[\[{])")
_FUNCTION = re.compile(r"(choice|glob|range|shuffle|sort|tag)\(.*\)")
# oc.env is missing, because the shell already inserts variables.
_RESOLVERS = {"hydra", "now", "job_name", "run_name"}


def as_overrides(arguments: Sequence[str], settings: Collection[str]) -> list[str]:
    """Return a command's arguments in Hydra's grammar. A second call changes nothing more.

    A value that Hydra reads as quoted or escaped text stays as it is. If a path can be read in two ways, the reading of
    which more exists on the disk counts. `+postprocess=` and `+augment=` are read without their +.
    `dataset.batch_size=auto` keeps the global batch, and divides it.

    Args:
        arguments: the arguments as the shell passes them.
        settings: the names that an interpolation may begin with. ${method.name} is then one, and ${x} is text.

    Raises:
        ConfigError: an argument is not in UTF-8.
    """
    sweep = is_sweep(arguments)
    return [_as_override(argument, settings, sweep) for argument in arguments]


def is_sweep(arguments: Sequence[str]) -> bool:
    """Say whether a command line runs several jobs, by -m or by a ready grid."""
    if "hydra.mode=RUN" in arguments:
        return False
    grid = any(argument.startswith("sweep=") and argument not in ("sweep=", "sweep=null") for argument in arguments)
    return grid or not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(arguments)


def _as_override(argument: str, settings: Collection[str], sweep: bool) -> str:
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{argument!r} is not in UTF-8: rename the file or folder") from None
    if argument.startswith(("+postprocess=", "+augment=")):
        return argument[1:]
    if argument == "dataset.batch_size=auto":
        return "fit_memory=true"
    given, equals, value = argument.partition("=")
    setting = given.lstrip("+")
    if argument.startswith("-") or not equals or not value:
        return argument
    if setting in PATHS | NAMES:
        return f"{given}={_Values(setting, settings).read(value, sweep)}"
    if "/" in value and not _PLAIN.fullmatch(value) and _exists(value):  # The user has added this setting.
        return f"{given}={quoted(escaped(value))}"
    return argument


class _Values:
    """Reads the values of one setting that holds paths or names into Hydra's grammar.

    Args:
        setting: the name of the setting.
        settings: see `as_overrides`.
    """

    def __init__(self, setting: str, settings: Collection[str]) -> None:
        self.setting, self.settings = setting, settings
        self.of_paths = setting in PATHS

    def read(self, value: str, sweep: bool) -> str:
        """Read a value as it was typed: as one text, or as a list, a dictionary or several values.

        Args:
            value: the value as typed.
            sweep: whether commas separate values of different jobs.
        """
        if self._exists(value) and not re.fullmatch(_QUOTED, value, re.DOTALL):
            return self._text(value)
        sweep = sweep and not self.setting.startswith("hydra.")
        if sweep and _FUNCTION.fullmatch(value):
            return value
        if self.setting in _COLLECTIONS and value[0] + value[-1] in ("[]", "{}"):
            collections = _BETWEEN_COLLECTIONS.split(value) if sweep else [value]
            return ",".join(map(self._collection, collections))
        if sweep:
            return ",".join(map(self._one, self._pieces(value)))
        return self._one(value)

    def _one(self, value: str) -> str:
        nothing = value.lower() == "null" and not self.setting.startswith("hydra.")
        return value if nothing and not self._exists(value) else self._item(value)

    def _collection(self, value: str) -> str:
        pieces = self._pieces(value[1:-1])
        items = list(map(self._item if value[0] == "[" else self._pair, pieces))
        return value if items == pieces else f"{value[0]}{','.join(items)}{value[-1]}"

    def _pair(self, piece: str) -> str:
        key, _, value = piece.partition(":")
        return f"{key}: {self._one(value.strip())}" if value.strip() else piece

    def _pieces(self, text: str) -> list[str]:
        """Split a text at its commas, except those in quotes, behind a backslash, or in an existing path."""
        raw, pieces, at, parted = [], [], 0, True
        while parted:
            match = _PIECE.match(text, at)
            assert match is not None
            raw.append(match[1])
            at, parted = match.end(), bool(match[2])
        while raw:
            joined = (count for count in range(len(raw), 1, -1) if self._exists(",".join(raw[:count]).strip()))
            count = next(joined, 1)
            pieces.append(",".join(raw[:count]).strip())
            raw = raw[count:]
        return pieces

    def _item(self, value: str) -> str:
        """Return one quoted text, unless Hydra reads the value as a quoted or an escaped text already."""
        if not value or (self.setting in _LABELLED and re.fullmatch(r"0|[1-9]\d*", value)):
            return value
        if re.fullmatch(_QUOTED, value, re.DOTALL) or _ESCAPED.search(value):
            meant = parsed(value)
            if isinstance(meant, str) and not (self.of_paths and _reach(value) > _reach(meant)):
                return value
        return self._text(value)

    def _text(self, value: str) -> str:
        if value == "???" and self.of_paths:  # OmegaConf takes it for a missing value.
            value = "./???"
        if self.of_paths and value.split("/")[0] == "~" and not _exists("~"):
            value = str(Path(value).expanduser())  # Shells expand ~ after output=, but not after dataset.root=.
        return quoted(value if self._refers(value) and not self._exists(value) else escaped(value))

    def _refers(self, value: str) -> bool:
        """Say whether the name of a setting follows each ${."""
        names = re.findall(r"\$\{(\w+)[\w.]*\}|\$\{(\w+):", value)
        return value.count("${") == len(names) and all(
            setting in self.settings or resolver in _RESOLVERS for setting, resolver in names
        )

    def _exists(self, value: str) -> bool:
        return self.of_paths and _exists(value)


def _reach(path: str) -> int:
    """Return how many folders of a path exist, counting the path itself."""
    return sum(map(_exists, (path, *map(str, Path(path).parents))))


def _exists(path: str) -> bool:
    # Path's method fails if a name is too long.
    return os.path.exists(path)  # noqa: PTH110


def quoted(text: str) -> str:
    """Return a text as a value in Hydra's grammar, in quotes if Hydra needs them."""
    if _PLAIN.fullmatch(text) and parsed(text) == text:
        return text
    return str(QuotedString(text, Quote.single).with_quotes())


@cache
def parsed(value: str) -> Any:
    """Return the value that Hydra reads, or None if it cannot read it."""
    try:
        return _parser().parse_override(f"key={value}").value()
    except HydraException:
        return None


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def escaped(value: Any) -> Any:
    """Return a plain value for OmegaConf, with each ${ escaped in its texts."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    return [escaped(inner) for inner in value] if isinstance(value, list | tuple) else value
