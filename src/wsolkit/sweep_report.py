"""python -m wsolkit.sweep_report DIR: show the jobs of a sweep, or any runs, in tables, plots and pictures.

It writes sweep.md with the table, the unfinished jobs and the plots, sweep.csv with a line for each job, and
sweep_mean.csv with a line for each combination of settings. It also writes `<metric>_by_<setting>.png`, and
comparison.html with the results of each combination on the same images. It imports neither torch nor Lightning.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.measure import Measurement
from yaml import YAMLError

from wsolkit.data.files import walk
from wsolkit.errors import ConfigError, JobError
from wsolkit.reporting.terminal import PlainConsole, picture
from wsolkit.settings.checks import check_config
from wsolkit.settings.command import name_directory, run_command
from wsolkit.settings.compose import plain
from wsolkit.settings.jobs import RECORD, RESULT, Job, duration, read_job
from wsolkit.sweeps.tables import (
    STATES,
    Run,
    Sweep,
    Value,
    as_value,
    check_axis,
    console_table,
    counts,
    group_runs,
    markdown,
    means_csv,
    remarks,
    runs_csv,
    unfinished,
)
from wsolkit.system.drafts import draft, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OVERRIDES, _COMPOSED = Path(".hydra", "overrides.yaml"), Path(".hydra", "config.yaml")
_USED = Path("config.yaml")  # train and evaluate write it. That of evaluate has the checkpoint's settings.
_PAGE = "comparison.html"


@dataclass
class Settings:
    """The settings of conf/sweep_report.yaml. `names` checks those that are lists of names."""

    directory: str
    metrics: Any
    keys: Any
    sort: str | None
    x: str | None
    output: str | None


def sweep_report(cfg: DictConfig, _: Path) -> None:
    """Gather the jobs in `cfg.directory`, write the report and print its table."""
    check_config(cfg, Settings)
    directory = Path(str(cfg.directory))
    sweep = group_runs(gather(directory), names(cfg, "keys"), names(cfg, "metrics"), cfg.sort)
    figures: dict[str, Figure] = {}
    page: str | None = None
    problems: list[str] = []
    if sweep.finished:
        if cfg.x is not None:
            check_axis(cfg.x, sweep.keys)
        from wsolkit.sweeps.charts import charts
        from wsolkit.sweeps.comparison import comparison  # It loads Matplotlib.

        figures = charts(sweep, cfg.x)
        with picture(_PAGE):
            page, problems = comparison(sweep, directory)
    folder = directory if cfg.output is None else Path(str(cfg.output))
    try:
        files, pictures = write(sweep, figures, page, folder)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to '{folder}' ({error}). Set another output=DIR") from error
    show(sweep)
    for problem in problems:
        print(f"pictures left out: {problem}")
    print(f"Written to {folder}: {', '.join(files)}; plots: {len(pictures)}")


def names(cfg: DictConfig, setting: str) -> list[str] | None:
    """Return a setting that is a list of names, one name, or null.

    Raises:
        ConfigError: it is something else.
    """
    value = plain(cfg)[setting]
    listed = [value] if isinstance(value, str) else value
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ConfigError(f"{setting}={value}: expected names, such as {setting}=[a,b]")
    return list(dict.fromkeys(listed))


def gather(directory: Path) -> list[Run]:
    """Read all jobs in a directory and below it: those with a `job.json`, and those that only have Hydra's files.

    Raises:
        ConfigError: the directory does not exist, or has no job.
    """
    if not directory.is_dir():
        raise ConfigError(f"there is no directory '{directory}'; expected that of a sweep, such as outputs/multirun/…")
    folders = []
    for found in walk(directory):
        folder = directory / found.path
        if RECORD in found.files or (folder / _OVERRIDES).is_file():
            folders.append(folder)
            if folder != directory:
                found.folders.clear()  # It holds checkpoints and logs.
    if not folders:
        raise ConfigError(f"there is no job in '{directory}': no directory there has a {RECORD}, or a {_OVERRIDES}")
    return [read_run(folder, folder.relative_to(directory).as_posix()) for folder in sorted(folders)]


def read_run(folder: Path, name: str) -> Run:
    """Read a job from its record or Hydra's files, with its metrics. If they are damaged, the run's note says so."""
    try:
        job = read_job(folder)
        run = _without_record(folder, name) if job is None else _with_record(job, folder, name)
    except (JobError, OSError) as error:
        return Run(name, "damaged", note=str(error))
    if run.state != "finished":
        return run
    try:
        return replace(run, metrics=read_metrics(folder / RESULT), classes=read_classes(folder / RESULT))
    except (JobError, OSError) as error:
        return replace(run, state="damaged", note=str(error))


def _with_record(job: Job, folder: Path, name: str) -> Run:
    record: Any = job  # Its fields may hold anything, as they were read from a file.
    if not (
        isinstance(record.overrides, list)
        and isinstance(record.settings, dict)
        and record.settings
        and record.state in STATES
        and all(isinstance(number, int | float) for number in (record.started, record.seconds))
        and isinstance(record.error, str)
    ):
        raise JobError(f"'{folder / RECORD}' is damaged: a field is missing or of a wrong type")
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
    note = {
        "running": f"since {since}, for {duration(time.time() - job.started)}",
        "failed": f"after {duration(job.seconds)}: {job.error.removeprefix('error: ')}",
        "interrupted": f"started {since}" + (f", {job.error}" if job.error else ""),
    }.get(job.state, "")
    settings = job.settings
    if settings.get("checkpoint") is not None and (folder / _USED).is_file():
        settings = read_settings(folder / _USED)
    overrides = parse(job.overrides, folder / RECORD)
    return Run(name, job.state, overrides, _own(settings), seconds=job.seconds, note=note)


def _without_record(folder: Path, name: str) -> Run:
    """Read a run that no sweep has started. It is finished if it has metrics. Otherwise nobody knows its state."""
    try:
        overrides: Any = OmegaConf.to_container(OmegaConf.load(folder / _OVERRIDES), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise JobError(f"'{folder / _OVERRIDES}' is damaged ({error})") from error
    settings = read_settings(folder / (_USED if (folder / _USED).is_file() else _COMPOSED))
    state, note = "unfinished", f"no {RECORD} says how it ended"
    if (folder / RESULT).is_file():
        state, note = "finished", ""
    return Run(name, state, parse(overrides, folder / _OVERRIDES), _own(settings), note=note)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the resolved settings in a YAML file.

    Raises:
        JobError: it has none, or is damaged.
    """
    try:
        cfg = OmegaConf.load(path)
        if not isinstance(cfg, DictConfig) or not cfg:
            raise JobError(f"'{path}' is damaged: it has no settings")
        return plain(cfg)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise JobError(f"'{path}' is damaged ({error})") from error


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without those that do not matter for the run.

    An evaluation trains nothing, and maps from files have no model.
    """
    from_files = settings.get("score_maps") is not None
    if not from_files and settings.get("checkpoint") is None:
        return dict(settings)
    unused = {"trainer", "optimizer", "schedule"} | ({"backbone"} if from_files else set())
    own = {key: value for key, value in settings.items() if key not in unused}
    return own | {"method": {"name": "score maps"}} if from_files else own


def parse(overrides: Sequence[str], path: Path) -> dict[str, Value]:
    """Return the names and values of a job's overrides, for example "optimizer.lr=1e-3", without Hydra's own.

    Args:
        overrides: as on the command line.
        path: the file that they come from.

    Raises:
        JobError: an override cannot be read.
    """
    try:
        pairs = [_parse(override) for override in overrides]
    except (HydraException, TypeError, AttributeError) as error:
        raise JobError(f"'{path}' is damaged: its overrides cannot be read ({error})") from error
    return {key: value for key, value in pairs if not key.startswith("hydra")}


@cache  # The jobs of a sweep share most of their overrides.
def _parse(override: str) -> tuple[str, Value]:
    parsed = OverridesParser.create().parse_override(override)
    return parsed.key_or_group, None if parsed.is_delete() else as_value(parsed.value())


def read_metrics(path: Path) -> dict[str, float]:
    """Return the finite numbers in a metrics.json, without its lists and texts.

    Raises:
        JobError: the file is damaged.
    """
    numbers = {name: value for name, value in _read_json(path).items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def read_classes(path: Path) -> tuple[str, ...]:
    """Return the names of the classes in a metrics.json, or () if it does not have them.

    Raises:
        JobError: the file is damaged.
    """
    return tuple(map(str, _read_json(path).get("class_names") or ()))


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise JobError(f"'{path}' is damaged ({error})") from error
    if not isinstance(content, Mapping):
        raise JobError(f"'{path}' is damaged: expected an object of metrics")
    return content


def write(sweep: Sweep, figures: Mapping[str, Figure], page: str | None, folder: Path) -> tuple[list[str], list[str]]:
    """Write tables, plots, the page of pictures and the report into a folder.

    Returns:
        the names of the files, and of the plots that could be drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"sweep.csv": runs_csv(sweep)} | ({"sweep_mean.csv": means_csv(sweep)} if sweep.finished else {})
    _write_texts(tables, folder)
    plots = []
    for name, figure in figures.items():
        with picture(folder / f"{name}.png"):
            with draft(folder / f"{name}.png", "wb") as file:
                figure.savefig(file, dpi=160)
            plots.append(f"{name}.png")
    report = {"sweep.md": markdown(sweep, plots, None if page is None else _PAGE)}
    pages = {} if page is None else {_PAGE: page}
    _write_texts(report | pages, folder)
    return [*report, *tables, *pages], plots


def _write_texts(texts: Mapping[str, str], folder: Path) -> None:
    for name, text in texts.items():
        write_text(folder / name, text)


def show(sweep: Sweep) -> None:
    """Print the table, and the unfinished jobs below it."""
    console = PlainConsole()
    for line in (counts(sweep.runs), *remarks(sweep)):
        console.print(line, soft_wrap=True)
    if sweep.finished:
        table = console_table(sweep)
        # Long lines are better than numbers that are cut off.
        console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), table).maximum)
        console.print(table)
    for name, state, note in unfinished(sweep.runs):
        console.print(f"{state}: {name}, {note}", soft_wrap=True)


def main() -> None:
    """Run the command. Its first argument that is not a setting is the directory."""
    if {"-m", "--multirun"} & set(sys.argv):
        sys.exit("error: a report is made in one run: leave out -m")
    name_directory()
    run_command("sweep_report", sweep_report)


if __name__ == "__main__":
    main()
