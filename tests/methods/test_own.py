"""A user's own method in the user's folder: a Python file, and a YAML file that --config-dir finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.conftest import REPOSITORY
from wsolkit import Localizer, build_module, load_config
from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.settings.restore import choose_groups
from wsolkit.training.checkpointing import AtomicCheckpointIO

METHOD = '''
from wsolkit.methods.cam import CAM

class Doubled(CAM):
    """CAM with twice the loss, or any other multiple of it."""

    def __init__(self, multiple: float, **others):
        super().__init__(**others)
        self.multiple = multiple

    def losses(self, batch):
        return {name: self.multiple * value for name, value in super().losses(batch).items()}
'''


@pytest.fixture
def own(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the user works in."""
    (in_tmp / "doubled_cam.py").write_text(METHOD)
    settings = (REPOSITORY / "conf" / "method" / "cam.yaml").read_text()
    settings = settings.replace("wsolkit.methods.cam.CAM", "doubled_cam.Doubled").replace("name: cam", "name: doubled")
    (in_tmp / "my conf" / "method").mkdir(parents=True)
    (in_tmp / "my conf" / "method" / "doubled.yaml").write_text(f"{settings}\nmultiple: 2.0\n")
    monkeypatch.syspath_prepend(in_tmp)
    return in_tmp


@pytest.fixture
def checkpoint(own: Path) -> Path:
    """A checkpoint of an untrained model."""
    module = build_module(load_config("method=doubled", config_dir="my conf"), ["cat", "dog"])
    content: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 0}
    module.on_save_checkpoint(content)
    AtomicCheckpointIO().save_checkpoint(content, own / "x.ckpt")
    return own / "x.ckpt"


def test_constructor_may_pass_on_the_settings_of_its_base_class(own: Path) -> None:
    module: Any = build_module(load_config("method=doubled", "method.multiple=3", config_dir="my conf"))
    assert module.multiple == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+method.multipel=3", r"no setting 'method.multipel' \(did you mean 'multiple'\?\)"),
        ("method.form=last", "method.form='last': Input should be 'average_first' or 'maps_first'"),
        ("method.multiple=much", "method.multiple='much': Input should be a valid number"),
        ("backbone=vit_micro", "method=doubled needs a CNN, and backbone=vit_micro is a ViT"),
    ],
)
def test_settings_that_are_passed_on_are_checked_too(override: str, message: str, own: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build_module(load_config("method=doubled", override, config_dir="my conf"))


def test_localizer_takes_the_folder(checkpoint: Path) -> None:
    localizer = Localizer.from_checkpoint(checkpoint, device="cpu", config_dir="my conf")
    assert localizer.method == "doubled"
    assert localizer(np.zeros((8, 8, 3), np.uint8)).label in ("cat", "dog")


def test_folder_is_asked_for_where_it_is_needed(checkpoint: Path) -> None:
    expected = (
        f"'{checkpoint}' was trained with method=doubled, and wsolkit has no file method/doubled.yaml: name the folder "
        "of YAML files that has it, as in training, with "
    )
    with pytest.raises(CheckpointError) as caught:
        Localizer.from_checkpoint(checkpoint, device="cpu")
    assert str(caught.value) == expected + 'config_dir="FOLDER"'
    with pytest.raises(CheckpointError) as caught:
        choose_groups([f"checkpoint={checkpoint}"])
    assert str(caught.value) == expected + "--config-dir FOLDER"
    with pytest.raises(CheckpointError, match=r"neither wsolkit nor 'none' has a file method/doubled\.yaml"):
        choose_groups(["--config-dir=none", f"checkpoint={checkpoint}"])
    with pytest.raises(ConfigError, match="config_dir: there is no folder 'none'"):
        load_config(config_dir="none")


def test_predict_takes_the_folder(checkpoint: Path) -> None:
    PIL.Image.new("RGB", (9, 8)).save("image.png")
    arguments = ["--config-dir", "my conf", f"checkpoint={checkpoint.name}", "source=image.png", "output=found"]
    done = subprocess.run(
        [sys.executable, "-m", "wsolkit.predict", *arguments, "device=cpu"],
        env={**os.environ, "PYTHONPATH": f"{checkpoint.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(Path("found/predictions.json").read_text())) == 1
