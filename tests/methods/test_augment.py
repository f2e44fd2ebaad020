"""Every method trains on changed images and mixed labels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.conftest import CNN_METHODS, METHODS, TOKEN_METHODS
from tests.methods.test_cam import batch, build, image
from wsolkit import load_config
from wsolkit.build import build_augment
from wsolkit.errors import ConfigError
from wsolkit.methods.cutmix import CutMix


# CutMix's recipe has settings for its own transform, which HaS does not take.
@pytest.mark.parametrize("method", [name for name in METHODS if name not in (*TOKEN_METHODS, "cutmix")])
def test_every_method_trains_on_changed_images(method: str) -> None:
    module = build(method, "augment=has", "augment.cells=[8]").train()
    seen: list[Any] = []
    losses = module.losses

    def watched(given: Any) -> dict[str, torch.Tensor]:
        seen.append(given)
        return losses(given)

    module.losses = watched  # type: ignore[assignment]
    given = batch()
    hidden = module.training_step(given, 0)
    module.augment = CutMix(beta=1.0, probability=1.0)
    mixed = module.training_step(given, 0)
    (hidden + mixed).backward()
    assert hidden.isfinite()
    assert mixed.isfinite()
    assert [set(one) - set(given) for one in seen] == [set(), {"pasted_label", "own_share"}]
    assert all(not torch.equal(one["image"], given["image"]) for one in seen)
    module.eval().localize(image())  # An evaluation does not change images.
    assert len(seen) == 2


@pytest.mark.parametrize("method", [name for name in METHODS if name not in TOKEN_METHODS])
def test_classification_is_mixed_in_every_method(method: str) -> None:
    """If all of an image is its own, the loss is the plain one. It is linear in the share."""
    module = build(method, "backbone.batch_norm=frozen" if method in CNN_METHODS else "backbone.drop_path_rate=0")
    module.train()
    given = batch()
    before = copy.deepcopy(module.state_dict())  # Some methods remember what they have seen.

    def loss(**pasted: Any) -> float:
        torch.manual_seed(1)
        module.load_state_dict(before)
        return module.losses({**given, **pasted})["loss"].item()  # type: ignore[typeddict-item]

    pasted_label = given["label"].flip(0)
    own, half, other = (loss(pasted_label=pasted_label, own_share=torch.tensor(share)) for share in (1.0, 0.5, 0.0))
    assert own == pytest.approx(loss(), rel=1e-5)
    assert half == pytest.approx((own + other) / 2, rel=1e-4)
    assert other != pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("augment", ["has", "cutmix"])
def test_methods_on_tokens_refuse(augment: str) -> None:
    """Their images are gone when they train."""
    for method in TOKEN_METHODS:
        with pytest.raises(ConfigError, match=f"augment={augment} changes images, and method={method} trains on"):
            build_augment(load_config(f"method={method}", f"augment={augment}"))


def test_plus_before_the_group_is_not_needed() -> None:
    assert load_config("+augment=has") == load_config("augment=has")
