"""Plot a sweep: each metric against each swept setting, and over two of them as a heat map."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from wsolkit.reporting.figure import PlainFigure
from wsolkit.reporting.terminal import picture
from wsolkit.sweeps.tables import Average, Sweep, Value, is_percentage, number, order, shown
from wsolkit.system.names import AS_IN_FILES, shortened

# Okabe and Ito's colours differ under every colour blindness. Yellow is left out, since it is faint on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#000000", "#888888")
_MARKERS = "osD^vP*X"
_MOST_LINES = len(_COLOURS)

_NAMES = {
    "max_box_acc": "MaxBoxAcc",
    "max_box_acc_v2": "mean MaxBoxAcc at IoU 30/50/70",
    "gt_known_loc": "GT-known Loc",
    "top1_loc": "Top-1 Loc",
    "top5_loc": "Top-5 Loc",
    "top1_cls": "Top-1 Cls",
    "top5_cls": "Top-5 Cls",
    "pxap": "PxAP",
    "peak_iou": "peak IoU",
}

Combination = tuple[Value, ...]
Line = list[tuple[Value, Average]]
"""The points of a line: values on the horizontal axis and averages there."""


class Axis(NamedTuple):
    """The places of values on an axis.

    places: the place of each value, in order; ticks: whether each value has a tick; scale: "linear" or "log"; ordered:
    whether lines may connect the values.
    """

    places: dict[Value, float]
    ticks: bool
    scale: str
    ordered: bool


def charts(sweep: Sweep, x: str | None = None) -> dict[str, Figure]:
    """Draw all plots, by file name without its ending.

    Args:
        sweep: the sweep to plot.
        x: the key on the horizontal axis. None takes each in turn.
    """
    figures: dict[str, Figure] = {}

    def add(draw: Callable[..., Figure | None], metric: str, *keys: str) -> None:
        name = file_name(metric, *keys)
        with picture(f"{name}.png"):
            figure = draw(sweep, metric, *keys)
            if figure is not None:
                figures[name] = figure

    for metric in sweep.metrics:
        for key in sweep.keys if x is None else [x]:
            add(line_chart, metric, key)
        if len(sweep.keys) == 2:
            add(heat_map, metric, *(sweep.keys if x is None else (x, *(key for key in sweep.keys if key != x))))
    return figures


_LONGEST_NAME = 200


def file_name(metric: str, *keys: str) -> str:
    """Return a valid file name for each metric and keys. Where letters are lost, a digest makes it unique."""
    whole = f"{metric}_by_{'_and_'.join(keys)}"
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", whole)
    if len(name) <= _LONGEST_NAME and name == whole.replace("/", "_"):
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(whole.encode(errors=AS_IN_FILES)).hexdigest()[:8]}"


def title(metric: str) -> str:
    """Return a metric's name as in papers, with its unit and its protocol."""
    protocol, _, name = metric.rpartition("/")
    text = _NAMES.get(name, name.replace("_", " "))
    return text + " (%)" * is_percentage(metric) + (f" under {protocol}" if protocol else "")


def axis(values: Sequence[Value]) -> Axis:
    """Place numbers at their values, and anything else at even distances.

    The scale is logarithmic for positive numbers that span more than a factor of 20. Up to ten numbers have a tick
    each. They are evenly spaced if their ticks would be too close.
    """
    values = sorted(set(values), key=order)
    evenly = {value: float(place) for place, value in enumerate(values)}
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values):
        return Axis(evenly, ticks=True, scale="linear", ordered=False)
    logarithmic = numbers[0] > 0 and numbers[-1] > 20 * numbers[0]
    drawn = np.log10(numbers) if logarithmic else np.array(numbers, dtype=float)
    few = len(numbers) <= 10
    if len(numbers) < 2 or (few and np.diff(drawn).min() < 0.06 * np.ptp(drawn)):
        return Axis(evenly, ticks=True, scale="linear", ordered=True)
    places: dict[Value, float] = {value: float(value) for value in numbers}
    return Axis(places, ticks=few, scale="log" if logarithmic else "linear", ordered=True)


