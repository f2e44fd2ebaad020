"""The sheet of examples shows what there is."""

from __future__ import annotations

import numpy as np
import pytest

from wsolkit.reporting.charts import Shown
from wsolkit.reporting.pictures import draw_examples


@pytest.mark.parametrize("with_truth", [True, False])
def test_fit_and_ground_truth_are_named_where_there_are_any(with_truth: bool) -> None:
    box = np.array([[1, 1, 2, 2]])
    iou, truth = (0.5, box) if with_truth else (float("nan"), box[:0])
    example = Shown("a.jpg", np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4)), truth, box, "cat", None, iou)
    figure = draw_examples([example], "sat on photos")
    (legend,) = figure.legends
    assert figure.axes[0].get_title() == ("cat\nIoU 0.50" if with_truth else "cat")
    assert [text.get_text() for text in legend.get_texts()] == [*["ground truth"] * with_truth, "predicted box"]
