"""Print what a run says at its beginning and at its end."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from wsolkit.metrics.evaluation import Outcome
from wsolkit.reporting.table import print_results, print_selection
from wsolkit.reporting.terminal import PlainConsole
from wsolkit.settings.conf import CONF, as_named, chosen_file, given_overrides
from wsolkit.system.signals import is_first


def title(cfg: DictConfig, trained: Mapping[str, Any]) -> str:
    """Return one line on the run: the method, the data set, and the split that selected the checkpoint.

    Args:
        cfg: the settings of this run.
        trained: the settings of the run that wrote the checkpoint.
    """
    selection = trained.get("selection", "test")
    held_out = trained["dataset"]["held_out"] and selection != "test"
    by = {"pseudo": "by pseudo boxes ", "classification": "by classification "}.get(selection, "")
    selected = f"{by}on {'the held-out val split' if held_out else 'the reported split itself'}"
    return f"{method_name(cfg)}, {cfg.backbone.name}, {cfg.dataset.name}; checkpoint selected {selected}"


def method_name(cfg: DictConfig) -> str:
    """Return the name of the method with what was added to it: "cam + cutmix + scg"."""
    names = [str(cfg.method.name)]
    for group in ("augment", "postprocess"):
        name = (cfg.get(group) or {}).get("name")
        if name is not None and name not in names:  # method=has has the transform of this name.
            names.append(str(name))
    return " + ".join(names)


def print_summary(folder: Path, title: str, row: str, chosen_on: Mapping[str, str], outcome: Outcome) -> None:
    """Print the table of a run's numbers, and where all files are.

    Args:
        folder: the run directory.
        title: describes the run.
        row: the name of the method in the table.
        chosen_on: what chose each protocol's threshold.
        outcome: the numbers and lists by name.
    """
    console = PlainConsole()
    print_results(console, outcome.results, chosen_on, row, title)
    print_selection(console, outcome, chosen_on)
    console.print(f"Written to {as_named(folder)}", soft_wrap=True)


def what_next(folder: Path, cfg: DictConfig) -> str:
    """Say what to open, and which commands to try on the model in a run directory."""
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


_OF_RECIPES = ("optimizer.lr", "schedule.name", "dataset.batch_size", "trainer.max_epochs")


def about_recipe(cfg: DictConfig, recipe: Path | None, overrides: Sequence[str]) -> str:
    """Return a sentence that says which recipe a run takes, or what it trains with if there is none.

    Args:
        cfg: the settings.
        recipe: the file of the recipe.
        overrides: the user's overrides on the command line.
    """
    if recipe is not None:
        comment = re.findall(r"^# ([^@].*)", recipe.read_text(encoding="utf-8-sig"), re.MULTILINE)
        return f"recipe={recipe.stem}: {' '.join(comment).split('. ')[0].removesuffix('.')}."
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    values = [f"{key}={OmegaConf.select(cfg, key)}" for key in _OF_RECIPES if key not in given]
    known = sorted(path.stem for path in (CONF / "recipe").glob(f"{cfg.method.name}_*.yaml"))
    return (
        f"No recipe is taken for method={cfg.method.name} on dataset={cfg.dataset.name}. "
        + (f"The defaults {', '.join(values)} are not tuned for them. " if values else "")
        + (f"Give these settings, or take a recipe with recipe=NAME: {', '.join(known)}." if known else "")
    ).strip()


def print_recipe(cfg: DictConfig) -> None:
    """Say once which recipe a command takes."""
    if HydraConfig.initialized() and is_first():
        logging.getLogger("wsolkit").info(about_recipe(cfg, chosen_file("recipe"), given_overrides()))
