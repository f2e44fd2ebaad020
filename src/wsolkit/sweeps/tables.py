"""Tabulate a sweep: one row for each combination of swept settings, with metrics averaged over seeds."""

from __future__ import annotations

import difflib
import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from wsolkit.errors import ConfigError
from wsolkit.settings.jobs import duration
from wsolkit.system.names import one_line, write_csv

Value = int | float | str | None
"""The value of a setting in a table: a number or text, or None if a job does not have the setting."""

STATES = ("finished", "failed", "running", "interrupted", "unfinished", "damaged")
"""The states of a job.

An unfinished job has no metrics, and no record says why. The files of a damaged one cannot be read.
"""

SEED = "seed"
_GROUPS = ("method", "backbone", "dataset")  # The report names these for every sweep, even if they were not set.
_FEW = 20  # A message shows this many names.
_USUAL_METRICS = ("max_box_acc", "pxap", "top1_loc")  # These are the metrics of a protocol.


@dataclass(frozen=True)
class Run:
    """A job of a sweep, as far as it has come.

    name: its directory, relative to that of the sweep; state: one of `STATES`; overrides: its given settings, by name;
    settings: all of its settings, nested, empty if unknown; metrics: its final numbers; seconds: the time that it took,
    or has taken so far; note: a remark on an unfinished job; classes: the names of the classes that it distinguishes.
    """

    name: str
    state: str
    overrides: Mapping[str, Value] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    note: str = ""
    classes: tuple[str, ...] = ()

    def value(self, key: str) -> Value:
        """Return the value of a setting such as "optimizer.lr", or the choice of a group such as "method"."""
        if key in self.overrides:
            return self.overrides[key]
        node: Any = self.settings
        for part in key.replace("/", ".").split("."):
            if not isinstance(node, Mapping) or part not in node:
                return None
            node = node[part]
        if not isinstance(node, Mapping):
            return as_value(node)
        if not node:
            return "none"  # This choice of a group adds nothing, for example postprocess=none.
        if "name" in node:
            return as_value(node["name"])
        if "_target_" in node:
            return None  # This choice of a group does not have a name.
        nested = any(isinstance(part, Mapping) for part in node.values())
        # With several choices of one group, this is a list of their names.
        return as_value(list(node) if nested else node)


def as_value(setting: object) -> Value:
    """Return a setting as a number or as text, written as on the command line: true, null, [16,4,4,4], {a:1}."""
    if setting is None:
        return "null"
    if isinstance(setting, bool):
        return str(setting).lower()
    if isinstance(setting, int | float | str):
        return setting
    if isinstance(setting, Mapping):
        return "{" + ",".join(f"{key}:{as_value(part)}" for key, part in setting.items()) + "}"
    if isinstance(setting, Iterable):
        return "[" + ",".join(str(as_value(part)) for part in setting) + "]"
    return str(setting)


def shown(value: Value) -> str:
    """Return a value as tables and plots show it."""
    return "–" if value is None else str(value)


def order(value: Value) -> tuple[int, float, str]:
    """Return the key by which values are sorted: numbers, then text, then absent values."""
    if value is None:
        return 2, 0, ""
    return (1, 0, value) if isinstance(value, str) else (0, value, "")


class Average(NamedTuple):
    """Mean, sample standard deviation (None for one run) and each run's value, over the runs that have the metric."""

    mean: float
    std: float | None
    values: list[float]


@dataclass(frozen=True)
class Row:
    """The jobs with one combination of values, one value for each key."""

    values: tuple[Value, ...]
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        """Return the jobs that have metrics."""
        return [run for run in self.runs if run.state == "finished"]

    def average(self, metric: str) -> Average | None:
        """Average a metric over the finished runs. Return None if no run has it."""
        values = [run.metrics[metric] for run in self.finished if metric in run.metrics]
        if not values:
            return None
        return Average(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, values)

    @property
    def seconds(self) -> float | None:
        """Return the mean time of a finished run, or None if no record says how long one took."""
        known = [run.seconds for run in self.finished if run.seconds is not None]
        return statistics.fmean(known) if known else None

    def differing(self, keys: Iterable[str]) -> list[str]:
        """Return those of some settings in which the jobs of the row differ."""
        return [key for key in keys if len({run.value(key) for run in self.runs}) > 1]


