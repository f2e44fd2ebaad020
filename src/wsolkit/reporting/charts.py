"""Draw the charts of an evaluation, one function for each. The report page and W&B show the same ones.

`results` and `curves` are flat, with keys `<protocol>/<name>` and `<protocol>/<baseline>/<name>`. A chart without data
is None.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
import PIL.Image
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wsolkit.reporting.figure import PlainFigure
from wsolkit.reporting.terminal import picture

if TYPE_CHECKING:
    from wsolkit.types import Boxes, Image  # It loads torch, which the report of a sweep does not need.

Results = Mapping[str, float]
Curves = Mapping[str, Sequence[Any]]

TRUTH, PREDICTED = "#00e000", "#ff3030"
SCORE_COLOURS = "plasma"

# Okabe and Ito's colours differ under every colour blindness.
_SKY, _BLUE, _GREEN, _RED, _ORANGE = "#56b4e9", "#0072b2", "#009e73", "#d55e00", "#e69f00"
_BASELINE_STYLES = (("#444444", (4, 2)), ("#666666", (1, 1.2)), ("#888888", (6, 2, 1, 2)))

_ERRORS = {
    "correct": "correct",
    "cls": "Cls: wrong class",
    "m_ins": "M-Ins: several\nobjects in one box",
    "part": "Part: part\nof the object",
    "more": "More: more\nthan the object",
    "other": "OT: other",
}


CLASSIFICATION = ("top1_cls", "top5_cls")


class Shown(NamedTuple):
    """An image of the gallery.

    name: the image's id; image [S, S, 3]; score_map [R, R] in [0, 1]; truth [n, 4] and predicted [m, 4] in pixels of
    the map; label and predicted_label: names of classes, None for an unknown prediction; iou in [0, 1], NaN without
    ground truth.
    """

    name: str
    image: Image
    score_map: npt.NDArray[np.floating[Any]]
    truth: Boxes
    predicted: Boxes
    label: str
    predicted_label: str | None
    iou: float


def charts(results: Results, curves: Curves) -> dict[str, Figure]:
    """Draw all charts that have data, with keys `<protocol>/<chart>`."""
    drawn: dict[str, Figure] = {}
    for protocol, (name, draw) in itertools.product(protocol_names(results, curves), _CHARTS.items()):
        with picture(f"chart {protocol}/{name}"):
            figure = draw(results, curves, protocol)
            if figure is not None:
                drawn[f"{protocol}/{name}"] = figure
    return drawn


def protocol_names(results: Results, curves: Curves) -> list[str]:
    """Return the protocols that have a number or a curve, in order of appearance."""
    names = dict.fromkeys(key.split("/")[0] for key in (*results, *curves) if "/" in key)
    return [name for name in names if name not in ("epochs", "norms")]


def telling_protocols(results: Results, curves: Curves) -> list[str]:
    """Return the protocols that say more than the run's own classification numbers do."""

    def tells(key: str, protocol: str) -> bool:
        start, _, name = key.partition("/")
        return start == protocol and (name not in CLASSIFICATION or results[key] != results.get(name))

    return [name for name in protocol_names(results, curves) if any(tells(key, name) for key in (*results, *curves))]


def baseline_names(results: Results, protocol: str) -> list[str]:
    """Return the baselines that have a number under a protocol, in order of appearance."""
    keys = [key.split("/") for key in results]
    return list(dict.fromkeys(key[1] for key in keys if len(key) == 3 and key[0] == protocol))


def series(curves: Curves, key: str) -> npt.NDArray[np.float64] | None:
    """Return a curve or table as an array, or None if it contains no number."""
    values = np.array(curves.get(key, ()), dtype=np.float64)  # None, as in JSON, becomes NaN.
    return values if np.isfinite(values).any() else None


def threshold_curves(curves: Curves, protocol: str) -> tuple[Sequence[float], dict[str, Sequence[float]]]:
    """Return thresholds τ [T], and the metrics of a protocol at each in percent, by name: each [T]."""
    start = f"{protocol}/curves/"
    own = {key.removeprefix(start): values for key, values in curves.items() if key.startswith(start)}
    return own.get("threshold", ()), {name: values for name, values in own.items() if "_loc" in name}


