"""Several processes see what one sees: the same losses and gradients, the same metrics, each image once."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from tests import fresh
from tests.conftest import CNN_METHODS, METHODS, TOKEN_METHODS, targets
from tests.fresh import FRESH
from tests.sync_batch_norm import synchronise
from wsolkit import build_datamodule, build_module, load_config
from wsolkit.data.dataset import EachOnce, evaluation_batch
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.sat import batch_area_loss, global_mean
from wsolkit.metrics.evaluation import outcome
from wsolkit.training.evaluator import Evaluator

Part = Callable[..., None]  # of what the processes of a group do together; it is told its rank and their number


def together(world_size: int, part: Part, *arguments: Any) -> None:
    """Do something in several processes that form a group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        FRESH.Process(target=_in_group, args=(rank, world_size, port, part, arguments)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def _in_group(rank: int, world_size: int, port: str, part: Part, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if world_size > 1:
        distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    part(rank, world_size, *arguments)
    if world_size > 1:
        distributed.destroy_process_group()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.randn(8, 3, 64, 64, generator=generator), "label": torch.arange(8), **targets(8)}


def step(world_size: int, rank: int, *settings: str) -> tuple[dict[str, Tensor], WSOLModule]:
    """One process's losses and gradients of a step."""
    torch.manual_seed(0)
    module = build_module(load_config(*settings)).train()
    if world_size > 1:
        synchronise(module.network)
    losses = module.losses({name: value[rank::world_size] for name, value in batch().items()})  # type: ignore[arg-type]
    losses["loss"].backward()
    return {name: value.detach() for name, value in losses.items()}, module


def part_of_step(rank: int, world_size: int, folder: Path, *settings: str) -> None:
    """One process's part of a step; rank 0 saves what DDP would apply: the mean of all gradients."""
    losses, module = step(world_size, rank, *settings)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    for value in (*losses.values(), *gradients.values()):
        assert value is not None
        distributed.all_reduce(value)
        value /= world_size
    if rank == 0:
        torch.save((losses, gradients, dict(module.named_buffers())), folder / "step.pt")


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "settings",
    [
        ["method=sat", "backbone.drop_path_rate=0", "method.area_prior=0.3"],
        ["method=cam"],
    ],
    ids=lambda settings: settings[0],
)
def test_area_and_batch_norm_are_of_the_global_batch(settings: list[str], world_size: int, tmp_path: Path) -> None:
    """SAT's area, and BatchNorm where it is synchronised: losses, gradients, running statistics."""
    losses, module = step(1, 0, *settings)
    together(world_size, part_of_step, tmp_path, *settings)
    actual_losses, gradients, buffers = torch.load(tmp_path / "step.pt")
    for name, value in losses.items():
        assert actual_losses[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    for name, parameter in module.named_parameters():
        expected = parameter.grad
        assert expected is not None
        assert (gradients[name] - expected).abs().max() <= 1e-5 + 1e-4 * expected.abs().max(), name
    for name, value in module.named_buffers():
        assert torch.allclose(buffers[name], value, rtol=1e-4, atol=1e-6), name


def own_settings(method: str) -> list[str]:
    """Of every term of the loss, with what is drawn at random taken out: processes draw differently."""
    own = {
        "spa": ["method.start_epoch=0"],
        "bridging_gap": ["method.warmup_epochs=0", "method.drop_probability=1"],
        "adl": ["method.drop_rate=1"],
        "spg": ["method.dropout=0"],
        "trilite": ["method.localization_dropout=0", "method.classification_dropout=0"],
        "i2c": ["method.dropout=0"],
        "spol": ["method.dropout=0"],
        # With as many samples as positions, no image has enough, and none are drawn.
        "da_wsol": ["method.start_epoch=0", "method.samples=64"],
    }.get(method, [])
    return own if method in (*CNN_METHODS, *TOKEN_METHODS) else [*own, "backbone.drop_path_rate=0"]


def run_every_method(rank: int, world_size: int, folder: Path) -> None:
    for method in METHODS:
        run_apart(rank, world_size, method, folder)


def run_apart(rank: int, world_size: int, method: str, folder: Path) -> None:
    """One process's part of a training batch and of an evaluation; each saves what it comes to."""
    torch.manual_seed(0)
    cfg = load_config(f"method={method}", *own_settings(method), "dataset.records.sizes={train: 16, val: 16, test: 9}")
    module, datamodule = build_module(cfg), build_datamodule(cfg)
    dataset, evaluation = datamodule.dataset("test"), module.attached(Evaluator).evaluation
    order = EachOnce(len(dataset), rank, world_size)  # of 9 images: 3, 2, 2 and 2, so one process has one more step
    module.eval()
    with torch.inference_mode():
        # One by one: the last bits of a map depend on the place of its image among those computed together.
        for images in DataLoader(dataset, sampler=order, batch_size=1, collate_fn=evaluation_batch):
            evaluation.update(images, module.localize, module)
        computed = outcome(evaluation.compute())
    synchronise(module.network)
    part = {name: value[rank::world_size] for name, value in batch().items()}
    if module.pairs:
        part = {name: value.unflatten(0, (-1, 2))[rank::world_size].flatten(0, 1) for name, value in batch().items()}
        part["label"] = part["label"] // 2
    losses = {name: value.detach().clone() for name, value in module.train().losses(part).items()}  # type: ignore[arg-type]
    for value in losses.values() if world_size > 1 else ():
        distributed.all_reduce(value)
    averaged = {name: value / world_size for name, value in losses.items()}
    buffers = {name: value for name, value in module.network.named_buffers() if value.dtype == torch.float32}
    torch.save([averaged, computed.results, computed.curves, buffers], folder / f"{method}_{world_size}_{rank}.pt")


@pytest.fixture(scope="module")
def of_every_method(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every method comes to on one process, and on two."""
    folder = tmp_path_factory.mktemp("methods")
    for world_size in (1, 2):
        together(world_size, run_every_method, folder)
    return folder


@pytest.fixture(scope="module")
def on_four(of_every_method: Path) -> Path:
    """What every method comes to on four processes, beside the above."""
    together(4, run_every_method, of_every_method)
    return of_every_method


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_same_on_two_processes(method: str, of_every_method: Path) -> None:
    assert_same(method, of_every_method, 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_same_on_four_processes(method: str, on_four: Path) -> None:
    assert_same(method, on_four, 4)


def assert_same(method: str, folder: Path, processes: int) -> None:
    """Losses of a global batch, to 1e-5, and what is remembered of it; metrics exactly, of images that the processes do
    not divide evenly.
    """
    losses, results, curves, buffers = torch.load(folder / f"{method}_1_0.pt", weights_only=False)
    for rank in range(processes):
        key = (processes, rank)
        others, other_results, other_curves, other_buffers = torch.load(
            folder / f"{method}_{processes}_{rank}.pt", weights_only=False
        )
        assert others.keys() == losses.keys()
        for name, value in losses.items():
            assert others[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-5), (key, name)
        np.testing.assert_equal(other_results, results, str(key))  # NaN equals NaN here.
        assert other_curves == curves, key
        for name, value in buffers.items():
            difference = (other_buffers[name] - value).abs().max()
            assert difference <= 1e-5 + 1e-4 * value.abs().max(), (key, name)


def statistics(rank: int, world_size: int, folder: Path) -> None:
    module = build_module(load_config("method=cam")).train()
    module(batch()["image"] * (1 + rank))
    before = {name: buffer.clone() for name, buffer in module.network.named_buffers()}
    module.attached(Evaluator).on_validation_start(Trainer(logger=False), module)
    torch.save({"before": before, "after": dict(module.network.named_buffers())}, folder / f"{rank}.pt")


def test_processes_validate_with_the_statistics_of_the_first(tmp_path: Path) -> None:
    """BatchNorm sees other images in each process; what is validated is the network that is saved."""
    together(2, statistics, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert any(not torch.equal(value, second["before"][name]) for name, value in first["before"].items())
    for name, value in first["before"].items():
        assert torch.equal(value, first["after"][name]), name
        assert torch.equal(value, second["after"][name]), name


def test_area_loss_on_one_process_is_plain() -> None:
    maps = torch.rand(3, 4, 4, requires_grad=True)
    assert torch.equal(global_mean(maps), maps.mean())
    batch_area_loss(maps, 0.9).backward()
    assert maps.grad is not None
    assert torch.allclose(maps.grad, torch.full_like(maps, -1 / 48))


def command(name: str, *arguments: str, cwd: Path, processes: int, jobs: int = 0) -> None:
    done = fresh.command(
        *(name, *arguments, "trainer.enable_progress_bar=false"),
        cwd=cwd,
        environment={"OMP_NUM_THREADS": "1"},
        processes=processes,
        jobs=jobs,
    )
    assert done.returncode == 0, done.stderr


def test_metrics_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """Trained on two processes in a multirun of one job; 23 and 20 images, which three processes do not divide."""
    command(
        *(
            "train",
            "-m",
            "method=cam",
            "dataset.records.sizes={train: 32, val: 20, test: 23}",
            "dataset.batch_size=16",
        ),
        *("trainer=cpu", "trainer.devices=2", "trainer.max_epochs=1", "hydra.sweep.dir=sweep", "logger=wandb"),
        "num_examples=0",
        cwd=tmp_path,
        processes=2,
        jobs=1,
    )
    (run,) = (path.parent for path in (tmp_path / "sweep").rglob("metrics.json"))
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1  # two processes, one run
    assert len(list(tmp_path.rglob("checkpoints"))) == 1  # two processes, one directory
    values = json.loads((run / "metrics.json").read_text())
    expected = {name: value for name, value in values.items() if not name.startswith("epochs/")}
    for processes in (1, 3):
        command(
            *("evaluate", f"checkpoint={run}/checkpoints/best.ckpt", "trainer=cpu", f"trainer.devices={processes}"),
            *("num_examples=0", "dataset.eval_batch_size=4", f"hydra.run.dir=evaluation{processes}"),
            cwd=tmp_path,
            processes=processes,
        )
        assert json.loads((tmp_path / f"evaluation{processes}" / "metrics.json").read_text()) == expected
        assert (tmp_path / f"evaluation{processes}" / "images.csv").read_text() == (run / "images.csv").read_text()
