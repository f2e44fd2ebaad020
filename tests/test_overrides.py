"""Every path and name works on the command line as the shell leaves it, in every setting of every command."""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import shlex
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

import wsolkit.data
from tests.conftest import write_listed
from tests.fresh import command
from wsolkit import load_config
from wsolkit.checkpoint import choose_groups, read_checkpoint, restore
from wsolkit.config import CONF, RunSettings, built, explain, plain
from wsolkit.errors import ConfigError
from wsolkit.jobs import job_name
from wsolkit.overrides import NAMES, PATHS, as_overrides, escaped, quoted
from wsolkit.train import save_config

ALL = "a b${x}&!;^\"'\\(),={}[]#$%~+@:|?*<>é数`"
"""Every sign that means something to a shell, to Hydra or to OmegaConf, in one name."""
SIGNS = [f"a{sign}b" for sign in "&!;^\"'\\(),={}[]#$%~+@:|?*<>` \t\n-._"]
TEXTS = [
    *SIGNS,
    *(
        ALL,
        "数据集",
        "é",
        "epoch=9.ckpt",
        "epoch=1-val=0.5.ckpt",
        "a,b",
        "a, b",
        "[a]",
        "[a,b]",
        "{a: b}",
        "(a)",
        "f(a)",
    ),
    *(" a", "a ", "  ", "\ta", "a\t", "it's", '"', "'", "'a", 'a"', "\\", "a\\", "a\\\\'", "a\\'", "\\'\\\"", "a/b c"),
    *(
        "${x}",
        "${oc.env:HOME}",
        "a${b}${c",
        "${",
        "\\${x}",
        "a\\\\${x}\\",
        "${x}'",
        "$x",
        "$",
        "%(x)s",
        "a.b",
        "-a",
        "=",
        "=a",
    ),
    *("true", "False", "1", "1e3", "007", "1_000", "-1", "inf", "nan", "0x1", "~x", "choice(a,b)", "glob(*)", "auto"),
]
"""Names of files and folders that do not exist, or do."""
MEANT = {
    '"a b"': "a b",
    "'a=b.ckpt'": "a=b.ckpt",
    "'it\\'s'": "it's",
    '"a\\\\"': "a\\",
    "a\\=b": "a=b",
    "a\\,\\ b": "a, b",
    "null": None,
    "???": "./???",
    "~/a": str(Path("~/a").expanduser()),
}
"""What is quoted or escaped for Hydra already, and what else means something."""

SETTINGS = {*RunSettings.__annotations__, "method", "dataset", "hydra"}
COMMANDS = (
    "train",
    "evaluate",
    "predict",
    "export",
    "demo",
    "import_checkpoint",
    "prepare",
    "sweep_report",
    "dashboard",
)
parse = OverridesParser.create().parse_overrides


def compose(name: str, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra.compose(name, overrides=as_overrides(overrides, SETTINGS), return_hydra_config=True)


def has(cfg: DictConfig, setting: str) -> bool:
    place, _, key = setting.rpartition(".")
    node = OmegaConf.select(cfg, place) if place else cfg
    return isinstance(node, DictConfig) and key in list(node)


@pytest.fixture(scope="module")
def composed() -> list[tuple[DictConfig, list[str]]]:
    """Settings of every command and of data sets, and which of them are paths."""
    found = []
    for name in COMMANDS:
        datasets = ("cub", "imagenet", "folder") if name in ("train", "prepare") else ()
        for chosen in [[f"dataset={dataset}"] for dataset in datasets] or [[]]:
            method = ["method=sat"] if name == "import_checkpoint" else []
            cfg = compose(name, *chosen, *method)
            found.append((cfg, [setting for setting in sorted(PATHS) if has(cfg, setting)]))
    return found


def arriving(cfg: DictConfig, setting: str, override: str) -> object:
    """The value of a setting that Hydra overrides."""
    (parsed,) = parse([override])
    cfg = cfg.copy()
    OmegaConf.update(cfg, setting, parsed.value(), merge=True)
    return OmegaConf.select(cfg, setting)


def arrivals(cfg: DictConfig, setting: str, typed: str) -> Iterator[object]:
    """Values of a setting on the command line, in a process of DDP, and in the job of a sweep."""
    (override,) = as_overrides([f"{setting}={typed}"], SETTINGS)
    yield arriving(cfg, setting, override)
    ((again,),) = BasicSweeper.split_arguments(parse([override]), None)[0]
    for given in (override, again):
        (child,) = as_overrides([given], SETTINGS)
        yield arriving(cfg, setting, child)


def test_settings_of_every_command_that_are_paths(composed: list[tuple[DictConfig, list[str]]]) -> None:
    assert set().union(*(settings for _, settings in composed)) == PATHS


def test_every_setting_that_is_a_text_is_known() -> None:
    """Settings of runs and of data sets whose type is text hold paths or names, or one word of a few."""
    words = {"monitor", "host", "device"}
    hints = {name: str(hint) for name, hint in typing.get_type_hints(RunSettings).items()}
    texts = {name for name, hint in hints.items() if "str" in hint.replace("typing.Literal", "")}
    assert texts - words <= PATHS | NAMES
    for module in pkgutil.iter_modules(wsolkit.data.__path__):
        found = importlib.import_module(f"wsolkit.data.{module.name}")
        for name, function in inspect.getmembers(found, inspect.isfunction):
            if name.endswith("_records") and "split" in (parameters := inspect.signature(function).parameters):
                own = {
                    key
                    for key, value in parameters.items()
                    if "str" in value.annotation.replace("Mapping[str, int]", "")
                }
                assert {f"dataset.{key}" for key in own} <= PATHS | NAMES, name


@pytest.mark.parametrize("there", [False, True])
def test_every_name_in_every_setting(there: bool, composed: list[tuple[DictConfig, list[str]]], in_tmp: Path) -> None:
    for text in TEXTS:
        if there:
            (in_tmp / text).mkdir(parents=True, exist_ok=True)
    tried = set()
    for cfg, settings in composed:
        for setting in settings:
            if setting in tried:
                continue
            tried.add(setting)
            lists = {"dataset.annotations", "dataset.box_folders", "dataset.splits"}
            for text in TEXTS:
                if not there and setting in lists and text[0] + text[-1] in ("[]", "{}"):
                    continue
                for typed in (text, f"/nowhere/{text}"):
                    assert list(arrivals(cfg, setting, typed)) == [typed] * 3, f"{setting}={typed}"


@pytest.mark.parametrize(("typed", "meant"), MEANT.items())
def test_what_means_something_means_it(typed: str, meant: str | None, in_tmp: Path) -> None:
    cfg = OmegaConf.create({"checkpoint": "x"})
    assert list(arrivals(cfg, "checkpoint", typed)) == [meant] * 3