def threshold_chart(results: Results, curves: Curves, protocol: str) -> Figure | None:
    """Draw GT-known Loc against τ, with a curve for each IoU threshold δ, and the baselines at δ = 0.5."""
    tau = series(curves, f"{protocol}/curves/threshold")
    known = {delta: series(curves, f"{protocol}/curves/gt_known_loc_{delta}") for delta in ("30", "50", "70")}
    if tau is None or all(values is None for values in known.values()):
        return None
    figure = _figure()
    axes = _style(figure.subplots(), "threshold τ", "GT-known Loc (%)")
    for (delta, values), colour in zip(known.items(), (_SKY, _BLUE, _GREEN), strict=True):
        if values is not None:
            axes.plot(tau, values, color=colour, linewidth=1.8, label=f"IoU threshold δ = 0.{delta[0]}")
    chosen = _value(results, f"{protocol}/threshold")
    if chosen is not None:
        axes.axvline(chosen, color=_RED, linewidth=1.2, label=f"chosen τ = {chosen:.3f}")
    for name, (colour, dashes) in zip(baseline_names(results, protocol), _BASELINE_STYLES, strict=False):
        values = series(curves, f"{protocol}/{name}/curves/gt_known_loc_50")
        if values is not None:
            label = f"{spelled(name)}, δ = 0.5"
            axes.plot(tau, values, color=colour, linewidth=1.2, dashes=dashes, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 100))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def iou_chart(results: Results, curves: Curves, protocol: str) -> Figure | None:
    """Draw the IoU of boxes at the chosen threshold, with the medians of all boxes and of the correct ones."""
    counts = series(curves, f"{protocol}/iou_histogram")
    if counts is None or not counts.sum():
        return None
    figure = _figure()
    axes = _style(figure.subplots(), "IoU of the box with the ground truth", "images")
    bars = counts.reshape(20, -1).sum(axis=1)  # [100] → [20]
    axes.bar(np.arange(20) / 20, bars, width=1 / 20, align="edge", color=_SKY, edgecolor="white", linewidth=0.8)
    medians = {"iou_median": ("all boxes", _BLUE, "-"), "iou_median_correct": ("correct boxes", _RED, "--")}
    for key, (whose, colour, style) in medians.items():
        percent = _value(results, f"{protocol}/{key}")
        if percent is not None:
            label = f"median of {whose}: {percent / 100:.2f}"
            axes.axvline(percent / 100, color=colour, linestyle=style, linewidth=1.6, label=label)
    axes.set_xlim(0, 1)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def error_chart(results: Results, curves: Curves, protocol: str) -> Figure | None:
    """Draw the share of each error of boxes, as in SPA's error analysis (supplement, Algorithm 1)."""
    shares = {label: _value(results, f"{protocol}/error_{name}") for name, label in _ERRORS.items()}
    known = {label: share for label, share in shares.items() if share is not None}
    if not known:
        return None
    figure = _figure()
    axes = _style(figure.subplots(), "share of images (%)", "")
    colours = [_GREEN if label == "correct" else _ORANGE for label in known]
    bars = axes.barh(list(known), list(known.values()), height=0.65, color=colours)
    axes.bar_label(bars, [f"{share:.1f} %" for share in known.values()], padding=3, fontsize=8)
    axes.set_xlim(0, 1.22 * max(max(known.values()), 1))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure


def object_size_chart(results: Results, curves: Curves, protocol: str) -> Figure | None:
    """Draw the accuracy for objects of each size, with the number of images in each bin."""
    accuracy, images = (series(curves, f"{protocol}/{name}") for name in ("max_box_acc_by_size", "images_by_size"))
    if accuracy is None or images is None:
        return None
    figure = _figure()
    axes = _style(figure.subplots(), "object's share of the image (%)", "MaxBoxAcc (%)")
    bars = axes.bar(np.arange(len(accuracy)), accuracy, width=1, align="edge", color=_SKY, edgecolor="white")
    axes.bar_label(bars, [f"{count:,.0f}" if count else "" for count in images], padding=2, fontsize=7)
    mean = _value(results, f"{protocol}/max_box_acc_size_mean")
    if mean is not None:
        axes.axhline(mean, color=_RED, linewidth=1.2, label=f"mean of the bars: {mean:.1f} %")
        figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    sides = np.linspace(0, 10, len(accuracy) + 1)  # The sides of the objects rise in even steps.
    axes.set_xticks(np.arange(len(sides)), [f"{side**2:.0f}" for side in sides])
    axes.set(xlim=(0, len(accuracy)), ylim=(0, 108))
    axes.set_yticks(range(0, 101, 20))
    axes.grid(visible=False, axis="x")
    return figure


