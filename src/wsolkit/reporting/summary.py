"""What a run says at its end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from wsolkit.config import as_named
from wsolkit.reporting.table import print_results
from wsolkit.reporting.terminal import PlainConsole


def title(cfg: DictConfig, trained: Mapping[str, Any]) -> str:
    """What was run on what, and where the checkpoint was chosen, in one line.

    Args:
        cfg: settings of this run.
        trained: settings of the run that the checkpoint is from.
    """
    held_out = trained["dataset"]["held_out"] and trained["selection"] == "val"
    selected = "the held-out val split" if held_out else "the reported split itself"
    return f"{method_name(cfg)}, {cfg.backbone.name}, {cfg.dataset.name}; checkpoint selected on {selected}"


def method_name(cfg: DictConfig) -> str:
    """The method, and what refines its maps: "cam + scg"."""
    postprocess = cfg.get("postprocess")
    return f"{cfg.method.name} + {postprocess.name}" if postprocess else str(cfg.method.name)


def print_summary(
    folder: Path, title: str, row: str, chosen_on: Mapping[str, str], results: Mapping[str, float]
) -> None:
    """Print the table of a run's numbers, and where everything is.

    Args:
        folder: run directory.
        title: what was run.
        row: name of the method in the table.
        chosen_on: where each protocol's threshold was chosen.
        results: numbers by name.
    """
    console = PlainConsole()
    print_results(console, results, chosen_on, row, title)
    console.print(f"Written to {as_named(folder)}", soft_wrap=True)


def what_next(folder: Path, cfg: DictConfig) -> str:
    """What to open, and which commands to try on the model in a run directory."""
    checkpoint = shlex.quote(f"checkpoint={as_named(folder) / 'checkpoints' / 'best.ckpt'}")
    settings = [f"method={'ts_cam' if cfg.method.name == 'sat' else 'sat'}", f"dataset={cfg.dataset.name}"]
    if "root" in cfg.dataset:
        settings.append(f"dataset.root={cfg.dataset.root}")
    commands = {
        f"python -m wsolkit.demo {checkpoint}": "try the model on an image, in the browser",
        f"python -m wsolkit.predict {checkpoint} source=FOLDER output=boxes": "write boxes and masks of images",
        f"python -m wsolkit.train {shlex.join(settings)}": "train another method",
    }
    width = max(map(len, commands))
    opened = [f"Open {as_named(folder) / 'report.html'} in a browser."] if (folder / "report.html").is_file() else []
    return "\n".join([*opened, "Next:", *(f"    {what:<{width}}  # {why}" for what, why in commands.items())])
