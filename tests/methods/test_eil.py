"""EIL against released code, and MEIL."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.methods.released import Released, error, read
from tests.methods.test_cam import awake, batch, build, network
from wsolkit.errors import ConfigError
from wsolkit.methods.eil import erase


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("eil", request)


def test_erasing_is_the_released_one(released: Released) -> None:
    assert torch.equal(erase(released["feature"], released.number("threshold")), released["erased"])


def test_both_branches_are_the_released_ones(released: Released) -> None:
    """From pool4 on, with the released weights: losses, and gradients through both branches."""
    if "label" not in released:
        pytest.skip("the reduced arrays have no weights")
    weights = {name: value.requires_grad_() for name, value in released.state("state/").items()}
    feature = released["feature"].requires_grad_()

    def logits(maps: torch.Tensor) -> torch.Tensor:
        for layer in ("conv5_1", "conv5_2", "conv5_3", "conv6"):
            maps = F.conv2d(maps, weights[f"{layer}.weight"], weights[f"{layer}.bias"], padding=1).relu()
        return F.linear(maps.mean(dim=(2, 3)), weights["fc.weight"], weights["fc.bias"])

    plain, erased = logits(feature), logits(erase(feature, released.number("threshold")))
    assert error(plain, released["logits"]) < 1e-5
    assert error(erased, released["logits_erased"]) < 1e-5
    loss = F.cross_entropy(plain, released["label"]) + F.cross_entropy(erased, released["label"])
    assert error(loss, released["loss"]) < 1e-5
    loss.backward()
    assert error(feature.grad, released["grad_feature"]) < 1e-4
    assert error(weights["conv5_1.weight"].grad, released["grad/conv5_1.weight"]) < 1e-4


@pytest.mark.parametrize("stages", [["layer3"], ["layer2", "layer3"]])
def test_losses_are_those_of_the_branches(stages: list[str]) -> None:
    """Written out with two runs of the later stages. With several stages, MEIL takes the mean of their losses."""
    names = ",".join(stages)
    module = build("eil", f"method.stages=[{names}]", "method.erased_weight=0.5", "backbone.batch_norm=frozen")
    own = network(awake(module).train())
    losses, label = module.losses(batch()), batch()["label"]
    erased = []
    for stage in stages:
        before, after = own.backbone.split(stage)
        erased.append(F.cross_entropy(own.logits(own.head(after(erase(before(batch()["image"]), 0.7)))), label))
    plain = F.cross_entropy(module(batch()["image"]), label)
    torch.testing.assert_close(losses["loss_cls"], plain)
    torch.testing.assert_close(losses["loss_erased"], torch.stack(erased).mean())
    torch.testing.assert_close(losses["loss"], plain + 0.5 * torch.stack(erased).mean())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("method.stages=[]", r"method\.stages=\[\]: name a stage"),
        ("method.stages=[conv9]", "no stage 'conv9'"),
        ("method.threshold=0.0", r"method\.threshold=0\.0: expected a share of the maximum"),
    ],
)
def test_settings_are_checked(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("eil", setting)
