from __future__ import annotations

from typing import Any

import pytest
import torch

from wsolkit import build_module, load_config
from wsolkit.errors import ConfigError
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.sat import (
    SAT,
    batch_area_loss,
    image_area_loss,
    mask_probabilities,
    normalization_loss,
    smoothing_kernel,
    spatial_blocks,
)


def build(*overrides: str) -> SAT:
    torch.manual_seed(0)
    module = build_module(load_config("method=sat", *overrides))
    assert isinstance(module, SAT)
    return module


@pytest.mark.parametrize(
    ("num_blocks", "from_one"), [(1, [10]), (2, [10, 11]), (3, [10, 11, 12]), (4, [9, 10, 11, 12]), (12, range(1, 13))]
)
def test_spatial_blocks_are_those_of_the_ablation(num_blocks: int, from_one: list[int]) -> None:
    assert [block + 1 for block in spatial_blocks(12, num_blocks)] == list(from_one)


@pytest.mark.parametrize("num_blocks", [0, 13])
def test_number_of_spatial_blocks_is_checked(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match=f"num_blocks={num_blocks}: expected 1 to 12"):
        spatial_blocks(12, num_blocks)


def test_released_kernel() -> None:
    kernel = smoothing_kernel("released", 6.0)[0, 0]
    assert kernel.sum().item() == pytest.approx(1)
    assert [kernel[1, 1].item(), kernel[0, 1].item(), kernel[0, 0].item()] == pytest.approx(
        [0.8054397, 0.0460116, 0.00262846], abs=1e-6
    )


def test_other_kernels() -> None:
    assert smoothing_kernel("none", 1.0)[0, 0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    gaussian = smoothing_kernel("gaussian", 6.0)[0, 0]
    assert gaussian.sum().item() == pytest.approx(1)
    assert (gaussian[0, 1] / gaussian[1, 1]).item() == pytest.approx(torch.exp(torch.tensor(-1 / 72)).item())


def test_losses_by_hand() -> None:
    maps = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    assert batch_area_loss(maps, 0.25).item() == pytest.approx(0.5)  # mean 0.75
    assert image_area_loss(maps, 0.25).item() == pytest.approx((0.25 + 0.75) / 2)
    assert normalization_loss(maps, smoothing_kernel("none", 1.0)).item() == 0
    assert normalization_loss(torch.full((1, 4, 4), 0.5), smoothing_kernel("none", 1.0)).item() == pytest.approx(0.25)


def test_masking_values_equals_masking_columns_of_attention() -> None:
    network: Any = build("method.num_blocks=1").network
    block = network.backbone.blocks[0].eval()
    x = torch.randn(2, 66, 128)
    attention: Any = block.attn
    qkv = attention.qkv(block.norm1(x)).reshape(2, 66, 3, 4, 32).permute(2, 0, 3, 1, 4)
    scores = qkv[0] @ qkv[1].transpose(-2, -1) / 32**0.5
    mask = scores[:, :, -1].mean(dim=1).sigmoid()
    for position, weights in (
        ("after", scores.softmax(-1) * mask[:, None, None]),
        ("before", (scores * mask[:, None, None]).softmax(-1)),
    ):
        network.mask_position = position
        query, key, value = network._gate(scores[:, :, -1], *qkv.unbind(0))
        fused = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        assert torch.allclose(fused, weights @ qkv[2], atol=1e-5)
    assert torch.equal(mask_probabilities(scores[:, :, -1]), mask)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["method.num_blocks=1", "method.mask_position=before"],
        ["method.token_init=class", "method.area_level=image", "method.filter=gaussian"],
        ["method.token_init=shared", "method.head_init=he", "method.filter=none"],
    ],
)
def test_every_setting_trains(overrides: list[str]) -> None:
    module = build(*overrides)
    losses = module.losses({"image": torch.randn(4, 3, 64, 64), "label": torch.tensor([0, 1, 2, 7])})
    losses["loss"].backward()
    unused = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not unused  # DDP would wait for them
    assert losses["loss"].isfinite()


def test_weights_of_the_spatial_losses() -> None:
    batch = {"image": torch.randn(2, 3, 64, 64), "label": torch.tensor([0, 1])}
    module = build("method.area_weight=0", "method.norm_weight=0.5")
    losses = module.losses(batch)  # type: ignore[arg-type]
    assert losses["loss"].item() == pytest.approx((losses["loss_cls"] + 0.5 * losses["loss_norm"]).item())


@pytest.mark.parametrize("method", ["sat", "ts_cam", "scm"])
def test_localize_returns_the_maps_asked_for(method: str) -> None:
    torch.manual_seed(0)
    module: WSOLModule = build_module(load_config(f"method={method}")).eval()
    image = torch.randn(2, 3, 64, 64)
    logits, maps = module.localize(image)
    assert maps.shape == (2, 1, 8, 8)
    assert torch.allclose(logits, module(image), atol=1e-5)
    both = module.localize(image, torch.tensor([[0, 5], [3, 1]])).maps
    chosen = module.localize(image, lambda scores: scores.topk(2).indices).maps
    assert both.shape == chosen.shape == (2, 2, 8, 8)
    top = logits.argmax(1, keepdim=True)
    assert torch.equal(module.localize(image, top).maps, maps)
    if method == "sat":
        assert torch.equal(both[:, 0], both[:, 1])
        assert maps.min() > 0
        assert maps.max() < 1
    else:
        assert not torch.equal(both[:, 0], both[:, 1])


@pytest.mark.parametrize("method", ["sat", "ts_cam", "scm"])
def test_bfloat16_stays_close(method: str) -> None:
    torch.manual_seed(0)
    module = build_module(load_config(f"method={method}")).eval()
    image = torch.randn(2, 3, 64, 64)
    expected = module.localize(image)
    with torch.autocast("cpu", torch.bfloat16):
        actual = module.localize(image)
        losses = module.losses({"image": image, "label": torch.tensor([0, 1])})
    assert actual.maps.dtype == torch.float32
    assert (actual.maps - expected.maps).abs().max() < 0.02 * expected.maps.abs().max()
    assert all(value.dtype == torch.float32 for value in losses.values())


@pytest.mark.parametrize(
    ("method", "exempt"), [("ts_cam", {"pos_embed", "cls_token"}), ("scm", {"pos_embed", "cls_token"}), ("sat", set())]
)
def test_weight_decay_groups_are_those_of_the_released_code(method: str, exempt: set[str]) -> None:
    from wsolkit.methods.parameters import weight_decay_groups

    module = build_module(load_config(f"method={method}"))
    decay, no_decay = weight_decay_groups(module, module.no_weight_decay)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    free = {names[id(parameter)] for parameter in no_decay["params"]}
    assert no_decay["weight_decay"] == 0
    assert "weight_decay" not in decay  # the optimizer's own
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)
    for name, parameter in module.named_parameters():
        assert (name in free) == (parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in exempt), name