@dataclass(frozen=True)
class Sweep:
    """The jobs of a sweep, and what the report shows.

    keys: the settings that distinguish the rows; pooled: other settings in which jobs differ, besides the seed;
    constant: the settings that are the same in all jobs; metrics: names of numbers in metrics.json; rows: sorted.
    """

    runs: Sequence[Run]
    keys: Sequence[str]
    pooled: Sequence[str]
    constant: Mapping[str, Value]
    metrics: Sequence[str]
    rows: Sequence[Row]

    @property
    def finished(self) -> list[Run]:
        """Return the runs that have metrics."""
        return [run for run in self.runs if run.state == "finished"]

    @property
    def unit(self) -> str:
        """Say what a row averages: "seeds", or "runs" if a row has a seed twice or an unknown one."""
        for row in self.rows:
            seeds = [run.value(SEED) for run in row.finished]
            if None in seeds or len(set(seeds)) < len(seeds):
                return "runs"
        return "seeds"


def group_runs(
    runs: Sequence[Run],
    keys: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    sort: str | None = None,
) -> Sweep:
    """Group runs by the values of their settings.

    Args:
        runs: all jobs, in any state.
        keys: the settings that distinguish the rows. None takes all settings in which the jobs differ, without paths
            that make no difference to the rows. The seed is never among them.
        metrics: names of numbers in metrics.json. None takes the usual ones.
        sort: the metric whose mean sorts the rows, from the highest to the lowest. None sorts them by their values.

    Raises:
        ConfigError: there is no such key or metric.
    """
    known = [run for run in runs if run.settings]
    given = dict.fromkeys(key for run in known for key in run.overrides if key != SEED)
    swept = [key for key in given if len({run.value(key) for run in known}) > 1]
    if keys is None:
        keys = _without_paths(swept, known)
    if known:
        _check_keys(keys, known)
    constant = {
        key: known[0].value(key)
        for key in dict.fromkeys((*_GROUPS, *given))
        if key not in keys and len({run.value(key) for run in known}) == 1 and known[0].value(key) is not None
    }
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if metrics is None:
        metrics = usual_metrics(names)
    for setting, metric in [("metrics", metric) for metric in metrics] + [("sort", sort)] if names else ():
        if metric is not None and metric not in names:
            raise ConfigError(f"{setting}: no job has a number '{metric}'{_close(metric, names)}")
    groups: dict[tuple[Value, ...], list[Run]] = {}
    for run in known:
        groups.setdefault(tuple(run.value(key) for key in keys), []).append(run)
    rows = [Row(values, groups[values]) for values in sorted(groups, key=lambda values: [*map(order, values)])]
    if sort is not None:
        rows.sort(key=lambda row: _from_highest(row, sort))
    pooled = [key for key in swept if key not in keys]
    return Sweep(runs, keys, pooled, constant, metrics, rows)


def _from_highest(row: Row, metric: str) -> float:
    """Return the key that sorts rows by the mean of a metric, from the highest to the lowest, and without one last."""
    average = row.average(metric)
    return math.inf if average is None else -average.mean


def _without_paths(keys: Sequence[str], runs: Sequence[Run]) -> Sequence[str]:
    """Leave out settings that are paths, such as checkpoint=… or save_maps=…, if others distinguish the same rows.

    If either of two paths could go, the one that was given first stays.
    """

    def rows(keys: Sequence[str]) -> int:
        return len({tuple(run.value(key) for key in keys) for run in runs})

    for key in reversed(keys):
        others = [other for other in keys if other != key]
        if any("/" in str(run.value(key)) for run in runs) and rows(others) == rows(keys):
            keys = others
    return keys


