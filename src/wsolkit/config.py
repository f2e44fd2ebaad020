"""Compose, check and explain settings, and run commands. Imports neither torch nor Lightning."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import shlex
import signal
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
import hydra.core.utils
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from wsolkit.errors import ConfigError, WsolkitError
from wsolkit.jobs import run_job, watch_sweep
from wsolkit.limits import check_limits
from wsolkit.overrides import as_overrides, escaped, is_sweep, quoted
from wsolkit.signals import SIGNALS, Stopped, end_with_parent, is_first, leave_without_reader
from wsolkit.usage import settings as settings_of
from wsolkit.usage import usage

_HERE = Path(__file__).parent
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parents[1] / "conf"
"""The folder of YAML files: inside the package when installed from a wheel, beside `src` in a checkout."""


def _by_name(name: str, values: Mapping[str, Any], default: Any) -> Any:
    value = values.get(name, default)
    return OmegaConf.create(value) if isinstance(value, list | dict) else value  # else `--cfg job --resolve` fails


# A paper's value for each data set or backbone, and another for the rest: ${by_dataset:${dataset.name},{cub:0.1},null}.
OmegaConf.register_new_resolver("by_dataset", _by_name, replace=True)
OmegaConf.register_new_resolver("by_backbone", _by_name, replace=True)

_header = ConfigSource._get_header_dict
# Else Hydra would not see the header "# @package …" of a user's YAML file behind a byte order mark.
ConfigSource._get_header_dict = staticmethod(lambda text: _header(text.lstrip("\ufeff")))

# Not arguments of the class that a node describes: a name is for people and interpolation, mean and standard deviation
# of a backbone's input are for the data set.
_LABELS = {"name", "mean", "std"}
# Launchers that come as extras of the package.
_EXTRAS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm"}
_HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


# Hydra puts the absolute path of the run directory into its settings as it is, where ${ would be an interpolation.
_paths = types.SimpleNamespace(**vars(os.path) | {"abspath": lambda path: escaped(os.path.abspath(path))})  # noqa: PTH100
hydra.core.utils.os = types.SimpleNamespace(**vars(os) | {"path": _paths})


def load_config(*overrides: str) -> DictConfig:
    """Compose the settings of `python -m wsolkit.train` with overrides such as "method=sat" or "optimizer.lr=1e-4".

    Raises:
        ConfigError: a group, key or value is wrong; the message names the choices.
    """
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg: DictConfig = hydra.compose("train", overrides=as_overrides(overrides, _referable("train")))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return cfg


def run_command(
    config_name: str,
    task: Callable[[DictConfig, Path], object],
    complete: Callable[[list[str]], list[str]] = list,
    stopped: str = "",
    fixed: Collection[str] = (),
) -> None:
    """Run a command: compose its settings from the command line, then `task(settings, run directory)`.

    Errors a user can mend are printed as one message, and the process exits with 1; HYDRA_FULL_ERROR=1 shows the
    traceback too. Where SIGTERM or Ctrl-C stops it, it exits with 143 or 130.

    Args:
        config_name: of the command's YAML file.
        task: what it does.
        complete: makes of its arguments, in Hydra's grammar, those that it is run with.
        stopped: how to go on where it was stopped, unless the task says so.
        fixed: groups that the help leaves out, since the command chooses in them.
    """
    traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

    failures: list[Exception] = []

    def job(cfg: DictConfig) -> None:
        if not traceback:
            os.environ.pop("HYDRA_FULL_ERROR", None)  # not for the processes that the task starts
        try:
            folder = Path(HydraConfig.get().runtime.output_dir)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                run_job(f"wsolkit.{config_name}", *_command_line(), _as_far_as_known(cfg), folder)
            else:
                watch_sweep()
                _prepare_children()
                task(cfg, folder)
        except (WsolkitError, OmegaConfBaseException) as error:
            # Hydra would add lines of its own; in a multirun they say which job it was.
            if traceback or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            failures.append(error)
        finally:
            os.environ["HYDRA_FULL_ERROR"] = "1"

    end_with_parent()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal cannot show must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors instead of printing them its own way
    try:
        if {"--help", "-h"}.intersection(sys.argv):
            print(usage(CONF, config_name, fixed), flush=True)
            return
        sys.argv[1:] = _for_hydra(complete(as_overrides(sys.argv[1:], _referable(config_name))))
        with SIGNALS.listening():
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
        sys.stdout.flush()
        for failure in failures:
            raise failure
    except (WsolkitError, HydraException, OmegaConfBaseException) as error:
        if traceback:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # of `--help | head`
        leave_without_reader()
        raise
    except OSError as error:
        if traceback or error.filename is None:
            raise
        sys.exit(
            f"error: '{error.filename}' cannot be read or written ({error.strerror}); results go to another folder "
            f"with {'output' if _has_output(config_name) else 'hydra.run.dir'}=DIR"
        )
    except (Stopped, KeyboardInterrupt) as error:
        stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        stop.advice = stop.advice or stopped
        if is_first():
            print(stop, file=sys.stderr)
        raise stop from None


def _for_hydra(arguments: list[str]) -> list[str]:
    """Return a command line for Hydra, which then names the jobs of a sweep as `wsolkit.sweeper` does.

    Of several values, --cfg shows the first. --dry-run is ours: a sweeper that runs nothing lists the jobs.
    """
    own = [argument for argument in arguments if argument not in ("-m", "--multirun", "--dry-run")]
    if {"--cfg", "-c"}.intersection(arguments):
        return [_first_value(argument) for argument in own]
    sweep, preview = is_sweep(arguments), "--dry-run" in arguments
    if not sweep and not preview:
        return arguments
    from wsolkit.sweeper import replace_sweeper

    replace_sweeper(sweep=sweep, preview=preview)
    return ["--multirun", *own, "hydra/sweeper=basic"] if preview else arguments


def _first_value(argument: str) -> str:
    if argument.startswith("-") or "=" not in argument:
        return argument
    (override,) = OverridesParser.create().parse_overrides([argument])
    several = override.is_sweep_override() and override.is_discrete_sweep()
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}" if several else argument


def _has_output(config_name: str) -> bool:
    """Whether a command's folder is its setting `output`."""
    return re.search(r"^output:", (CONF / f"{config_name}.yaml").read_text(encoding="utf-8"), re.MULTILINE) is not None


