"""Every command that the README and the pages tell is run: on small copies of the data sets, for a step.

Of training and evaluating on one kind of network, one is run, and the others' settings are composed and checked; the
slow tests run all.

Pages that go from start to end (predict, export, …) are followed as they stand, in test_docs.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import timm
import torch
from omegaconf import DictConfig

from tests.conftest import CNN_METHODS, REPOSITORY, TOKEN_METHODS, write_imagenet, write_listed
from tests.data.layouts import AIRCRAFT, CUB_CLASSES, write_aircraft, write_cub, write_imagenet_v2
from tests.data.test_folder import write_folder
from tests.data.test_pseudo_boxes import write_predictions
from tests.fresh import FRESH, exit_code, run_main
from tests.test_docs import released_state
from tests.test_sweep_report import add_job
from wsolkit import load_config
from wsolkit.checkpoint import read_checkpoint
from wsolkit.settings import sweeper
from wsolkit.settings.checks import check_config
from wsolkit.settings.conf import given_overrides
from wsolkit.settings.restore import restore
from wsolkit.train import train

CNN_PAGES = {"cnn.md", "rethinking_cam.md", "postprocess.md", "pseudo_labels.md"}  # whose checkpoints are of CAM
FOLLOWED = {"predict.md", "export.md", "import_checkpoint.md", "demo.md"}

# What makes a run small, and runs on this machine what the page runs on another. Behind what the page says.
SMALL = {
    "train": (
        *("trainer.accelerator=cpu", "trainer.devices=1", "trainer.max_steps=1", "trainer.limit_train_batches=1"),
        *("trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.enable_progress_bar=false"),
        *("trainer.check_val_every_n_epoch=1", "dataset.batch_size=2", "dataset.eval_batch_size=2"),
        *("dataset.num_workers=0", "backbone.pretrained=false", "num_examples=1", "dataset.subset_seed=0"),
    ),
    "evaluate": (
        *("trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "dataset.eval_batch_size=2", "num_examples=1"),
    ),
    "predict": ("device=cpu", "num_workers=0"),
    "dashboard": ("save=false",),
    "pseudo_boxes": ("device=cpu", "progress=false", "image_size=64", "backbone.pretrained=false"),
    "pseudo_masks": ("device=cpu", "progress=false"),
}
CLASSES = {"imagenet": 2, "cub": len(CUB_CLASSES), "aircraft": len(AIRCRAFT)}  # in the copies


def pages() -> list[Path]:
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def commands(page: Path) -> Iterator[str]:
    """Commands of wsolkit in indented blocks and in tables, lines that end with a backslash joined."""
    text = re.sub(r"\\\n +", " ", page.read_text(encoding="utf-8"))
    for line in text.splitlines():
        if line.startswith("    "):
            found = [line] if "-m wsolkit." in line else []
        else:  # within a sentence, a command without settings is only named
            found = re.findall(r"`([^`]*-m wsolkit\.[^`]+ [^`]+)`", line)
        for command in found:
            yield re.sub(r".*-m wsolkit\.", "python -m wsolkit.", command)  # torchrun and srun start it elsewhere


COMMANDS = sorted(
    {
        (page.name, line)
        for page in pages()
        if page.name not in FOLLOWED
        for line in commands(page)
        if not line.startswith("python -m wsolkit.demo ")  # never ends by itself; test_docs opens it
    }
)


def kind(line: str) -> tuple[str, ...]:
    """Commands of one kind do the same: by name, kind of network, and whether it is a sweep."""
    name, *arguments = line.removeprefix("python -m wsolkit.").split()
    if name not in ("train", "evaluate"):
        return (line,)  # these are quick
    if is_sweep(arguments):
        return (name, "sweep")
    method = next((word.removeprefix("method=") for word in arguments if word.startswith("method=")), "sat")
    network = "cnn" if method in CNN_METHODS else "tokens" if method in TOKEN_METHODS else "vit"
    return (name, network, *(["score maps"] if "score_maps=" in line else []))


def is_sweep(arguments: list[str]) -> bool:
    return "-m" in arguments or any(word.startswith("sweep=") for word in arguments)


def effort(command: tuple[str, str]) -> tuple[bool, bool]:
    """Networks and data sets that a command names are larger than those that go with a method."""
    return "backbone=" in command[1], "dataset=" in command[1]


FIRST = {kind(line): (page, line) for page, line in sorted(COMMANDS, key=effort, reverse=True)}
OTHERS = [command for command in COMMANDS if command not in FIRST.values()]


def named(commands: list[tuple[str, str]], *marks: pytest.MarkDecorator) -> list[object]:
    return [pytest.param(page, line, id=f"{page}: {line}", marks=marks) for page, line in commands]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages speak of."""
    folder = tmp_path_factory.mktemp("place")
    data = folder / "data"
    write_imagenet_v2(write_imagenet(data / "imagenet"))
    write_cub(data / "cub", train=10)
    write_aircraft(data / "aircraft")
    write_listed(data / "listed", {"train": 4, "val": 4})
    write_folder(data / "folder", "train", "val")
    (data / "folder" / "val.json").write_text(json.dumps(boxes_of(data / "folder")), encoding="utf-8")
    for name in ("red spots", "blue spots"):  # classes of the checkpoints below
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(3):
            PIL.Image.new("RGB", (60, 40), (80 * number, 100, 0)).save(folder / "photos" / name / f"{number}.jpg")
    for model in ("vit_tiny_patch16_224", "mobilenetv2_100"):
        safetensors.torch.save_file(timm.create_model(model).state_dict(), folder / f"{model}.safetensors")
    for method in ("scm", "cam"):
        train(load_config(f"method={method}", *SMALL["train"]), folder / method)
    write_predictions(folder / "boxes", {f"red spots/{number}.jpg": [[0, 0, 9, 9]] for number in range(3)}, (60, 40))
    (folder / "shapes.txt").write_text("val/00000,0,0,9,9\n", encoding="utf-8")
    torch.save({"model": released_state("sat"), "best_thr": 0.4}, folder / "best_loc.pth.tar")
    for name, accuracy in (("a", 50.0), ("b", 60.0)):
        add_job(folder / "sweep", name, f"method.attention_level={name == 'b':d}", accuracy=accuracy)
    for image in (path for split in ("val", "val2") for path in (data / "imagenet" / split).rglob("*.[jJ]*")):
        score_map = folder / "maps" / f"{image.relative_to(data / 'imagenet')}.npy"
        score_map.parent.mkdir(parents=True, exist_ok=True)
        np.save(score_map, np.full((224, 224), 0.5, np.float32))
    return folder


