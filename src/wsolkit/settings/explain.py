"""Explain errors of Hydra and OmegaConf in readable messages."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from wsolkit.errors import WsolkitError
from wsolkit.settings.conf import CONF

# These launchers come as extras of the package.
_EXTRAS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm"}


def explain(error: Exception) -> str:
    """Return one readable message for an error of wsolkit, Hydra or OmegaConf."""
    if isinstance(error, WsolkitError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return f"'{error.override}' cannot be read as a setting: {_as_it_should_be(error.override)}"
    several = re.search(r"Ambiguous value for argument '(.*)'\n1\.", str(error), re.DOTALL)
    if several:
        setting, _, value = several[1].partition("=")
        return (
            f"'{several[1]}' has several values: add -m to run each of them, or write '{setting}=[{value}]' for a "
            f"list, or {_in_quotes(setting, value)} for one text"
        )
    needed = re.search(r"Missing mandatory value: (\S+)", str(error))
    if needed:
        return f"required and not given: {needed[1]}. Add {needed[1]}=…"
    option = re.search(r"Could not (?:find|load) '([^']+?)/([^/']*)'", str(error))
    if option:
        group, choice = option.groups()
        if group == "hydra/launcher" and choice in _EXTRAS:
            return f"{group}={choice} needs another package: pip install 'wsolkit[{_EXTRAS[choice]}]'"
        listed = re.search(r"Available options in '[^']+':\n((?:\t[^\n]+\n)+)", str(error))
        known = listed[1].split() if listed else [path.stem for path in (CONF / group).glob("*.yaml")]
        return f"there is no {group} '{choice}'{suggestion(choice, known)}"
    for candidate in (error, error.__cause__):
        parent = getattr(candidate, "parent_node", None)
        if isinstance(candidate, ConfigKeyError | ConfigAttributeError) and isinstance(parent, DictConfig):
            where, key = candidate.full_key or str(candidate.key), str(candidate.key)
            return f"there is no setting '{where}'{suggestion(key, map(str, parent))}"
    return "\n".join(line for line in str(error).splitlines() if line.strip())


def _as_it_should_be(override: str) -> str:
    setting, equals, value = override.partition("=")
    if not equals:
        return "expected SETTING=VALUE"
    if value[:1] in ("[", "{"):
        example = f'{setting}=["first, one","second"]'
        return f"put texts in it in quotes, such as {shlex.quote(example)}"
    return f"put a text in quotes: {_in_quotes(setting, value)}"


def _in_quotes(setting: str, text: str) -> str:
    """Return a setting with a text as its value, quoted for the shell."""
    return shlex.quote(f"{setting}={QuotedString(text, Quote.double).with_quotes()}")


def suggestion(wrong: str, options: Iterable[str]) -> str:
    """Return the end of a message about a wrong word: the closest option, and all options."""
    options = sorted(option for option in options if not option.startswith("_"))
    close = difflib.get_close_matches(wrong, options, n=1)
    return (f" (did you mean '{close[0]}'?)" if close else "") + f"; choose from: {', '.join(options)}"
