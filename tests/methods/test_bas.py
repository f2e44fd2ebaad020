"""BAS against released code, and its second pass with constant weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from tests.methods.released import Released, error, read
from tests.methods.test_cam import batch, build, image
from wsolkit.errors import ConfigError
from wsolkit.methods.bas import (
    BASNetwork,
    BASViTNetwork,
    MaskLosses,
    background_logits,
    foreground_logits,
    score_maps,
    suppression_loss,
)
from wsolkit.methods.constant_weights import with_constant_weights
from wsolkit.methods.sat import batch_area_loss, normalization_loss

SETTINGS: Any = {
    "top_k": None,
    "objective": "bas",
    "foreground_weight": 0.5,
    "area_weight": 1.2,
    "area_prior": 0.3,
    "filter": "released",
    "filter_sigma": 6.0,
}


@pytest.fixture(params=["reduced", "full"])
def vgg(request: pytest.FixtureRequest) -> Released:
    return read("bas", request)


@pytest.fixture(params=["reduced", "full"])
def resnet(request: pytest.FixtureRequest) -> Released:
    return read("bas_bn", request)


def convolution(released: Released, name: str) -> nn.Conv2d:
    weight = released[f"state/{name}.weight"]
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
    layer.load_state_dict(released.state(f"state/{name}."))
    return layer


def head(released: Released) -> list[nn.Module]:
    layers = [convolution(released, f"classifier_cls.{place}") for place in (0, 2, 4)]
    return [part for layer in layers for part in (layer, nn.ReLU())]


def check(released: Released, rest: nn.Sequential, gradients: dict[str, Tensor]) -> None:
    """Compare the losses of a step and its gradients, for layers behind the feature map."""
    generator = convolution(released, "classifier_loc.0")
    feature, label = released["feature"].requires_grad_(), released["label"]
    mask = generator(feature).sigmoid()[torch.arange(len(label)), label]
    maps = rest(feature)
    statistics = {name: buffer.clone() for name, buffer in rest.named_buffers()}
    background = background_logits(feature, mask, rest)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in rest.named_buffers())
    score, background_score = (each.gather(1, label[:, None])[:, 0] for each in (maps.mean(dim=(2, 3)), background))
    assert error(score, released["score"]) < 1e-5
    assert error(background_score, released["background_score"]) < 1e-5
    assert error(foreground_logits(maps, mask), released["foreground_logits"]) < 1e-5
    settings = SETTINGS | {"foreground_weight": released.number("alpha"), "area_weight": released.number("beta")}
    losses = MaskLosses(settings)(maps, mask, lambda: background, {"image": None, "label": label})
    assert error(losses["loss_bas"], suppression_loss(score, background_score)) == 0
    for name in ("loss_bas", "loss_area", "loss_cls", "loss_frg", "loss"):
        assert error(losses[name], released[name]) < 1e-5, name
    own = losses["loss_bas"] + released.number("beta") * losses["loss_area"]
    own_gradient = torch.autograd.grad(
        own, [generator.weight, *rest.parameters()], retain_graph=True, allow_unused=True
    )
    assert all(gradient is None for gradient in own_gradient[1:])  # The rest has constant weights in this pass.
    if "grad_bas/classifier_loc.0.weight" in released:
        assert error(own_gradient[0], released["grad_bas/classifier_loc.0.weight"]) < 1e-4
    losses["loss"].backward()
    if "grad_feature" in released:
        assert error(feature.grad, released["grad_feature"]) < 1e-4
    named = {"classifier_loc.0.weight": generator.weight, **gradients}
    for name, parameter in named.items():
        assert error(parameter.grad, released[f"grad/{name}"]) < 1e-4, name


def test_losses_and_gradients_are_the_released_ones_on_vgg(vgg: Released) -> None:
    convolutions = [convolution(vgg, f"conv5_{place}") for place in (1, 2, 3)]
    rest = nn.Sequential(nn.MaxPool2d(2), *(part for layer in convolutions for part in (layer, nn.ReLU())), *head(vgg))
    last = rest[-2]
    assert isinstance(last, nn.Conv2d)
    check(vgg, rest, {"conv5_1.weight": convolutions[0].weight, "classifier_cls.4.weight": last.weight})
    masks = convolution(vgg, "classifier_loc.0")(vgg["feature"]).sigmoid()
    found = score_maps(masks, vgg["logits"], vgg["label"][:, None], int(vgg.number("top_k")))
    assert error(found[:, 0], vgg["test_map"]) < 1e-5


def test_losses_gradients_and_statistics_are_the_released_ones_on_resnet(resnet: Released) -> None:
    """BatchNorm uses the background's batch, and keeps the running statistics of the clean pass."""
    downsample = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8))
    blocks = nn.Sequential(Bottleneck(6, 2, downsample=downsample), Bottleneck(8, 2))
    blocks.load_state_dict(resnet.state("state/layer4."))
    first = blocks[0]
    assert isinstance(first, Bottleneck)
    check(
        resnet,
        nn.Sequential(nn.MaxPool2d(2), blocks, *head(resnet)).train(),
        {"layer4.0.conv1.weight": first.conv1.weight, "layer4.0.bn1.weight": first.bn1.weight},
    )
    for name, value in resnet.state("after/layer4.0.bn1.").items():
        assert error(getattr(first.bn1, name), value) < 1e-5, name


