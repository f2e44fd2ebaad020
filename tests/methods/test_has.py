"""HaS against released code."""

from __future__ import annotations

import pytest
import torch

from tests.methods.released import Released, read
from wsolkit import load_config
from wsolkit.build import build_augment
from wsolkit.errors import ConfigError
from wsolkit.methods.has import HideAndSeek, hide


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("has", request)


def test_squares_are_the_released_ones(released: Released) -> None:
    hidden = released["draws"] <= released.number("drop_rate")
    assert torch.equal(hidden, released["hidden"].bool())
    found = hide(released["image"], hidden, int(released.number("cell")))
    assert torch.equal(found, released["output"])


def test_squares_lie_where_they_should_on_an_image_that_is_not_square() -> None:
    hidden = torch.zeros(1, 2, 3, dtype=torch.bool)
    hidden[0, 1, 2] = True
    expected = torch.ones(1, 3, 5, 8)
    expected[:, :, 3:5, 6:8] = 0  # The border cuts the square of 3×3 pixels.
    given = torch.ones(1, 3, 5, 8)
    assert torch.equal(hide(given, hidden, 3), expected)
    assert given.all()


def test_each_image_has_its_own_squares() -> None:
    torch.manual_seed(0)
    found = HideAndSeek([0, 8, 16], 0.5)({"image": torch.ones(300, 3, 32, 32), "label": torch.arange(300)})
    kept = found["image"].mean(dim=(1, 2, 3))
    assert 0.25 < (kept == 1).float().mean() < 0.42  # a third of the images, whose g is 0
    assert kept[kept < 1].mean().item() == pytest.approx(0.5, abs=0.03)
    by_cell = found["image"][:, 0, ::8, ::8] != 0  # [300, 4, 4]
    pairs = (by_cell[:, ::2] == by_cell[:, 1::2]).flatten(1).all(dim=1) & (kept < 1)
    assert pairs.float().mean() > 0.25  # those with 16×16 pixels


def test_method_is_cam_with_hidden_squares() -> None:
    """Two methods that differ in nothing else: `method=has augment=none` is `method=cam`."""
    has, cam = load_config("method=has"), load_config("method=cam")
    assert {**has.method, "name": "cam"} == cam.method
    assert isinstance(build_augment(has), HideAndSeek)
    assert build_augment(cam) is None
    # A recipe may leave the settings of a transform behind.
    assert build_augment(load_config("method=has", "augment=none", "+augment.drop_rate=0.5")) is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("augment.cells=[]", r"augment\.cells=\[\]: expected one or more sides in pixels"),
        ("augment.cells=[-1]", r"augment\.cells=\[-1\]"),
        ("augment.drop_rate=2.0", "augment.drop_rate=2.0: expected a probability"),
    ],
)
def test_settings_are_checked(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_augment(load_config("method=has", setting))
