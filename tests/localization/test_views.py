"""Evaluation in several views of an image: sizes, and mirror images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import METHODS
from wsolkit import build_datamodule, build_module, load_config
from wsolkit.data.dataset import evaluation_batch
from wsolkit.errors import ConfigError
from wsolkit.localization.inputs import localize_views, network_views
from wsolkit.localization.maps import min_max
from wsolkit.methods.maps import choose_classes, select_maps
from wsolkit.types import Classes, Localization, View


def localize(image: Tensor, classes: Classes) -> Localization:
    """Three classes, one for each channel: its logit is the mean, and its map the channel at a quarter of the size."""
    logits, maps = image.mean(dim=(2, 3)), F.avg_pool2d(image, 4)
    return Localization(logits, select_maps(maps, choose_classes(classes, logits)))


def test_one_view_is_what_the_method_gives() -> None:
    image, label = torch.rand(2, 3, 8, 8), torch.tensor([[1], [2]])
    found = localize_views([View(image, False)], localize, label)
    assert torch.equal(found.maps, localize(image, label).maps)


def test_views_are_averaged_on_the_finest_grid() -> None:
    image, larger, label = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16), torch.tensor([[1], [2]])
    views = [View(image, False), View(larger, False), View(larger.flip(-1), True)]
    found = localize_views(views, localize, label)
    small = F.interpolate(F.avg_pool2d(image, 4), size=(4, 4), mode="bilinear")
    maps = [min_max(one)[[0, 1], [1, 2]] for one in (small, F.avg_pool2d(larger, 4), F.avg_pool2d(larger, 4))]
    assert torch.allclose(found.maps[:, 0], torch.stack(maps).mean(dim=0), atol=1e-6)
    assert torch.equal(found.logits, image.mean(dim=(2, 3)))  # those of the first size


def test_predicted_class_is_that_of_the_mean_logits() -> None:
    """The first view alone would say class 0, the second class 1, and their mean says class 2."""
    first, second = (torch.zeros(1, 3, 8, 8) for _ in range(2))
    first[:, 0], first[:, 2] = 1.0, 0.9
    second[:, 1], second[:, 2] = 1.0, 0.9
    second[:, 2, 0, 0] = 5.0
    views = [View(first, False), View(second, False)]
    for classes in (None, lambda logits: logits.argmax(dim=1, keepdim=True)):
        found = localize_views(views, localize, classes)
        assert found.logits.argmax().item() == 2
        assert torch.equal(found.maps, localize_views(views, localize, torch.tensor([[2]])).maps)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_localizes_at_other_sizes(method: str) -> None:
    cfg = load_config(f"method={method}", "dataset=shapes", "dataset.eval_image_size=[64,96]", "dataset.eval_flip=true")
    cfg.dataset.records.sizes = {"train": 2, "val": 2, "test": 2}
    module, dataset = build_module(cfg).eval(), build_datamodule(cfg).dataset("test")
    batch = evaluation_batch([dataset[0, 0], dataset[0, 1]])
    views = network_views(batch, "resize")
    assert [(view.image.shape[-1], view.mirrored) for view in views] == [
        (64, False),
        (64, True),
        (96, False),
        (96, True),
    ]
    assert torch.equal(views[0].image, batch["image"])
    assert torch.equal(views[1].image, batch["image"].flip(-1))
    found = localize_views(views, module.localize, batch["label"][:, None])
    grids = [module.localize(view.image, batch["label"][:, None]).maps.shape[-1] for view in views]
    assert found.maps.shape == (2, 1, max(grids), max(grids))
    assert max(grids) > min(grids)
    mirrored = [View(view.image.flip(-1), view.mirrored) for view in views]
    turned = localize_views(mirrored, module.localize, batch["label"][:, None])
    assert torch.allclose(turned.maps.flip(-1), found.maps, atol=1e-4)


def test_cropping_protocols_see_the_same_part_at_every_size() -> None:
    cfg = load_config("method=sat", "dataset=shapes", "protocol=[sat]", "dataset.eval_image_size=[128]")
    cfg.dataset.records.sizes = {"train": 2, "val": 2, "test": 2}
    dataset = build_datamodule(cfg).dataset("test")
    batch = evaluation_batch([dataset[0, 0], dataset[0, 1]])
    (view,) = network_views(batch, "center_crop")
    uncropped = batch["uncropped"]
    assert uncropped is not None
    assert view.image.shape[-1] == 128
    shrunk = F.avg_pool2d(view.image, 2)
    inside = uncropped[..., 4:-4, 4:-4]
    assert (shrunk - inside).abs().mean() < 0.5 * (shrunk - batch["image"]).abs().mean()


def test_sizes_are_checked_before_training() -> None:
    with pytest.raises(
        ConfigError, match="eval_image_size: 60 is not a multiple of the patch size 8 of backbone=vit_micro"
    ):
        build_module(load_config("dataset=shapes", "dataset.eval_image_size=60"))
    with pytest.raises(ConfigError, match=r"dataset\.eval_image_size=\[\]: expected one size or more"):
        build_datamodule(load_config("dataset=shapes", "dataset.eval_image_size=[]")).dataset("test")
    with pytest.raises(ConfigError, match=r"dataset\.eval_image_size=0: expected 1 or more"):
        build_datamodule(load_config("dataset=shapes", "dataset.eval_image_size=0"))