def run_command_on_checkpoint(
    config_name: str, task: Callable[[DictConfig, Path], object], with_protocol: bool = True, stopped: str = ""
) -> None:
    """`run_command`, with the method, backbone and data set of `checkpoint=…` before the user's settings.

    Args:
        with_protocol: whether with the checkpoint's first protocol, too.
        stopped: see `run_command`.
    """

    def complete(arguments: list[str]) -> list[str]:
        if not any(argument.startswith("checkpoint=") for argument in arguments):
            return arguments
        from wsolkit.checkpoint import choose_groups

        return choose_groups(arguments, with_protocol)

    fixed = ("method", "backbone", "dataset") if with_protocol else ("method", "backbone")
    run_command(config_name, task, complete, stopped, fixed)


def as_named(folder: Path) -> Path:
    """A run directory as people name it: relative to where they are, if it is below."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def name_directory() -> None:
    """Make the command line's first argument that is no setting `directory=…`."""
    for index, argument in enumerate(sys.argv[1:], start=1):
        of_option = sys.argv[index - 1].startswith("-")
        if not argument.startswith("-") and not of_option and ("=" not in argument or Path(argument).is_dir()):
            sys.argv[index] = f"directory={argument}"
            break


def _as_far_as_known(cfg: DictConfig) -> dict[str, Any]:
    """Settings as plain containers; where a required one is missing, with interpolations as they are.

    The job says what is missing; that of `evaluate` may find it in its checkpoint.
    """
    try:
        return plain(cfg)
    except OmegaConfBaseException:
        return typing.cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=False))


def given_overrides() -> list[str]:
    """Overrides of this job, in Hydra's grammar."""
    return list(_hydra_settings()["overrides"]["task"])


def chosen_file(group: str) -> Path | None:
    """Return the YAML file that this job takes from a group, or None if it takes none."""
    choice = _hydra_settings()["runtime"]["choices"].get(group)
    paths = (folder / group / f"{choice}.yaml" for folder in (*_own_folders(), CONF))
    return next((path for path in paths if path.is_file()), None)


def _hydra_settings() -> dict[str, Any]:
    """Hydra's settings, without resolving what is in them: overrides may hold interpolations."""
    return typing.cast("dict[str, Any]", OmegaConf.to_container(HydraConfig.get(), resolve=False))


def _command_line() -> tuple[list[str], list[str]]:
    """Overrides of this one job, and the flags that its command was started with."""
    sources = _hydra_settings()["runtime"]["config_sources"]
    flags = [f"--config-dir={source['path']}" for source in sources if source["provider"] == "command-line"]
    return given_overrides(), flags


def command_to_resume(folder: Path) -> str:
    """What to type to go on with the run in a directory."""
    goes_on = ["resume=auto", f"hydra.run.dir={quoted(escaped(str(as_named(folder))))}"]
    if not HydraConfig.initialized():
        return " ".join(goes_on)
    overrides, flags = _command_line()
    own = [override for override in overrides if not override.startswith("resume=")]
    return shlex.join(["python", "-m", "wsolkit.train", *flags, *own, *goes_on])


def _prepare_children() -> None:
    """Make the command line and the run directory those of this one job.

    DDP starts the command again for each device, with this process's command line and `hydra.run.dir` between double
    quotes, in this process's folder.
    """
    overrides, flags = _command_line()
    sys.argv[1:] = [*flags, *overrides, "hydra.mode=RUN"]
    instance = HydraConfig.instance().cfg
    assert instance is not None
    folder = escaped(HydraConfig.get().runtime.output_dir)
    with read_write(instance.hydra):
        instance.hydra.run.dir = escaped(QuotedString(folder, Quote.double).with_quotes()[1:-1])
        instance.hydra.runtime.cwd = escaped(str(Path.cwd()))


