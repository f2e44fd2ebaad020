"""ACoL's erasing, branches and maps against released code."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.methods.released import Released, error, read
from tests.methods.test_cam import batch, build, image
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import min_max
from wsolkit.methods.acol import ACoLNetwork, erase, merge
from wsolkit.methods.heads import convolutional_head


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("acol", request)


def test_erasing_and_merging_are_the_released_ones(released: Released) -> None:
    label, maps_a = released["label"], released["map_a"]
    erased = erase(released["pooled"], maps_a, label, released.number("threshold"))
    assert torch.equal(erased == 0, released["erased"] == 0)
    assert error(erased, released["erased"]) < 1e-6
    merged = merge(maps_a, released["map_b"])
    assert error(merged[torch.arange(len(label)), label], released["cams"]) < 1e-5


def test_branches_maps_and_gradients_are_the_released_ones(released: Released) -> None:
    """The network of this project with the released weights, on a feature map in place of a backbone's."""
    if "feature" not in released:
        pytest.skip("the reduced arrays have no weights")
    module = build("acol", "method.average_before=true", "method.head_channels=[14,14]").eval()
    own, label = module.network, released["label"]
    assert isinstance(own, ACoLNetwork)
    own.threshold = released.number("threshold")
    own.backbone.stages = torch.nn.Sequential(torch.nn.Identity())
    own.head = convolutional_head([10, 14, 14], dropout=0.0)
    own.classifier = torch.nn.Conv2d(14, 5, 1)
    own.branch_b = copy.deepcopy(torch.nn.Sequential(*own.head, own.classifier))
    own.branch_b.load_state_dict(released.state("state/classifier_B."))
    torch.nn.Sequential(*own.head, own.classifier).load_state_dict(released.state("state/classifier_A."))
    feature = released["feature"].requires_grad_()
    losses = module.losses({"image": feature, "label": label})
    assert error(losses["loss"], released["loss"]) < 1e-5
    losses["loss"].backward()
    assert error(feature.grad, released["grad_feature"]) < 1e-4
    first = own.branch_b[0]
    assert isinstance(first, torch.nn.Conv2d)
    assert error(first.weight.grad, released["grad/classifier_B.0.weight"]) < 1e-4
    classes = torch.stack([label, released["other_label"]], dim=1)
    found = module.localize(feature.detach(), classes)
    assert error(found.logits, released["logits_a"]) < 1e-5
    assert error(found.maps[:, 0], released["cams"]) < 1e-4
    assert error(found.maps[:, 1], released["other_cams"]) < 1e-4


def test_map_of_each_class_has_its_own_erasing() -> None:
    """All 8 classes at once are what each of them is alone; and no more than some at a time need memory."""
    module = build("acol", "method.head_channels=[16]").eval()
    together = module.localize(image(), "all").maps
    assert together.shape == (2, 8, 8, 8)
    for label in (0, 5):
        torch.testing.assert_close(module.localize(image(), torch.full((2, 1), label)).maps[:, 0], together[:, label])
    own = module.network
    assert isinstance(own, ACoLNetwork)
    with torch.no_grad():
        shared = own.backbone(image())
        maps_a = own.class_maps(own.head(shared))
        maps_b = own.branch_b(erase(shared, maps_a, torch.tensor([5, 5]), own.threshold))
    torch.testing.assert_close(together[:, 5], merge(maps_a, maps_b)[:, 5])
    assert together.min() >= 0
    assert together.max() <= 1


def test_average_counts_the_zeros_of_the_padding() -> None:
    own = build("acol", "method.average_before=true", "method.head_channels=[16]").eval().network
    assert isinstance(own, ACoLNetwork)
    with torch.no_grad():
        last = own.backbone(image())
        expected = F.conv2d(last.transpose(0, 1).flatten(0, 1)[:, None], torch.full((1, 1, 3, 3), 1 / 9), padding=1)
        shared = own.shared_and_stages(image())[0]
    torch.testing.assert_close(shared.transpose(0, 1).flatten(0, 1), expected[:, 0], rtol=1e-4, atol=1e-5)


def test_no_gradient_reaches_branch_a_through_the_mask() -> None:
    module = build("acol", "method.head_channels=[16]").train()
    module.losses(batch())["loss_b"].backward()
    assert module.network.get_submodule("classifier").weight.grad is None


def test_constant_maps_are_harmless() -> None:
    feature, maps = torch.rand(2, 3, 4, 4), torch.ones(2, 5, 4, 4)
    assert torch.equal(erase(feature, maps, torch.tensor([0, 1]), 0.5), feature)
    assert not merge(maps, maps).any()
    assert not min_max(maps).any()


def test_threshold_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"method\.threshold=1\.5: expected 0 to 1"):
        build("acol", "method.threshold=1.5")
