"""ORNet's losses against released code, its erasing, and how its stages hand over checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.released import Released, error, read
from tests.methods.test_cam import batch, build, image
from wsolkit import Localizer, build_module, load_config
from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.ornet import ORNetNetwork, area_loss, erase_attentively, weighted_entropy_loss
from wsolkit.training.checkpointing import AtomicCheckpointIO


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("ornet", request)


def test_losses_and_gradients_are_the_released_ones(released: Released) -> None:
    maps = released["maps"].requires_grad_()
    entropy = weighted_entropy_loss(maps, released.number("mean"), released.number("deviation"))
    assert error(entropy, released["loss_entropy"]) < 1e-5
    (gradient,) = torch.autograd.grad(entropy, maps)
    assert error(gradient, released["grad_entropy"]) < 1e-4
    class_maps = released["class_maps"].requires_grad_()
    area = area_loss(maps, released["logits"], class_maps, int(released.number("top")))
    assert error(area, released["loss_area"]) < 1e-5
    of_maps, of_classes = torch.autograd.grad(area, [maps, class_maps])
    assert error(of_maps, released["grad_area_maps"]) < 1e-4
    assert error(of_classes.sum(dim=(2, 3)), released["grad_area_class"]) < 1e-4


def test_erasing_covers_part_of_the_peak() -> None:
    """Outside of the peak nothing but the rescaling happens; in it, some pixels are 0."""
    torch.manual_seed(0)
    maps = torch.full((64, 20, 20), 0.1)
    maps[:, 6:16, 6:16] = 0.9
    maps[:, 10, 10] = 1.0
    maps.requires_grad_()
    erased = erase_attentively(maps, probability=0.5, depth=1.0)
    outside = torch.ones(20, 20, dtype=torch.bool)
    outside[6:16, 6:16] = False
    assert torch.equal(erased[:, outside], (0.6 * maps + 0.2)[:, outside])
    touched = (erased == 0).flatten(1).any(dim=1)
    assert 0.3 < touched.float().mean() < 0.7
    (gradient,) = torch.autograd.grad(erased.sum(), maps)
    assert torch.equal(gradient, 0.6 * (erased != 0))


def test_erasing_of_no_image_rescales() -> None:
    maps = torch.rand(3, 8, 6)
    torch.testing.assert_close(erase_attentively(maps, 0.0, 0.5), 0.6 * maps + 0.2)


def test_window_is_at_most_half_the_peak_wide() -> None:
    """A peak of 20×20 around its middle: the window reaches 4 to 9 pixels from it."""
    torch.manual_seed(0)
    maps = torch.zeros(200, 30, 30)
    maps[:, 5:25, 5:25] = 0.9
    maps[:, 15, 15] = 1.0
    zeros = (erase_attentively(maps, 1.0, 1.0) == 0).nonzero()[:, 1:]
    reach = (zeros - 15).abs().amax(dim=0)
    assert reach.min() >= 4
    assert reach.max() <= 9


def save(path: Path, *overrides: str) -> WSOLModule:
    """Write a checkpoint of an untrained model of the built-in data set."""
    torch.manual_seed(len(overrides))
    module = build_module(load_config(*overrides))
    content: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 1}
    module.on_save_checkpoint(content)
    AtomicCheckpointIO().save_checkpoint(content, path)
    return module.eval()


def fine(folder: Path, **changes: str) -> list[str]:
    paths = {"coarse": folder / "coarse.ckpt", "evaluator": folder / "evaluator.ckpt"} | changes
    return ["method=ornet", "method.stage=fine", *(f"method.{name}={path}" for name, path in paths.items())]


@pytest.mark.parametrize("method", ["cam", "ts_cam"])
def test_fine_stage_has_the_coarse_weights_and_the_evaluator_s_logits(method: str, tmp_path: Path) -> None:
    coarse = save(tmp_path / "coarse.ckpt", "method=ornet")
    evaluator = save(tmp_path / "evaluator.ckpt", f"method={method}")
    module = save(tmp_path / "fine.ckpt", *fine(tmp_path))
    weights = module.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in coarse.state_dict().items())
    mean, std = (torch.tensor(values)[:, None, None] for values in (module.description.mean, module.description.std))
    its = [torch.tensor(values)[:, None, None] for values in (evaluator.description.mean, evaluator.description.std)]
    expected = evaluator((image() * std + mean - its[0]) / its[1])
    found = module.localize(image())
    torch.testing.assert_close(found.logits, expected)
    torch.testing.assert_close(found.maps, coarse.localize(image()).maps)

    # Its own checkpoint holds everything, so that the others may be gone.
    for name in ("coarse", "evaluator"):
        (tmp_path / f"{name}.ckpt").unlink()
    again = Localizer.from_checkpoint(tmp_path / "fine.ckpt", device="cpu").module.localize(image())
    torch.testing.assert_close(again.logits, found.logits)
    torch.testing.assert_close(again.maps, found.maps)


def test_fine_stage_trains_the_last_layers_of_the_generator(tmp_path: Path) -> None:
    save(tmp_path / "coarse.ckpt", "method=ornet")
    save(tmp_path / "evaluator.ckpt", "method=cam")
    module = build_module(load_config(*fine(tmp_path))).train()
    own = module.network
    assert isinstance(own, ORNetNetwork)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    losses = module.losses(batch())
    assert losses.keys() == {"loss", "loss_cls", "loss_area", "loss_entropy", "map_area"}
    total = losses["loss_cls"] + 0.02 * losses["loss_area"] + 1.5 * losses["loss_entropy"]
    torch.testing.assert_close(losses["loss"], total)
    losses["loss"].backward()
    learnt = {name.split(".")[2] for name, p in module.named_parameters() if p.grad is not None}
    assert learnt == {"up", "to_map", "norm"}
    assert not any(
        name.startswith("network.generator.up.0.") for name, p in module.named_parameters() if p.requires_grad
    )
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    assert changed  # BatchNorm's statistics, of those layers only
    assert all(
        name.startswith(("network.generator.up.1", "network.generator.up.2", "network.generator.norm"))
        for name in changed
    )


def test_coarse_stage_sees_the_map_only() -> None:
    module = build("ornet").eval()
    own = module.network
    assert isinstance(own, ORNetNetwork)
    with torch.no_grad():
        feature, class_maps, maps, _ = own.all_parts(image())
        before, after = own.backbone.split("stem")
        low = before(image())
        torch.testing.assert_close(after(low * maps[:, None]), feature)
        torch.testing.assert_close(own.generate(image())[1], maps)
    losses = module.losses(batch())
    torch.testing.assert_close(losses["loss"], losses["loss_cls"] + losses["loss_branch"])
    assert (class_maps.shape, maps.shape) == ((2, 8, 16, 16), (2, 16, 16))


def test_checkpoints_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belong to the fine stage"):
        build("ornet", "method.coarse=x.ckpt")
    with pytest.raises(ConfigError, match=r"method\.stage=fine starts from two checkpoints"):
        build("ornet", "method.stage=fine")
    save(tmp_path / "evaluator.ckpt", "method=cam")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        build_module(load_config(*fine(tmp_path)))
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of method=ornet method\.stage=coarse"):
        build_module(load_config(*fine(tmp_path, coarse=str(tmp_path / "evaluator.ckpt"))))
    save(tmp_path / "coarse.ckpt", "method=ornet")
    with pytest.raises(ConfigError, match=r"method\.evaluator knows 8 classes, and the data set has 3"):
        build_module(load_config(*fine(tmp_path)), ["a", "b", "c"])
    with pytest.raises(ConfigError, match="a post-process cannot take gradients"):
        build("ornet", "postprocess=bagcams")


def test_pickled_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"wsolkit": Evil()}, tmp_path / "evaluator.ckpt")
    save(tmp_path / "coarse.ckpt", "method=ornet")
    with pytest.raises(CheckpointError, match="holds pickled code"):
        build_module(load_config(*fine(tmp_path)))
    assert not (tmp_path / "ran").exists()
