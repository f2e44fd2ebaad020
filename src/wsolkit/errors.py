"""Errors that a user can cause. Each message says what was expected, what was found and what to do."""

from __future__ import annotations

import re


class WsolkitError(Exception):
    """The base of every error that a user can cause and fix. Commands print its message alone and exit with 1."""

    def __init__(self, message: str = "") -> None:
        # PyTorch raises an error of a loader's process again, with that process's traceback before the message.
        found = re.fullmatch(r"Caught \w+ in .+?\nOriginal Traceback .+?\n[\w.]+Error: (.+)", message, re.DOTALL)
        super().__init__(found[1].strip() if found else message)


class ConfigError(WsolkitError, ValueError):
    """A setting is unknown, missing, has a wrong type or does not fit another setting."""


class DataError(WsolkitError, ValueError):
    """A file of a data set is missing, unreadable or contradicts another file."""


class CheckpointError(WsolkitError, ValueError):
    """A checkpoint or weight file cannot be read or does not fit the model."""


class TrainingError(WsolkitError, RuntimeError):
    """Training cannot continue: a loss is not finite, the memory is full, or a loader's process died."""


class BusyError(WsolkitError, RuntimeError):
    """Another process works in a folder that only one process may write to."""


class JobError(WsolkitError, RuntimeError):
    """A job of a sweep failed, or its record cannot be used."""
