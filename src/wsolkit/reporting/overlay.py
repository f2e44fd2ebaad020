"""Draw predictions: an image under its score map, with boxes."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from wsolkit.reporting.charts import PREDICTED, SCORE_COLOURS
from wsolkit.reporting.figure import PlainFigure
from wsolkit.system.names import shortened
from wsolkit.types import Boxes, Image

_MIN_SIDE, _MAX_SIDE = 256, 1024
ScoreMap = npt.NDArray[np.floating[Any]]


def overlay(image: Image | None, score_map: ScoreMap, boxes: Boxes) -> Image:
    """Draw the image under its score map, with boxes: [h, w, 3], in the image's proportions.

    The longer side has 256 to 1,024 pixels, so that lines are neither lost nor too thick.

    Args:
        image: [H, W, 3], or None for the map alone.
        score_map: [H, W] in [0, 1].
        boxes: [n, 4] in pixels of both.
    """
    height, width = score_map.shape
    longest = max(height, width)
    scale = min(max(longest, _MIN_SIDE), _MAX_SIDE) / longest
    size = max(1, round(scale * width)), max(1, round(scale * height))
    scores = _resized(PIL.Image.fromarray(np.asarray(score_map, np.float32)), size).clip(0, 1)
    colours = 255 * matplotlib.colormaps[SCORE_COLOURS](scores)[..., :3]  # [h, w] → [h, w, 3]
    if image is not None:
        colours = 0.5 * colours + 0.5 * _resized(PIL.Image.fromarray(image), size)
    picture = PIL.Image.fromarray(colours.astype(np.uint8))
    draw = PIL.ImageDraw.Draw(picture)
    line = max(1, round(max(size) / 200))
    for box in boxes:
        x0, y0, x1, y1 = (box + np.array([0, 0, 1, 1])) * np.tile(np.array(size) / [width, height], 2)
        corners = x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)  # The last pixel is drawn, too.
        draw.rectangle(corners, outline="#ffffff", width=line + 2)
        draw.rectangle(corners, outline=PREDICTED, width=line)
    return np.asarray(picture)


def draw_boxes(axes: Axes, boxes: Boxes, colour: str = PREDICTED, linestyle: str = "-") -> None:
    """Draw boxes [n, 4], with both corners inside, around their pixels in an image that `imshow` shows."""
    for x0, y0, x1, y1 in np.asarray(boxes).tolist():
        frame = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1, fill=False, edgecolor=colour, linewidth=2)
        frame.set_linestyle(linestyle)
        axes.add_patch(frame)


def prediction_figure(image: Image | None, score_map: ScoreMap, boxes: Boxes, title: str) -> Figure:
    """Draw the image, if there is one, beside its overlay."""
    drawn = overlay(image, score_map, boxes)
    pictures = [drawn] if image is None else [image, drawn]
    figure = PlainFigure(figsize=(4 * len(pictures), 4.3), layout="constrained")
    for axes, picture in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True):
        axes.imshow(picture)
        axes.set_axis_off()
    figure.suptitle(shortened(title, 40 * len(pictures)))
    return figure


def _resized(picture: PIL.Image.Image, size: tuple[int, int]) -> npt.NDArray[Any]:
    return np.array(picture.resize(size, PIL.Image.Resampling.BILINEAR))
