"""Every path and name works on the command line as the shell leaves it, in every setting of every command."""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import shutil
import typing
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

import wsolkit.data
from wsolkit import load_config
from wsolkit.__main__ import COMMANDS as ALL_COMMANDS
from wsolkit.checkpoint import read_checkpoint
from wsolkit.errors import ConfigError
from wsolkit.predict import find_images
from wsolkit.settings.compose import built, plain, save_config
from wsolkit.settings.conf import CONF
from wsolkit.settings.jobs import job_name
from wsolkit.settings.overrides import NAMES, PATHS, as_overrides
from wsolkit.settings.restore import choose_groups, restore

ALL = "a b${x}&!;^\"'\\(),={}[]#%~+@:|?*<>é数`"
"""Every sign that means something to a shell, to Hydra or to OmegaConf, in one name."""
SIGNS = [f"a{sign}b" for sign in "&!;^\"'\\(),={}[]#$%~+@:|?*<>` \t\n-._"]
TEXTS = [
    *(f"a{sign}b" for sign in "&!;^\"'\\(),={}[]#$%~+@:|?*<>` \t\n-._"),
    *(ALL, "数据集", "epoch=9.ckpt", "epoch=1-val=0.5.ckpt", "a, b", "[a]", "[a,b]", "{a: b}", "(a)", "a/b c"),
    *(" a", "a ", "  ", "\ta", "a\t", "it's", '"', "'", "'a", 'a"', "\\", "a\\", "a\\'", "\\'\\\""),
    *("${x}", "${oc.env:HOME}", "a${b}${c", "${", "\\${x}", "${x}'", "$x", "$", "%(x)s", "-a", "=", "=a", "~x"),
    *("true", "False", "1", "1e3", "007", "1_000", "-1", "inf", "nan", "0x1", "choice(a,b)", "glob(*)", "auto"),
]
"""Names of files and folders, which are there or not."""
ESCAPES = ["a\\\\", "a\\\\${x}\\", "a\\(b", "a\\ b", "'q'", '"q r"', '"q\\\\"', "null"]
"""Names that mean something else unless there are such files or folders."""
COLLECTIONS = {"dataset.annotations", "dataset.box_folders", "dataset.splits"}
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

TYPES: dict[str, Any] = {}
"""Types of the settings of every command that belong to no group."""
for _command in itertools.chain(*ALL_COMMANDS.values()):
    TYPES |= typing.get_type_hints(importlib.import_module(f"wsolkit.{_command}").Settings)
SETTINGS = {*TYPES, "method", "dataset", "hydra"} - {"x"}  # the texts below have ${x}, which sweep_report may mean
COMMANDS = (
    *(("train", f"dataset={dataset}") for dataset in ("cub", "imagenet", "folder")),
    *(("train", f"method={method}") for method in ("ornet", "psol")),
    *(("evaluate",), ("predict",), ("sweep_report",)),
)
"""Between them they have all settings."""
parse = OverridesParser.create().parse_overrides


