"""LCTR against its equations, written out with whole attention matrices, and against its released code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.test_official import full, network_input
from wsolkit import build_module, load_config
from wsolkit.errors import CheckpointError
from wsolkit.interop import from_official
from wsolkit.interop.official import _RELEASED_LCTR, _renamed
from wsolkit.localization.maps import min_max
from wsolkit.methods.lctr import LCTR, DynamicClassifier, follow_attention, smoothed_logits

FORWARD, GRADIENT, LOSS = 2e-4, 1e-2, 2e-3  # relative tolerances of the norm


def build() -> LCTR:
    torch.manual_seed(0)
    module = build_module(load_config("method=lctr", "backbone.options.depth=3", "dataset.num_classes=5")).eval()
    assert isinstance(module, LCTR)
    return module


def difference(found: Tensor, stored: np.ndarray[Any, Any]) -> float:
    expected = torch.from_numpy(stored)
    return float(torch.linalg.vector_norm(found.detach() - expected) / torch.linalg.vector_norm(expected))


def test_lctr_matches_released_code(shared: Path) -> None:
    golden, state = full(shared / "golden" / "second_tier" / "lctr.npz")
    heads = int(golden["num_heads"])
    module = from_official({name: value.float() for name, value in state.items()}, "lctr", num_heads=heads)
    assert isinstance(module, LCTR)
    image = network_input(golden["image"])
    logits, maps = module.localize(image)
    assert difference(logits, golden["eval_logits"]) < FORWARD
    assert difference(min_max(maps[:, 0]), min_max(torch.from_numpy(golden["map_top1"])).numpy()) < FORWARD
    with torch.no_grad():
        semantic, attention, _ = module.network.with_maps(image)
        assert difference(module(image), golden["eval_logits"]) < FORWARD
    assert difference(semantic, golden["class_maps"]) < FORWARD
    assert difference(attention, golden["attention_map"]) < FORWARD

    loss = module.train().losses({"image": image, "label": torch.from_numpy(golden["label"])})["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=LOSS)
    gradients = {_renamed(f"network.{name}", _RELEASED_LCTR): p.grad for name, p in module.network.named_parameters()}
    compared = [name for name in golden if name.startswith("grad/")]
    assert len(compared) == 6
    for name in compared:
        gradient = gradients[name.removeprefix("grad/")]
        assert gradient is not None
        assert difference(gradient, golden[name]) < GRADIENT, name


def test_network_follows_the_equations() -> None:
    """With whole attention matrices, and a kernel for each image."""
    module: Any = build()
    backbone, classifier = module.network.backbone, module.network.classifier
    image = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        tokens, rows, followed = backbone.embed(image), [], []
        for block in backbone.blocks:
            qkv = block.attn.qkv(block.norm1(tokens)).reshape(2, 36, 3, 4, 32).permute(2, 0, 3, 1, 4)
            a = (qkv[0] @ qkv[1].mT / 32**0.5).softmax(-1).mean(1)  # [B, N + 1, N + 1]
            rows.append(a[:, 0])
            followed.append((a[:, 0, :, None] * a).mean(1))
            tokens = block(tokens)
        x = backbone.norm(tokens)[:, 1:].mT.unflatten(2, (5, 7))
        u = 1 - torch.stack(rows).mean(0)[:, 1:].unflatten(1, (5, 7))
        g = module.network.context(x * u[:, None])
        w = (classifier.mean_route(g.mean((2, 3))) + classifier.maximum_route(g.amax((2, 3)))).sigmoid()
        kernels = torch.einsum("bk,kcdij->bcdij", w, classifier.weight)
        pairs = zip(x, kernels, strict=True)
        s = torch.cat([F.conv2d(own[None], kernel, classifier.bias, padding=1) for own, kernel in pairs])
        expected = torch.stack(followed).mean(0)[:, 1:].unflatten(1, (5, 7))[:, None] * s.relu()
        padded = F.pad(s, (1, 1, 1, 1))
        parts = [padded[:, :, i : i + 5, j : j + 7] for i in range(3) for j in range(3)]
        logits = torch.stack(parts).sum(0).mean((2, 3)) / 9
    found = module.localize(image, "all")
    assert torch.allclose(found.logits, logits, atol=1e-5)
    assert torch.allclose(found.maps, expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(module(image), logits, atol=1e-5)


def test_attention_that_is_followed() -> None:
    """With equal scores, each of three tokens gets a third of the row's weight, divided by three tokens."""
    followed = follow_attention(torch.tensor([[0.5, 0.3, 0.2]]), torch.zeros(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    assert torch.allclose(followed, torch.full((1, 3), 1 / 9))


def test_zeros_around_the_maps_count_in_the_logits() -> None:
    assert smoothed_logits(torch.ones(1, 1, 2, 2)).item() == pytest.approx(4 / 9)


def test_equal_shares_are_the_mean_of_the_kernels() -> None:
    classifier = DynamicClassifier(embed_dim=3, num_classes=2, num_kernels=4)
    feature = torch.randn(2, 3, 5, 6)
    expected = F.conv2d(feature, classifier.weight.mean(0), classifier.bias, padding=1)
    assert torch.allclose(classifier(feature, torch.full((2, 4), 0.25)), expected, atol=1e-6)


def test_gradient_reaches_the_attention_through_what_it_does_not_see() -> None:
    """The class token acts on the logits only through its rows of attention."""
    module = build().train()
    module.losses({"image": torch.randn(2, 3, 64, 64), "label": torch.tensor([0, 1])})["loss"].backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []
    assert module.network.backbone.class_token.grad is not None
    assert module.network.backbone.class_token.grad.abs().max() > 0


def test_state_dicts_of_other_methods_are_refused() -> None:
    state = {f"module.{_renamed(name, _RELEASED_LCTR)}": value for name, value in build().state_dict().items()}
    assert from_official(state, "lctr", num_heads=4).description.config["dataset"]["num_classes"] == 5
    del state["module.CDM._routing_fn_two.fc2.bias"]
    with pytest.raises(CheckpointError, match=r"entries missing: CDM\._routing_fn_two\.fc2\.bias"):
        from_official(state, "lctr", num_heads=4)