def test_constant_weights_get_no_gradient_and_keep_their_statistics() -> None:
    layers = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).train()
    before = {name: buffer.clone() for name, buffer in layers.named_buffers()}
    given = torch.randn(4, 2, 5, 5, requires_grad=True)
    found = with_constant_weights(layers, given)
    (found**3).sum().backward()
    torch.testing.assert_close(found, F.batch_norm(layers[0](given), None, None, training=True))
    assert all(parameter.grad is None for parameter in layers.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in layers.named_buffers())
    assert given.grad is not None


def test_suppression_stops_where_the_background_scores_more() -> None:
    background = torch.tensor([0.5, 2.0, 1.0], requires_grad=True)
    loss = suppression_loss(torch.ones(3), background)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 / 3)
    assert background.grad is not None
    assert background.grad.tolist() == pytest.approx([1 / 3, 0, 0])


def test_mask_is_averaged_to_any_size_of_the_maps() -> None:
    maps = torch.rand(2, 3, 4, 6)
    for size in ((4, 6), (8, 12), (9, 13)):
        mask = torch.full((2, *size), 0.5)
        torch.testing.assert_close(foreground_logits(maps, mask), maps.mean(dim=(2, 3)) / 2)


def test_map_of_several_predicted_classes_is_their_mean() -> None:
    masks, logits = torch.rand(2, 4, 3, 3), torch.tensor([[0.0, 3.0, 2.0, 1.0], [9.0, 0.0, 1.0, 8.0]])
    expected = torch.stack([masks[0, [1, 2]].mean(dim=0), masks[1, [0, 3]].mean(dim=0)])[:, None]
    torch.testing.assert_close(score_maps(masks, logits, None, 2), expected)
    assert score_maps(masks, logits, torch.zeros(2, 3, dtype=torch.int64), 2).shape == (2, 3, 3, 3)
    torch.testing.assert_close(score_maps(masks, logits, None, 99)[:, 0], masks.mean(dim=1))
    assert score_maps(masks, logits, None, None) is masks


def test_network_halves_what_follows_the_masks() -> None:
    """With `pool`, maps behind the stage have half the sides, and the background takes the same way."""
    module = build("bas", "method.pool=true", "backbone.stride=4").eval()
    own = module.network
    assert isinstance(own, BASNetwork)
    assert (own.backbone.stride, own.backbone.names[-2:]) == (8, ("pool", "layer4.0"))
    with torch.no_grad():
        middle, feature, _ = own.parts(image())
        maps = own.activations(feature)
        assert (middle.shape[2:], maps.shape[2:]) == ((16, 16), (8, 8))
        nothing = torch.zeros(2, 16, 16)
        torch.testing.assert_close(own.background(middle, nothing), maps.mean(dim=(2, 3)))
        torch.testing.assert_close(module(image()), maps.mean(dim=(2, 3)))
    assert module.localize(image()).maps.shape == (2, 1, 16, 16)


@pytest.mark.parametrize("refine", ["scg", "sem"])
def test_finer_maps_can_be_refined(refine: str) -> None:
    module = build("bas", "method.pool=true", "backbone.stride=4", f"postprocess={refine}").eval()
    assert module.localize(image(), "all").maps.shape == (2, 8, 16, 16)


@pytest.mark.parametrize("method", ["bas", "bas_vit"])
def test_sat_s_losses_take_the_place_of_bas_s(method: str) -> None:
    module = build(method, "method.objective=sat", "method.area_prior=0.3")
    losses = module.eval().losses(batch())
    assert losses.keys() == {"loss", "loss_cls", "loss_area", "loss_norm", "map_area"}
    own, label = module.network, batch()["label"]
    masks = own.clean(batch()["image"])[1] if isinstance(own, BASViTNetwork) else _masks(own, batch()["image"])
    mask = masks[torch.arange(4), label]
    torch.testing.assert_close(losses["loss_area"], batch_area_loss(mask, 0.3))
    kernel = module.get_submodule("mask_losses").kernel
    assert isinstance(kernel, Tensor)
    torch.testing.assert_close(losses["loss_norm"], normalization_loss(mask, kernel))
    terms = [losses[name] for name in ("loss_cls", "loss_area", "loss_norm")]
    torch.testing.assert_close(losses["loss"], torch.stack(terms).sum())


def _masks(own: object, images: Tensor) -> Tensor:
    assert isinstance(own, BASNetwork)
    return own.masks(own.parts(images)[0])


def test_transformer_s_background_is_what_the_mask_leaves() -> None:
    """A mask of nothing leaves all; the generator learns from the background, and the blocks do not."""
    module = build("bas_vit").eval()
    own = module.network
    assert isinstance(own, BASViTNetwork)
    middle, masks, semantic, _ = own.clean(image())
    nothing = torch.zeros_like(masks[:, 0])
    torch.testing.assert_close(own.background(middle, nothing, image()), semantic.mean(dim=(2, 3)))
    own.background(middle, masks[:, 0], image()).sum().backward()
    assert own.generator.weight.grad is not None
    later = [parameter for block in own.backbone.blocks[own.first :] for parameter in block.parameters()]
    assert all(parameter.grad is None for parameter in (*later, *own.head.parameters()))
    assert own.backbone.blocks[0].get_submodule("mlp.fc1").weight.grad is not None  # Through the mask.


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("bas", "method.top_k=0", r"method\.top_k=0: expected 1 or more"),
        ("bas", "method.area_prior=1.0", r"method\.area_prior=1\.0: expected a share"),
        ("bas", "method.stage=layer9", "no stage 'layer9'"),
        ("bas_vit", "method.num_blocks=7", r"method\.num_blocks=7: expected 1 to 6"),
    ],
)
def test_settings_are_checked(method: str, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(method, setting)
