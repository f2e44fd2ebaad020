"""Trouble in training is named, and costs no more than the steps since the last checkpoint."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from tests.fresh import FRESH, command
from tests.test_commands import TINY, config, weights
from tests.test_resume import _train, finish, stop
from wsolkit.checkpoint import is_whole, read_checkpoint
from wsolkit.data.benchmarks.shapes import ShapesRecords
from wsolkit.errors import CheckpointError, TrainingError
from wsolkit.methods.sat import SAT
from wsolkit.settings.overrides import as_overrides
from wsolkit.train import train
from wsolkit.types import TrainingBatch

SETTINGS = ("trainer.max_epochs=3", "resume=auto", "checkpoints.every_n_steps=1")


def change_losses(monkeypatch: pytest.MonkeyPatch, change: Callable[[SAT, TrainingBatch, Tensor], Tensor]) -> None:
    losses = SAT.losses

    def changed(self: SAT, batch: TrainingBatch) -> dict[str, Tensor]:
        terms = losses(self, batch)
        return terms | {"loss": change(self, batch, terms["loss"])}

    monkeypatch.setattr(SAT, "losses", changed)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The metrics of a run without trouble."""
    return train(config(*SETTINGS), tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize("every_n_steps", [1, 100])
def test_loss_that_is_not_finite_stops_the_run(
    every_n_steps: int, expected: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is seen at once or when a checkpoint is due: the checkpoint is from before, the images are named."""
    given: list[Tensor] = []

    def spoil(self: SAT, batch: TrainingBatch, loss: Tensor) -> Tensor:
        if self.global_step == 4:
            given.append(batch["image"])
        return loss * float("nan") if self.global_step == 4 else loss

    change_losses(monkeypatch, spoil)
    settings = (*SETTINGS, f"trainer.log_every_n_steps={every_n_steps}")
    with pytest.raises(
        TrainingError, match=r"not finite in epoch 1, batch 1 \(images (.*) and 11 more\). Set"
    ) as error:
        train(config(*settings), tmp_path / "run")
    monkeypatch.undo()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last).step == 4
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())

    from wsolkit import build_datamodule

    datamodule = build_datamodule(config())
    dataset = datamodule.dataset("train")
    named = str(error.value).partition("(images ")[2].partition(" and")[0].split(", ")
    assert named == datamodule.training_images(1, 1)[:5]
    names = [dataset.records.name(index) for index in range(len(dataset))]
    from wsolkit.data.pixels import normalised_batch

    seen = normalised_batch([dataset[1, names.index(name)]["image"] for name in datamodule.training_images(1, 1)])
    assert torch.equal(seen, given[0])
    assert train(config(*SETTINGS), tmp_path / "run") == expected


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient can be infinite where the loss is not."""

    def steepen(self: SAT, batch: TrainingBatch, loss: Tensor) -> Tensor:
        parameter = next(self.network.parameters())
        return loss + (0 * parameter.sum()).sqrt() if self.global_step == 4 else loss

    change_losses(monkeypatch, steepen)
    with pytest.raises(
        TrainingError, match="weights are not finite after step 5: the loss was finite, but not its gradient"
    ):
        train(config(*SETTINGS), tmp_path)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt").step == 4


def test_full_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(self: SAT, batch: TrainingBatch, loss: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    change_losses(monkeypatch, fill)
    with pytest.raises(TrainingError, match=r"no memory left with dataset.batch_size=16. .*batch_size=auto finds out"):
        train(config(*SETTINGS), tmp_path)
    with pytest.raises(TrainingError, match="not even one image of 64 pixels fits into the memory of cpu"):
        train(config(*SETTINGS, "fit_memory=true"), tmp_path)


def test_batch_is_divided_until_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dataset.batch_size=auto: the same as giving the number of parts."""
    expected = train(config(*SETTINGS, "trainer.accumulate_grad_batches=4"), tmp_path / "given")

    def fill(self: SAT, batch: TrainingBatch, loss: Tensor) -> Tensor:
        if len(batch["label"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    change_losses(monkeypatch, fill)
    assert as_overrides(["dataset.batch_size=auto"], ()) == ["fit_memory=true"]
    assert train(config(*SETTINGS, "fit_memory=true"), tmp_path / "found") == expected
    for name, value in weights(tmp_path / "given").items():
        assert torch.equal(weights(tmp_path / "found")[name], value), name


def test_loader_process_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = ShapesRecords.image

    def die(self: ShapesRecords, index: int) -> Any:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return image(self, index)

    monkeypatch.setattr(ShapesRecords, "image", die)
    with pytest.raises(
        TrainingError, match=r"a process that loads images died \(number \d+\)\. .* smaller dataset.num_w"
    ):
        train(config(*SETTINGS, "dataset.num_workers=1"), tmp_path)


def _train_on_a_full_disk(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))  # checkpoints have more than half a MiB
    try:
        _train(folder, ())
    except CheckpointError as error:
        (folder / "error").write_text(str(error))


def test_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stop(folder, 7, tmp_path, "checkpoints.requeue=false")
    process = FRESH.Process(target=_train_on_a_full_disk, args=(folder,))
    process.start()
    finish(process, folder)
    said = (folder / "error").read_text()
    assert "last.ckpt' cannot be written (" in said
    assert "MiB are free there. Make room and continue from the checkpoint before with resume=auto" in said
    assert is_whole(folder / "checkpoints" / "last.ckpt")
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt").step == 8
    assert not list((folder / "checkpoints").glob(".*"))  # nothing half written


def test_run_goes_on_where_wandb_cannot_be_reached(tmp_path: Path) -> None:
    """Nobody listens on port 9; the run is kept, to be sent later."""
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "a", "WANDB_INIT_TIMEOUT": "5"}
    given = (*TINY, "logger=wandb", "trainer.max_epochs=1", "hydra.run.dir=run")
    done = command("train", *given, cwd=tmp_path, environment=nobody | {"WANDB_MODE": "online"})
    assert done.returncode == 0, done.stderr
    assert "W&B cannot be reached, or does not accept your login" in done.stderr
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"val/maxboxacc/max_box_acc" in offline.read_bytes()
