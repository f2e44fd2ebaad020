"""Read the checkpoints that papers released."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from wsolkit.backbones.conformer import conformer_sizes
from wsolkit.backbones.weights import StateDict
from wsolkit.build import attach_training, build_model
from wsolkit.errors import CheckpointError
from wsolkit.methods.base import WSOLModule
from wsolkit.settings.compose import load_config

# How entries of released state dicts are called here, as patterns and replacements. The first one that matches counts.
# All entries that belong to no method or head belong to the backbone.
_METHODS = {
    r"loc_token": r"network.spatial_token",
    r"loc_embed": r"network.spatial_embed",
    r"layers\.(\d+)\.thred": r"calibration.blocks.\1.threshold",
    r"layers\.(\d+)\.fuse\._loss_rate": r"calibration.blocks.\1.semantic_weight",
}
_DEIT = {**_METHODS, r"head\.(weight|bias)": r"network.head.\1", r"(.*)": r"network.backbone.network.\1"}
_LCTR = {
    r"conv3x3\.(.*)": r"network.context.\1",
    r"CDM\.(weight|bias)": r"network.classifier.\1",
    r"CDM\._routing_fn_two\.fc\.(.*)": r"network.classifier.mean_route.\1",
    r"CDM\._routing_fn_two\.fc2\.(.*)": r"network.classifier.maximum_route.\1",
    r"(.*)": r"network.backbone.network.\1",
}
_CONFORMER = {
    **_METHODS,
    r"trans_cls_head\.(weight|bias)": r"network.head.\1",
    r"conv_cls_head\.(weight|bias)": r"network.branch_head.\1",
    r"(.*)": r"network.backbone.\1",
}
# The other way round, for messages.
_RELEASED_METHODS = {
    r"network\.spatial_(.*)": r"loc_\1",
    r"calibration\.blocks\.(\d+)\.threshold": r"layers.\1.thred",
    r"calibration\.blocks\.(\d+)\.semantic_weight": r"layers.\1.fuse._loss_rate",
}
_RELEASED_DEIT = {
    **_RELEASED_METHODS,
    r"network\.head\.(.*)": r"head.\1",
    r"(?:network\.backbone\.network\.)?(.*)": r"\1",
}
_RELEASED_LCTR = {
    r"network\.context\.(.*)": r"conv3x3.\1",
    r"network\.classifier\.(weight|bias)": r"CDM.\1",
    r"network\.classifier\.mean_route\.(.*)": r"CDM._routing_fn_two.fc.\1",
    r"network\.classifier\.maximum_route\.(.*)": r"CDM._routing_fn_two.fc2.\1",
    r"(?:network\.backbone\.network\.)?(.*)": r"\1",
}
_RELEASED_CONFORMER = {
    **_RELEASED_METHODS,
    r"network\.head\.(.*)": r"trans_cls_head.\1",
    r"network\.branch_head\.(.*)": r"conv_cls_head.\1",
    r"(?:network\.backbone\.)?(.*)": r"\1",
}
# SAT's fixed filter is a setting here.
_IGNORED = {"weight"}
# The papers use DeiTs with these widths.
_DEITS = {192: "deit_tiny", 384: "deit_small", 768: "deit_base"}


def from_official(
    state_dict: Mapping[str, Tensor], method: Literal["ts_cam", "scm", "sat", "lctr"], num_heads: int | None = None
) -> WSOLModule:
    """Build a module from the state dict of a paper's released model. The tensors determine backbone and sizes.

    Args:
        state_dict: the released entries, with or without a "module." prefix.
        method: the method of the model.
        num_heads: the number of attention heads. None takes one per 64 channels, as DeiT and
            Conformer have.

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
    """Return the settings of a method on DeiT or Conformer with the sizes in the state dict of a released model.

    Raises:
        CheckpointError: the state dict does not belong to the method's released model.
    """
    method = cfg.method.name
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    cfg = cfg.copy()
    try:
        settings, sizes = (_conformer_settings if _is_conformer(state) else _deit_settings)(state)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"not a released {method} model: entry {error} is missing. It has {', '.join(sorted(state)[:4])}, …"
        ) from error
    num_heads = num_heads or sizes["embed_dim"] // 64
    if num_heads == 0 or sizes["embed_dim"] % num_heads:
        raise CheckpointError(
            f"{num_heads} attention heads do not divide a width of {sizes['embed_dim']}: give num_heads=…"
        )
    sizes |= {"num_heads": num_heads}
    if _is_conformer(state):
        cfg.backbone = _published_conformer(sizes)
        settings |= {f"backbone.{name}": value for name, value in sizes.items()}
    else:
        settings |= {"backbone.options": sizes}
    settings |= {"backbone.pretrained": False, "backbone.drop_path_rate": 0.0}
    if method == "scm":
        num_blocks = len({name.split(".")[1] for name in state if name.startswith("layers.")})
        if not num_blocks:
            raise CheckpointError(
                "not a released scm model: it has no diffusion blocks (entry layers.0.thred). Is it a ts_cam model?"
            )
        # The released DeiT has 16 iterations in the first block and 4 in the others, and the Conformer has 4 in all.
        first = 4 if _is_conformer(state) else 16
        settings |= {"method.num_blocks": num_blocks, "method.iterations": ([first] + [4] * num_blocks)[:num_blocks]}
    for name, value in settings.items():
        OmegaConf.update(cfg, name, value, merge=False)
    return cfg


