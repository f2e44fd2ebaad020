"""`wsolkit COMMAND …` on the command line."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from wsolkit import __main__ as cli
from wsolkit import __version__

NAMES = [name for commands in cli.COMMANDS.values() for name in commands]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[list[str]]:
    """What is run, and with which arguments."""
    calls: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["wsolkit", *arguments])
    monkeypatch.setattr(runpy, "run_module", lambda module, **how: calls.append([module, *sys.argv[1:]]))
    cli.main()
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_run_as_its_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, name, "method=sat", "-m") == [[f"wsolkit.{name}", "method=sat", "-m"]]
    assert call(monkeypatch, name.replace("_", "-")) == [[f"wsolkit.{name}"]]


def test_all_commands_are_listed() -> None:
    modules = (REPOSITORY / "src" / "wsolkit").glob("[!_]*.py")
    assert set(NAMES) == {path.stem for path in modules if 'if __name__ == "__main__"' in path.read_text("utf-8")}


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_says_what_each_command_is_for(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == []
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in NAMES)
    assert max(map(len, printed.splitlines())) <= 100


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == []
    assert capsys.readouterr().out == f"wsolkit {__version__}\n"


def test_unknown_command_is_answered_with_the_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "trian")
    assert stopped.value.code == 2
    assert (
        "there is no command 'trian' (did you mean 'train'?); choose from: prepare, train," in capsys.readouterr().err
    )


def test_command_composes_its_settings(tmp_path: Path) -> None:
    """In a process of its own, as the installed script does; and whoever asks for a command gets that command's help."""
    ask = [sys.executable, "-m", "wsolkit", "train", "method=ts_cam", "--cfg", "job"]
    done = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "_target_: wsolkit.methods.ts_cam.TSCAM" in done.stdout


@pytest.mark.parametrize("arguments", ["wsolkit --help", "wsolkit.train --help", "wsolkit.train --cfg job"])
def test_reader_that_goes_ends_it_in_silence(arguments: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -u -m {arguments} | head -n 0"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_other_pipes_that_break_are_errors(tmp_path: Path) -> None:
    """The output is read to the end: what has broken is, for instance, a loader's pipe, and that is said."""
    code = (
        "from wsolkit.settings.command import run_command\n"
        "def task(*_): raise BrokenPipeError(32, 'a pipe of a loader')\n"
        "run_command('prepare', task)"
    )
    command = [sys.executable, "-c", code, "hydra.output_subdir=null", "hydra.run.dir=."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "a pipe of a loader" in done.stderr
