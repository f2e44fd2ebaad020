"""Folders of results that a command fills file by file, and continues to fill after an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsolkit.errors import ConfigError
from wsolkit.system.drafts import write_text
from wsolkit.system.locks import alone

SETTINGS = "settings.json"
"""The settings that a complete folder was made with."""

_BEGUN, _LOCK = "unfinished.json", ".lock"


@contextmanager
def filling(folder: Path, settings: Mapping[str, Any]) -> Iterator[bool]:
    """Keep other processes out of a folder while its files are made, and call it complete when that is done.

    Args:
        folder: the folder. It is made if it does not exist.
        settings: what the files depend on, as plain values.

    Yields:
        whether the folder is complete already.

    Raises:
        ConfigError: the folder holds results of other settings, or files of something else.
        BusyError: another process fills it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / _LOCK, f"writing to '{folder}'", "choose another output"):
        before = next((folder / name for name in (SETTINGS, _BEGUN) if (folder / name).is_file()), None)
        if before is None and any(path.name != _LOCK for path in folder.iterdir()):
            raise ConfigError(f"output={folder}: the folder holds other files: choose an empty or a new one")
        if before is not None:
            _check_same(before, settings)
        complete = before == folder / SETTINGS
        if not complete:
            write_text(folder / _BEGUN, json.dumps(settings, indent=2))
        yield complete
        if not complete:
            (folder / _BEGUN).replace(folder / SETTINGS)


def _check_same(path: Path, settings: Mapping[str, Any]) -> None:
    """Check that a folder was begun with the same settings.

    Raises:
        ConfigError: it was not.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"output: '{path}' cannot be read ({error}): choose another output") from error
    now = json.loads(json.dumps(settings))
    if not isinstance(before, dict) or before.keys() != now.keys():
        raise ConfigError(f"output: '{path.parent}' was made by another command or version: choose another output")
    changed = [f"{key}={now[key]} (was {before[key]})" for key in now if now[key] != before[key]]
    if changed:
        raise ConfigError(
            f"output: '{path.parent}' was made with other settings: {', '.join(changed)}. Choose another output, or "
            "the same settings"
        )
