"""SPA, beside loops over positions in float64, written after the paper's equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.methods.test_cam import batch, build, image, network
from wsolkit.errors import ConfigError
from wsolkit.methods.spa import (
    SPA,
    SelfCorrelationGenerator,
    restricted_activation_loss,
    self_correlation,
    self_correlation_map,
)

Array = npt.NDArray[np.float64]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scaled(values: Array) -> Array:
    span = values.max() - values.min()
    return np.asarray((values - values.min()) / (span if span else 1))


def reference_correlation(feature: Array, order: int, first_th: float, high_th: float) -> tuple[Array, Array]:
    """Eqn. 6 to 9 for one image [D, H, W]."""
    vectors = feature.reshape(len(feature), -1).T
    n = len(vectors)
    cosine = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            value = vectors[i] @ vectors[j] / (np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j]))
            cosine[i, j] = value if value > 0 and value >= first_th else 0
    first = np.stack([cosine[:, j] / (cosine[:, j].sum() + 1e-5) for j in range(n)], axis=1)
    np.fill_diagonal(cosine, 0)
    step = np.stack([cosine[:, j] / (cosine[:, j].sum() + 1e-5) for j in range(n)], axis=1)
    high = step
    for _ in range(order - 1):
        high = high @ step
        sums = high.sum(axis=0)
        high = high / np.where(sums == 0, 1, sums)
    return first, np.where(high < high_th / n, 0, high)


def reference_map(cam: Array, correlation: Array, object_th: float, background_th: float) -> Array:
    """Eqn. 11 to 13 for one image [H, W]."""
    found = np.zeros((2, cam.size))
    for position, value in enumerate(cam.ravel()):
        column = scaled(correlation[:, position])
        if value >= object_th:
            found[0] += column
        if value <= background_th:
            found[1] += column
    return scaled(np.maximum(scaled(found[0]) - scaled(found[1]), 0)).reshape(cam.shape)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6), (1, 1)])
def test_self_correlation_is_that_of_the_equations(grid: tuple[int, int], order: int) -> None:
    feature = random(2, 6, *grid)
    first, high = self_correlation(feature, order, 0.1, 0.8)
    for row in range(2):
        expected = reference_correlation(feature[row].double().numpy(), order, 0.1, 0.8)
        np.testing.assert_allclose(first[row], expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(high[row], expected[1] if order > 1 else 0 * expected[1], rtol=1e-5, atol=1e-6)


def test_columns_say_what_is_like_a_position() -> None:
    feature = torch.zeros(1, 2, 1, 4)
    feature[0, 0, 0, :2] = 1  # two positions of a kind, and two of another
    feature[0, 1, 0, 2:] = 3
    first, high = self_correlation(feature, 2, 0.1, 0.1)
    torch.testing.assert_close(first[0, :, 0], torch.tensor([0.5, 0.5, 0, 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(high[0, :, 0], torch.tensor([1.0, 0, 0, 0]))  # back from the only other one alike


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)])
def test_map_is_that_of_the_equations(grid: tuple[int, int]) -> None:
    first, _ = self_correlation(random(3, 6, *grid), 1, 0.1, 0.5)
    cams = torch.rand(3, 2, *grid, generator=torch.Generator().manual_seed(1))
    cams[2, 1] = 0  # nothing seen
    cams[0, 0] = 1
    maps = self_correlation_map(cams, first, 0.5, 0.2)
    for row in range(3):
        for which in range(2):
            expected = reference_map(cams[row, which].double().numpy(), first[row].double().numpy(), 0.5, 0.2)
            np.testing.assert_allclose(maps[row, which], expected, atol=2e-6)
    torch.testing.assert_close(self_correlation_map(cams[:, 0], first, 0.5, 0.2), maps[:, 0])


def test_correlation_completes_a_part() -> None:
    """The CAM sees one of two patches of an object whose features are alike; SCG finds both, and no background."""
    feature = random(1, 8, 6, 6) * 0.05
    feature[:, 0] += 1
    on = (slice(1, 3), slice(1, 5))
    feature[0, :, on[0], on[1]] = 0
    feature[0, 1, on[0], on[1]] = 1
    cam = torch.zeros(1, 1, 6, 6)
    cam[0, 0, 1:3, 1:3] = 1
    found = generator(stages=["any"])(cam, [feature])[0, 0]
    assert (found > 0.5).nonzero().tolist() == [[y, x] for y in (1, 2) for x in (1, 2, 3, 4)]


def generator(**changes: Any) -> SelfCorrelationGenerator:
    settings: dict[str, Any] = {
        "stages": ["layer3", "layer4"],
        "order": 2,
        "correlation": "both",
        "merge": "correlations",
        "high_order_weight": 2.0,
        "first_order_threshold": 0.1,
        "high_order_threshold": 0.5,
        "combine": "sum",
        "object_threshold": 0.1,
        "background_threshold": 0.05,
    }
    return SelfCorrelationGenerator(**settings | changes)


@pytest.mark.parametrize("combine", ["sum", "maximum"])
@pytest.mark.parametrize(
    ("correlation", "merge", "order"),
    [
        *[("both", merge, order) for merge in ("correlations", "maps") for order in (1, 2, 3)],
        *[("first", "maps", 2), ("high", "correlations", 2)],
    ],
)
def test_generator_is_that_of_the_equations(correlation: Any, merge: Any, order: int, combine: Any) -> None:
    features = [random(1, 6, 5, 4, seed=1), random(1, 9, 5, 4, seed=2)]
    raw = random(1, 1, 5, 4, seed=3)
    found = generator(correlation=correlation, merge=merge, order=order, combine=combine)(raw, features)[0, 0]
    pairs = [reference_correlation(feature[0].double().numpy(), order, 0.1, 0.5) for feature in features]
    if order == 1:
        pairs = [(first, np.zeros_like(first)) for first, _ in pairs]
    cam = scaled(np.maximum(raw[0, 0].double().numpy(), 0))

    def together(stages: list[Array]) -> Array:
        combined = sum(stages) if combine == "sum" else np.maximum(*stages)
        return reference_map(cam, np.asarray(combined), 0.1, 0.05)

    if correlation == "both" and merge == "correlations":
        larger = [np.maximum(first, 2.0 * high) for first, high in pairs]
        expected = together([stage / stage.sum(axis=0) for stage in larger])
    else:
        maps = {"first": together([first for first, _ in pairs]), "high": together([high for _, high in pairs])}
        expected = np.maximum(maps["first"], maps["high"]) if correlation == "both" else maps[correlation]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_finer_and_coarser_stages_are_brought_to_the_grid_of_the_map() -> None:
    same, finer = random(1, 6, 4, 4), random(1, 5, 8, 8)
    pooled = finer.reshape(1, 5, 4, 2, 4, 2).mean(dim=(3, 5))
    raw = random(1, 2, 4, 4, seed=5)
    torch.testing.assert_close(generator()(raw, [finer, same]), generator()(raw, [pooled, same]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_finite_maps(dtype: torch.dtype) -> None:
    features = [random(2, 6, 5, 5).to(dtype), random(2, 6, 5, 5, seed=1).to(dtype)]
    found = generator()(random(2, 2, 5, 5).to(dtype), features)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize("raw", [torch.zeros(1, 1, 4, 4), -torch.ones(1, 1, 4, 4)])
def test_empty_cams_and_features_are_harmless(raw: Tensor) -> None:
    assert not generator()(raw, [random(1, 6, 4, 4)] * 2).any()
    for value in (0.0, 1.0):
        assert generator()(random(1, 1, 4, 4), [torch.full((1, 6, 4, 4), value)] * 2).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "name one or more stages"),
        ({"order": 0}, "postprocess.order=0: expected 1"),
        ({"order": 1, "correlation": "high"}, "correlation=high needs 2 or more"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generator(**changes)


def reference_loss(logits: Array, labels: list[int], threshold: float, gap: float, spread: str) -> float:
    """Eqn. 2 to 5, position by position."""
    values = []
    for maps, label in zip(logits, labels, strict=True):
        positions = maps.reshape(len(maps), -1).T
        shares = [np.exp(position) / np.exp(position).sum() for position in positions]
        spreads = scaled(np.array([each.var(ddof=1) if spread == "variance" else each.std(ddof=1) for each in shares]))
        for position, own in zip(positions, spreads, strict=True):
            activation = 1 / (1 + np.exp(-position[label]))
            values.append(activation * (own < threshold) + (1 - activation) * (own > threshold + gap))
    return float(np.mean(values))


@pytest.mark.parametrize("spread", ["variance", "std"])
@pytest.mark.parametrize("threshold", [0.1, 0.4])
def test_activation_loss_is_that_of_the_equations(threshold: float, spread: Any) -> None:
    logits, labels = 2 * random(3, 5, 4, 6), [4, 0, 2]
    loss = restricted_activation_loss(logits, torch.tensor(labels), threshold, 0.1, spread)
    assert loss.item() == pytest.approx(reference_loss(logits.double().numpy(), labels, threshold, 0.1, spread))


def test_activation_loss_moves_the_true_class_only() -> None:
    logits = random(2, 5, 6, 6).requires_grad_()
    restricted_activation_loss(logits, torch.tensor([1, 3]), 0.1, 0.2).backward()
    assert logits.grad is not None
    moved = logits.grad.abs().sum(dim=(2, 3)) > 0
    assert moved.tolist() == [[label == own for label in range(5)] for own in (1, 3)]


def test_activation_loss_of_a_constant_map_is_finite() -> None:
    logits = torch.zeros(1, 5, 6, 6, requires_grad=True)
    loss = restricted_activation_loss(logits, torch.tensor([1]), 0.1, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.5)  # all background
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_activation_loss_starts_at_its_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("spa", "method.start_epoch=3", "method.activation_weight=0.25", "method.spread=std")
    assert isinstance(module, SPA)
    assert set(module.losses(batch())) == {"loss", "loss_cls"}
    monkeypatch.setattr(SPA, "current_epoch", 3)
    losses = module.losses(batch())
    assert losses["loss"].item() == pytest.approx((losses["loss_cls"] + 0.25 * losses["loss_activation"]).item())
    maps = network(module).class_maps(network(module).features(batch()["image"]))
    expected = restricted_activation_loss(maps, batch()["label"], module.background_threshold, module.gap, "std")
    assert losses["loss_activation"].item() == pytest.approx(expected.item())


def test_spa_without_its_postprocess_is_a_cam() -> None:
    plain, refined = build("spa", "postprocess=none").eval(), build("spa").eval()
    cam = build("cam", "method.form=maps_first").eval()
    cam.load_state_dict(plain.state_dict())
    assert torch.equal(plain.localize(image()).maps, cam.localize(image()).maps)
    scg = network(refined).postprocess
    assert isinstance(scg, SelfCorrelationGenerator)
    _, stages = network(refined).backbone.maps(image(), scg.stages)
    torch.testing.assert_close(refined.localize(image()).maps, scg(plain.localize(image()).maps, stages))