def size_chart(results: Results, curves: Curves, protocol: str) -> Figure | None:
    """Draw the number of images by the object's share of the image and by the IoU of thresholded map and mask."""
    counts = series(curves, f"{protocol}/mask_iou_by_size")
    if counts is None or not counts.sum():
        return None
    figure = _figure()
    axes = _style(figure.subplots(), "object's share of the image (%)", "IoU of map and mask (%)")
    picture = axes.imshow(
        counts.T, origin="lower", extent=(0, 100, 0, 100), cmap="Blues", interpolation="none", aspect="auto"
    )
    axes.grid(visible=False)
    bar = figure.colorbar(picture, ax=axes, ticks=MaxNLocator(5, integer=True))
    bar.set_label("images", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def pixel_chart(results: Results, curves: Curves, protocol: str) -> Figure | None:
    """Draw precision against recall of pixels, and pixel IoU against the threshold on the scale of 8-bit maps."""
    names = ("recall", "precision", "pixel_threshold", "pixel_iou")
    recall, precision, threshold, iou = (series(curves, f"{protocol}/curves/{name}") for name in names)
    if recall is None or precision is None or threshold is None or iou is None:
        return None
    figure = _figure(width=6.5)
    left, right = figure.subplots(1, 2)
    _style(left, "pixel recall (%)", "pixel precision (%)").set(xlim=(0, 100), ylim=(0, 100))
    _style(right, "threshold τ (0 to 255)", "pixel IoU (%)").set(xlim=(0, 255), ylim=(0, 100))
    pxap = _value(results, f"{protocol}/pxap")
    left.plot(recall, precision, color=_BLUE, linewidth=1.8, label=None if pxap is None else f"PxAP {pxap:.1f} %")
    right.plot(threshold, iou, color=_BLUE, linewidth=1.8)
    peak, at = _value(results, f"{protocol}/peak_iou"), _value(results, f"{protocol}/peak_threshold")
    if peak is not None and at is not None:
        right.plot([at], [peak], "o", color=_RED, label=f"peak {peak:.1f} % at τ = {at:.0f}")
    for axes, place in ((left, "lower left"), (right, "upper right")):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc=place, fontsize=8, frameon=False)
    return figure


EPOCH_METRICS = ("top1_cls", "max_box_acc", "max_box_acc_v2", "top1_loc", "pxap", "pseudo_max_box_acc")
"""The numbers that are kept of the validation after each epoch, as `epochs/…` in `curves`."""


def epoch_chart(results: Results, curves: Curves, protocol: str) -> Figure | None:
    """Draw localization against classification, with a point for each epoch's validation."""
    epochs, classification = series(curves, "epochs/epoch"), series(curves, "epochs/top1_cls")
    localization = series(curves, f"epochs/{protocol}/max_box_acc")
    if epochs is None or classification is None or localization is None or len(epochs) < 2:
        return None
    figure = _figure()
    axes = _style(figure.subplots(), "Top-1 Cls (%)", "MaxBoxAcc (%)")
    axes.plot(classification, localization, color=_SKY, linewidth=1.2)
    axes.scatter(classification, localization, color=_BLUE, s=22, zorder=3)
    for index in {0, int(localization.argmax()), int(classification.argmax()), len(epochs) - 1}:
        point = classification[index], localization[index]
        axes.annotate(f"{epochs[index]:.0f}", point, xytext=(4, 4), textcoords="offset points", fontsize=8)
    return figure


def norm_chart(results: Results, curves: Curves, protocol: str) -> Figure | None:
    """Draw the norms of features on objects and on background. They do not depend on a protocol."""
    found = {kind: series(curves, f"norms/{kind}") for kind in ("background", "object")}
    if protocol != protocol_names(results, curves)[0] or any(shares is None for shares in found.values()):
        return None
    figure = _figure()
    axes = _style(
        figure.subplots(), "norm of the feature, from the smallest to the largest of its image", "positions (%)"
    )
    for (kind, shares), colour in zip(found.items(), (_SKY, _BLUE), strict=True):
        assert shares is not None
        axes.stairs(shares, np.linspace(0, 1, len(shares) + 1), label=kind, color=colour, linewidth=1.6)
    axes.legend(fontsize=8, frameon=False)
    return figure