def usual_metrics(names: Sequence[str]) -> list[str]:
    """Choose the numbers to report.

    Raises:
        ConfigError: there are numbers, but none of the usual ones.
    """
    protocols = dict.fromkeys(name.split("/")[0] for name in names if name.endswith(f"/{_USUAL_METRICS[0]}"))
    usual = [f"{protocol}/{metric}" for protocol in [*protocols][:1] for metric in _USUAL_METRICS]
    found = [name for name in (*usual, "top1_cls") if name in names]
    if names and not found:
        raise ConfigError(f"none of the usual metrics is there; choose with metrics=[…] from: {', '.join(names)}")
    return found


def _check_keys(keys: Sequence[str], runs: Sequence[Run]) -> None:
    if SEED in keys:
        raise ConfigError(f"keys: '{SEED}' is what the metrics are averaged over, and cannot distinguish rows")
    for key in keys:
        if all(run.value(key) is None for run in runs):
            options = {option for run in runs for option in (*run.overrides, *_paths(run.settings))}
            raise ConfigError(f"keys: no job has a setting '{key}'{_close(key, sorted(options))}")


def check_axis(key: str, keys: Sequence[str]) -> None:
    """Check the setting on the horizontal axis of plots.

    Raises:
        ConfigError: it does not distinguish the rows.
    """
    if key not in keys:
        choices = f"choose from: {', '.join(keys)}" if keys else "there are none"
        raise ConfigError(f"x: '{key}' is not one of the keys in which the rows differ; {choices}")


def _paths(settings: Mapping[str, Any], path: str = "") -> Iterable[str]:
    for key, value in settings.items():
        yield f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{path}{key}.")


def _close(wrong: str, options: Sequence[str]) -> str:
    """Return a hint at what was meant: the whole name with another spelling, or the end of a name."""
    ends = [option for option in options if option.replace(".", "/").endswith(f"/{wrong}")]
    close = ends[:3] or difflib.get_close_matches(wrong, options, n=3)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are: {', '.join(options[:_FEW])}" + ", …" * (len(options) > _FEW)


def counts(runs: Sequence[Run]) -> str:
    """Say how many jobs there are in each state."""
    found = Counter(run.state for run in runs)
    states = ", ".join(f"{found[state]} {state}" for state in STATES if found[state])
    return f"{len(runs)} job{'s' * (len(runs) != 1)}: {states}"


def remarks(sweep: Sweep) -> list[str]:
    """Return remarks on all rows, one per line."""
    lines = []
    if sweep.constant:
        lines.append("Same in all jobs: " + ", ".join(f"{key}={value}" for key, value in sweep.constant.items()))
    averaged = [key for key in sweep.pooled if any(row.differing([key]) for row in sweep.rows)]
    if averaged:
        lines.append(f"Averaged over: {', '.join(averaged)}")
    for dataset in dict.fromkeys(run.value("dataset") for run in sweep.finished):
        lists = {run.classes for run in sweep.finished if run.classes and run.value("dataset") == dataset}
        if len(lists) > 1:
            counts = ", ".join(map(str, sorted(map(len, lists))))
            lines.append(f"Not all jobs on {dataset} tell the same classes apart: there are lists of {counts}")
    if not sweep.finished:
        lines.append("No job is finished yet, so there are no metrics and no plots.")
    elif not sweep.keys:
        lines.append("No setting distinguishes the jobs, so there are no plots.")
    return lines


