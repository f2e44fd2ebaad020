"""Convolutional networks: their stages, how large their maps are, and that nothing but strides is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from wsolkit.backbones.cnn import CNN
from wsolkit.backbones.pretrained import normalization
from wsolkit.errors import CheckpointError, ConfigError

SMALL = {"layers": [1, 1, 1, 1], "channels": [4, 8, 16, 32]}
MODEL = "resnet18"


def build(model: str = MODEL, stride: int = 32, options: dict[str, Any] = SMALL, **changes: Any) -> CNN:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "batch_norm": "running",
        "align": False,
        "channels_last": True,
        "pretrained": False,
        "weights": None,
    }
    return CNN(model, stride, options=options, **settings | changes)


def image(side: int = 96) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "stride", "channels", "side"),
    [
        *[("resnet50", stride, 2048, 224 // stride) for stride in (32, 16, 8)],
        ("resnet50d", 16, 2048, 14),
        *[("vgg16", stride, 512, 224 // stride) for stride in (16, 8)],
        ("vgg16_bn", 16, 512, 14),
        *[("inception_v3", stride, 768, 224 // stride) for stride in (16, 8)],
        *[("mobilenetv2_100", stride, 1280, 224 // stride) for stride in (32, 16, 8)],
    ],
)
def test_maps_are_as_large_as_the_stride_says(model: str, stride: int, channels: int, side: int) -> None:
    with torch.device("meta"), torch.no_grad():  # sizes, without numbers
        network = build(model, stride, {}).eval()
        assert network(torch.zeros(1, 3, 224, 224)).shape == (1, channels, side, side)
    assert network.channels == channels


@pytest.mark.parametrize("model", ["resnet18", "resnet50", "mobilenetv2_100"])
def test_network_with_its_own_stride_is_timms(model: str) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(model, pretrained=False).eval().double()
    network = build(model, 32, {}).eval().double()  # the same seed draws the same weights
    with torch.no_grad():
        torch.testing.assert_close(network(image().double()), reference.forward_features(image().double()))


def test_vgg_is_timms_without_its_last_pooling() -> None:
    torch.manual_seed(0)
    reference = timm.create_model("vgg16", pretrained=False).eval()
    network = build("vgg16", 16, {}).eval()
    with torch.no_grad():
        torch.testing.assert_close(network(image()), reference.features[:-1](image()))


def test_strides_are_taken_out_without_dilation() -> None:
    """Where no stride is left out the networks agree, and the finer map has the coarser one's network at its centre."""
    coarse, fine = build(stride=32), build(stride=8)
    for (name, one), (_, other) in zip(coarse.named_modules(), fine.named_modules(), strict=True):
        if isinstance(one, nn.Conv2d) and isinstance(other, nn.Conv2d):
            assert torch.equal(one.weight, other.weight), name
            assert other.dilation == (1, 1)
            assert other.stride == ((1, 1) if name.split(".")[1] in ("3", "4") else one.stride), name
    with torch.no_grad():
        maps = [network.eval().maps(image(), ["layer2"])[1][0] for network in (coarse, fine)]
    assert torch.equal(*maps)


def test_inception_is_padded_as_in_spg() -> None:
    """Written out after SPG's network: padding in the first convolution, the poolings and Mixed_6a, no stride there."""
    torch.manual_seed(0)
    layers = timm.create_model("inception_v3", pretrained=False).eval().double()
    layers.Conv2d_1a_3x3.conv.padding = (1, 1)
    x = layers.Conv2d_2b_3x3(layers.Conv2d_2a_3x3(layers.Conv2d_1a_3x3(image(224).double())))
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1, ceil_mode=True)
    x = layers.Conv2d_4a_3x3(layers.Conv2d_3b_1x1(x))
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1, ceil_mode=True)
    x = layers.Mixed_5d(layers.Mixed_5c(layers.Mixed_5b(x)))
    mixed = layers.Mixed_6a
    for strided in (mixed.branch3x3, mixed.branch3x3dbl_3):
        strided.conv.stride, strided.conv.padding = (1, 1), (1, 1)
    deep = mixed.branch3x3dbl_3(mixed.branch3x3dbl_2(mixed.branch3x3dbl_1(x)))
    x = torch.cat([mixed.branch3x3(x), deep, F.max_pool2d(x, kernel_size=3, stride=1, padding=1)], dim=1)
    expected = layers.Mixed_6e(layers.Mixed_6d(layers.Mixed_6c(layers.Mixed_6b(x))))
    network = build("inception_v3", 8, {}).eval().double()
    with torch.no_grad():
        torch.testing.assert_close(network(image(224).double()), expected)


