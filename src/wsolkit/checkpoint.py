"""Read wsolkit's checkpoints, and compose the settings of the model in one.

A checkpoint may come from anywhere, and a setting named `_target_` makes code run. So a checkpoint says only the names
of its method, backbone and data set, which must be YAML files of this installation, and plain values for the settings
that those files have.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from wsolkit.backbones.weights import StateDict
from wsolkit.errors import CheckpointError


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint; a resumed run takes it along from the directory of the run it continues."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning's hook: make the state of the earlier run that of this one, in this one's directory."""
        assert self.dirpath is not None
        earlier, here = Path(state_dict["best_model_path"]), Path(self.dirpath) / f"{self.filename}.ckpt"
        state = dict(state_dict)
        if earlier.is_file() and earlier != here:
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(earlier, here)
            state |= {
                "dirpath": self.dirpath,
                "best_model_path": str(here),
                "kth_best_model_path": str(here),
                "best_k_models": {str(here): state["best_model_score"]},
                "last_model_path": "",
            }
        super().load_state_dict(state)


GROUPS = ("method", "backbone", "dataset", "postprocess")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds beside the trainer's state."""

    path: Path
    state_dict: StateDict
    config: Mapping[str, Any]
    class_names: list[str]
    version: str

    def names(self) -> dict[str, str]:
        """Names of the method, backbone, data set and post-process it was trained with; "none" for none."""
        return choices(self.config)


def choices(config: Mapping[str, Any] | DictConfig) -> dict[str, str]:
    """Names of what settings take from the groups that make a model; "none" for nothing."""
    return {group: _name(config, group) for group in GROUPS}


def _name(config: Mapping[str, Any] | DictConfig, group: str) -> str:
    node = config.get(group)
    return str(node["name"]) if node else "none"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of `python -m wsolkit.train`, without executing anything in it.

    Raises:
        CheckpointError: the file is missing, damaged, of another program, or holds pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint '{path}': runs leave theirs in checkpoints/best.ckpt and last.ckpt"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' holds pickled code, or is damaged; it is not read: {str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).split(". ")[0]
        raise CheckpointError(f"'{path}' cannot be read, perhaps it was cut short ({reason})") from error
    own = content.get("wsolkit") if isinstance(content, dict) else None
    if own is None:
        raise CheckpointError(f"'{path}' is not a checkpoint of wsolkit: expected one from `python -m wsolkit.train`")
    return Checkpoint(path, content["state_dict"], own["config"], own["class_names"], own["version"])


def check_resumable(path: str, cfg: DictConfig) -> None:
    """Check that a checkpoint continues a run of these settings' method, backbone and part of the same data set.

    Raises:
        CheckpointError: it does not, or cannot be read.
    """
    checkpoint = read_checkpoint(path)
    for group, name in checkpoint.names().items():
        own = _name(cfg, group)
        if own != name:
            raise CheckpointError(f"resume={path} is of a run with {group}={name}, these settings say {own}")
    for key in ("classes", "fraction", "shots"):
        saved, given = checkpoint.config["dataset"].get(key), cfg.dataset[key]
        if saved != given:
            raise CheckpointError(f"resume={path} is of a run with dataset.{key}={saved}, these settings say {given}")


def restore(cfg: DictConfig, checkpoint: Checkpoint, overrides: Iterable[str]) -> DictConfig:
    """Put a checkpoint's values into settings composed for its method, backbone and data set.

    Args:
        cfg: settings as composed.
        checkpoint: whose model is to be built. Values of its data set count only if `cfg` has the same data set.
        overrides: what the user gave on the command line, which prevails.
    """
    cfg = cfg.copy()
    saved = checkpoint.config
    groups = [group for group in GROUPS if cfg.get(group) and _name(cfg, group) == _name(saved, group)]
    for derived in (False, True):
        for group in groups:
            _merge(cfg[group], saved[group], derived)
    cfg.dataset.image_size = saved["dataset"]["image_size"]
    cfg.backbone.pretrained, cfg.backbone.weights = False, None  # the weights are in the checkpoint
    for override in OverridesParser.create().parse_overrides(overrides=list(overrides)):
        key, value = override.key_or_group, override.value()
        present = OmegaConf.select(cfg, key, default=cfg)  # a choice from a group that adds nothing, as sweep=…, is not
        if not isinstance(present, DictConfig) or (isinstance(value, dict) and present is not cfg):
            OmegaConf.update(cfg, key, value)
    return cfg


def _merge(node: DictConfig, saved: Mapping[str, Any], derived: bool) -> None:
    """Put saved values into a node: those that stand for themselves, or those that it derives from others.

    A derived value stays so where it comes to the saved one anyway: it then follows what the user overrides.
    """
    for key, value in saved.items():
        if key not in list(node) or str(key).startswith("_"):  # `in node` says no of a value that is required: ???
            continue
        if OmegaConf.is_interpolation(node, key) != derived and not isinstance(value, Mapping):
            continue
        if isinstance(value, Mapping) and isinstance(node[key], DictConfig) and "_target_" in node[key]:
            _merge(node[key], value, derived)
        elif not _mentions_target(value) and not (derived and node[key] == value):
            node[key] = value


def _mentions_target(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(str(key) == "_target_" or _mentions_target(inner) for key, inner in value.items())
    return isinstance(value, list) and any(_mentions_target(inner) for inner in value)
