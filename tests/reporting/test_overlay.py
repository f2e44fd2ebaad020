"""Boxes over pictures."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from wsolkit.reporting.overlay import draw_boxes


def test_boxes_are_drawn_around_their_pixels() -> None:
    axes = Figure().subplots()
    axes.imshow(np.zeros((8, 10)))
    draw_boxes(axes, np.array([[2, 3, 5, 3], [0, 0, 9, 7]]), "#00e000", "--")
    first, second = axes.patches
    assert isinstance(first, Rectangle)
    assert isinstance(second, Rectangle)
    assert np.asarray(first.get_bbox().extents).tolist() == [1.5, 2.5, 5.5, 3.5]  # pixels are centred on whole numbers
    assert np.asarray(second.get_bbox().extents).tolist() == [-0.5, -0.5, 9.5, 7.5]
    assert (to_hex(first.get_edgecolor()), first.get_linestyle()) == ("#00e000", "--")
    assert axes.get_xlim() == (-0.5, 9.5)
