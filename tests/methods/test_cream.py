"""CREAM beside loops over positions in float64, written after its equations. No released code has the method."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.methods.test_cam import build, image
from wsolkit.errors import ConfigError
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.cream import CREAMNetwork, calibrate, context_means, reactivate

Array = npt.NDArray[np.float64]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(module: WSOLModule) -> CREAMNetwork:
    assert isinstance(module.network, CREAMNetwork)
    return module.network


def cosine(first: Array, second: Array) -> float:
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


def reference_map(feature: Array, foreground: Array, background: Array, rounds: int, temperature: float) -> Array:
    """The mixture of one image [D, H, W], whose components start at two vectors [D]."""
    positions = feature.reshape(len(feature), -1).T
    for turn in range(rounds + 1):
        shares = np.zeros(len(positions))
        for place, vector in enumerate(positions):
            scores = np.exp([cosine(vector, centre) / temperature for centre in (foreground, background)])
            shares[place] = scores[0] / scores.sum()
        if turn < rounds:
            foreground = (shares[:, None] * positions).sum(axis=0) / shares.sum()
            background = ((1 - shares)[:, None] * positions).sum(axis=0) / (1 - shares).sum()
    return shares.reshape(feature.shape[1:])


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_mixture_is_that_of_the_equations(rounds: int) -> None:
    feature, foreground, background = random(2, 5, 3, 4), random(2, 3, 5, seed=1), random(2, 3, 5, seed=2)
    found = reactivate(feature, foreground, background, rounds, 0.3)
    for row in range(2):
        for place in range(3):
            starts = [each[row, place].double().numpy() for each in (foreground, background)]
            expected = reference_map(feature[row].double().numpy(), starts[0], starts[1], rounds, 0.3)
            np.testing.assert_allclose(found[row, place], expected, rtol=1e-4, atol=1e-6)


def test_means_are_those_of_foreground_and_background() -> None:
    feature = torch.arange(8.0).reshape(1, 2, 2, 2)
    cam = torch.tensor([[[-1.0, 3.0], [-0.5, 0.0]]])  # scaled: 0, 1, 0.125, 0.25
    means, counts = context_means(feature, torch.stack([cam, -cam], dim=1), 0.2)
    assert means[0, 0].tolist() == [[2.0, 6.0], [1.0, 5.0]]
    assert counts.tolist() == [[[2, 2], [3, 1]]]


def test_maps_of_the_background_are_turned() -> None:
    cam = torch.tensor([[[[3.0, 0.0]], [[3.0, 0.0]]]])
    maps = torch.tensor([[[[0.9, 0.2]], [[0.1, 0.8]]]])
    torch.testing.assert_close(calibrate(maps, cam), torch.tensor([[[[0.9, 0.2]], [[0.9, 0.2]]]]))


def test_training_moves_the_embeddings_by_momentum() -> None:
    module = build("cream").train()
    own, label = network(module), torch.tensor([3, 5, 3])
    with torch.no_grad():
        feature = own.features(image(3))
        means = context_means(feature, own.class_maps(feature, label[:, None]), 0.2)[0][:, 0]
    module.losses({"image": image(3), "label": label})
    context, visits = own.context, own.visits
    torch.testing.assert_close(context[5], means[1])
    torch.testing.assert_close(context[3], 0.8 * means[0] + 0.2 * means[2])
    assert visits.tolist() == [0, 0, 0, 2, 0, 1, 0, 0]
    before = context.clone()
    module.eval().losses({"image": image(3), "label": label})
    assert torch.equal(own.context, before)
    assert {"network.context", "network.visits"} <= module.state_dict().keys()


def test_constant_class_map_leaves_the_foreground() -> None:
    own = network(build("cream").train())
    torch.nn.init.zeros_(own.classifier.weight)
    own.context.fill_(7.0)
    own.visits.fill_(4.0)
    own.remember(random(1, own.classifier.in_channels, 2, 2), torch.tensor([1]))
    assert (own.context[1, 0] == 7).all()
    assert (own.context[1, 1] != 7).all()


def test_maps_are_made_of_the_class_that_is_asked_for() -> None:
    module = build("cream").eval()
    own = network(module)
    own.context.copy_(random(*own.context.shape))
    own.visits.fill_(1.0)
    with torch.no_grad():
        feature = own.features(image())
        expected = reactivate(feature, own.context[[[2], [5]], 0], own.context[[[2], [5]], 1], 2, 0.3)
        expected = calibrate(expected, own.class_maps(feature, torch.tensor([[2], [5]])))
    assert torch.equal(module.localize(image(), torch.tensor([[2], [5]])).maps, expected)


def test_class_without_embeddings_starts_at_the_image_itself() -> None:
    module = build("cream").eval()
    own, label = network(module), torch.tensor([[2], [5]])
    with torch.no_grad():
        feature = own.features(image())
        cam = own.class_maps(feature, label)
        foreground, background = context_means(feature, cam, 0.2)[0].unbind(dim=2)
        expected = calibrate(reactivate(feature, foreground, background, 2, 0.3), cam)
    assert torch.equal(module.localize(image(), label).maps, expected)


@pytest.mark.parametrize("setting", ["foreground_threshold=1.2", "momentum=-1", "rounds=-1", "temperature=0.0"])
def test_settings_are_checked(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.replace(".", r"\.")):
        build("cream", f"method.{setting}")
