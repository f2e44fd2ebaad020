"""python -m wsolkit.dashboard DIR: make a W&B workspace that shows what the runs in a directory have logged.

Its panels only name keys that these runs have. It needs the extra `dashboard`, and imports neither torch nor Lightning.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from wsolkit.data.files import walk
from wsolkit.errors import ConfigError
from wsolkit.reporting.log_file import NAME, read_log
from wsolkit.reporting.terminal import PlainConsole
from wsolkit.settings.checks import check_config
from wsolkit.settings.command import name_directory, run_command

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

_LOG, _RESULT, _IMAGES, _INSIDE, _SETTINGS = NAME, "metrics.json", "images.csv", "inside.png", "config.yaml"
_HEADLINES = ("gt_known_loc", "top1_loc", "top5_loc", "max_box_acc", "max_box_acc_v2", "pxap", "peak_iou")
_STEP = "trainer/global_step"
_SERIES = {"method/semantic_weight_": "λ of each block", "method/threshold_": "β of each block"}


@dataclass
class Settings:
    """The settings of conf/dashboard.yaml."""

    directory: str
    entity: str | None
    project: str
    name: str
    grouped: bool
    save: bool


def dashboard(cfg: DictConfig, _: Path) -> None:
    """Build the workspace for the runs in `cfg.directory`, print its panels, and save it in W&B.

    Raises:
        ConfigError: the extra is missing, there is no run, or W&B does not accept the workspace.
    """
    if find_spec("wandb_workspaces") is None:
        raise ConfigError("the dashboard needs another package: pip install 'wsolkit[dashboard]'")
    import requests
    import wandb

    check_config(cfg, Settings)
    keys = logged_keys(Path(str(cfg.directory)))
    entity = cfg.entity
    try:
        if entity is None and cfg.save:
            entity = wandb.Api().default_entity
        workspace = build_workspace(keys, entity or "", cfg.project, cfg.name, grouped=cfg.grouped)
        console = PlainConsole()
        for section in workspace.sections:
            console.print(f"{section.name}: {len(section.panels)}", soft_wrap=True)
        if cfg.save:
            workspace.save()
    except (wandb.Error, requests.RequestException, ValueError) as error:
        raise ConfigError(
            f"W&B does not accept the dashboard ({str(error).splitlines()[0]}): are entity={entity} and "
            f"project={cfg.project} right, is there a run in it, and are you logged in (wandb login)?"
        ) from error


def logged_keys(directory: Path) -> set[str]:
    """Return the keys under which runs in a directory and below it have logged, or log with logger=wandb.

    Raises:
        ConfigError: there is no run, or one cannot be read.
    """
    below = walk(directory) if directory.is_dir() else ()
    folders = sorted(directory / found.path for found in below if _LOG in found.files)
    if not folders:
        raise ConfigError(f"there is no run in '{directory}': expected {_LOG}, in it or below")
    keys = {"epoch", _STEP}
    for folder in folders:
        try:
            keys |= _keys_of_a_run(folder)
        except (OSError, ValueError, LookupError, AttributeError, csv.Error, YAMLError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"the run in '{folder}' cannot be read ({reason}): it has only just begun, or a file of it is damaged"
            ) from error
    return keys


def _keys_of_a_run(folder: Path) -> set[str]:
    from wsolkit.reporting.charts import charts  # It loads Matplotlib.

    keys = {name for name in read_log(folder / _LOG).columns if "/" in name}
    if OmegaConf.load(folder / _SETTINGS).num_examples > 0:
        keys.add("examples/val")
    if (folder / _INSIDE).is_file():
        keys.add("examples/inside")
    if (folder / _RESULT).is_file():
        content: dict[str, Any] = json.loads((folder / _RESULT).read_text(encoding="utf-8-sig"))
        curves = {name: value for name, value in content.items() if isinstance(value, list)}
        results = {name: value for name, value in content.items() if isinstance(value, float)}
        keys |= {f"charts/{name}" for name in charts(results, curves)}
    if (folder / _IMAGES).is_file():
        with (folder / _IMAGES).open(newline="", encoding="utf-8-sig") as file:
            protocols = {row["protocol"] for row in csv.DictReader(file)}
        keys |= {f"images/{name}" for name in protocols} | {f"curves/{name}_table" for name in protocols}
    return keys


def build_workspace(keys: Iterable[str], entity: str, project: str, name: str, *, grouped: bool) -> Workspace:
    """Build the workspace without saving it.

    Args:
        keys: the logged keys.
        entity, project: the place of its runs.
        name: the name of the view.
        grouped: whether runs of a method and data set are averaged.
    """
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=title, panels=panels, is_open=True) for title, panels in _panels(sorted(keys)).items() if panels
    ]
    runs = ws.RunsetSettings(groupby=[ws.Metric("Group")] if grouped else [])
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, runset_settings=runs)


def _panels(keys: list[str]) -> Mapping[str, list[Any]]:
    """Return the panels by section, in the order in which people look at them."""
    import wandb_workspaces.reports.v2 as wr

    def line(title: str, *y: str, x: str = _STEP) -> Any:
        return wr.LinePlot(title=title, x=x, y=list(y))

    def within(prefix: str) -> list[str]:
        return [key for key in keys if key.startswith(prefix)]

    def headlines(stage: str) -> list[str]:
        """Return the keys of the method under each protocol, without those of baselines."""
        found = [key for key in within(f"{stage}/") if key.count("/") == 2 and key.rpartition("/")[2] in _HEADLINES]
        return sorted(found, key=lambda key: (key.split("/")[1], _HEADLINES.index(key.rpartition("/")[2])))

    def classification(stage: str) -> list[str]:
        return [key for key in (f"{stage}/top1_cls", f"{stage}/top5_cls") if key in keys]

    watched = [key for key in within("method/") if key.endswith("_step")]
    together = {title: [key for key in watched if key.startswith(prefix)] for prefix, title in _SERIES.items()}
    together["mean map area and its prior"] = [key for key in watched if "_area_" in key or "area_prior" in key]
    single = set(watched).difference(*together.values())
    return {
        "Localization": [line(_titled(key), key, x="epoch") for key in headlines("val")],
        "Classification": [line(_titled(key), key, x="epoch") for key in classification("val")],
        "Losses": [line(_titled(key), key) for key in within("train/") if key.endswith("_step")],
        "Method": [line(title, *series) for title, series in together.items() if series]
        + [line(_titled(key), key) for key in sorted(single)],
        "Learning rate": [line("learning rate", *found) for found in [within("lr")] if found],
        "Speed and memory": [line(_titled(key), key) for key in (*within("speed/"), *within("memory/"))],
        "Examples": [wr.MediaBrowser(title=key, media_keys=[key]) for key in within("examples/")],
        "Threshold curves": [_curves(key) for key in within("curves/")],
        "Charts": [wr.MediaBrowser(title=_titled(key), media_keys=[key]) for key in within("charts/")],
        "Images": [wr.WeavePanelSummaryTable(table_name=key) for key in within("images/")],
        "Test": [
            wr.BarPlot(title=_titled(key), metrics=[key], orientation="h")
            for key in (*headlines("test"), *classification("test"))
        ],
    }


def _curves(table: str) -> Any:
    """Return the plot that the run logged, for all runs."""
    import wandb_workspaces.reports.v2 as wr

    chart = wr.CustomChart.from_table(
        table,
        chart_fields={"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
        chart_strings={"title": f"{_titled(table).removesuffix('_table')}: percent at each τ", "xname": "threshold"},
    )
    chart.chart_name = "wandb/lineseries/v0"
    return chart


def _titled(key: str) -> str:
    """Return a panel's title: the key without its section."""
    return key.partition("/")[2].removesuffix("_step")


def main() -> None:
    """Run the command. Its first argument that is not a setting is the directory."""
    name_directory()
    run_command("dashboard", dashboard)


if __name__ == "__main__":
    main()
