"""SEM against the arrays of its released code, and as a post-process."""

from __future__ import annotations

import pytest
import torch

from tests.methods.released import Released, error, read
from wsolkit import build_module, load_config
from wsolkit.localization.maps import min_max
from wsolkit.methods.sem import self_enhancement


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("sem", request)


def test_map_is_the_released_one(released: Released) -> None:
    seeds = int(released.number("seeds"))
    found = self_enhancement(released["feature"], released["cam"], seeds)
    assert error(found, released["sem"]) < 2e-4
    together = self_enhancement(released["feature"], released["class_maps"], seeds)
    label = released["label"]
    assert error(together[torch.arange(len(label)), label], released["sem"]) < 2e-4


def test_position_without_activity_is_like_no_other() -> None:
    feature = torch.tensor([[[[1.0, 0.0, -1.0]], [[0.0, 0.0, 0.0]]]])
    found = self_enhancement(feature, torch.tensor([[[1.0, 0.5, 0.0]]]), seeds=1)
    assert found.flatten().tolist() == [1.0, 0.5, 0.0]  # cosines 1, 0 and −1


@pytest.mark.parametrize("method", ["cam", "acol", "spa"])
def test_it_refines_the_maps_of_any_method_on_a_cnn(method: str) -> None:
    torch.manual_seed(0)
    overrides = [f"method={method}", "backbone=cnn_micro"]
    plain, refined = (
        build_module(load_config(*overrides, f"postprocess={how}"), ["a", "b"]) for how in ("none", "sem")
    )
    refined.load_state_dict(plain.state_dict())
    image = torch.rand(2, 3, 64, 64)
    classes = torch.tensor([[0, 1], [1, 0]])
    maps = plain.eval().localize(image, classes).maps
    found = refined.eval().localize(image, classes).maps
    feature = refined.network.features(image)  # type: ignore[operator]
    seeds = max(1, round(60 * maps.shape[-2] * maps.shape[-1] / 784))
    assert torch.allclose(found, self_enhancement(feature, min_max(maps), seeds), atol=1e-5)
