"""CALM's probabilities, losses and gradients against released code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.methods.released import Released, error, read
from tests.methods.test_cam import build, image, network
from wsolkit.localization.maps import min_max
from wsolkit.methods.calm import expectation_loss, joint, marginal_loss, prior


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("calm", request)


def test_probabilities_and_maps_are_the_released_ones(released: Released) -> None:
    both = joint(released["class_maps"], released["attention"])
    assert error(both, released["joint"]) < 1e-5
    assert error(prior(released["attention"]), released["prior"]) < 1e-5
    assert error(both.sum(dim=(2, 3)), released["probs"]) < 1e-5
    label = released["label"]
    own = both[torch.arange(len(label)), label]
    assert error(own, released["map_jointll"]) < 1e-5
    assert error(own / own.sum(dim=(1, 2), keepdim=True), released["map_gtcond"]) < 1e-5


@pytest.mark.parametrize(("name", "loss"), [("ml", marginal_loss), ("em", expectation_loss)])
def test_losses_and_gradients_are_the_released_ones(name: str, loss: object, released: Released) -> None:
    assert callable(loss)
    maps, attention = released["class_maps"].requires_grad_(), released["attention"].requires_grad_()
    value = loss(maps, attention, released["label"])
    assert error(value, released[f"loss_{name}"]) < 1e-5
    value.backward()
    assert error(maps.grad, released[f"grad_{name}_class_maps"]) < 1e-4
    positive = attention.detach() > 0  # Where the attention is 0, its ReLU passes nothing on.
    assert attention.grad is not None
    assert error(attention.grad[positive], released[f"grad_{name}_attention"][positive]) < 1e-4

    weights = {part: tensor.requires_grad_() for part, tensor in released.state("state/").items()}

    def layer(part: str) -> Tensor:
        return F.conv2d(released["feature"], weights[f"{part}.weight"], weights[f"{part}.bias"])

    loss(layer("conv_last"), layer("attention").relu()[:, 0], released["label"]).backward()
    for part in ("attention.weight", "conv_last.weight"):
        assert error(weights[part].grad, released[f"grad_{name}/{part}"]) < 1e-4, part


def test_attention_of_zeros_is_harmless() -> None:
    maps, attention = torch.randn(2, 4, 3, 3, requires_grad=True), torch.zeros(2, 3, 3, requires_grad=True)
    for loss in (marginal_loss, expectation_loss):
        value = loss(maps, attention, torch.tensor([0, 1]))
        value.backward()
        assert value.isfinite()
        assert maps.grad is not None
        assert maps.grad.isfinite().all()


def test_logits_are_probabilities_and_maps_their_parts() -> None:
    modules = {name: build("calm", f"method.map={name}").eval() for name in ("joint", "posterior", "log_joint")}
    with torch.no_grad():
        logits = modules["joint"](image())
        torch.testing.assert_close(logits.exp().sum(dim=1), torch.ones(2))
        own = network(modules["joint"])
        torch.testing.assert_close(own.logits(own.features(image())), logits)
    maps = {name: module.localize(image(), "all").maps for name, module in modules.items()}
    torch.testing.assert_close(maps["joint"].sum(dim=(2, 3)).log(), logits)
    torch.testing.assert_close(min_max(maps["posterior"]), min_max(maps["joint"]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(maps["log_joint"], (maps["joint"] + 1e-8).log())


def test_objectives_differ() -> None:
    given = {"image": image(), "label": torch.tensor([0, 1])}
    expectation, marginal = (build("calm", f"method.objective={name}").eval() for name in ("expectation", "marginal"))
    logits = marginal(given["image"])
    loss = marginal.losses(given)["loss"]  # type: ignore[arg-type]
    torch.testing.assert_close(loss, F.nll_loss(logits, given["label"]))
    assert expectation.losses(given)["loss"] > loss  # type: ignore[arg-type]
