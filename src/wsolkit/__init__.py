"""wsolkit: weakly supervised object localization, from class labels to boxes and masks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from wsolkit.build import build_datamodule, build_module
    from wsolkit.localizer import Localizer, Prediction
    from wsolkit.settings.compose import load_config

# These load on first use, so that `--help` and `--cfg job` answer without importing torch.
_HOME = {
    "load_config": "wsolkit.settings.compose",
    "build_module": "wsolkit.build",
    "build_datamodule": "wsolkit.build",
    "Localizer": "wsolkit.localizer",
    "Prediction": "wsolkit.localizer",
}

__all__ = ["Localizer", "Prediction", "__version__", "build_datamodule", "build_module", "load_config"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in {"metrics", "localization", "methods", "backbones", "data", "interop", "reporting"}:
        return import_module(f"wsolkit.{name}")
    raise AttributeError(f"module 'wsolkit' has no attribute '{name}'")
