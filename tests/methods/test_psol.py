"""PSOL: DDT against its released arrays, and the regressor with its files."""

from __future__ import annotations

import pytest
import torch

from tests.methods.released import Released, error, read
from wsolkit.methods.psol import PrincipalDirection, project, projection, pseudo_box


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("psol", request)


def test_projection_is_the_released_one_up_to_the_sign(released: Released) -> None:
    found, expected = projection(released["feature"]), released["projection"]
    sign = (found * expected).sum().sign()
    assert error(sign * found, expected) < 1e-6


@pytest.mark.parametrize("sign", ["", "flipped_"])
def test_boxes_are_the_released_ones(released: Released, sign: str) -> None:
    for one, box in zip(released[f"{sign}projection"], released[f"{sign}box"], strict=True):
        torch.testing.assert_close(torch.tensor(pseudo_box(one)), box)


def test_parts_of_a_class_have_the_direction_of_the_whole(released: Released) -> None:
    features, direction = released["feature"], PrincipalDirection()
    for part in features.split([1, 4, 2]):
        direction.add(part)
    mean, component = direction.compute()
    assert error(mean.float(), released["mean"]) < 1e-6
    torch.testing.assert_close(project(features, mean, component), projection(features))


def test_sign_is_that_of_the_middle() -> None:
    """An object in the middle, whose features point to where those of the background do not."""
    features = torch.randn(4, 6, 8, 8) * 0.1
    features[:, 2, 2:6, 3:6] -= 5
    found = projection(features)
    assert found[:, 2:6, 3:6].min() > 0
    assert found[:, :2].max() < 0
    assert pseudo_box(found[0]) == (3 / 8, 2 / 8, 3 / 8, 4 / 8)


def test_one_box_around_pixels_that_touch_at_a_corner_and_the_first_of_equals() -> None:
    maps = torch.zeros(4, 5)
    maps[0, 0] = maps[1, 1] = 1
    maps[2, 4] = maps[3, 4] = 2
    assert pseudo_box(maps) == (0, 0, 0.4, 0.5)
    assert pseudo_box(torch.zeros(4, 5)) == (0, 0, 1, 1)
