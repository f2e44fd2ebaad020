"""PSOL: DDT against its released arrays, and the regressor with its files."""

from __future__ import annotations

import pytest
import torch

from tests.methods.released import Released, error, read
from wsolkit import build_module, load_config
from wsolkit.errors import ConfigError
from wsolkit.methods.psol import PSOL, PrincipalDirection, box_loss, box_maps, project, projection, pseudo_box
from wsolkit.types import TrainingBatch


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("psol", request)


def test_projection_is_the_released_one_up_to_the_sign(released: Released) -> None:
    found, expected = projection(released["feature"]), released["projection"]
    sign = (found * expected).sum().sign()
    assert error(sign * found, expected) < 1e-6


@pytest.mark.parametrize("sign", ["", "flipped_"])
def test_boxes_are_the_released_ones(released: Released, sign: str) -> None:
    for one, box in zip(released[f"{sign}projection"], released[f"{sign}box"], strict=True):
        torch.testing.assert_close(torch.tensor(pseudo_box(one)), box)


def test_parts_of_a_class_have_the_direction_of_the_whole(released: Released) -> None:
    features, direction = released["feature"], PrincipalDirection()
    for part in features.split([1, 4, 2]):
        direction.add(part)
    mean, component = direction.compute()
    assert error(mean.float(), released["mean"]) < 1e-6
    torch.testing.assert_close(project(features, mean, component), projection(features))


def test_sign_is_that_of_the_middle() -> None:
    """An object in the middle, whose features point to where those of the background do not."""
    features = torch.randn(4, 6, 8, 8) * 0.1
    features[:, 2, 2:6, 3:6] -= 5
    found = projection(features)
    assert found[:, 2:6, 3:6].min() > 0
    assert found[:, :2].max() < 0
    assert pseudo_box(found[0]) == (3 / 8, 2 / 8, 3 / 8, 4 / 8)


def test_one_box_around_pixels_that_touch_at_a_corner_and_the_first_of_equals() -> None:
    maps = torch.zeros(4, 5)
    maps[0, 0] = maps[1, 1] = 1
    maps[2, 4] = maps[3, 4] = 2
    assert pseudo_box(maps) == (0, 0, 0.4, 0.5)
    assert pseudo_box(torch.zeros(4, 5)) == (0, 0, 1, 1)


def test_boxes_become_maps_that_hold_at_least_one_pixel() -> None:
    maps = box_maps(torch.tensor([[0.5, 0.25, 0.25, 0.5], [0.9, 0.9, 0.0, 0.0], [0.5, 0.0, 0.9, 1.0]]), (8, 4))
    assert maps.shape == (3, 8, 4)
    assert torch.equal(maps[0].nonzero(), torch.tensor([[2, 2], [3, 2], [4, 2], [5, 2]]))
    assert torch.equal(maps[1].nonzero(), torch.tensor([[7, 3]]))
    assert torch.equal(maps[2].sum(dim=0), torch.tensor([0.0, 0.0, 8.0, 8.0]))


def test_image_without_a_pseudo_box_adds_nothing_to_the_loss() -> None:
    boxes = torch.full((2, 4), 0.5, requires_grad=True)
    loss = box_loss(boxes, torch.tensor([[0.0, 0.5, 0.5, 1.0], [float("nan")] * 4]))
    assert loss.item() == pytest.approx(2 * 0.25 / 8)
    loss.backward()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()
    assert not boxes.grad[1].any()


def build(*overrides: str) -> PSOL:
    module = build_module(load_config("method=psol", *overrides))
    assert isinstance(module, PSOL)
    return module


def test_loss_is_fifty_times_the_squared_error_and_the_map_is_the_box() -> None:
    torch.manual_seed(0)
    module, image = build().eval(), torch.randn(2, 3, 64, 64)
    feature = module.network.features(image)
    boxes = torch.sigmoid(module.network.regressor(feature.mean(dim=(2, 3))))
    pseudo = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 1.0, 1.0]])
    batch: TrainingBatch = {"image": image, "label": torch.tensor([1, 2]), "pseudo_box": pseudo}
    losses = module.losses(batch)
    own = torch.nn.functional.cross_entropy(module(image), batch["label"])
    torch.testing.assert_close(losses["loss"], 50 * ((boxes - pseudo) ** 2).mean() + own)
    found = module.localize(image, torch.tensor([[0, 3], [1, 2]]))
    assert found.maps.shape == (2, 2, 64, 64)
    for one, box in zip(found.maps, boxes, strict=True):
        rows, columns = one[1].nonzero(as_tuple=True)
        edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 64
        around = torch.cat([box[:2], box[:2] + box[2:]]).clamp(max=1)
        assert (edges - around).abs().max() <= 1 / 64


def test_post_process_is_refused() -> None:
    with pytest.raises(ConfigError, match="a box and no map"):
        build("+postprocess=scg")
