"""TriLite against its released code, and how its checkpoint joins two epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import GOLDEN
from wsolkit import build_module, load_config
from wsolkit.methods.trilite import LocalizationHead, TriLite, background_loss
from wsolkit.types import Tokens

_OWN_NAMES = {"patch_classifier": "classifier", "activation_head": "conv", "bn_head": "norm"}


@pytest.fixture(params=["reduced", "full"])
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    path = GOLDEN / "trilite.npz"
    if request.param == "full":
        shared: Path = request.getfixturevalue("shared")
        path = shared / "golden" / "second_tier" / "trilite.npz"
    with np.load(path) as arrays:
        return dict(arrays)


def array(golden: dict[str, Any], name: str) -> Tensor:
    return torch.from_numpy(np.asarray(golden[name])).float()


def own_name(released: str) -> str:
    part, _, rest = released.partition(".")
    return f"{_OWN_NAMES[part]}.{rest}"


def head_of(golden: dict[str, Any]) -> LocalizationHead:
    head = LocalizationHead(embed_dim=24, num_classes=6, dropout=0.0)
    names = [name.removeprefix("state/head.") for name in golden if name.startswith("state/head.")]
    head.load_state_dict({own_name(name): array(golden, f"state/head.{name}") for name in names})
    return head


def feature_of(golden: dict[str, Any]) -> Tensor:
    height, width = golden["grid"].tolist()
    return array(golden, "tokens")[:, 1:].mT.reshape(-1, 24, height, width)  # [B, N, D] → [B, D, H, W]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach() - expected).norm() / expected.norm())


def test_evaluation_is_the_released_one(golden: dict[str, Any]) -> None:
    regions, foreground, background = head_of(golden).eval()(feature_of(golden))
    assert error(regions[:, 0], array(golden, "eval_map")) < 1e-5
    assert error(foreground, array(golden, "eval_fg_logits")) < 1e-5
    assert error(background, array(golden, "eval_bg_logits")) < 1e-5


def test_losses_and_gradients_are_the_released_ones(golden: dict[str, Any]) -> None:
    cfg = load_config("method=trilite", "dataset=shapes", "method.localization_dropout=0")
    cfg.method.classification_dropout, cfg.method.background_weight = 0.0, float(golden["alpha"])
    module = build_module(cfg, [str(label) for label in range(6)])
    assert isinstance(module, TriLite)
    network = module.network
    network.localization = head_of(golden)
    network.classifier = torch.nn.Linear(24, 6)
    network.classifier.load_state_dict({name: array(golden, f"state/cls.{name}") for name in ("weight", "bias")})
    tokens = Tokens(array(golden, "tokens")[:, 0], feature_of(golden)[:, None])
    losses = module.train().losses({"image": tokens, "label": torch.from_numpy(golden["label"])})
    for name in ("loss", "loss_cls", "loss_fg", "loss_bg"):
        assert error(losses[name], array(golden, name)) < 1e-5, name
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    checked = [name for name in golden if name.startswith("grad/")]
    assert len(checked) == len(gradients) == 7
    for name in checked:
        part, _, rest = name.removeprefix("grad/").partition(".")
        own = f"localization.{own_name(rest)}" if part == "head" else f"classifier.{rest}"
        assert error(gradients[own], array(golden, name)) < 1e-4, name


def test_background_that_shows_the_class_for_certain_costs_much_but_not_without_end() -> None:
    certain, label = torch.tensor([[100.0, 0.0]]), torch.tensor([0])
    assert background_loss(certain, label).item() == pytest.approx(-np.log(1e-7), rel=1e-5)
    assert background_loss(-certain, label).item() == pytest.approx(0, abs=1e-6)


def test_number_of_trained_parameters_is_the_published_one() -> None:
    for classes, count in ((1000, 780_374), (200, 164_374)):
        cfg = load_config("method=trilite", "dataset=cub", "dataset.root=x", "backbone.pretrained=false")
        module = build_module(cfg, [str(label) for label in range(classes)])
        assert sum(p.numel() for p in module.parameters() if p.requires_grad) == count


def test_backbone_stays_frozen_in_training() -> None:
    module = build_module(load_config("method=trilite", "dataset=shapes")).train()
    backbone = module.network.backbone
    assert not any(part.training for part in backbone.modules())  # type: ignore[union-attr]
    module.losses({"image": torch.randn(2, 3, 64, 64), "label": torch.tensor([0, 1])})["loss"].backward()
    assert all(p.grad is None for p in backbone.parameters())  # type: ignore[union-attr]
    rates = {group["name"]: group.get("lr_factor", 1) for group in module.parameter_groups()}
    assert rates == {"localization": 1, "classifier": 10}
