from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from tests.methods.released import Released, error, read
from wsolkit.localization.maps import (
    Interpolation,
    Normalisation,
    central_crop,
    min_max,
    normalise,
    ten_crops,
    upsample,
)


def test_min_max_scales_each_map_by_itself() -> None:
    maps = torch.tensor([[[2.0, 4.0], [3.0, 2.0]], [[-1.0, -1.0], [0.0, 1.0]]])
    expected = [[[0.0, 1.0], [0.5, 0.0]], [[0.0, 0.0], [0.5, 1.0]]]
    assert min_max(maps).tolist() == expected
    assert torch.allclose(min_max(maps, epsilon=1.0)[0], torch.tensor([[0, 2 / 3], [1 / 3, 0]]))


def test_constant_map_becomes_zero_and_not_nan() -> None:
    assert min_max(torch.full((1, 3, 3), 7.0)).eq(0).all()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-3, 123.456, -7.7, 1e-30])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_constant_map_stays_constant_when_it_is_enlarged(value: float, interpolation: Interpolation) -> None:
    """Interpolation leaves differences in the last places, which must not become a map from 0 to 1."""
    for side in (7, 14, 28):
        enlarged = upsample(torch.full((1, side, side), value), (224, 224), interpolation)
        assert min_max(enlarged).eq(0).all()
        assert min_max(enlarged, epsilon=1e-5).eq(0).all()


def test_faint_map_is_none_that_is_constant() -> None:
    faint = torch.tensor([[[1.0, 1.0 + 1e-5], [1.0, 1.0]]])
    assert min_max(faint).tolist() == [[[0.0, 1.0], [0.0, 0.0]]]
    assert min_max(torch.tensor([[[0.0, 1e-30], [0.0, 0.0]]])).max() == 1


def test_upsampling_is_that_of_opencv() -> None:
    maps = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0))
    for interpolation, flag in (("bicubic", cv2.INTER_CUBIC), ("bilinear", cv2.INTER_LINEAR)):
        for height, width in ((224, 224), (375, 500)):
            expected = np.stack([cv2.resize(m, (width, height), interpolation=flag) for m in maps.numpy()])
            actual = upsample(maps, (height, width), interpolation)  # type: ignore[arg-type]
            assert np.abs(actual.numpy() - expected).max() < 1e-5


def test_ten_crops_are_those_of_torchvision() -> None:
    from torchvision.transforms.functional import ten_crop

    images = torch.rand(2, 3, 20, 20)
    expected = ten_crop(images, [16, 16])  # in another order: there the crops of the mirrored image
    order = [[torch.equal(own, crop) for crop in expected].index(True) for own in ten_crops(images, 16)]
    assert sorted(order) == list(range(10))
    assert torch.equal(central_crop(images, 16), images[..., 2:18, 2:18])


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("normalise", request)


def test_normalisations_are_the_released_ones(released: Released) -> None:
    maps = released["maps"]
    for how in ("minmax", "max", "pas"):
        assert error(normalise(maps, how, 0.45), released[how]) < 1e-6, how
    for place, percentile in enumerate(released.arrays["percentiles"].tolist()):
        assert error(normalise(maps, "ivr", percentile), released["ivr"][place]) < 1e-6


def test_minmax_is_the_same_as_ever() -> None:
    maps = torch.randn(3, 14, 14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normalise(maps, "minmax", 0.45), min_max(maps))
    assert torch.equal(normalise(maps, "minmax", 0.45, epsilon=1e-5), min_max(maps, 1e-5))


@pytest.mark.parametrize("how", ["minmax", "max", "pas", "ivr"])
def test_normalised_maps_lie_within_their_range(how: Normalisation) -> None:
    given = torch.randn(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    before = given.clone()
    maps = normalise(given, how, 0.3)
    assert torch.equal(given, before)
    assert maps.shape == given.shape
    assert (maps.min().item(), maps.max().item()) == (0, 1)
    for constant in (0.0, 0.25, -3.0):
        assert not normalise(torch.full((1, 4, 5), constant), how, 0.3).any()


def test_edges_of_normalisations() -> None:
    negative = torch.tensor([[-3.0, -2.0, -1.0]])
    assert normalise(negative, "max", 0.45).tolist() == [[0, 0, 0]]
    mostly_low = torch.zeros(1, 20)
    mostly_low[0, 19] = 5.0
    assert normalise(mostly_low, "pas", 0.45).sum() == 1  # Its 90th percentile is the minimum.
    # 0.45 · 1920 is 864 in double precision, and 863.99994 in float32.
    rising = torch.arange(1920.0).reshape(40, 48)
    assert (normalise(rising, "ivr", 0.45) == 0).sum() == 865
