from __future__ import annotations

import numpy as np
import pytest

from wsolkit.metrics.errors import ERRORS, localization_errors

ONE = [[20, 20, 59, 59]]
TWO = [[0, 0, 39, 39], [50, 0, 89, 39]]


# SPA, supplement, Algorithm 1, for a rightly classified image.
@pytest.mark.parametrize(
    ("box", "truth", "expected"),
    [
        ([20, 20, 59, 59], ONE, "correct"),
        ([20, 20, 59, 40], ONE, "correct"),  # IoU 0.525
        ([20, 20, 59, 39], ONE, "part"),  # IoU is 0.5, not above it
        ([25, 25, 30, 30], ONE, "part"),
        ([0, 0, 99, 99], ONE, "more"),
        ([0, 0, 89, 39], TWO, "m_ins"),  # comes before "more"
        ([5, 5, 15, 15], TWO, "part"),
        ([0, 0, 39, 99], TWO, "more"),
        ([70, 70, 99, 99], ONE, "other"),
        ([40, 40, 99, 99], ONE, "other"),  # a corner of the object and much else
    ],
)
def test_error_of_a_box(box: list[int], truth: list[list[int]], expected: str) -> None:
    (kind,) = localization_errors(np.array([box]), np.array(truth))
    assert ERRORS[kind] == expected
