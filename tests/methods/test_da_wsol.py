"""DA-WSOL: the discrepancy against released code, and the clusters beside plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.released import Released, error, read
from tests.methods.test_cam import build, image
from wsolkit.errors import ConfigError
from wsolkit.methods.da_wsol import DAWSOL, draw_members, k_means, mmd, mmd_of_images


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("dawsol", request)


def test_discrepancy_is_the_released_one(released: Released) -> None:
    source, target = (released[name].requires_grad_() for name in ("source", "target"))
    found = mmd(source, target)
    found.backward()
    assert error(found, released["mmd"]) < 2e-4
    assert error(mmd_of_images(source, target), released["mmd_per_image"]) < 2e-4
    assert error(source.grad, released["grad_source"]) < 2e-3
    assert error(target.grad, released["grad_target"]) < 2e-3


def test_samples_that_are_all_alike_have_no_discrepancy() -> None:
    source = torch.ones(2, 4, 3, requires_grad=True)
    found = mmd(source, torch.ones(2, 4, 3))
    found.backward()
    assert found.item() == 0
    assert source.grad is not None
    assert source.grad.isfinite().all()


def test_clusters_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    points = torch.randn(2, 30, 2) + 4 * torch.randint(3, (2, 30, 1))
    starts = torch.tensor([[0.0, 0.0], [4.0, 4.0], [8.0, 8.0]]).expand(2, -1, -1)
    clusters, centres = k_means(points, starts, 20)
    for row in range(2):
        expected = starts[row].clone()
        for _ in range(20):
            nearest = torch.cdist(points[row], expected).argmin(dim=1)
            for number in range(3):
                expected[number] = points[row][nearest == number].mean(dim=0)
        torch.testing.assert_close(centres[row], expected)
        assert torch.equal(clusters[row], torch.cdist(points[row], expected).argmin(dim=1))


def test_empty_cluster_takes_the_farthest_point() -> None:
    points = torch.tensor([[[1.0, 1.0], [1.0, 2.0], [1.0, 6.0], [1.0, 3.0]]])
    clusters, centres = k_means(points, torch.ones(1, 2, 2), 1)
    assert centres.tolist() == [[[1, 2], [1, 6]]]
    assert clusters.tolist() == [[0, 0, 1, 0]]
    _, centres = k_means(torch.ones(1, 4, 2), torch.tensor([[[1.0, 1.0], [9.0, 9.0]]]), 3)
    assert centres.tolist() == [[[1, 1], [1, 1]]]


def test_first_of_two_centres_at_one_place_takes_the_points() -> None:
    torch.manual_seed(0)
    points, start = torch.rand(2, 65, 33), torch.rand(2, 1, 33)
    clusters, _ = k_means(points, torch.cat([torch.zeros_like(start), start, start], dim=1) + 1e-9, 0)
    assert (clusters != 2).all()


def test_only_members_are_drawn_and_each_once() -> None:
    torch.manual_seed(0)
    points, member = torch.arange(10.0).reshape(1, 10, 1), torch.arange(10)[None] % 2 == 1
    drawn = {tuple(sorted(draw_members(points, member, 4).flatten().tolist())) for _ in range(50)}
    assert {number for each in drawn for number in each} == {1, 3, 5, 7, 9}
    assert all(len(set(each)) == 4 for each in drawn)
    assert len(drawn) > 1
    assert draw_members(points, member, 12).shape == (1, 12, 1)


def batch(label: list[int]) -> Any:
    return {"image": image(len(label)), "label": torch.tensor(label)}


def test_running_means_start_with_an_image_and_take_in_centres() -> None:
    """Written out for one class and the universum, of a batch in which a class occurs twice."""
    module = build("da_wsol", "method.start_epoch=0").train()
    assert isinstance(module, DAWSOL)
    own, label = module.network, [2, 5, 2]
    with torch.no_grad():
        points = own.features(image(3)).flatten(2).mT
    mean = points.mean(dim=1)
    starts = torch.stack([torch.zeros_like(mean), mean, mean[[0, 1, 0]]], dim=1)
    _, centres = k_means(points, starts, module.iterations)
    module.losses(batch(label))
    torch.testing.assert_close(own.targets[2], (mean[0] + centres[0, 1] + centres[2, 1]) / 3)
    torch.testing.assert_close(own.targets[5], (mean[1] + centres[1, 1]) / 2)
    torch.testing.assert_close(own.universum[0], centres[:, 0].mean(dim=0))
    assert own.visits.tolist() == [0, 0, 3, 0, 0, 2, 0, 0]
    assert own.universum_visits.tolist() == [3]
    before = own.targets.clone()
    module.eval().losses(batch(label))
    assert torch.equal(own.targets, before)


def losses_of(monkeypatch: pytest.MonkeyPatch, counts: list[tuple[int, int, int]]) -> dict[str, Tensor]:
    """The losses of images whose positions are divided in a given way."""
    module = build("da_wsol", "method.start_epoch=0", "method.samples=4").train()
    clusters = torch.tensor([[0] * u + [1] * s + [2] * t for u, s, t in counts])
    monkeypatch.setattr(type(module.network), "cluster", lambda *_, **__: clusters)
    return module.losses(batch([0] * len(counts)))


def test_images_with_small_clusters_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = losses_of(monkeypatch, [(57, 3, 4), (58, 2, 4), (58, 3, 3), (0, 30, 34)])
    assert found["share_adapted"].item() == 0.5
    assert found["loss_adaptation"].item() != 0
    total = found["loss_cls"] + 0.3 * found["loss_adaptation"] + 2 * found["loss_universum"]
    torch.testing.assert_close(found["loss"], total)
    nothing = losses_of(monkeypatch, [(0, 64, 0), (0, 0, 64)])
    assert nothing["loss_adaptation"].item() == nothing["loss_universum"].item() == 0


def test_first_epoch_classifies_only(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("da_wsol").train()
    assert set(module.losses(batch([0, 1]))) == {"loss", "loss_cls"}
    monkeypatch.setattr(type(module), "current_epoch", 1)
    assert "loss_adaptation" in module.losses(batch([0, 1]))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"method\.samples=1 and method\.iterations=20: expected two samples"):
        build("da_wsol", "method.samples=1")
