"""The package as others install it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from tests.conftest import REPOSITORY


def test_wheel_carries_the_settings_and_works_elsewhere(tmp_path: Path) -> None:
    """Built, installed into an empty place, and asked for its settings from another directory."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    carried = {
        name.removeprefix("wsolkit/conf/") for name in zipfile.ZipFile(wheel).namelist() if "wsolkit/conf/" in name
    }
    assert carried == {
        path.relative_to(REPOSITORY / "conf").as_posix() for path in (REPOSITORY / "conf").rglob("*.yaml")
    }
    templates = REPOSITORY / "src" / "wsolkit" / "reporting" / "templates"
    assert {f"wsolkit/reporting/templates/{path.name}" for path in templates.iterdir()} <= set(
        zipfile.ZipFile(wheel).namelist()
    )

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    # A .pth file adds this environment's libraries, but not what their own .pth files add: its editable wsolkit.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def ask(*arguments: str) -> str:
        done = subprocess.run([python, *arguments], cwd=elsewhere, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert ask("-c", "import wsolkit.settings.conf as c; print(c.CONF)").strip() == str(site / "wsolkit" / "conf")
    settings = ask("-m", "wsolkit.train", "--cfg", "job", "method=ts_cam")
    assert "_target_: wsolkit.methods.ts_cam.TSCAM" in settings
