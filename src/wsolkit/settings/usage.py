"""What `--help` prints. The comments in a command's YAML file are its source, so no text is written twice."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

_WIDEST = 110
_NAMES = 26  # columns; the text of a longer name begins on the next line
_MOST_CHOICES = 12  # of more, none is listed

_SETTING = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: +(?P<default>\S.*))?")
_GROUP = re.compile(r"  - (?:optional |override )?(?P<group>\w+): (?P<default>.+?)(?: +# (?P<comment>.*))?")
_INCLUDED = re.compile(r"  - (\w+)")


class Item(NamedTuple):
    """A setting or a group of a command."""

    name: str
    default: str
    text: str


def usage(conf: Path, command: str, fixed: Collection[str] = ()) -> str:
    """Return the help of a command: what it does, examples, its settings, and its groups with their choices.

    Args:
        conf: the folder of YAML files.
        command: the name of the command's YAML file.
        fixed: groups that the help leaves out, since the command's checkpoint chooses in them.
    """
    about = []
    for line in _lines(conf, command):
        if not line.startswith("#"):
            break
        about.append(line.removeprefix("# "))
    examples = [line for line in about if line.startswith("  ")]
    parts = [
        "\n".join(line for line in about if line not in examples),
        "Examples:\n" + "\n".join(examples),
        "Settings, given as NAME=VALUE:\n" + _table(settings(conf, command)),
    ]
    chosen = [item for item in groups(conf, command) if item.name not in fixed]
    if chosen:
        parts.append("Groups of settings, chosen as GROUP=CHOICE:\n" + _table(chosen))
    return "\n\n".join([*parts, "--cfg job prints all settings, with those of the groups."])


def settings(conf: Path, command: str) -> list[Item]:
    """Return the settings of a command that belong to no group, each with the comment above it."""
    found, comment, outer = [], "", ""
    for line in _lines(conf, command):
        match = _SETTING.fullmatch(line)
        if match and not match["indent"]:
            outer = match["key"]
        if match and match["default"] and outer not in ("defaults", "hydra"):
            name = f"{outer}.{match['key']}" if match["indent"] else outer
            found.append(Item(name, match["default"], comment))
        comment = line.strip().removeprefix("# ") if line.lstrip().startswith("#") else ""
    return found


def groups(conf: Path, command: str) -> list[Item]:
    """Return the groups of a command that have a comment, each with the comment and the choices."""
    defaults: dict[str, str] = {}
    comments: dict[str, str] = {}
    for match in filter(None, map(_GROUP.fullmatch, _lines(conf, command))):
        defaults.setdefault(match["group"], match["default"])
        if match["comment"]:
            comments[match["group"]] = match["comment"]
    found = []
    for group, comment in reversed(comments.items()):
        choices = sorted(path.stem for path in (conf / group).glob("[!_]*.yaml"))
        listed = f": {', '.join(choices)}" if len(choices) <= _MOST_CHOICES else "."
        found.append(Item(group, defaults[group], comment + listed))
    return found


def _lines(conf: Path, name: str) -> list[str]:
    """Return the lines of a YAML file, and then those of the files that it includes."""
    lines = (conf / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    included = [match[1] for match in map(_INCLUDED.fullmatch, lines) if match and match[1] != "_self_"]
    return lines + [line for other in included for line in _lines(conf, other)]


def _table(items: list[Item]) -> str:
    width = min(shutil.get_terminal_size((_WIDEST, 0)).columns, _WIDEST)
    lines = []
    for name, default, text in items:
        shown = name if default.startswith(("???", "_", "null")) else f"{name}={default}"
        required = " (required)" if default == "???" else ""
        start = f"  {shown}"
        if len(start) >= _NAMES:
            lines.append(start)
            start = ""
        for part in textwrap.wrap(text + required, max(width - _NAMES, 20)):
            lines.append(f"{start:<{_NAMES}}{part}")
            start = ""
    return "\n".join(lines)
