"""What can go wrong through a user's input; each message says what was expected, what came and what to do."""

from __future__ import annotations

import re


class WsolkitError(Exception):
    """Base of every error a user can cause and mend; commands print its message alone and exit with 1."""

    def __init__(self, message: str = "") -> None:
        # PyTorch raises an error of a loader's process anew, with that process's traceback before the message.
        found = re.fullmatch(r"Caught \w+ in .+?\nOriginal Traceback .+?\n[\w.]+Error: (.+)", message, re.DOTALL)
        super().__init__(found[1].strip() if found else message)


class ConfigError(WsolkitError, ValueError):
    """A setting is unknown, missing, of a wrong type or does not fit another."""


class DataError(WsolkitError, ValueError):
    """A file of a data set is missing, unreadable or contradicts another."""


class CheckpointError(WsolkitError, ValueError):
    """A checkpoint or weight file cannot be read or does not fit the model."""


class TrainingError(WsolkitError, RuntimeError):
    """Training cannot go on: a loss is not finite, memory is full, a loader's process died."""


class BusyError(WsolkitError, RuntimeError):
    """Another process is at work in a folder that only one may write to."""


class JobError(WsolkitError, RuntimeError):
    """A job of a sweep failed, or its record cannot be used."""