def line_chart(sweep: Sweep, metric: str, x: str) -> Figure | None:
    """Plot a metric against a key: the mean, the sample standard deviation, and each run as a small dot.

    Each combination of the other keys is a line. If there are more than eight, some keys become panels instead: the
    keys that leave at most eight lines with the fewest panels. If no line would have a second point, for example after
    a random search, all points form one cloud. Lines connect numbers only.
    """
    parts = _arrange(sweep, metric, x)
    points = [point for lines in parts.panels.values() for line in lines.values() for point in line]
    if not points:
        return None
    columns = min(len(parts.panels), 3)
    rows = math.ceil(len(parts.panels) / columns)
    width, height = (5.6, 4.2) if len(parts.panels) == 1 else (1.2 + 2.7 * columns, 1.4 + 2.4 * rows)
    figure = PlainFigure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    places = axis([value for value, _ in points])
    connected = places.ordered and not parts.cloud
    styles = {line: style for style, line in enumerate(dict.fromkeys(itertools.chain(*parts.panels.values())))}
    for axes, (panel, lines) in zip(grid, parts.panels.items(), strict=False):
        _style(axes, places, width / columns)
        for line, drawn in lines.items():
            _draw(axes, places, drawn, styles[line], len(styles), connected=connected)
        heading = [f"{key} = {_short(value)}" for key, value in zip(parts.panel_keys, panel, strict=True)]
        axes.set_title("\n".join(heading), fontsize=9)
    for axes in grid[len(parts.panels) :]:
        axes.remove()
    for axes in grid[: len(parts.panels)][-columns:]:
        axes.set_xlabel(x, fontsize=10)
        axes.tick_params(labelbottom=True)

    figure.suptitle(title(metric), fontsize=11)
    spread = any(average.std is not None for _, average in points)
    figure.supylabel(f"mean ± standard deviation over {sweep.unit}" if spread else title(metric), fontsize=9)
    if parts.line_keys:
        _legend(figure, parts.line_keys, styles, connected=connected)
    return figure


class _Parts(NamedTuple):
    """The panels of a plot by the values of panel_keys, and the lines of each by the values of line_keys."""

    panel_keys: list[str]
    line_keys: list[str]
    panels: dict[Combination, dict[Combination, Line]]
    cloud: bool


def _arrange(sweep: Sweep, metric: str, x: str) -> _Parts:
    others = [key for key in sweep.keys if key != x]
    points: dict[Combination, Line] = {}
    for row in sweep.rows:
        average = row.average(metric)
        if average is not None:
            values = dict(zip(sweep.keys, row.values, strict=True))
            points.setdefault(tuple(values[key] for key in others), []).append((values[x], average))
    if len(points) > _MOST_LINES and all(len(line) == 1 for line in points.values()):
        return _Parts([], [], {(): {(): list(itertools.chain(*points.values()))}}, cloud=True)
    panel_keys = _panel_keys([dict(zip(others, values, strict=True)) for values in points], others)
    line_keys = [key for key in others if key not in panel_keys]
    panels: dict[Combination, dict[Combination, Line]] = {}
    for combination, line in points.items():
        values = dict(zip(others, combination, strict=True))
        lines = panels.setdefault(tuple(values[key] for key in panel_keys), {})
        lines[tuple(values[key] for key in line_keys)] = line
    return _Parts(panel_keys, line_keys, panels, cloud=False)


def _panel_keys(lines: Sequence[Mapping[str, Value]], keys: Sequence[str]) -> list[str]:
    """Return the keys that make the fewest panels and leave at most eight lines."""
    choices = [chosen for size in range(len(keys) + 1) for chosen in itertools.combinations(keys, size)]

    def number_of(chosen: Iterable[str]) -> int:
        return len({tuple(line[key] for key in chosen) for line in lines})

    fitting = [chosen for chosen in choices if number_of([k for k in keys if k not in chosen]) <= _MOST_LINES]
    return list(min(fitting, key=number_of))


def _draw(axes: Any, places: Axis, line: Line, style: int, styles: int, *, connected: bool) -> None:
    """Draw a line beside the others, with its dots beside it, so that nothing covers an error bar.

    Numbers stay within 9 points (of a figure) of their place, and categories have room for more.
    """
    step = min(8.0, (18 if places.ordered else 48) / max(styles - 1, 1))
    aside = (style - (styles - 1) / 2) * step / 72  # In inches.

    def shifted(inches: float) -> Any:
        return axes.transData + ScaledTranslation(inches, 0, axes.figure.dpi_scale_trans)

    look = _look(style, connected=connected)
    x, means = [places.places[value] for value, _ in line], [average.mean for _, average in line]
    stds = [average.std or 0.0 for _, average in line]
    axes.errorbar(x, means, stds, elinewidth=1.2, capsize=2.5, transform=shifted(aside), **look)
    for place, (_, average) in zip(x, line, strict=True):
        if len(average.values) > 1:
            dots = look | {"marker": "o", "markersize": 3.5, "markeredgewidth": 0, "linestyle": "", "alpha": 0.45}
            axes.plot([place] * len(average.values), average.values, transform=shifted(aside + 3 / 72), **dots)
        reach = [*average.values, average.mean - (average.std or 0), average.mean + (average.std or 0)]
        axes.update_datalim([(place, y) for y in reach])  # Shifted artists do not count by themselves.
    axes.autoscale_view()


