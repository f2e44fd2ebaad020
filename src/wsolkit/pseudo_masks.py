"""python -m wsolkit.pseudo_masks checkpoint=PATH output=DIR: make a mask of each training image, for method=spol.

The masks are made from the score map of each image's own class, see `wsolkit.methods.spol.pseudo_mask`. The model is
that of any checkpoint. The output folder holds settings.json and a PNG file for each image, see `wsolkit.data.targets`,
and dataset.train_masks takes it. After an interruption, the same command makes the masks that are missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wsolkit.errors import ConfigError
from wsolkit.settings.checks import check_config
from wsolkit.settings.command import run_command_on_checkpoint
from wsolkit.settings.conf import as_named, given_overrides

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass
class Settings:
    """The settings of conf/pseudo_masks.yaml."""

    checkpoint: str
    output: str
    size: int
    band: list[float]
    least_pixels: int
    shrink: float
    threshold: float
    background: float
    batch_size: int
    device: str
    progress: bool


def pseudo_masks(cfg: DictConfig, folder: Path) -> None:
    """Write the pseudo masks of the training images of `cfg.dataset` into a folder."""
    import torch
    from omegaconf import OmegaConf
    from rich.progress import track

    from wsolkit.build import build_datamodule, build_model
    from wsolkit.checkpoint import read_checkpoint
    from wsolkit.data.records import check_inside
    from wsolkit.data.targets import mask_path, write_mask
    from wsolkit.localizer import device_of
    from wsolkit.methods.spol import pseudo_mask
    from wsolkit.settings.restore import restore
    from wsolkit.system.folders import filling
    from wsolkit.system.libraries import quieten_libraries

    lacking = [name for name in ("checkpoint", "output") if OmegaConf.is_missing(cfg, name) or cfg[name] is None]
    if lacking:
        raise ConfigError(f"required and not given: {lacking[0]}. Add {lacking[0]}=…")
    checkpoint = read_checkpoint(cfg.checkpoint)
    cfg = restore(cfg, checkpoint, given_overrides())
    check_config(cfg, Settings)
    check_mask_settings(cfg)
    quieten_libraries()
    datamodule = build_datamodule(cfg, checkpoint.class_names)
    datamodule.read("train")
    records = datamodule.dataset("train").records
    model = build_model(cfg, checkpoint.class_names)
    checkpoint.load_into(model)
    model = model.eval().to(device_of(cfg.device))
    names = [records.name(index) for index in range(len(records.labels))]
    check_inside(folder, names)
    rules = {name: cfg[name] for name in ("size", "least_pixels", "shrink", "threshold", "background")}
    rules["band"] = list(cfg.band)
    made_with = {
        "command": "pseudo_masks",
        "checkpoint": str(checkpoint.path.absolute()),
        **rules,
        "images": [names[0], names[-1], len(names)],
    }
    with filling(folder, made_with) as complete, torch.inference_mode():
        todo = [] if complete else [at for at, name in enumerate(names) if not mask_path(folder, name).is_file()]
        loader = datamodule.whole_images(todo, cfg.dataset.image_size, cfg.batch_size)
        for batch in track(loader, "Making masks", disable=not cfg.progress):
            label = batch["label"][:, None].to(model.device)
            maps = model.localize(batch["image"].to(model.device), label).maps[:, 0].float().cpu().numpy()
            for index, one in zip(batch["index"].tolist(), maps, strict=True):
                write_mask(folder, names[index], pseudo_mask(one, **rules))
    print(f"{len(names):,} training images have a mask, {len(todo):,} of them new. Written to {as_named(folder)}")
    print(
        f"Train: python -m wsolkit.train method=spol method.stage=segment dataset.train_masks={as_named(folder)} "
        f"method.classifier={as_named(checkpoint.path)} …"
    )


def check_mask_settings(cfg: DictConfig) -> None:
    """Check the ranges of the settings.

    Raises:
        ConfigError: one is out of its range.
    """
    for name in ("size", "least_pixels", "batch_size"):
        if cfg[name] < 1:
            raise ConfigError(f"{name}={cfg[name]}: expected 1 or more")
    if not cfg.shrink > 0:
        raise ConfigError(f"shrink={cfg.shrink}: expected a number above 0")
    for name in ("threshold", "background"):
        if not 0 <= cfg[name] < 1:
            raise ConfigError(f"{name}={cfg[name]}: expected a share of the map's maximum, from 0 to below 1")
    if not (len(cfg.band) == 2 and 0 <= cfg.band[0] < cfg.band[1] <= 1):
        raise ConfigError(
            f"band={list(cfg.band)}: expected the lowest and the highest value of a region, such as [0.1,0.5]"
        )


def main() -> None:
    """Run the command."""
    run_command_on_checkpoint("pseudo_masks", pseudo_masks, stopped="the same command continues")


if __name__ == "__main__":
    main()
