"""CutMix against released code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.methods.released import Released, error, read
from tests.methods.test_cam import batch
from wsolkit import load_config
from wsolkit.build import build_augment
from wsolkit.errors import ConfigError
from wsolkit.methods.cutmix import CutMix, mixed_cross_entropy, paste, rectangle


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("cutmix", request)


def test_draws_give_the_released_images_and_losses(released: Released) -> None:
    image, label = released["image"], released["label"]
    for draw, lam in enumerate(released.arrays["lam"].tolist()):
        row, column = released["centre"][draw].tolist()
        box = rectangle(image.shape[2], image.shape[3], lam, row, column)
        assert list(box) == released["box"][draw].tolist()
        permutation = released["permutation"][draw]
        mixed, share = paste(image, permutation, box)
        assert torch.equal(mixed, released["output"][draw])
        assert share == pytest.approx(released["share"][draw].item(), abs=1e-6)
        other = label[permutation]
        assert torch.equal(other, released["label_other"][draw])
        loss = mixed_cross_entropy(released["logits"], label, other, share)
        assert error(loss, released["loss"][draw]) < 1e-5


def test_share_is_that_of_the_pixels() -> None:
    torch.manual_seed(0)
    image = torch.arange(5.0)[:, None, None, None].expand(5, 3, 30, 20).contiguous()
    shares = []
    for _ in range(200):
        mixed = CutMix(beta=1.0, probability=1.0)({"image": image, "label": torch.arange(5)})
        moved = mixed["pasted_label"] != torch.arange(5)
        own = (mixed["image"] == image).float().mean(dim=(1, 2, 3))
        assert own[moved].tolist() == pytest.approx([mixed["own_share"].item()] * int(moved.sum()))
        shares.append(mixed["own_share"].item())
    assert min(shares) < 0.3
    assert max(shares) > 0.9


def test_some_batches_stay_as_they_are() -> None:
    torch.manual_seed(0)
    mixed = [CutMix(beta=1.0, probability=0.3)(batch()) for _ in range(100)]
    changed = sum("pasted_label" in one for one in mixed)
    assert abs(changed - 30) < 4 * math.sqrt(100 * 0.3 * 0.7)


def test_whole_and_empty_rectangles() -> None:
    logits, label, other = torch.randn(2, 4), torch.tensor([0, 1]), torch.tensor([1, 0])
    for lam, share in ((1.0, 1.0), (0.0, 0.0)):
        box = rectangle(8, 8, lam, 4, 4)
        _, found = paste(torch.randn(2, 3, 8, 8), other, box)
        assert found == share
        expected = F.cross_entropy(logits, label if share else other)
        torch.testing.assert_close(mixed_cross_entropy(logits, label, other, found), expected)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("augment.beta=0.0", "augment.beta=0.0: expected a positive number"),
        ("augment.probability=1.1", "augment.probability=1.1: expected 0 to 1"),
    ],
)
def test_settings_are_checked(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_augment(load_config("method=cutmix", setting))