def compose(name: str, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg: DictConfig = hydra.compose(name, overrides=list(overrides), return_hydra_config=True)
    return cfg


def has(cfg: DictConfig, setting: str) -> bool:
    place, _, key = setting.rpartition(".")
    node = OmegaConf.select(cfg, place) if place else cfg
    return isinstance(node, DictConfig) and key in list(node)


@pytest.fixture(scope="module")
def composed() -> list[tuple[DictConfig, list[str]]]:
    """Settings of every command and of data sets, and which of them are paths."""
    composed = [compose(*call) for call in COMMANDS]
    return [(cfg, [setting for setting in sorted(PATHS) if has(cfg, setting)]) for cfg in composed]


@cache
def in_a_job(value: str) -> tuple[object, str]:
    """What Hydra reads a value as, and the value in the job of a sweep."""
    (override,) = parse([f"key={value}"])
    ((job,),) = BasicSweeper.split_arguments([override], None)[0]
    return override.value(), job.removeprefix("key=")


def arrivals(cfg: DictConfig, setting: str, typed: str) -> Iterator[object]:
    """Values of a setting in the command, in a process of DDP that it starts, and in the job of a sweep."""
    (override,) = as_overrides([f"{setting}={typed}"], SETTINGS)
    _, job = in_a_job(override.removeprefix(f"{setting}="))
    for given in (override, *as_overrides([override, f"{setting}={job}"], SETTINGS)):
        OmegaConf.update(cfg, setting, in_a_job(given.removeprefix(f"{setting}="))[0], merge=True)
        yield OmegaConf.select(cfg, setting)


def test_settings_of_every_command_that_are_paths(composed: list[tuple[DictConfig, list[str]]]) -> None:
    assert set().union(*(settings for _, settings in composed)) == PATHS


def test_every_setting_that_is_a_text_is_known() -> None:
    """Settings of runs and of data sets whose type is text hold paths or names, or one word of a few."""
    words = {"monitor", "host", "hosts", "device", "compile", "sort", "x", "pool_after"}
    hints = {name: str(hint) for name, hint in TYPES.items()}
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
    for text in [*TEXTS, *ESCAPES]:
        if there:
            (in_tmp / text).mkdir(parents=True, exist_ok=True)
    where = {setting: cfg for cfg, settings in composed for setting in settings}
    for setting, cfg in where.items():
        for text in [*TEXTS, *(ESCAPES if there else ())]:
            collection = setting in COLLECTIONS and text[0] + text[-1] in ("[]", "{}")
            if there or not collection:
                assert list(arrivals(cfg, setting, text)) == [text] * 3, f"{setting}={text}"


@pytest.mark.parametrize(("typed", "meant"), MEANT.items())
def test_what_means_something_means_it(typed: str, meant: str | None, in_tmp: Path) -> None:
    cfg = OmegaConf.create({"checkpoint": "x"})
    assert list(arrivals(cfg, "checkpoint", typed)) == [meant] * 3


def in_command(argument: str, *more: str) -> str:
    return as_overrides([*more, argument], SETTINGS)[-1]


@pytest.mark.parametrize(
    ("argument", "override"),
    [
        ("dataset.classes=[a b & c]", "dataset.classes=['a b & c']"),
        ("dataset.classes=[猫, it's, 17, 007, 1e3, true]", "dataset.classes=['猫','it\\'s',17,007,'1e3','true']"),
        ("dataset.classes=['Egg, fried',\"b=c\", d=e]", "dataset.classes=['Egg, fried',\"b=c\",'d=e']"),
        ("dataset.classes=[a, b]", "dataset.classes=[a, b]"),
        ("dataset.classes=null", "dataset.classes=null"),
        ("examples=[val/1 (a).jpg,12]", "examples=['val/1 (a).jpg','12']"),
        ("classes=Egg, fried", "classes='Egg, fried'"),
        ("classes=3", "classes=3"),
        ("classes='quoted'", "classes='quoted'"),
        ("dataset.box_folders=[a b,c=d, e]", "dataset.box_folders=['a b','c=d',e]"),
        ("dataset.annotations={val: a b.json, test: 数.json}", "dataset.annotations={val: 'a b.json',test: '数.json'}"),
        ("dataset.annotations={val: a.json, test: b.json}", "dataset.annotations={val: a.json, test: b.json}"),
        ("+dataset.cache=a b", "+dataset.cache='a b'"),
        ("++dataset.cache=a b", "++dataset.cache='a b'"),
        ("~dataset.cache", "~dataset.cache"),
        ("~dataset.cache=null", "~dataset.cache=null"),
        ("protocol@x=a", "protocol@x=a"),
        ("hydra.run.dir=null", "hydra.run.dir='null'"),
        ("hydra.run.dir=runs/${method.name}/${now:%H-%M} é", "hydra.run.dir='runs/${method.name}/${now:%H-%M} é'"),
        ("hydra.run.dir=runs/${hydra.job.num}", "hydra.run.dir='runs/${hydra.job.num}'"),
        ("dataset.root=/data/cub", "dataset.root=/data/cub"),
        ("dataset.root=", "dataset.root="),
        ("source=photos/**/*.jpg", "source=photos/**/*.jpg"),
        ("resume=auto", "resume=auto"),
        ("+postprocess=scg", "postprocess=scg"),
        ("method.iterations=[1,2]", "method.iterations=[1,2]"),
        ("--config-dir=a b", "--config-dir=a b"),
    ],
)
def test_values_as_hydra_is_given_them(argument: str, override: str, in_tmp: Path) -> None:
    """What Hydra reads as it was meant stays as it is: jobs of a sweep are named after it."""
    assert in_command(argument) == override
    assert in_command(override) == override
    if not argument.startswith("-"):
        parse([override])


@pytest.mark.parametrize("sweep", [["-m"], ["--multirun"], ["hydra.mode=MULTIRUN"], ["sweep=sat_blocks"]])
def test_commas_part_the_values_of_a_sweep(sweep: list[str], in_tmp: Path) -> None:
    for folder in ("x, y/1", "x, y/2", "z"):
        (in_tmp / folder).mkdir(parents=True)
    for typed, override in {
        "a.ckpt,b=1.ckpt": "a.ckpt,'b=1.ckpt'",
        "'p,q',r s": "'p,q','r s'",
        "x, y/1,z,x, y/2": "'x, y/1',z,'x, y/2'",
        "x, y/1": "'x, y/1'",
        "null,z": "null,z",
        "choice(a,b)": "choice(a,b)",
    }.items():
        assert in_command(f"checkpoint={typed}", *sweep) == f"checkpoint={override}"
    assert in_command("checkpoint=a.ckpt,b.ckpt") == "checkpoint='a.ckpt,b.ckpt'"
    assert in_command("checkpoint=a.ckpt,b.ckpt", *sweep, "hydra.mode=RUN") == "checkpoint='a.ckpt,b.ckpt'"
    assert in_command("hydra.sweep.dir=a,b", *sweep) == "hydra.sweep.dir='a,b'"
    assert in_command("dataset.box_folders=[a b],[c]", *sweep) == "dataset.box_folders=['a b'],[c]"


def test_folders_that_are_there_decide_between_readings(in_tmp: Path) -> None:
    assert in_command("output=runs\\=1/x") == "output=runs\\=1/x"  # runs=1/x, as Hydra reads it
    (in_tmp / "runs\\=1").mkdir()
    assert in_command("output=runs\\=1/x") == "output='runs\\=1/x'"
    assert in_command("output=${seed}/x") == "output='${seed}/x'"
    (in_tmp / "${seed}").mkdir()
    assert in_command("source=${seed}") == "source='\\${seed}'"
    (in_tmp / "~").mkdir()
    assert in_command("output=~/x") == "output='~/x'"


def test_path_of_a_setting_that_nobody_knows(in_tmp: Path) -> None:
    (in_tmp / "my lists").mkdir()
    assert in_command("+dataset.records.lists=./my lists") == "+dataset.records.lists='./my lists'"
    assert in_command("+dataset.records.lists=./none") == "+dataset.records.lists=./none"


def test_pattern_below_a_folder_that_is_named_like_one(in_tmp: Path) -> None:
    (in_tmp / "a[1] *").mkdir()
    (in_tmp / "a[1] *" / "x.png").touch()
    assert find_images("a[1] */*.png", in_tmp / "out") == (Path("a[1] *"), ["x.png"])


def test_name_that_is_not_in_utf_8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is not in UTF-8: rename the file or folder"):
        in_command("dataset.root=a\udce9")


@pytest.mark.parametrize("text", [ALL, "${x}", "a\\${x}\\", "\\"])
def test_text_goes_through_everything_that_settings_go_through(text: str, in_tmp: Path) -> None:
    cfg = load_config("dataset=cub", f"dataset.root={text}")
    assert cfg.dataset.held_out_root == f"{text}/CUBV2"
    assert built(cfg.dataset.records).keywords["held_out_lists"] == f"{text}/metadata/val"
    save_config(cfg, in_tmp)
    assert plain(cfg) == plain(OmegaConf.load(in_tmp / "config.yaml"))  # type: ignore[arg-type]


def test_jobs_have_names_that_every_file_system_takes() -> None:
    given = [in_command(f"dataset.root={text}") for text in TEXTS if "/" not in text]
    names = {job_name([override]) for override in given}
    assert len(names) == len(given)
    assert all(
        set(name) <= {*"-_.+", *"0123456789", *map(chr, range(65, 91)), *map(chr, range(97, 123))} for name in names
    )
    resolved = OmegaConf.create({"task": given, "name": "${job_name:${task}}"})
    assert resolved.name == job_name(given)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.accelerator=a & b's",
            """cannot be read as a setting: put a text in quotes: 'trainer.accelerator="a & b'"'"'s"'""",
        ),
        (
            "method.iterations=[1,a & b]",
            """put texts in it in quotes, such as 'method.iterations=["first, one","second"]'""",
        ),
        ("nothing", "'nothing' cannot be read as a setting: expected SETTING=VALUE"),
        (
            "seed=1,2",
            "'seed=1,2' has several values: add -m to run each of them, or write 'seed=[1,2]' for a list, or ",
        ),
    ],
)
def test_what_cannot_be_read_is_explained(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_checkpoint_of_any_name_gives_its_groups(shapes_checkpoint: Path, in_tmp: Path) -> None:
    for name in (ALL, "epoch=9.ckpt", "1e3", "a,b.ckpt"):
        shutil.copyfile(shapes_checkpoint, in_tmp / name)
        groups = choose_groups([in_command(f"checkpoint={name}")])
        assert groups[:-1] == ["method=ts_cam", "backbone=vit_micro", "dataset=shapes"]
    both = in_command("checkpoint=epoch=9.ckpt,1e3", "-m")
    assert choose_groups([both])[-1] == both == "checkpoint='epoch=9.ckpt','1e3'"
    assert choose_groups(["checkpoint=null"]) == ["checkpoint=null"]


def test_paths_in_a_checkpoint_are_text(shapes_checkpoint: Path) -> None:
    saved = read_checkpoint(shapes_checkpoint)
    config = dict(saved.config) | {"dataset": dict(saved.config["dataset"]) | {"index": ALL}}
    cfg = load_config("method=ts_cam", "backbone=vit_micro")
    assert restore(cfg, replace(saved, config=config), []).dataset.index == ALL
    assert restore(cfg, saved, [in_command(f"dataset.cache={ALL}")]).dataset.cache == ALL
