"""Run a command with its settings, its errors and its jobs. This module imports neither torch nor Lightning."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import hydra
import hydra.core.utils
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from wsolkit.errors import WsolkitError
from wsolkit.settings.compose import plain, referable
from wsolkit.settings.conf import CONF, as_named, given_overrides, hydra_settings
from wsolkit.settings.explain import explain
from wsolkit.settings.jobs import run_job, watch_sweep
from wsolkit.settings.overrides import as_overrides, escaped, is_sweep, quoted
from wsolkit.settings.usage import usage
from wsolkit.system.signals import SIGNALS, Stopped, end_with_parent, is_first, leave_without_reader


def run_command(
    config_name: str,
    task: Callable[[DictConfig, Path], object],
    complete: Callable[[list[str]], list[str]] = list,
    stopped: str = "",
    fixed: Collection[str] = (),
) -> None:
    """Compose a command's settings from the command line, and call `task(settings, run directory)`.

    It prints an error that the user can fix as one message, and exits with 1. HYDRA_FULL_ERROR=1 also shows the
    traceback. When SIGTERM or Ctrl-C stops it, it exits with 143 or 130.

    Args:
        config_name: the name of the command's YAML file.
        task: does the work.
        complete: completes the command's arguments, in Hydra's grammar.
        stopped: says how to continue after a stop, unless the task says so itself.
        fixed: groups that the help leaves out, because the command chooses in them.
    """
    traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

    failures: list[Exception] = []

    def job(cfg: DictConfig) -> None:
        if not traceback:
            os.environ.pop("HYDRA_FULL_ERROR", None)  # The processes that the task starts must not inherit it.
        try:
            folder = Path(HydraConfig.get().runtime.output_dir)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                run_job(f"wsolkit.{config_name}", *_command_line(), _as_far_as_known(cfg), folder)
            else:
                watch_sweep()
                _prepare_children()
                task(cfg, folder)
        except (WsolkitError, OmegaConfBaseException) as error:
            # Hydra would add lines of its own. In a multirun they name the job.
            if traceback or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            failures.append(error)
        finally:
            os.environ["HYDRA_FULL_ERROR"] = "1"

    end_with_parent()
    if isinstance(sys.stdout, io.TextIOWrapper):  # A name that the terminal cannot show must not end a command.
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # It makes Hydra raise its errors instead of printing them in its own way.
    try:
        if {"--help", "-h"}.intersection(sys.argv):
            print(usage(CONF, config_name, fixed), flush=True)
            return
        sys.argv[1:] = _for_hydra(complete(as_overrides(sys.argv[1:], referable(config_name))))
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
    except BrokenPipeError:  # For example, from `--help | head`.
        leave_without_reader()
        raise
    except OSError as error:
        if traceback or error.filename is None:
            raise
        sys.exit(
            f"error: '{error.filename}' cannot be read or written ({error.strerror}). Results go to another folder "
            f"with {'output' if _has_output(config_name) else 'hydra.run.dir'}=DIR"
        )
    except (Stopped, KeyboardInterrupt) as error:
        stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        stop.advice = stop.advice or stopped
        if is_first():
            print(stop, file=sys.stderr)
        raise stop from None


def _for_hydra(arguments: list[str]) -> list[str]:
    """Return a command line for Hydra, which then names the jobs of a sweep as `wsolkit.settings.sweeper` does.

    If a setting has several values, --cfg shows the first one. For --dry-run, a sweeper lists the jobs and runs none.
    """
    own = [argument for argument in arguments if argument not in ("-m", "--multirun", "--dry-run")]
    if {"--cfg", "-c"}.intersection(arguments):
        return [_first_value(argument) for argument in own]
    sweep, preview = is_sweep(arguments), "--dry-run" in arguments
    if not sweep and not preview:
        return arguments
    from wsolkit.settings.sweeper import replace_sweeper

    replace_sweeper(sweep=sweep, preview=preview)
    return ["--multirun", *own, "hydra/sweeper=basic"] if preview else arguments


def _first_value(argument: str) -> str:
    if argument.startswith("-") or "=" not in argument:
        return argument
    (override,) = OverridesParser.create().parse_overrides([argument])
    several = override.is_sweep_override() and override.is_discrete_sweep()
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}" if several else argument


def _has_output(config_name: str) -> bool:
    """Say whether a command writes to its setting `output`."""
    return re.search(r"^output:", (CONF / f"{config_name}.yaml").read_text(encoding="utf-8"), re.MULTILINE) is not None


def run_command_on_checkpoint(
    config_name: str, task: Callable[[DictConfig, Path], object], with_protocol: bool = True, stopped: str = ""
) -> None:
    """Run a command with the method, backbone and data set of `checkpoint=…`, which the user's settings may override.

    Args:
        with_protocol: whether to take the checkpoint's first protocol, too.
        stopped: see `run_command`.
    """

    def complete(arguments: list[str]) -> list[str]:
        if not any(argument.startswith("checkpoint=") for argument in arguments):
            return arguments
        from wsolkit.settings.restore import choose_groups

        return choose_groups(arguments, with_protocol)

    fixed = ("method", "backbone", *(("dataset",) if with_protocol else ()))
    run_command(config_name, task, complete, stopped, fixed)


def name_directory() -> None:
    """Turn the first argument that is not a setting into `directory=…`."""
    for index, argument in enumerate(sys.argv[1:], start=1):
        of_option = sys.argv[index - 1].startswith("-")
        if not argument.startswith("-") and not of_option and ("=" not in argument or Path(argument).is_dir()):
            sys.argv[index] = f"directory={argument}"
            break


def _as_far_as_known(cfg: DictConfig) -> dict[str, Any]:
    """Return settings as plain containers. Keep interpolations as they are if a required setting is missing.

    The job then names the missing setting. `evaluate` may find it in its checkpoint.
    """
    try:
        return plain(cfg)
    except OmegaConfBaseException:
        return typing.cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=False))


def _command_line() -> tuple[list[str], list[str]]:
    """Return the overrides of this one job, and the flags of its command."""
    sources = hydra_settings()["runtime"]["config_sources"]
    flags = [f"--config-dir={source['path']}" for source in sources if source["provider"] == "command-line"]
    return given_overrides(), flags


def command_to_resume(folder: Path) -> str:
    """Return the command that continues the run in a directory."""
    goes_on = ["resume=auto", f"hydra.run.dir={quoted(escaped(str(as_named(folder))))}"]
    if not HydraConfig.initialized():
        return " ".join(goes_on)
    overrides, flags = _command_line()
    own = [override for override in overrides if not override.startswith("resume=")]
    return shlex.join(["python", "-m", "wsolkit.train", *flags, *own, *goes_on])


def _prepare_children() -> None:
    """Set the command line and the run directory to those of this one job.

    DDP starts the command again for each device, with this process's command line and folder, and with `hydra.run.dir`
    in double quotes.
    """
    overrides, flags = _command_line()
    sys.argv[1:] = [*flags, *overrides, "hydra.mode=RUN"]
    instance = HydraConfig.instance().cfg
    assert instance is not None
    folder = escaped(HydraConfig.get().runtime.output_dir)
    with read_write(instance.hydra):
        instance.hydra.run.dir = escaped(QuotedString(folder, Quote.double).with_quotes()[1:-1])
        instance.hydra.runtime.cwd = escaped(str(Path.cwd()))
