"""I²C against released code, and the batches of pairs that it needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.methods.released import Released, error, read
from tests.methods.test_cam import build, image
from wsolkit import build_datamodule, load_config
from wsolkit.data.dataset import GlobalBatches, pairs_of_classes
from wsolkit.errors import ConfigError, DataError
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.i2c import class_centres, global_loss, local_loss, object_seeds, update_bank


@pytest.fixture(params=["reduced", "full"])
def released(request: pytest.FixtureRequest) -> Released:
    return read("i2c", request)


def class_maps(released: Released, averaged: Tensor) -> Tensor:
    state = released.state("state/")
    hidden = averaged
    for name in ("cls_fc6.0", "cls_fc7.0"):
        hidden = F.conv2d(hidden, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu()
    return F.conv2d(hidden, state["cls_fc8.weight"], state["cls_fc8.bias"])


@pytest.mark.parametrize("step", [0, 1])
def test_steps_are_the_released_ones(released: Released, step: int) -> None:
    label, feature = released["label"], released[f"{step}/feature"].requires_grad_()
    averaged = F.avg_pool2d(feature, 3, 1, 1)
    maps = class_maps(released, averaged)
    seeds = object_seeds(maps, label, int(released.number("num_seeds")))
    assert torch.equal(seeds, released[f"{step}/seeds"])
    local, centres = local_loss(averaged, seeds), class_centres(averaged, seeds)
    assert error(local, released[f"{step}/loss_local"]) < 2e-4
    assert error(centres, released[f"{step}/centres"]) < 2e-4
    bank = released[f"{step}/bank_before"]
    towards_bank = global_loss(bank, label, centres)
    assert error(towards_bank, released[f"{step}/loss_global"]) < 2e-4
    moved, visits = update_bank(bank, released[f"{step}/visits_before"], label, centres)
    assert error(moved, released[f"{step}/bank_after"]) < 2e-4
    assert torch.equal(visits, released[f"{step}/visits_after"])
    assert torch.equal(bank, released[f"{step}/bank_before"])
    loss = F.cross_entropy(maps.mean(dim=(2, 3)), label)
    loss = loss + released.number("local_weight") * local + released.number("global_weight") * towards_bank
    assert error(loss, released[f"{step}/loss"]) < 2e-4
    if f"{step}/grad_feature" in released:
        loss.backward()
        gradient = released[f"{step}/grad_feature"]
        assert feature.grad is not None
        assert error(feature.grad[: len(gradient)], gradient) < 2e-3


def test_seeds_are_taken_again_from_the_start() -> None:
    maps = torch.zeros(2, 3, 2, 4)
    maps[0, 1, 1, 1], maps[0, 1, 0, 2] = 5.0, 4.0  # two seeds
    assert object_seeds(maps, torch.tensor([1, 0]), 5).tolist() == [[2, 5, 2, 5, 2], [0, 1, 2, 3, 4]]


def bank_of(module: WSOLModule) -> tuple[Tensor, Tensor]:
    state = module.state_dict()
    return state["network.bank"].clone(), state["network.visits"].clone()


def test_training_moves_the_bank_and_evaluation_does_not() -> None:
    module = build("i2c")
    pairs = {"image": image(4), "label": torch.tensor([3, 3, 6, 6])}
    before, _ = bank_of(module)
    module.eval().losses(pairs)  # type: ignore[arg-type]
    assert torch.equal(bank_of(module)[0], before)
    module.train().losses(pairs)["loss"].backward()  # type: ignore[arg-type]
    after, visits = bank_of(module)
    assert visits.nonzero().flatten().tolist() == [3, 6]
    assert (after != before).all(dim=1).nonzero().flatten().tolist() == [3, 6]


@pytest.mark.parametrize("counts", [[4, 4], [5, 1, 2], [1], [3, 3, 7]])
def test_an_epoch_pairs_every_image(counts: list[int]) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)) * 3, counts))
    pairs = pairs_of_classes(labels, np.random.default_rng(0))
    assert (labels[pairs[:, 0]] == labels[pairs[:, 1]]).all()
    times = np.bincount(pairs.ravel(), minlength=len(labels))
    assert times.min() >= 1
    assert times.sum() == sum(count + count % 2 for count in counts)
    alone = [label for label, count in enumerate(counts) if count == 1]
    assert set(labels[pairs[pairs[:, 0] == pairs[:, 1], 0]] // 3) == set(alone)


def batches(labels: list[int], size: int, world_size: int = 1, skip: int = 0) -> list[list[list[int]]]:
    """The batches of the second epoch, of each process."""
    found = []
    for rank in range(world_size):
        own = GlobalBatches(len(labels), size, 5, rank, world_size, np.array(labels))
        own.epoch, own.skip = 1, skip
        found.append([[index for _, index in batch] for batch in own])
    return found


def test_processes_share_the_pairs_of_a_batch() -> None:
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 0, 1, 2]  # odd: three images of class 2, and five of the others
    (whole,) = batches(labels, 8)
    assert [len(batch) for batch in whole] == [8, 8]  # nine pairs, of which one is left out
    for batch in whole:
        assert [labels[index] for index in batch[0::2]] == [labels[index] for index in batch[1::2]]
    parts = batches(labels, 8, world_size=2)
    for number, batch in enumerate(whole):
        pairs = [batch[place : place + 2] for place in range(0, 8, 2)]
        assert parts[0][number] == pairs[0] + pairs[2]
        assert parts[1][number] == pairs[1] + pairs[3]
    assert batches(labels, 8, skip=1)[0] == whole[1:]


def test_data_of_the_method_come_in_pairs() -> None:
    cfg = load_config("method=i2c", "dataset.records.sizes={train: 31, val: 2, test: 2}", "dataset.batch_size=8")
    module = build_datamodule(cfg)
    seen = [batch["label"] for batch in module.train_dataloader()]
    assert len(seen) >= 4
    assert all(torch.equal(label[0::2], label[1::2]) for label in seen)
    assert len(module.training_images(0, 1)) == 8
    cfg.dataset.batch_size = 7
    with pytest.raises(ConfigError, match="batch_size=7 is the global batch: it must be a multiple of 1 devices"):
        build_datamodule(cfg).train_dataloader()
    with pytest.raises(DataError, match="in pairs of one class, cannot be spread over 3 processes"):
        GlobalBatches(4, 8, 0, 0, 3, np.array([0, 0, 1, 1]))


def test_other_methods_take_images_one_by_one() -> None:
    assert not build_datamodule(load_config("method=cam")).pairs
