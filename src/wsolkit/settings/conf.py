"""Find the YAML files, and ask Hydra about the command line."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

_PACKAGE = Path(__file__).parents[1]

CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parents[1] / "conf"
"""The folder of YAML files. It is inside the package after an installation, and beside `src` in a checkout."""

# These are no arguments of the class that a node describes. The name is for people and interpolation. The mean and the
# standard deviation of a backbone's input are for the data set.
LABELS = {"name", "mean", "std"}
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}

named_folders: set[Path] = set()
"""Folders of YAML files that callers of `load_config` have named in this process."""


def as_named(folder: Path) -> Path:
    """Return a run directory as people write it, relative to the working directory if it is below it."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def given_overrides() -> list[str]:
    """Return the overrides of this job, in Hydra's grammar."""
    return list(hydra_settings()["overrides"]["task"])


def chosen_file(group: str) -> Path | None:
    """Return the YAML file that this job takes from a group, or None if it takes none."""
    choice = hydra_settings()["runtime"]["choices"].get(group)
    paths = (folder / group / f"{choice}.yaml" for folder in (*own_folders(), CONF))
    return next((path for path in paths if path.is_file()), None)


def hydra_settings() -> dict[str, Any]:
    """Return Hydra's settings without resolving them, since overrides may hold interpolations."""
    return typing.cast("dict[str, Any]", OmegaConf.to_container(HydraConfig.get(), resolve=False))


def own_folders() -> list[Path]:
    """Return the folders of YAML files that the command line or a caller of `load_config` adds to the package's."""
    if not HydraConfig.initialized():
        return sorted(named_folders)
    sources = hydra_settings()["runtime"]["config_sources"]
    own = [Path(source["path"]) for source in sources if source["schema"] == "file" and Path(source["path"]) != CONF]
    return [*own, *sorted(named_folders)]
