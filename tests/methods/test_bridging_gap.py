"""Bridging the gap, beside loops over positions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.methods.test_cam import awake, batch, build, network
from wsolkit.errors import ConfigError
from wsolkit.methods.bridging_gap import BridgingGap, alignment_losses, attentive_dropout


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(
    feature: Any, weight: Any, labels: list[int], fg: float, bg: float, similarity: str
) -> tuple[float, float]:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    directions, lengths = [], []
    for image, label in zip(feature, labels, strict=True):
        vectors = image.reshape(len(image), -1).T
        lengths_ = [float(np.linalg.norm(vector)) for vector in vectors]
        norms = [(n - min(lengths_)) / (max(lengths_) - min(lengths_)) for n in lengths_]
        cosines = [
            [float(v @ w) / (n * float(np.linalg.norm(w))) for w in weight]
            for v, n in zip(vectors, lengths_, strict=True)
        ]
        target = [row[label] for row in cosines]
        sign = target if similarity == "target" else [max(row) for row in cosines]
        low, high = (mean([s for s, n in zip(target, norms, strict=True) if at(n)]) for at in (bg.__gt__, fg.__lt__))
        directions.append(low - high)
        against, along = (
            mean([n for n, s in zip(norms, sign, strict=True) if at(s)]) for at in ((0.0).__gt__, (0.0).__lt__)
        )
        lengths.append(against - along)
    return mean(directions), mean(lengths)


@pytest.mark.parametrize("similarity", ["target", "max"])
@pytest.mark.parametrize(("fg", "bg"), [(0.6, 0.1), (0.28, 0.25), (1.0, 0.0)])
def test_losses_are_those_of_the_equations(fg: float, bg: float, similarity: Any) -> None:
    feature, weight, labels = random(3, 6, 4, 5), random(4, 6, seed=1), [3, 0, 1]
    losses = alignment_losses(feature, weight, torch.tensor(labels), fg, bg, similarity)
    expected = reference(feature.double().numpy(), weight.double().numpy(), labels, fg, bg, similarity)
    assert [loss.item() for loss in losses] == pytest.approx(expected, abs=1e-6)


def test_gradients_are_right() -> None:
    feature, weight = random(2, 4, 3, 3).double().requires_grad_(), random(3, 4, seed=1).double().requires_grad_()

    def total(feature: Tensor, weight: Tensor) -> Tensor:
        # In float32 inside, whatever comes: differences of a size at which its rounding does not matter.
        direction, length = alignment_losses(feature, weight, torch.tensor([2, 0]), 0.6, 0.1)
        return (direction + 0.5 * length).double()

    torch.autograd.gradcheck(total, (feature, weight), eps=1e-3, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_and_empty_features_are_harmless(value: float) -> None:
    feature = torch.full((2, 6, 4, 4), value, requires_grad=True)
    weight = random(4, 6).requires_grad_()
    direction, length = alignment_losses(feature, weight, torch.tensor([0, 1]), 0.5, 0.3)
    (direction + length).backward()
    assert feature.grad is not None
    assert weight.grad is not None
    for tensor in (direction, length, feature.grad, weight.grad):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    feature, weight = 100 * random(2, 64, 7, 7), random(5, 64, seed=1)  # norms whose squares float16 does not hold
    exact = alignment_losses(feature.to(dtype).float(), weight.to(dtype).float(), torch.tensor([0, 1]), 0.5, 0.3)
    half = alignment_losses(feature.to(dtype), weight.to(dtype), torch.tensor([0, 1]), 0.5, 0.3)
    torch.testing.assert_close(torch.stack(half), torch.stack(exact))


def test_dropout_takes_the_most_active_positions() -> None:
    feature = torch.ones(2, 3, 4, 4)
    feature[0, :, 1, 2] = 10
    feature[0, :, 3, 3] = 8.5
    feature[1, :, 0] = 5
    erased = attentive_dropout(feature, threshold=0.8, probability=1.0)
    assert (erased == 0).all(dim=1).nonzero().tolist() == [[0, 1, 2], [0, 3, 3], *([1, 0, x] for x in range(4))]
    kept = (erased != 0).all(dim=1, keepdim=True)
    assert torch.equal(erased, feature * kept)
    assert torch.equal(attentive_dropout(feature, 0.8, 0.0), feature)


def test_dropout_is_drawn_by_position() -> None:
    torch.manual_seed(0)
    erased = attentive_dropout(torch.ones(20, 3, 20, 20), threshold=0.8, probability=0.25)
    shares = (erased == 0).float().mean(dim=(0, 2, 3))
    assert (shares == shares[0]).all()  # a position loses all channels, or none
    assert shares[0].item() == pytest.approx(0.25, abs=0.02)


def test_terms_and_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("method.warmup_epochs=2", "method.similarity_weight=0.5", "method.norm_weight=0.3")
    module = build("bridging_gap", *settings, "backbone.batch_norm=frozen").train()
    assert isinstance(module, BridgingGap)
    losses = module.losses(batch())
    assert losses.keys() == {"loss", "loss_cls", "loss_drop"}
    assert losses["loss"].item() == pytest.approx((losses["loss_cls"] + 2 * losses["loss_drop"]).item())
    monkeypatch.setattr(BridgingGap, "current_epoch", 2)
    torch.manual_seed(5)
    losses = module.losses(batch())
    parts = (("cls", 1), ("drop", 2), ("similarity", 0.5), ("norm", 0.3))
    assert losses["loss"].item() == pytest.approx(sum(w * losses[f"loss_{name}"].item() for name, w in parts), rel=1e-5)

    own = network(module)
    before, after = own.backbone.split("layer3")
    early = before(batch()["image"])
    feature = own.head(after(early))
    torch.manual_seed(5)
    erased = own.head(after(attentive_dropout(early, 0.8, 0.25)))
    assert losses["loss_drop"].item() == pytest.approx((feature - erased).abs().mean().item(), rel=1e-5)
    weight = own.classifier.weight[:, :, 0, 0]
    expected = alignment_losses(feature, weight, batch()["label"], 0.4, 0.2, "max")
    assert [losses["loss_similarity"].item(), losses["loss_norm"].item()] == pytest.approx(
        [part.item() for part in expected], rel=1e-5
    )


def test_no_branch_of_the_drop_loss_is_detached() -> None:
    """With the clean branch's gradient alone, and with the erased one's alone, it would be another one."""
    module = awake(build("bridging_gap", "backbone.batch_norm=frozen", "method.drop_probability=1.0")).train()
    own = network(module)
    before, after = own.backbone.split("layer3")
    early = before(batch()["image"])
    clean, erased = (own.head(after(maps)) for maps in (early, attentive_dropout(early, 0.8, 1.0)))
    parameter = next(own.backbone.parameters())
    (full,) = torch.autograd.grad(torch.nn.functional.l1_loss(clean, erased), parameter, retain_graph=True)
    module.losses(batch())["loss_drop"].backward()
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, full)
    for one, other in ((clean, erased.detach()), (clean.detach(), erased)):
        (part,) = torch.autograd.grad(torch.nn.functional.l1_loss(one, other), parameter, retain_graph=True)
        assert not torch.allclose(part, full)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("method.drop_probability=1.5", "method.drop_probability=1.5: expected 0 to 1"),
        ("method.drop_after=conv4", "the backbone has no stage 'conv4'"),
    ],
)
def test_settings_are_checked(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("bridging_gap", setting)
