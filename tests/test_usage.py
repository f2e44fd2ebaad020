"""`--help` of each command, and the settings that each declares."""

from __future__ import annotations

import importlib
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from wsolkit.__main__ import COMMANDS
from wsolkit.settings.conf import CONF
from wsolkit.settings.usage import groups, settings, usage


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print for a terminal of some width."""
    monkeypatch.setenv("COLUMNS", "110")


NAMES = [name for commands in COMMANDS.values() for name in commands]


@pytest.mark.parametrize("command", NAMES)
def test_help_is_one_screen_of_sentences(command: str) -> None:
    lines = usage(CONF, command).splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 110
    assert f"  python -m wsolkit.{command}" in lines[lines.index("Examples:") + 1]
    for name, _, text in settings(CONF, command):
        assert text[:1].isupper(), name
        assert text[-1:] == ".", name


@pytest.mark.parametrize("command", NAMES)
def test_command_declares_what_its_file_holds(command: str) -> None:
    declared = typing.get_type_hints(importlib.import_module(f"wsolkit.{command}").Settings)
    assert {item.name.partition(".")[0] for item in settings(CONF, command)} == set(declared)


def test_command_lists_only_its_own_groups() -> None:
    assert [item.name for item in groups(CONF, "prepare")] == ["dataset"]
    assert [item.name for item in groups(CONF, "predict")] == [
        "dataset",
        "method",
        "backbone",
        "postprocess",
        "protocol",
    ]
    assert not groups(CONF, "sweep_report")


def test_help_says_defaults_choices_and_what_is_required() -> None:
    text = usage(CONF, "predict", ("method", "backbone", "dataset"))
    assert "  top_k=1                 The number of most probable classes to find in each image.\n" in text
    assert "  source                  An image, a folder with images at any depth, or a pattern. (required)\n" in text
    assert "refinement of score maps, such as scg, which SPA brings along: bagcams, none,\n" in text
    assert "resnet50" not in text
    assert "cutmix" not in text
    assert "protocol=[maxboxacc, maxboxacc_v2]" in usage(CONF, "evaluate")


@pytest.mark.parametrize("arguments", [("wsolkit.train",), ("wsolkit", "train")])
def test_help_of_both_spellings(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ask = [sys.executable, "-m", *arguments, "--help"]
    done = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == usage(CONF, "train") + "\n"