_CHARTS = {
    "threshold": threshold_chart,
    "iou": iou_chart,
    "errors": error_chart,
    "object_size": object_size_chart,
    "size": size_chart,
    "pixels": pixel_chart,
    "epochs": epoch_chart,
    "norms": norm_chart,
}


def example_image(shown: Shown, side: int = 320) -> Image:
    """Draw the image with its boxes beside the image under the score map: [side, 2·side + 4, 3].

    Ground truth is solid, and predicted boxes are dashed.
    """
    plain = _draw_both(_resized(PIL.Image.fromarray(shown.image), side), shown)
    gap = np.full((side, 4, 3), 255, np.uint8)
    return np.concatenate([plain, gap, map_image(shown, side)], axis=1)


def map_image(shown: Shown, side: int = 320) -> Image:
    """Draw the image under the score map, with ground truth and predicted boxes: [side, side, 3]."""
    plain = _resized(PIL.Image.fromarray(shown.image), side)
    scores = _resized(PIL.Image.fromarray(np.asarray(shown.score_map, np.float32)), side).clip(0, 1)
    colours = 255 * matplotlib.colormaps[SCORE_COLOURS](scores)[..., :3]  # [side, side] → [side, side, 3]
    return _draw_both(np.asarray(0.5 * plain + 0.5 * colours, np.uint8), shown)


def truth_image(shown: Shown, side: int = 320) -> Image:
    """Draw the image with ground truth alone: [side, side, 3]."""
    picture = _resized(PIL.Image.fromarray(shown.image), side)
    _draw_boxes(picture, shown, shown.truth, TRUTH, dashed=False)
    return picture


def jpeg(picture: Image) -> bytes:
    """Encode a picture as a JPEG file whose thin lines keep their colours."""
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "JPEG", quality=85, subsampling=0)
    return file.getvalue()


def _draw_both(picture: Image, shown: Shown) -> Image:
    """Draw ground truth and predicted boxes into a picture [side, side, 3], and return it."""
    # White below the dashes makes them visible. Green between the two still shows where both boxes agree.
    _draw_boxes(picture, shown, shown.predicted, "#ffffff", dashed=False)
    _draw_boxes(picture, shown, shown.truth, TRUTH, dashed=False)
    _draw_boxes(picture, shown, shown.predicted, PREDICTED, dashed=True)
    return picture


def _resized(picture: PIL.Image.Image, side: int) -> npt.NDArray[Any]:
    return np.array(picture.resize((side, side), PIL.Image.Resampling.BILINEAR))


def _draw_boxes(picture: Image, shown: Shown, boxes: Boxes, colour: str, *, dashed: bool) -> None:
    """Draw the outlines of an image's boxes [n, 4], four pixels wide, into a picture [side, side, 3] of it."""
    # Under some protocols this is the size of the original image, which is shown squashed.
    height, width = shown.score_map.shape
    scale = len(picture) / np.array([width, height, width, height])
    y, x = np.mgrid[: len(picture), : len(picture)]
    for box in boxes:
        x0, y0, x1, y1 = scale * (box + np.array([0, 0, 1, 1]))  # The last corner lies inside the box.
        depth = np.minimum(np.minimum(x - x0, x1 - 1 - x), np.minimum(y - y0, y1 - 1 - y)).round()
        line = (depth >= 0) & (depth < 4)
        if dashed:
            line &= (x + y) // 8 % 2 == 0
        picture[line] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def spelled(name: str) -> str:
    """Return a key as people write it: "center_box" → "center box"."""
    return name.replace("_", " ")


def _value(results: Results, key: str) -> float | None:
    value = results.get(key)
    return value if value is not None and np.isfinite(value) else None


def _figure(width: float = 4.4) -> Figure:
    return PlainFigure(figsize=(width, 3.5), layout="constrained")


def _style(axes: Any, xlabel: str, ylabel: str) -> Any:
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes
