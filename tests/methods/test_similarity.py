"""The walk over the similarity of patches, written out, and in every method on a transformer."""

from __future__ import annotations

import math

import pytest
import torch

from tests.conftest import CNN_METHODS, METHODS
from wsolkit import build_module, load_config
from wsolkit.errors import ConfigError
from wsolkit.methods.similarity import similarity_walk


def test_walk_is_the_written_out_one() -> None:
    """In double precision, position by position, on a grid that is not square."""
    torch.manual_seed(0)
    maps, feature = torch.rand(2, 3, 2, 4), torch.randn(2, 5, 2, 4)
    walked = similarity_walk(maps, feature, temperature=0.2, steps=2)
    for image in range(2):
        tokens = feature[image].double().flatten(1)
        centred = (tokens - tokens.mean(dim=1, keepdim=True)).T
        unit = [row / row.norm() for row in centred]
        weights = [[math.exp(float(a @ b) / 0.2) for b in unit] for a in unit]
        for channel in range(3):
            scores = maps[image, channel].double().flatten().tolist()
            for _ in range(2):
                scores = [sum(w * s for w, s in zip(row, scores, strict=True)) / sum(row) for row in weights]
            expected = torch.tensor(scores).reshape(2, 4)
            assert torch.allclose(walked[image, channel].double(), expected.double(), atol=1e-6)


def test_walk_leaves_a_constant_map_alone_and_no_map_its_range() -> None:
    feature = torch.randn(1, 4, 3, 3)
    constant = torch.full((1, 1, 3, 3), 0.25)
    assert torch.allclose(similarity_walk(constant, feature, 0.1, 3), constant)
    maps = torch.rand(1, 2, 3, 3)
    walked = similarity_walk(maps, feature, 0.1, 3)
    assert maps.amin() <= walked.amin()
    assert walked.amax() <= maps.amax()


def test_patches_that_are_all_alike_give_the_mean() -> None:
    maps = torch.rand(1, 1, 2, 2)
    walked = similarity_walk(maps, torch.ones(1, 4, 2, 2), 0.1, 1)
    assert torch.allclose(walked, maps.mean().expand_as(walked))


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(CNN_METHODS)))
def test_every_method_on_a_transformer_takes_it(method: str) -> None:
    image = torch.randn(2, 3, 64, 64)
    label = torch.tensor([[0, 3], [1, 2]])
    found = []
    for chosen in ("none", "similarity"):
        torch.manual_seed(0)
        module = build_module(load_config(f"method={method}", "dataset=shapes", f"postprocess={chosen}")).eval()
        found.append(module.localize(image, label))
    plain, refined = found
    assert torch.equal(plain.logits, refined.logits)
    assert plain.maps.shape == refined.maps.shape == (2, 2, 8, 8)
    assert not torch.allclose(plain.maps, refined.maps)
    assert refined.maps.std() < plain.maps.std()


def test_networks_and_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="postprocess=similarity refines the maps of methods on vision transformers"):
        build_module(load_config("method=cam", "postprocess=similarity"))
    with pytest.raises(ConfigError, match="temperature=0.0 and steps=2: expected a temperature above 0"):
        build_module(load_config("method=sat", "postprocess=similarity", "postprocess.temperature=0.0"))
