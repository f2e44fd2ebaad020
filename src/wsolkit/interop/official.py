"""Read the checkpoints that papers released."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from wsolkit.build import attach_training, build_model
from wsolkit.errors import CheckpointError
from wsolkit.methods.base import WSOLModule
from wsolkit.settings.compose import load_config

# These entries of released state dicts have other names here. All other entries belong to timm's DeiT.
_NAMES = {
    r"head\.(weight|bias)": r"network.head.\1",
    r"loc_token": r"network.spatial_token",
    r"loc_embed": r"network.spatial_embed",
    r"layers\.(\d+)\.thred": r"calibration.blocks.\1.threshold",
    r"layers\.(\d+)\.fuse\._loss_rate": r"calibration.blocks.\1.semantic_weight",
    r"(.*)": r"network.backbone.network.\1",
}
_RELEASED = {
    r"network\.head\.(.*)": r"head.\1",
    r"network\.spatial_(.*)": r"loc_\1",
    r"calibration\.blocks\.(\d+)\.threshold": r"layers.\1.thred",
    r"calibration\.blocks\.(\d+)\.semantic_weight": r"layers.\1.fuse._loss_rate",
    r"(?:network\.backbone\.network\.)?(.*)": r"\1",
}
# SAT's fixed filter is a setting here.
_IGNORED = {"weight"}
# The papers use DeiTs with these widths.
_DEITS = {192: "deit_tiny", 384: "deit_small", 768: "deit_base"}


def from_official(
    state_dict: Mapping[str, Tensor], method: Literal["ts_cam", "scm", "sat"], num_heads: int | None = None
) -> WSOLModule:
    """Build a module from the state dict of a paper's released model. The tensors determine the sizes.

    Args:
        state_dict: the released entries, with or without a "module." prefix.
        method: the method of the model.
        num_heads: the number of attention heads. None takes as many as DeiT has at that width, one per 64 channels.

    Returns:
        the module in evaluation mode, without stochastic depth. Other settings come from `conf/method`.

    Raises:
        CheckpointError: the entries do not belong to the method's released model.

    >>> import torch
    >>> from wsolkit.interop import from_official
    >>> module = from_official(torch.load("ts_cam.pth", weights_only=True), "ts_cam", num_heads=3)
    >>> module(torch.zeros(1, 3, 224, 224)).shape
    torch.Size([1, 7])
    """
    cfg = fitted(load_config(f"method={method}", "~recipe", "backbone=deit_small"), state_dict, num_heads)
    cfg.dataset.resize = cfg.dataset.image_size
    return attach_training(cfg, build_official(cfg, state_dict))


def fitted(cfg: DictConfig, state_dict: Mapping[str, Tensor], num_heads: int | None = None) -> DictConfig:
    """Return the settings of a method on DeiT with the sizes in the state dict of a released model.

    Raises:
        CheckpointError: the state dict does not belong to the method's released model.
    """
    method = cfg.method.name
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    try:
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        embed_dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
        grid = math.isqrt(state["pos_embed"].shape[1] - 1)
        num_classes = state["head.weight"].shape[0]
        mlp_ratio = state["blocks.0.mlp.fc1.bias"].numel() / embed_dim
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"not a released {method} model: entry {error} is missing. It has {', '.join(sorted(state)[:4])}, …"
        ) from error
    num_heads = num_heads or embed_dim // 64
    if num_heads == 0 or embed_dim % num_heads:
        raise CheckpointError(f"{num_heads} attention heads do not divide a width of {embed_dim}: give num_heads=…")
    options = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth}
    settings: dict[str, Any] = {
        "backbone.pretrained": False,
        "backbone.drop_path_rate": 0.0,
        "backbone.options": options | {"num_heads": num_heads, "mlp_ratio": mlp_ratio},
        "dataset.image_size": grid * patch_size,
        "dataset.num_classes": num_classes,
    }
    if embed_dim in _DEITS:
        settings |= {"backbone.name": _DEITS[embed_dim]}
        settings |= {"backbone.model": f"{_DEITS[embed_dim]}_patch16_224.fb_in1k"}
    if method == "scm":
        num_blocks = len({name.split(".")[1] for name in state if name.startswith("layers.")})
        if not num_blocks:
            raise CheckpointError(
                "not a released scm model: it has no diffusion blocks (entry layers.0.thred). Is it a ts_cam model?"
            )
        # The released model has 16 iterations in the first block, and 4 in the others.
        settings |= {"method.num_blocks": num_blocks, "method.iterations": ([16] + [4] * num_blocks)[:num_blocks]}
    cfg = cfg.copy()
    for name, value in settings.items():
        OmegaConf.update(cfg, name, value, merge=False)
    return cfg


def build_official(
    cfg: DictConfig, state_dict: Mapping[str, Tensor], class_names: list[str] | None = None
) -> WSOLModule:
    """Build the module of `fitted` settings, and give it the weights of a released model.

    Raises:
        CheckpointError: the entries do not belong to the method's released model.
    """
    module = build_model(cfg, class_names)
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    names = {_own_name(name): name for name in state if name not in _IGNORED}
    try:
        missing, unknown = module.load_state_dict({own: state[name] for own, name in names.items()}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"not a released {cfg.method.name} model: {error}") from error
    if missing or unknown:
        raise CheckpointError(
            f"not a released {cfg.method.name} model: entries missing: {_listed(map(_released_name, missing))}; "
            f"entries unknown: {_listed(names[own] for own in unknown)}"
        )
    return module.eval()


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "") if found else "none"


def _released_name(own: str) -> str:
    return next(match.expand(name) for pattern, name in _RELEASED.items() if (match := re.fullmatch(pattern, own)))


def _own_name(name: str) -> str:
    return next(match.expand(own) for pattern, own in _NAMES.items() if (match := re.fullmatch(pattern, name)))