def boxes_of(root: Path) -> dict[str, object]:
    """COCO's JSON of a folder's images for evaluation."""
    images = [path for path in sorted((root / "val").rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    images = [path for path in images if not path.name.startswith(".")]
    sizes = [PIL.Image.open(path).size for path in images]
    return {
        "images": [
            {"id": number, "file_name": str(path.relative_to(root / "val")), "width": width, "height": height}
            for number, (path, (width, height)) in enumerate(zip(images, sizes, strict=True))
        ],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [1, 2, 10, 8], "area": 80, "iscrowd": 0}
            for n in range(len(images))
        ],
    }


def filled_in(page: str, line: str, place: Path) -> tuple[str, list[str]]:
    """A page's command with places that exist instead of DIR, FILE, PATH and so on: its name, and its arguments."""
    words = [word for word in shlex.split(line, comments=True)[2:] if word != "…"]
    name, arguments = words[0].removeprefix("wsolkit."), words[1:]
    dataset = next((word.split("=")[1] for word in arguments if word.startswith("dataset=")), "")
    model = "mobilenetv2_100" if "backbone=mobilenetv2" in arguments else "vit_tiny_patch16_224"
    root = place / ("photos" if "dataset.splits=null" in arguments else f"data/{dataset}")
    pseudo = {"cub": root / "metadata" / "val", "folder": place / "boxes"}.get(dataset, place / "shapes.txt")
    here = {
        "dataset.root": root,
        "backbone.weights": place / f"{model}.safetensors",
        "checkpoint": place / ("cam" if page in CNN_PAGES else "scm") / "checkpoints" / "best.ckpt",
        "score_maps": place / "maps",
        "source": place / ("best_loc.pth.tar" if name == "import_checkpoint" else "photos"),
        "dataset.cache": Path("cache"),
        "dataset.pseudo_boxes": pseudo,
    }
    elsewhere = ("hydra/launcher=", "hydra.launcher.", "trainer.num_nodes=")  # tested by themselves
    arguments = [word for word in arguments if not word.startswith(elsewhere)]
    for index, word in enumerate(arguments):
        setting, equals, value = word.partition("=")
        if equals and setting in here:
            arguments[index] = f"{setting}={here[setting]}"
        elif not equals and not word.startswith("-"):
            arguments[index] = str(shutil.copytree(place / ("scm" if name == "dashboard" else "sweep"), Path(word)))
        elif setting == "dataset.classes":
            arguments[index] = word.replace(",17]", ",1]")
        elif "," in value and not re.search(r"[\[{]", value) and "sweep=" not in word:
            arguments[index] = f"{setting}={value.split(',')[0]}"  # the first job of a sweep stands for all
    if dataset in CLASSES:
        arguments += [f"dataset.num_classes={CLASSES[dataset]}", "dataset.expected=null"]
    if name == "train" and dataset and "backbone=" not in line:
        arguments.append(f"backbone={smallest_backbone(line)}")
    return name, [*arguments, *SMALL.get(name, ())]


