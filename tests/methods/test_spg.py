"""SPG's seeds and losses against released code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.methods.released import Released, error, read
from tests.methods.test_cam import batch, build
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.spg import SPG, pixel_losses, seeds


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("spg", request)


def inputs(released: Released, gradient: bool = False) -> list[Any]:
    logits = [released[f"logits_{branch}"].requires_grad_(gradient) for branch in ("b1", "b2", "c")]
    thresholds = released.arrays["thresholds"].tolist()
    return [
        released["maps"].requires_grad_(gradient),
        released["label"],
        *logits,
        thresholds,
        released["size"].tolist(),
    ]


def test_losses_and_gradients_are_the_released_ones(released: Released) -> None:
    maps, _, b1, b2, c, *_ = given = inputs(released, gradient=True)
    losses = pixel_losses(*given)
    assert list(losses) == ["loss_b2", "loss_b1", "loss_c"]
    for name, loss in losses.items():
        assert error(loss, released[name]) < 1e-5, name
    torch.stack(list(losses.values())).sum().backward()
    assert maps.grad is None  # Seeds carry no gradient.
    for name, logits in (("grad_b1", b1), ("grad_b2", b2), ("grad_c", c)):
        if name in released:
            assert error(logits.grad, released[name]) < 1e-4, name


def test_seeds_are_the_released_ones(released: Released) -> None:
    maps, label, b1, b2, _, thresholds, size = inputs(released)

    def enlarged(values: Tensor) -> Tensor:
        return F.interpolate(values, size=size, mode="bilinear", align_corners=False)[:, 0]

    attention = min_max(enlarged(maps[torch.arange(len(label)), label][:, None]))
    first, second = enlarged(b1).sigmoid(), enlarged(b2).sigmoid()
    sources = {"b2": attention, "b1": second, "c": (first + second) / 2}
    for (name, source), (high, low) in zip(sources.items(), thresholds, strict=True):
        inside, background = seeds(source, high, low)
        coded = torch.full_like(source, 255).masked_fill(background, 0).masked_fill(inside, 1)
        assert (coded != released[f"seeds_{name}"]).float().mean() <= 2e-4, name


def test_few_pixels_and_both_at_once() -> None:
    attention = torch.zeros(1, 10, 10)
    attention[0, 0, :8] = 0.5
    attention[0, 1, 0] = 0.6
    inside, background = seeds(attention, high=0.55, low=0.1)  # One pixel is above, so those above 0.42 count.
    assert inside.sum() == 9
    assert background.sum() == 91
    inside, background = seeds(attention, high=0.8, low=0.55)
    assert inside.sum() == 1  # Background overrides object.
    assert not (inside & background).any()


def test_batch_without_seeds_adds_nothing() -> None:
    half = torch.zeros(1, 1, 4, 4)
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    losses = pixel_losses(maps, torch.tensor([0]), half, half, half, [(1, 0), (1, 0), (1, 0)], (4, 4))
    assert all(loss.isfinite() for loss in losses.values())


def test_terms_are_those_of_the_branches() -> None:
    module = build("spg", "method.head_channels=[16]", "method.pixel_channels=8", "method.dropout=0.0").eval()
    assert isinstance(module, SPG)
    losses, given = module.losses(batch()), batch()
    maps, b1, b2, c = module.network.all_branches(given["image"])
    assert [tuple(part.shape[1:]) for part in (maps, b1, b2, c)] == [(8, 8, 8), (1, 8, 8), (1, 8, 8), (1, 8, 8)]
    thresholds = [(0.7, 0.05), (0.5, 0.05), (0.7, 0.1)]
    expected = pixel_losses(maps, given["label"], b1, b2, c, thresholds, (64, 64))
    expected["loss_cls"] = F.cross_entropy(module(given["image"]), given["label"])
    assert losses.keys() == expected.keys() | {"loss"}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    torch.testing.assert_close(losses["loss"], sum(expected.values()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("method.stages=[layer3]", r"method\.stages=\['layer3'\]: expected two stages"),
        ("method.stages=[layer3,conv9]", "no stage 'conv9'"),
        ("method.seeds.b1=[0.1,0.5]", r"method\.seeds\.b1=\[0\.1, 0\.5\]: expected \[high, low\]"),
    ],
)
def test_settings_are_checked(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("spg", setting)
