"""SPOL: pseudo masks, and the product of three maps, against plain transcriptions of the equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsolkit import build_module, load_config
from wsolkit.errors import ConfigError
from wsolkit.methods.spol import SPOL, mask_loss, pseudo_mask
from wsolkit.types import TrainingBatch

RULES: Any = {"band": (0.1, 0.5), "least_pixels": 20, "shrink": 10.0, "threshold": 0.25, "background": 0.01}


def hill(size: int, y: float, x: float, height: float, spread: float) -> npt.NDArray[np.float32]:
    rows, columns = np.mgrid[:size, :size]
    return np.asarray(height * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * spread**2)), np.float32)


def test_object_background_and_what_is_neither() -> None:
    m = np.maximum(hill(64, 20, 20, 1.0, 6), hill(64, 48, 48, 0.4, 6))
    mask = pseudo_mask(3 * m, 64, **RULES)  # the scale does not matter
    assert (mask[m > 0.25] == 1).all()
    assert (mask[m < 0.005] == 0).all()
    assert mask[20, 20] == mask[48, 48] == 1
    assert set(np.unique(mask)) == {0, 1, 255}
    ignored = m[mask == 255]
    assert ignored.min() >= 0.01 - 1e-6
    assert ignored.max() <= 0.25


def test_gaussian_of_a_faint_region_is_the_plain_formula() -> None:
    """A region that never reaches the threshold becomes object at its centre, by its Gaussian alone."""
    m = np.zeros((64, 64), np.float32)
    m[2:6, 2:6] = 1  # the maximum
    rows, columns = np.mgrid[40:60, 30:50]
    m[40:60, 30:50] = np.where(columns < 40, 0.12, 0.2)
    weights = m[40:60, 30:50].astype(np.float64).ravel()
    places = np.stack([rows.ravel(), columns.ravel()]).astype(np.float64)
    covariance = np.cov(places, aweights=weights, ddof=0) / 10
    apart = np.stack([(axis - np.average(place, weights=weights)).ravel()
                      for axis, place in zip(np.mgrid[:64, :64], places, strict=True)])  # fmt: skip
    gaussian = np.exp(-0.5 * (apart * np.linalg.solve(covariance, apart)).sum(axis=0)).reshape(64, 64)
    mask = pseudo_mask(m, 64, **RULES)
    expected = (gaussian > 0.25) | (m > 0.25)
    np.testing.assert_array_equal(mask == 1, expected)
    assert expected[40:60, 30:50].any()
    assert (mask[(m == 0) & ~expected] == 0).all()


@pytest.mark.parametrize("pixels", [19, 20])
def test_small_regions_have_no_gaussian(pixels: int) -> None:
    m = np.zeros((64, 64), np.float32)
    m[2:6, 2:6] = 1
    m[40, 10 : 10 + pixels] = 0.2  # a line, whose covariance has rank 1
    mask = pseudo_mask(m, 64, **RULES)
    assert (mask[40, 10 : 10 + pixels] == 1).any() == (pixels == 20)


def test_map_without_a_positive_value_is_background() -> None:
    assert not pseudo_mask(np.full((7, 7), -1, np.float32), 32, **RULES).any()


def build(*overrides: str) -> SPOL:
    torch.manual_seed(0)
    module = build_module(load_config("method=spol", *overrides))
    assert isinstance(module, SPOL)
    return module


def plain(module: SPOL, image: Tensor) -> tuple[Tensor, Tensor]:
    """P and o_5, word for word."""
    net: Any = module.network
    _, maps = net.backbone.maps(image, ["layer2", "layer3", "layer4"])
    v = torch.ones(image.shape[0], 128, 1, 1)
    for x, (w, norm, _) in zip(maps, net.gates, strict=True):
        v = v * norm(F.conv2d(F.adaptive_avg_pool2d(x, 1), w.weight)).relu()
    outputs = []
    for x, opening, (w, norm, _) in zip(maps, net.openings, net.reductions, strict=True):
        x = x * torch.sigmoid(F.conv2d(v, opening.weight, opening.bias))
        o = norm(F.conv2d(x, w.weight)).relu()
        outputs.append(F.interpolate(o, size=maps[0].shape[-2:], mode="bilinear", align_corners=True))
    return outputs[2] * outputs[1] * outputs[0], outputs[2]


@pytest.mark.parametrize("stride", [8, 32])
def test_product_and_losses_are_the_plain_formulas(stride: int) -> None:
    module = build(f"backbone.stride={stride}").eval()
    for norm in module.modules():  # as if they had been trained
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.bias.data.fill_(0.5)
    image, label = torch.randn(2, 3, 64, 64), torch.tensor([1, 5])
    product, deep, _ = module.network.all_parts(image)
    expected, expected_deep = plain(module, image)
    torch.testing.assert_close(product, expected)
    torch.testing.assert_close(deep, expected_deep)
    w, b = module.network.classifier.weight, module.network.classifier.bias
    one, two = (F.conv2d(o, w, b).relu().mean(dim=(2, 3)) for o in (expected_deep, expected))
    soft = -(one.detach().softmax(1) * two.log_softmax(1)).sum(1).mean()
    batch: TrainingBatch = {"image": image, "label": label}
    torch.testing.assert_close(module.losses(batch)["loss"], (F.cross_entropy(one, label) + soft) / 2)
    module.deep_target = False
    torch.testing.assert_close(module.losses(batch)["loss"], F.cross_entropy(two, label))
    found = module.localize(image, label[:, None])
    torch.testing.assert_close(found.logits, two)
    torch.testing.assert_close(found.maps[:, 0], F.conv2d(expected, w, b).relu()[torch.arange(2), label])


def test_pixels_of_neither_kind_do_not_count() -> None:
    mask = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    mask[0, 0, :2], mask[0, 1, :2] = 1, 0
    logits = torch.randn(1, 4, 4, requires_grad=True)
    loss = mask_loss(logits, mask)
    p = logits.sigmoid()[0]
    expected = -(p[0, :2].log().sum() + (1 - p[1, :2]).log().sum()) / 16
    torch.testing.assert_close(loss, expected)


def test_messages() -> None:
    for overrides, message in (
        (["method.stage=segment"], r"give method\.classifier=PATH"),
        (["method.head_channels=[8]"], r"method\.head_channels=\[\]"),
        (["+postprocess=bagcams"], "cannot take gradients"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(*overrides)