def cells(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Return the heading and the rows of the table, as text.

    A metric is "mean ± sample standard deviation". It has the number of its values if some finished runs lack it. The
    number of seeds is "2 of 3" if some jobs are not finished. The last column is the mean time of a finished run, if
    records say how long runs took.
    """
    rows = []
    timed = any(row.seconds is not None for row in sweep.rows)
    for row in sweep.rows:
        finished, total = len(row.finished), len(row.runs)
        seeds = str(total) if finished == total else f"{finished} of {total}"
        averages = [_cell(metric, row.average(metric), finished) for metric in sweep.metrics]
        cost = [] if not timed else ["–" if row.seconds is None else duration(row.seconds)]
        rows.append([*map(shown, row.values), seeds, *averages, *cost])
    return [*sweep.keys, sweep.unit, *sweep.metrics, *(["time per run"] if timed else [])], rows


def _cell(metric: str, average: Average | None, runs: int) -> str:
    if average is None:
        return "–"
    text = number(metric, average.mean)
    if average.std is not None:
        text += f" ± {number(metric, average.std)}"
    return text if len(average.values) == runs else f"{text} ({len(average.values)})"


def is_percentage(metric: str) -> bool:
    """Say whether a metric is in percent. All metrics except thresholds are."""
    return "threshold" not in metric


def number(metric: str, value: float) -> str:
    """Return a metric's value with a reasonable number of digits."""
    return f"{value:.1f}" if is_percentage(metric) else f"{value:.3f}"


def console_table(sweep: Sweep) -> Table:
    """Make the table for the terminal."""
    heading, rows = cells(sweep)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column, name in enumerate(heading):
        justify = "left" if column < len(sweep.keys) else "right"
        table.add_column(name.replace("/", "/\n"), justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*row)
    return table


def unfinished(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Return name, state and note of each job without metrics, sorted by state."""
    rest = [(run.name, run.state, run.note) for run in runs if run.state != "finished"]
    return sorted(rest, key=lambda job: STATES.index(job[1]))


def markdown(sweep: Sweep, pictures: Iterable[str] = (), page: str | None = None) -> str:
    """Return the report as Markdown.

    Args:
        sweep: the sweep to report.
        pictures: names of image files beside the report, which it shows.
        page: the name of the page beside it that compares the rows image by image.
    """
    parts = ["# Sweep", counts(sweep.runs), *map(as_markdown, remarks(sweep))]
    if sweep.finished:
        parts.append(_markdown_table(*cells(sweep), left=len(sweep.keys)))
        parts.append(f"Mean ± sample standard deviation over {sweep.unit}. Metrics are in percent, but for thresholds.")
    if page is not None:
        parts.append(f"[{page}]({page}) shows what the rows make of the same images.")
    rest = unfinished(sweep.runs)
    if rest:
        parts += ["## Jobs that are not finished", _markdown_table(["job", "state", ""], rest, left=3)]
    parts += [f"![{name}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def _markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Make a table whose first `left` columns are text, and the others numbers."""
    rule = ["---" if column < left else "---:" for column in range(len(heading))]
    lines = [list(map(as_markdown, row)) for row in (heading, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


_MARKUP = re.compile(
    r"""[\\`*<&$~|]                   # begin something wherever they are
    | (?<![^\W_])_ | _(?![^\W_])     # emphasize at the edge of a word
    | \](?=[(\[:])                  # ends the text of a link""",
    re.VERBOSE,
)


def as_markdown(text: str) -> str:
    """Return Markdown in one line that shows a text as it is."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text.replace("\n", " ")))


def runs_csv(sweep: Sweep) -> str:
    """Return a line for each job: job, state, keys, seed, seconds, and every number of its metrics.json."""
    names = list(dict.fromkeys(name for run in sweep.runs for name in run.metrics))
    keys = [*sweep.keys, *sweep.pooled, SEED]
    heading = ["job", "state", *keys, "seconds", *names]
    rows = [
        [run.name, run.state, *map(run.value, keys), run.seconds, *map(run.metrics.get, names)] for run in sweep.runs
    ]
    return _csv(heading, rows)


def means_csv(sweep: Sweep) -> str:
    """Return a line for each combination of the keys.

    It has the jobs, the finished runs and their mean seconds, and the mean, std and count of each metric.
    """
    heading = [*sweep.keys, "jobs", "runs", "seconds"]
    heading += [f"{metric}_{part}" for metric in sweep.metrics for part in ("mean", "std", "count")]
    rows: list[list[object]] = []
    for row in sweep.rows:
        rows.append([*row.values, len(row.runs), len(row.finished), row.seconds])
        for metric in sweep.metrics:
            average = row.average(metric)
            rows[-1] += [None, None, 0] if average is None else [average.mean, average.std, len(average.values)]
    return _csv(heading, rows)


def _csv(heading: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Write CSV. Absent values are empty, which pandas reads as NaN."""
    file = io.StringIO(newline="")
    write_csv(file, [heading, *map(list, rows)])
    return file.getvalue()
