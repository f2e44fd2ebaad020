"""ADL's maps against released code, and where its layers stand."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.methods.released import Released, error, read
from tests.methods.test_cam import awake, build, image, network
from wsolkit.errors import ConfigError
from wsolkit.methods.adl import ADLNetwork, AttentionDropout, drop_mask, importance_map


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("adl", request)


def test_maps_and_gradients_are_the_released_ones(released: Released) -> None:
    feature, cotangent = released["feature"].requires_grad_(), released["cotangent"]
    mask, importance = drop_mask(feature, released.number("threshold")), importance_map(feature)
    assert torch.equal(mask, released["drop_mask"])
    assert error(importance, released["importance"]) < 1e-5
    for name, by in (("dropped", mask), ("weighted", importance)):
        output = feature * by
        assert error(output, released[name]) < 1e-5
        (gradient,) = torch.autograd.grad((cotangent * output).sum(), feature)
        assert error(gradient, released[f"grad_{name}"]) < 1e-5


def test_layer_takes_one_of_the_maps_for_the_whole_batch() -> None:
    torch.manual_seed(0)
    feature, layer = torch.rand(3, 4, 6, 6), AttentionDropout(drop_rate=0.3, threshold=0.8)
    dropped, weighted = feature * drop_mask(feature, 0.8), feature * importance_map(feature)
    count = 0
    for _ in range(300):
        output = layer(feature)
        drops = torch.equal(output, dropped)
        assert drops or torch.equal(output, weighted)
        count += drops
    assert 65 < count < 115
    assert torch.equal(layer.eval()(feature), feature)


def test_layers_stand_after_their_stages() -> None:
    """Written out: the stages, the layer after layer3 and the one after layer4. Weights have the names that CAM has."""
    module = awake(build("adl", "method.drop_rate=1", "method.threshold=0.5", "backbone.batch_norm=frozen")).train()
    own = network(module)
    assert list(module.state_dict()) == list(build("cam", "backbone.batch_norm=frozen").state_dict())

    def expected(train: bool) -> torch.Tensor:
        maps = image()
        for name, stage in zip(own.backbone.names, own.backbone.stages, strict=True):
            for hook in stage._forward_hooks.values():
                assert name.startswith(("layer3", "layer4"))
                assert hook is not None
            maps = stage.forward(maps)  # without the hook
            if train and name.startswith(("layer3", "layer4")):
                maps = maps * drop_mask(maps, 0.5)
        return maps

    torch.testing.assert_close(own.features(image()), expected(train=True))
    module.eval()
    torch.testing.assert_close(own.features(image()), expected(train=False))


def test_copies_have_layers_of_their_own() -> None:
    module = build("adl").train()
    other = copy.deepcopy(module).eval()
    assert torch.equal(other(image()), other(image()))
    assert not torch.equal(module(image()), module(image()))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"method\.drop_rate=2\.0: expected a share from 0 to 1"):
        build("adl", "method.drop_rate=2.0")
    for places, message in (("[conv9]", "no stage 'conv9'"), ("[head]", r"method\.head_channels=\[\] leaves empty")):
        with pytest.raises(ConfigError, match=message):
            build("adl", f"method.places={places}")
    module = build("adl", "method.places=[head]", "method.head_channels=[16]")
    assert isinstance(module.network, ADLNetwork)
    assert module.network.head._forward_hooks