def _is_conformer(state: StateDict) -> bool:
    return "trans_patch_conv.weight" in state


def _conformer_settings(state: StateDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return settings that the state dict of a Conformer determines, and its sizes."""
    # The state dict does not have the size of the images. All released models were trained at 224 pixels.
    settings = {"dataset.image_size": 224, "dataset.num_classes": len(state["trans_cls_head.weight"])}
    return settings, conformer_sizes(state)


def _published_conformer(sizes: Mapping[str, Any]) -> DictConfig:
    """Return the settings of the published Conformer of some sizes, or of Conformer-S if there is none."""
    known: list[DictConfig] = [load_config(f"backbone=conformer_{name}").backbone for name in ("small", "tiny", "base")]
    return next((node for node in known if all(node[size] == value for size, value in sizes.items())), known[0])


def _deit_settings(state: StateDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return settings that the state dict of a DeiT determines, and its sizes in timm's names."""
    embed_dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    sizes = {
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "mlp_ratio": state["blocks.0.mlp.fc1.bias"].numel() / embed_dim,
    }
    settings: dict[str, Any] = {
        "dataset.image_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size,
        "dataset.num_classes": state["CDM.bias" if "CDM.bias" in state else "head.weight"].shape[0],
    }
    if embed_dim in _DEITS:
        settings |= {"backbone.name": _DEITS[embed_dim]}
        settings |= {"backbone.model": f"{_DEITS[embed_dim]}_patch16_224.fb_in1k"}
    return settings, sizes


def build_official(
    cfg: DictConfig, state_dict: Mapping[str, Tensor], class_names: list[str] | None = None
) -> WSOLModule:
    """Build the module of `fitted` settings, and give it the weights of a released model.

    Raises:
        CheckpointError: the entries do not belong to the method's released model.
    """
    module = build_model(cfg, class_names)
    state = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if _is_conformer(state):
        own_names, released_names = _CONFORMER, _RELEASED_CONFORMER
    elif cfg.method.name == "lctr":
        own_names, released_names = _LCTR, _RELEASED_LCTR
    else:
        own_names, released_names = _DEIT, _RELEASED_DEIT
    names = {_renamed(name, own_names): name for name in state if name not in _IGNORED}
    try:
        missing, unknown = module.load_state_dict({own: state[name] for own, name in names.items()}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"not a released {cfg.method.name} model: {error}") from error
    if missing or unknown:
        raise CheckpointError(
            f"not a released {cfg.method.name} model: "
            f"entries missing: {_listed(_renamed(own, released_names) for own in missing)}; "
            f"entries unknown: {_listed(names[own] for own in unknown)}"
        )
    return module.eval()


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "") if found else "none"


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    return next(match.expand(new) for old, new in patterns.items() if (match := re.fullmatch(old, name)))