def centre_of_sight(network: CNN, side: int) -> float:
    """Where in its cell's middle a position in the middle of a map looks: with equal weights, the mean of the pixels."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    pixels = torch.full((1, 3, side, side), 1e-5, dtype=torch.double, requires_grad=True)  # small, for ReLU6
    place = side // network.stride // 2
    seen: Tensor
    (seen,) = torch.autograd.grad(network.eval().double()(pixels)[0, :, place, place].sum(), pixels)
    mean = (seen.sum(dim=(0, 1, 2)) * torch.arange(side)).sum() / seen.sum()
    return mean.item() - (network.stride * place + (network.stride - 1) / 2)


@pytest.mark.parametrize(
    ("model", "stride", "options", "offset"),
    [
        *[("resnet18", stride, SMALL, -(stride - 1) / 2) for stride in (8, 16, 32)],
        ("vgg11", 16, {}, 0),
        ("vgg11", 8, {}, 0),
        ("mobilenetv2_100", 16, {}, -7.5),
        ("mobilenetv2_100", 16, {"pad_type": "same"}, 7.5),
        ("inception_v3", 8, {}, 2.5),
        ("inception_v3", 16, {}, -1.5),
    ],
)
def test_positions_look_beside_their_cells(
    model: str, stride: int, options: dict[str, Any], offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The largest of equal values would be the first of them; their mean lies in the middle.
    monkeypatch.setattr(F, "max_pool2d", lambda x, **settings: F.avg_pool2d(x, **settings))
    monkeypatch.setattr(nn.MaxPool2d, "forward", average)
    network = build(model, stride, options)
    assert network.offset == offset
    side = 256 if model == "vgg11" else 512  # more than a position sees
    assert centre_of_sight(network, side) == pytest.approx(offset, abs=0.01)


def average(pool: nn.MaxPool2d, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)


@pytest.mark.parametrize(("padding", "looks_at"), [("", 32), ("same", 47)])
def test_align_moves_maps_to_where_positions_look(padding: str, looks_at: int) -> None:
    """Of a 4×4 map of 64×64 pixels one position stands out, whose cell has its middle at 39.5."""
    plain, aligned = (build("mobilenetv2_100", 16, {"pad_type": padding}, align=align) for align in (False, True))
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 2, 2] = 1
    assert plain.aligned(maps) is maps
    moved = F.interpolate(aligned.aligned(maps), scale_factor=8, mode="nearest")[0, 0]
    pixels = torch.arange(64.0)
    for sums in (moved.sum(dim=0), moved.sum(dim=1)):
        assert (sums * pixels).sum() / sums.sum() == pytest.approx(looks_at)


def test_stages_are_named() -> None:
    assert build().names == ("stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0")
    assert build("vgg11", 16, {}).names == (
        *("conv1", "pool1", "conv2", "pool2", "conv3", "pool3", "conv4", "pool4", "conv5"),
    )
    mobile = build("mobilenetv2_100", 32, {}).names
    assert mobile[:3] == ("stem", "blocks.0.0", "blocks.1.0")
    assert mobile[-1] == "conv_head"
    assert build("inception_v3", 8, {}).names[-1] == "Mixed_6e"


def test_maps_of_stages_come_as_asked_for() -> None:
    network = build(stride=16).eval()
    last, (third, first, third_again) = network.maps(image(), ["layer3", "layer1", "layer3.0"])
    assert [tuple(maps.shape[1:]) for maps in (first, third, last)] == [(4, 24, 24), (16, 6, 6), (32, 6, 6)]
    assert third is third_again
    assert torch.equal(last, network(image()))


def test_network_is_split_after_a_stage() -> None:
    network = build().eval()
    before, after = network.split("layer2")
    assert torch.equal(after(before(image())), network(image()))
    assert torch.equal(before(image()), network.maps(image(), ["layer2"])[1][0])
    assert {id(parameter) for part in (before, after) for parameter in part.parameters()} == {
        id(parameter) for parameter in network.parameters()
    }


def test_frozen_batch_norm_never_changes() -> None:
    running, frozen = build().train(), build(batch_norm="frozen").train()
    assert any(isinstance(layer, FrozenBatchNorm2d) for layer in frozen.modules())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in frozen.modules())
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    first = frozen(image())
    running(image())
    torch.testing.assert_close(frozen(image()[:1]), first[:1])  # no image depends on the others of its batch
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert any(value.any() for name, value in running.state_dict().items() if name.endswith("running_mean"))
    assert not any("bn" in name for name, _ in frozen.named_parameters())  # scales and shifts do not learn either
    torch.testing.assert_close(frozen.eval()(image()), build().eval()(image()))


def test_weights_come_from_a_file_and_bring_their_classifier(tmp_path: Path) -> None:
    torch.manual_seed(1)
    reference = timm.create_model(MODEL, pretrained=False, num_classes=5, **SMALL).eval()
    state = {name: value for name, value in reference.state_dict().items() if "num_batches" not in name}
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    network = build(weights=str(tmp_path / "weights.safetensors")).eval()
    torch.testing.assert_close(network(image()), reference.forward_features(image()))
    assert network.classifier is not None
    logits = network(image()).mean(dim=(2, 3)) @ network.classifier.weight.T + network.classifier.bias
    torch.testing.assert_close(logits, reference(image()))


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("resnet10t", pretrained=False).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"do not fit the backbone: \d+ missing \(.*not part of the model.*shape"):
        build(weights=str(path))


@pytest.mark.parametrize(
    ("model", "stride", "message"),
    [
        ("resnet18", 7, "backbone.stride=7: 'resnet18' can have 32, 16, 8, 4"),
        ("resnet18", 64, "can have 32, 16, 8, 4"),
        ("vgg11", 32, "backbone.stride=32: 'vgg11' can have 16, 8, 4, 2, 1"),
        ("inception_v3", 32, "'inception_v3' can have 16, 8, 4, 2"),
        ("vit_tiny_patch16_224", 16, "'vit_tiny_patch16_224' is not a convolutional network that can be opened up"),
        ("resnet51", 16, "timm has no model 'resnet51'; similar names: resnet5"),
    ],
)
def test_wrong_settings_are_named(model: str, stride: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(model, stride, {})


def test_unknown_stages_are_named() -> None:
    with pytest.raises(ConfigError, match=r"no stage 'layer5'; choose from: stem, layer1\.0"):
        build().maps(image(), ["layer5"])


def test_unknown_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"timm's 'resnet18' does not take \{'depth': 3\}"):
        build(options={"depth": 3})


def test_statistics_of_the_input() -> None:
    assert normalization("inception_v3.tv_in1k", None, None) == ((0.5,) * 3, (0.5,) * 3)
    assert normalization("own", [0.1, 0.2, 0.3], [1, 2, 3]) == ((0.1, 0.2, 0.3), (1, 2, 3))
    with pytest.raises(ConfigError, match=r"backbone.std=\[1, 0, 1\]: expected three numbers, .* above 0"):
        normalization("resnet50", None, [1, 0, 1])
    with pytest.raises(ConfigError, match=r"backbone.mean=\[1\]: expected three numbers"):
        normalization("resnet50", [1], None)
    with pytest.raises(ConfigError, match=r"backbone.mean=0.5: expected three numbers"):
        normalization("resnet50", 0.5, None)  # type: ignore[arg-type]
