"""Tokens that are computed once, kept in memory or in files, and read in place of images."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer

from tests.conftest import write_listed
from wsolkit import build_datamodule, build_module, load_config
from wsolkit.backbones.tokens import TokenBackbone
from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.tokens import Seen, TokenStore, check_room
from wsolkit.errors import ConfigError, DataError
from wsolkit.methods.base import WSOLModule
from wsolkit.training.tokens import cache_tokens
from wsolkit.types import Tokens

IMAGES = {"train": 10, "val": 4}
SHAPE = (1, 8, 2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_listed(tmp_path_factory.mktemp("listed"), IMAGES)


def run(root: Path, cache: Path | str, *overrides: str, fill: bool = True) -> tuple[WSOLModule, WSOLDataModule]:
    torch.manual_seed(0)
    cfg = load_config(
        *("method=trilite", "dataset=listed", f"dataset.root={root}", "backbone=tokens_micro", "dataset.num_workers=0"),
        *("dataset.image_size=64", "dataset.resize=72", f"backbone.cache={cache}", "dataset.batch_size=5"),
        *("dataset.eval_image_size=null", "backbone.blocks=[-1]", *overrides),
    )
    module, datamodule = build_module(cfg), build_datamodule(cfg)
    if fill:
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
        cache_tokens(module, datamodule, trainer, ("train", "val", "test"))
    return module, datamodule


class Counted:
    """Counts the images that a backbone sees, and may fail after some batches, as a killed process would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_after: int | None = None) -> None:
        self.images, self.fail_after, forward = 0, fail_after, TokenBackbone.forward

        def counted(backbone: TokenBackbone, image: torch.Tensor) -> Tokens:
            if self.fail_after is not None and self.images >= self.fail_after:
                raise KeyboardInterrupt
            self.images += len(image)
            return forward(backbone, image)

        monkeypatch.setattr(TokenBackbone, "forward", counted)


@pytest.mark.parametrize("where", ["memory", "files"])
def test_loaders_give_the_tokens_of_the_images(where: str, folder: Path, tmp_path: Path) -> None:
    """The same numbers as the backbone makes of the images of an evaluation, with the same ground truth."""
    overrides = ["dataset.eval_image_size=[64,96]", "dataset.eval_flip=true"]
    module, cached = run(folder, "memory" if where == "memory" else tmp_path, *overrides)
    _, plain = run(folder, "memory", *overrides, fill=False)
    (batch,), (expected,) = list(cached.test_dataloader()), list(plain.test_dataloader())
    assert len(batch["views"]) == len(expected["views"]) == 4
    for view, image in zip(batch["views"], expected["views"], strict=True):
        assert view.mirrored == image.mirrored
        for part, made in zip(view.image, module.network.backbone(image.image), strict=True):  # type: ignore[operator]
            assert torch.allclose(part, made, atol=2e-3)
    assert torch.equal(batch["label"], expected["label"])
    assert torch.equal(batch["size"], expected["size"])
    for own, other in zip(batch["boxes"], expected["boxes"], strict=True):
        assert (own == other).all()
    seen = [tokens["image"] for tokens in cached.train_dataloader()]
    assert [tokens.patches.shape for tokens in seen] == [(5, 1, 128, 8, 8)] * 2


def test_training_draws_mirror_images_if_their_tokens_are_kept(folder: Path) -> None:
    _, datamodule = run(folder, "memory", "backbone.cache_flip=true")
    plain, mirrored = datamodule.stores["train"]
    assert (plain.seen.mirrored, mirrored.seen.mirrored) == (False, True)
    samples = datamodule._loaded("train")
    drawn = {(epoch, i): samples[epoch, i]["image"] for epoch in range(3) for i in range(IMAGES["train"])}
    again = {key: samples[key]["image"] for key in drawn}
    count = 0
    for (epoch, index), tokens in drawn.items():
        is_plain = (tokens.patches == plain.tokens(index).patches).all()
        assert is_plain or (tokens.patches == mirrored.tokens(index).patches).all()
        assert (again[epoch, index].patches == tokens.patches).all()
        count += int(is_plain)
    assert 5 < count < 25


def test_file_is_shared_by_runs_and_continued_after_a_kill(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Counted(monkeypatch, fail_after=4)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path, "dataset.eval_batch_size=2")
    assert first.images == 4
    monkeypatch.undo()
    second = Counted(monkeypatch)
    run(folder, tmp_path, "dataset.eval_batch_size=2")
    assert second.images == 10 + 4 - 4  # `listed` tests on the images of its val list.
    monkeypatch.undo()
    third = Counted(monkeypatch)
    run(folder, tmp_path, "seed=3", "optimizer.lr=1e-3", "method.background_weight=2.0")
    assert third.images == 0


def test_image_that_changed_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_listed(tmp_path / "listed", IMAGES)
    run(root, tmp_path / "cache")
    image = root / "train" / "image 3, x.png"
    image.write_bytes((root / "train" / "image 4, x.png").read_bytes())
    os.utime(image, (1, 1))
    counted = Counted(monkeypatch)
    _, datamodule = run(root, tmp_path / "cache")
    assert counted.images == 1
    (store,) = datamodule.stores["train"]
    assert (store.tokens(3).patches == store.tokens(4).patches).all()


@pytest.mark.parametrize(
    "changed",
    ["backbone.blocks=[-2]", "backbone.norm=true", "backbone.mean=[0,0,0]", "dataset.image_size=56", "weights"],
)
def test_tokens_of_other_settings_are_never_taken(
    changed: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, tmp_path)
    counted = Counted(monkeypatch)
    if changed == "weights":
        seed = torch.manual_seed
        monkeypatch.setattr(torch, "manual_seed", lambda number: seed(number + 1))
        run(folder, tmp_path)
    else:
        run(folder, tmp_path, changed)
    assert counted.images == 14


def test_too_little_room_is_named_before_anything_is_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, datamodule = run(folder, "memory")
    records = datamodule.dataset("train").records
    seen = Seen("train", 64, False)
    large = (1, 1000, 100, 100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(DataError, match="the tokens take .* GiB more, and .* GiB left: make room"):
        check_room([TokenStore(records, seen, "", 8, large, tmp_path / "new")], 0)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match=r"cache=memory: the tokens take .* use backbone\.cache=DIR"):
        check_room([TokenStore(records, seen, "", 8, large, None)], 1000)


def test_images_that_do_not_come_from_files_are_kept_in_memory_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"do not come from files.*use backbone\.cache=memory"):
        TokenStore(
            build_datamodule(load_config()).dataset("test").records, Seen("test", 64, False), "", 8, SHAPE, tmp_path
        )


def test_full_disk_keeps_what_was_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: TokenStore, *given: object) -> None:
        written(self, *given)  # type: ignore[arg-type]
        raise DataError("backbone.cache: cannot write")

    written = TokenStore.write
    monkeypatch.setattr(TokenStore, "write", full)
    with pytest.raises(DataError, match="cannot write"):
        run(folder, tmp_path, "dataset.eval_batch_size=4")
    monkeypatch.undo()
    counted = Counted(monkeypatch)
    run(folder, tmp_path)
    assert counted.images == 10