def explain(error: Exception) -> str:
    """One readable message for an error of ours, of Hydra or of OmegaConf."""
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
        return f"there is no {group} '{choice}'{_choices(choice, known)}"
    for candidate in (error, error.__cause__):
        parent = getattr(candidate, "parent_node", None)
        if isinstance(candidate, ConfigKeyError | ConfigAttributeError) and isinstance(parent, DictConfig):
            where, key = candidate.full_key or str(candidate.key), str(candidate.key)
            return f"there is no setting '{where}'{_choices(key, map(str, parent))}"
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
    """A setting whose value is a text, for the shell."""
    return shlex.quote(f"{setting}={QuotedString(text, Quote.double).with_quotes()}")


def _choices(wrong: str, options: Iterable[str]) -> str:
    options = sorted(option for option in options if not option.startswith("_"))
    close = difflib.get_close_matches(wrong, options, n=1)
    return (f" (did you mean '{close[0]}'?)" if close else "") + f"; choose from: {', '.join(options)}"


def _referable(config_name: str) -> set[str]:
    """Return the names that interpolations of a command's settings begin with."""
    own = (item.name.partition(".")[0] for item in settings_of(CONF, config_name))
    return {*own, *(folder.name for folder in CONF.iterdir() if folder.is_dir())}


def check_config(cfg: DictConfig, own: type | None = None) -> None:
    """Check settings against their types and, for every node with a `_target_`, against that target's signature.

    Args:
        cfg: the settings.
        own: a dataclass of the settings that belong to no group. None: train's, which `load_config` composes.

    Raises:
        ConfigError: a setting is missing (`???`), unknown to the target, or of another type than its annotation.
    """
    missing = sorted(_missing(cfg, ""))
    if missing:
        raise ConfigError(
            f"required and not given: {', '.join(missing)}. Add {' '.join(f'{key}=…' for key in missing)}"
        )
    if own is None:
        from wsolkit.train import Settings

        own = Settings
    settings = plain(cfg)
    check_limits(settings)
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
    parameters = inspect.signature(target).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [key for key in node if key not in _HYDRA_KEYS | _LABELS | parameters.keys()]
    # A data set's node also holds what its records are read with, such as dataset.root.
    if unknown and not open_ended and path != "dataset.":
        raise ConfigError(f"there is no setting '{path}{unknown[0]}'{_choices(unknown[0], parameters)}")
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        return  # a library's annotations may not be resolvable; the library then checks for itself
    _check_types({key: node[key] for key in node.keys() & parameters.keys()}, hints, path)


def _check_types(values: Mapping[str, Any], hints: Mapping[str, Any], path: str) -> None:
    import pydantic  # not needed for --help

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
            # YAML has lists only: where one is given, a tuple is as good.
            adapter.validate_python(value, strict=not isinstance(value, list))
        except pydantic.ValidationError as error:
            reasons = "; ".join(dict.fromkeys(detail["msg"] for detail in error.errors()))
            raise ConfigError(f"{path}{key}={value!r}: {reasons}") from None


def locate(target: str, path: str) -> Any:
    """Import what a `_target_` names, if a YAML file of the package or of `--config-dir` names it as one.

    Wherever settings come from, they can run nothing else.

    Raises:
        ConfigError: no such file names it, or there is no such thing.
    """
    folders = [CONF, *_own_folders()]
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


def _own_folders() -> list[Path]:
    """Folders of YAML files that the command line adds to the package's."""
    if not HydraConfig.initialized():
        return []
    sources = _hydra_settings()["runtime"]["config_sources"]
    return [Path(source["path"]) for source in sources if source["schema"] == "file" and Path(source["path"]) != CONF]


@functools.cache
def _targets(folder: Path) -> frozenset[str]:
    """What the YAML files of a folder and its groups name as a `_target_`."""
    paths = [*folder.glob("*.yaml"), *folder.glob("*/*.yaml"), *folder.glob("*/*/*.yaml")]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return frozenset(name for text in texts for name in re.findall(r"""_target_["']?\s*:\s*["']?([\w.]+)""", text))


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Settings as plain containers, interpolations resolved, `???` kept."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return typing.cast("dict[str, Any]", container)


def built(node: DictConfig, **more: Any) -> Any:
    """What the `_target_` of a node makes of the node's settings, and of more arguments."""
    # Twice, since Hydra resolves settings twice.
    return hydra.utils.instantiate(escaped(escaped(plain(node) | more)), _convert_="all")


def arguments(node: DictConfig) -> dict[str, Any]:
    """A node's settings as arguments of its target: without Hydra's keys and labels."""
    return {key: value for key, value in plain(node).items() if key not in _HYDRA_KEYS | _LABELS}
