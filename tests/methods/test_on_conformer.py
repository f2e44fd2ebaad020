"""TS-CAM, SCM and SAT on a Conformer: the same methods, with a second branch that takes part in classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.test_official import full, network_input
from wsolkit import Localizer, build_module, load_config
from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.interop import from_official
from wsolkit.interop.official import _RELEASED_CONFORMER, _renamed
from wsolkit.localization.maps import min_max
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.sat import SAT
from wsolkit.methods.scm import SCM
from wsolkit.train import train

METHODS = ("ts_cam", "scm", "sat")
FORWARD, GRADIENT, LOSS = 2e-4, 1e-2, 2e-3  # relative tolerances of the norm


def build(method: str, *overrides: str) -> WSOLModule:
    torch.manual_seed(0)
    return build_module(load_config(f"method={method}", "backbone=conformer_micro", *overrides))


def difference(found: Tensor, stored: np.ndarray[Any, Any]) -> float:
    expected = torch.from_numpy(stored)
    return float(torch.linalg.vector_norm(found.detach() - expected) / torch.linalg.vector_norm(expected))


def test_ts_cam_matches_released_code(shared: Path) -> None:
    """Logits, maps, the training loss and gradients of a Conformer with a quarter of the channels and six blocks."""
    golden, state = full(shared / "golden" / "second_tier" / "conformer.npz")
    module = from_official({name: value.float() for name, value in state.items()}, "ts_cam", num_heads=3)
    image, classes = network_input(golden["image"]), torch.arange(7).expand(2, -1)
    logits, maps = module.localize(image, classes)
    assert difference(logits, golden["eval_logits"]) < FORWARD
    stored = torch.from_numpy(golden["eval_cams"])
    assert difference(min_max(maps.flatten(0, 1)), min_max(stored.flatten(0, 1)).numpy()) < FORWARD
    backbone: Any = module.network.backbone
    with torch.no_grad():
        found = backbone.features(image, {})
        tokens, own = backbone.norm(found.tokens), module.network.branch_head(found.branch)  # type: ignore[operator]
    assert difference(tokens, golden["eval_tokens"]) < FORWARD
    assert difference(own, golden["eval_conv_logits"]) < FORWARD
    plain = (torch.from_numpy(golden[f"plain/trans_cls_head.{part}"]).float() for part in ("weight", "bias"))
    assert difference(F.linear(tokens[:, 0], *plain), golden["plain_trans_logits"]) < FORWARD

    loss = module.train().losses({"image": image, "label": torch.from_numpy(golden["label"])})["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"].item(), rel=LOSS)
    gradients = {name.removeprefix("grad/"): value for name, value in golden.items() if name.startswith("grad/")}
    parameters = dict(module.network.named_parameters())
    renamed = {"conv_cls_head.weight": "branch_head.weight", "trans_cls_head.bias": "head.bias"}
    for name, value in gradients.items():
        gradient = parameters[renamed.get(name, f"backbone.{name}")].grad
        assert gradient is not None
        assert difference(gradient, value) < GRADIENT, name


@pytest.mark.parametrize("method", METHODS)
def test_state_dicts_in_released_names_come_back(method: str) -> None:
    """SCM's released Conformer has p = 4 in all of its blocks."""
    own = build(method, "dataset.num_classes=5").eval()
    state = {f"module.{_renamed(name, _RELEASED_CONFORMER)}": value for name, value in own.state_dict().items()}
    assert "module.conv_trans_2.cnn_block.conv1.weight" in state
    module = from_official(state, method, num_heads=4)  # type: ignore[arg-type]
    image = torch.randn(2, 3, 64, 96)
    for found, expected in zip(module.localize(image, "all"), own.localize(image, "all"), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    assert module.description.config["backbone"]["embed_dim"] == 96
    assert module.description.config["dataset"]["image_size"] == 224
    if isinstance(module, SCM):
        assert [block.iterations for block in module.calibration.blocks] == [4] * 4
    del state["module.conv_cls_head.bias"]
    with pytest.raises(CheckpointError, match="entries missing: conv_cls_head.bias"):
        from_official(state, method, num_heads=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_learns(method: str) -> None:
    """With the logits of both branches; one without a gradient would stop a run on several devices."""
    module: Any = build(method, "dataset.num_classes=5").train()
    batch: Any = {"image": torch.randn(4, 3, 64, 64), "label": torch.arange(4)}
    module.losses(batch)["loss"].backward()
    without = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert without == []
    with torch.no_grad():
        before = module.eval().localize(batch["image"]).logits
        module.network.branch_head.bias += 1.0
        after = module.localize(batch["image"])
    assert torch.allclose(after.logits, before + 1, atol=1e-5)
    assert torch.allclose(module(batch["image"]), after.logits, atol=1e-5)


def test_sat_s_spatial_blocks_are_the_last() -> None:
    module = build_module(load_config("method=sat", "backbone=conformer_small", "backbone.pretrained=false"))
    assert isinstance(module, SAT)
    assert list(module.network.spatial) == [9, 10, 11]


def test_scm_has_the_released_iterations_of_each_backbone() -> None:
    cub = ("method=scm", "dataset=cub", "dataset.root=x")
    assert load_config(*cub).method.iterations == [16, 4, 4, 4]
    conformer = load_config(*cub, "backbone=conformer_small")
    assert conformer.method.iterations == 4
    assert (conformer.dataset.batch_size, conformer.trainer.max_epochs) == (256, 30)


def test_methods_on_other_networks_refuse_it_and_theirs_name_it() -> None:
    with pytest.raises(ConfigError, match="method=cam needs a CNN, and backbone=conformer_micro is a Conformer"):
        build("cam", "dataset.num_classes=5")
    with pytest.raises(ConfigError, match="needs a Transformer, and backbone=cnn_micro is a CNN; .*conformer_small"):
        build_module(load_config("method=ts_cam", "backbone=cnn_micro"))


@pytest.mark.parametrize("method", METHODS)
def test_program_gives_the_logits_and_maps_of_the_model(method: str) -> None:
    module = build(method, "dataset.num_classes=5").eval()
    image = torch.randn(2, 3, 64, 64)
    module.network.requires_grad_(False)

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            return self.module.localize(image, "all")

    program = torch.export.export(Whole(), (image,), dynamic_shapes={"image": {0: torch.export.Dim("batch")}}).module()
    for found, expected in zip(program(image[:1]), module.localize(image[:1], "all"), strict=True):
        assert torch.allclose(found, expected, atol=1e-4)


def test_run_evaluates_and_predicts(in_tmp: Path) -> None:
    cfg = load_config(
        *("method=sat", "backbone=conformer_micro", "dataset.records.sizes={train: 16, val: 8, test: 8}"),
        *("dataset.batch_size=8", "trainer=smoke", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
        *("num_examples=0", "postprocess=similarity", "dataset.eval_image_size=[64,96]"),
    )
    train(cfg, in_tmp / "run")
    localizer = Localizer.from_checkpoint(in_tmp / "run" / "checkpoints" / "best.ckpt", device="cpu")
    found = localizer(np.zeros((50, 70, 3), np.uint8))
    assert found.score_map.shape == (50, 70)
