"""Compose, check and explain settings, and run commands. Imports neither torch nor Lightning."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from wsolkit.errors import ConfigError, WsolkitError
from wsolkit.jobs import run_job

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
ConfigSource._get_header_dict = staticmethod(lambda text: _header(text.lstrip("\ufeff")))  # type: ignore[method-assign]

# Not arguments of the class that a node describes: a name is for people and interpolation, mean and standard deviation
# of a backbone's input are for the data set.
_LABELS = {"name", "mean", "std"}
# Launchers that come as extras of the package.
_EXTRAS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm"}
_HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def load_config(*overrides: str) -> DictConfig:
    """Compose the settings of `python -m wsolkit.train` with overrides such as "method=sat" or "optimizer.lr=1e-4".

    Raises:
        ConfigError: a group, key or value is wrong; the message names the choices.
    """
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg: DictConfig = hydra.compose("train", overrides=[as_override(given) for given in overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return cfg


def run_command(config_name: str, task: Callable[[DictConfig, Path], object]) -> None:
    """Run a command: compose its settings from the command line, then `task(settings, run directory)`.

    Errors a user can mend are printed as one message, and the process exits with 1; HYDRA_FULL_ERROR=1 shows the
    traceback too.
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
                _prepare_children()
                task(cfg, folder)
        except (WsolkitError, OmegaConfBaseException) as error:
            # Hydra would add lines of its own; in a multirun they say which job it was.
            if traceback or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            failures.append(error)
        finally:
            os.environ["HYDRA_FULL_ERROR"] = "1"

    sys.argv[1:] = [as_override(argument) for argument in sys.argv[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors instead of printing them its own way
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
        for failure in failures:
            raise failure
    except (WsolkitError, HydraException, OmegaConfBaseException) as error:
        if traceback:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("interrupted")


def run_command_on_checkpoint(
    config_name: str, task: Callable[[DictConfig, Path], object], with_protocol: bool = True
) -> None:
    """`run_command`, with the method, backbone and data set of `checkpoint=…` before the user's settings.

    Args:
        with_protocol: whether with the checkpoint's first protocol, too.
    """
    if any(argument.startswith("checkpoint=") for argument in sys.argv[1:]):
        from wsolkit.checkpoint import choose_groups

        try:
            sys.argv[1:] = choose_groups(sys.argv[1:], with_protocol)
        except WsolkitError as error:
            sys.exit(f"error: {error}")
    run_command(config_name, task)


def as_named(folder: Path) -> Path:
    """A run directory as people name it: relative to where they are, if it is below."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def name_directory() -> None:
    """Make the command line's first argument that is no setting `directory=…`."""
    for index, argument in enumerate(sys.argv[1:], start=1):
        of_option = sys.argv[index - 1].startswith("-")
        if not argument.startswith("-") and not of_option and ("=" not in argument or Path(argument).is_dir()):
            escaped = argument.replace("'", "\\'")
            sys.argv[index] = f"directory='{escaped}'"
            break


def as_override(argument: str) -> str:
    """What is given on the command line, in Hydra's grammar.

    The value of `setting=path` is quoted where there is such a path, since = , [ ] mean something to Hydra, and so are
    patterns and names of classes; and a post-process may be added with + as if it were not among the settings.
    `dataset.batch_size=auto` keeps the global batch, and divides it.
    """
    if argument.startswith("+postprocess="):
        return argument[1:]
    if argument == "dataset.batch_size=auto":
        return "fit_memory=true"
    if argument.startswith("-"):
        return argument
    setting, equals, value = argument.partition("=")
    special = set("=,[]{}()#$' \t") & set(value)
    is_path = special and "/" in value and Path(value).exists()
    is_text = setting in ("source", "output") or (setting == "classes" and special)
    if value == "null" or not (equals and value and (is_path or (is_text and value[0] not in "'\""))):
        return argument
    escaped = value.replace("'", "\\'")
    return f"{setting}='{escaped}'"


def _as_far_as_known(cfg: DictConfig) -> dict[str, Any]:
    """Settings as plain containers; where a required one is missing, with interpolations as they are.

    The job says what is missing; that of `evaluate` may find it in its checkpoint.
    """
    try:
        return plain(cfg)
    except OmegaConfBaseException:
        return typing.cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=False))