def _look(style: int, *, connected: bool) -> dict[str, Any]:
    line = "-" if connected else ""
    return {"color": _COLOURS[style], "marker": _MARKERS[style], "markersize": 5, "linewidth": 1.6, "linestyle": line}


def _legend(figure: Figure, keys: Sequence[str], styles: Mapping[Combination, int], *, connected: bool) -> None:
    labels = [", ".join(map(_short, line)) for line in styles]
    handles = [Line2D([], [], **_look(style, connected=connected)) for style in styles.values()]
    # There are about 13 characters per inch.
    fitting = max(1, int(figure.get_figwidth() * 13 / (max(map(len, labels)) + 6)))
    rows = math.ceil(len(labels) / fitting)
    legend = figure.legend(
        handles,
        # Matplotlib before 3.10 leaves out labels that begin with an underscore.
        [str(place) for place in range(len(labels))],
        title=", ".join(keys),
        loc="outside lower center",
        ncols=math.ceil(len(labels) / rows),
        fontsize=8,
        title_fontsize=8,
        frameon=False,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


def heat_map(sweep: Sweep, metric: str, horizontal: str, vertical: str) -> Figure | None:
    """Draw the mean of a metric over two keys, with the number in each cell.

    The result is None unless both keys have two values or more, and at least half of the combinations have been run.
    """
    across, up = sweep.keys.index(horizontal), sweep.keys.index(vertical)
    means = {
        (row.values[across], row.values[up]): average.mean
        for row in sweep.rows
        if (average := row.average(metric)) is not None
    }
    columns, rows = (sorted({values[index] for values in means}, key=order) for index in (0, 1))
    if min(len(columns), len(rows)) < 2 or 2 * len(means) < len(columns) * len(rows):
        return None
    grid = np.array([[means.get((column, row), np.nan) for column in columns] for row in rows])
    size = (2.2 + 0.75 * len(columns), 1.5 + 0.5 * len(rows))
    figure = PlainFigure(figsize=(max(size[0], 4.4), max(size[1], 3.2)), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(grid, origin="lower", cmap="Blues", aspect="auto")
    dark = np.nanmean([np.nanmin(grid), np.nanmax(grid)])
    for (row, column), mean in np.ndenumerate(grid):
        text = "–" if np.isnan(mean) else number(metric, mean)
        colour = "white" if mean > dark else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(columns)), map(_short, columns))
    axes.set_yticks(range(len(rows)), map(_short, rows))
    _tilt(axes, columns, figure.get_figwidth() - 2)
    axes.tick_params(labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(horizontal, fontsize=10)
    axes.set_ylabel(vertical, fontsize=10)
    figure.suptitle(title(metric), fontsize=11)
    bar = figure.colorbar(picture, ax=axes)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def _style(axes: Any, places: Axis, width: float) -> None:
    axes.set_xscale(places.scale)
    if places.ticks:
        axes.set_xticks(list(places.places.values()), [_short(value) for value in places.places])
        axes.xaxis.set_minor_locator(NullLocator())
        _tilt(axes, list(places.places), width - 0.6)
    elif places.scale == "log":  # The usual labels are mathematics, such as $10^{-2}$.
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    # This leaves room for shifted lines, and as much beside categories as between them.
    axes.margins(x=0.1 if places.ordered else 0.5 / max(len(places.places) - 1, 1), y=0.08)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _tilt(axes: Any, values: Sequence[Value], width: float) -> None:
    """Tilt the labels below an axis if the longest would touch the next one, at 12 characters per inch."""
    if max(len(_short(value)) for value in values) + 2 > 12 * width / len(values):
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")


def _short(value: Value) -> str:
    """Return a label, which shows the beginning and the end of a long value."""
    return shortened(shown(value), 24)