def smallest_backbone(line: str) -> str:
    """A small backbone of the kind that the method of a command takes."""
    method = re.search(r"\bmethod=(\w+)", line)
    if method and method[1] in CNN_METHODS:
        return "mobilenetv2"
    return "tokens_micro" if method and method[1] in TOKEN_METHODS else "deit_tiny"


@pytest.fixture(autouse=True)
def _first_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps have their first job alone, and the others are not composed, which test_jobs does."""
    split = sweeper._Sweeper.split_arguments

    def first(overrides: list[object], size: int | None) -> list[list[list[str]]]:
        return [batch[:1] for batch in split(overrides, None)]

    monkeypatch.setattr(sweeper._Sweeper, "split_arguments", staticmethod(first))


@pytest.mark.parametrize(("page", "line"), [*named(list(FIRST.values())), *named(OTHERS, pytest.mark.slow)])
def test_command_runs(page: str, line: str, place: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, arguments = filled_in(page, line, place)

    def run_first_job(module: str, overrides: list[str], flags: list[str], settings: object, folder: Path) -> None:
        job = [*flags, *overrides, "hydra.mode=RUN", f'hydra.run.dir="{folder}"']
        process = FRESH.Process(target=run_main, args=(in_tmp, module, job))
        process.start()
        process.join()
        sys.exit(process.exitcode)  # the others are as good

    monkeypatch.setattr("wsolkit.settings.command.run_job", run_first_job)
    monkeypatch.setattr(sys, "argv", [])  # put back afterwards, as is what the command changes
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert exit_code(f"wsolkit.{name}", arguments) == 0
    if name in ("train", "evaluate"):
        assert list(in_tmp.rglob("metrics.json"))


@pytest.mark.parametrize(("page", "line"), named(OTHERS))
def test_settings_of_commands_are_right(
    page: str, line: str, place: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composed and checked, of a sweep the first job; another of the kind is run above."""
    name, arguments = filled_in(page, line, place)
    checked = []

    def check(cfg: DictConfig, folder: Path, **_: object) -> None:
        if name == "evaluate" and cfg.checkpoint is not None:
            cfg = restore(cfg, read_checkpoint(Path(cfg.checkpoint)), given_overrides())
        check_config(cfg)
        checked.append(folder)

    def check_job(module: str, overrides: list[str], flags: list[str], settings: object, folder: Path) -> None:
        checked.append(folder)
        sys.exit(0)

    monkeypatch.setattr(f"wsolkit.{name}.{name}", check)
    monkeypatch.setattr("wsolkit.settings.command.run_job", check_job)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert exit_code(f"wsolkit.{name}", arguments) == 0
    assert checked


def test_pages_have_commands() -> None:
    """What the test above goes through is what the pages tell."""
    assert len(COMMANDS) > 40
    assert {line.split()[2].removeprefix("wsolkit.") for _, line in COMMANDS} >= {
        *("train", "evaluate", "predict", "prepare", "sweep_report", "dashboard", "export", "import_checkpoint"),
    }