def _command_line() -> tuple[list[str], list[str]]:
    """Overrides of this one job, and the flags that its command was started with."""
    settings = HydraConfig.get()
    sources = settings.runtime.config_sources
    flags = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    return list(settings.overrides.task), flags


def _prepare_children() -> None:
    """Make the command line and the run directory those of this one job.

    DDP starts the command again for each device, with this process's command line and `hydra.run.dir`.
    """
    overrides, flags = _command_line()
    sys.argv[1:] = [*flags, *overrides, "hydra.mode=RUN"]
    instance = HydraConfig.instance().cfg
    assert instance is not None
    with read_write(instance.hydra):
        instance.hydra.run.dir = HydraConfig.get().runtime.output_dir


def explain(error: Exception) -> str:
    """One readable message for an error of ours, of Hydra or of OmegaConf."""
    if isinstance(error, WsolkitError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return f"'{error.override}' cannot be read as a setting: {str(error).splitlines()[0]}"
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


def _choices(wrong: str, options: Iterable[str]) -> str:
    options = sorted(option for option in options if not option.startswith("_"))
    close = difflib.get_close_matches(wrong, options, n=1)
    return (f" (did you mean '{close[0]}'?)" if close else "") + f"; choose from: {', '.join(options)}"


class Checkpoints(typing.TypedDict):
    """See `wsolkit.checkpoint.LastCheckpoint`."""

    every_n_steps: int | None
    every_n_minutes: float | None
    requeue: bool


class RunSettings(typing.TypedDict, total=False):
    """Types of the settings that belong to no group."""

    seed: int
    selection: typing.Literal["val", "test"]
    monitor: str | None
    resume: str | None
    checkpoints: Checkpoints
    fit_memory: bool
    checkpoint: str | None
    score_maps: str | None
    save_maps: str | None
    num_examples: int
    examples: list[str]
    num_table_images: int | None
    progress: bool
    source: str | None
    output: str
    host: str
    port: int
    format: typing.Literal["onnx", "torch_export"] | None
    overwrite: bool
    num_heads: int | None
    trust: bool
    classes: str | int | None
    top_k: int
    threshold: float | None
    select: typing.Literal["largest", "all"]
    overlays: bool
    batch_size: int
    num_workers: int | typing.Literal["auto"]
    device: str
    precision: typing.Literal["32-true", "bf16-mixed", "16-mixed"]


def check_config(cfg: DictConfig) -> None:
    """Check settings against `RunSettings` and, for every node with a `_target_`, that target's signature.

    Raises:
        ConfigError: a setting is missing (`???`), unknown to the target, or of another type than its annotation.
    """
    missing = sorted(_missing(cfg, ""))
    if missing:
        raise ConfigError(
            f"required and not given: {', '.join(missing)}. Add {' '.join(f'{key}=…' for key in missing)}"
        )
    settings = plain(cfg)
    _check_types(settings, typing.get_type_hints(RunSettings), "")
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
        if typing.is_typeddict(hints[key]) and isinstance(value, Mapping):
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
    """Import what a `_target_` names.

    Raises:
        ConfigError: there is no such thing.
    """
    try:
        return hydra.utils.get_object(target)
    except Exception as error:
        raise ConfigError(f"{path}_target_={target}: cannot be imported ({error})") from error


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Settings as plain containers, interpolations resolved, `???` kept."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return typing.cast("dict[str, Any]", container)


def arguments(node: DictConfig) -> dict[str, Any]:
    """A node's settings as arguments of its target: without Hydra's keys and labels."""
    return {key: value for key, value in plain(node).items() if key not in _HYDRA_KEYS | _LABELS}
