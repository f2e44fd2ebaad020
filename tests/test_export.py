"""python -m wsolkit.export: files that give the model's logits and maps without wsolkit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import PIL.Image
import pytest
import torch

import wsolkit
from tests.conftest import CNN_METHODS, METHODS, REPOSITORY, or_slow
from wsolkit import Localizer, build_module, load_config
from wsolkit.export import file_format, main
from wsolkit.interop import programs
from wsolkit.methods.base import WSOLModule
from wsolkit.training.checkpointing import AtomicCheckpointIO

TOLERANCE = 1e-4
EXAMPLE = REPOSITORY / "examples" / "onnx_boxes.py"

# A small model of every method, and of what changes a program.
SHALLOW = "backbone.options.depth=2"
MODELS = {name: [f"method={name}"] if name in CNN_METHODS else [f"method={name}", SHALLOW] for name in METHODS} | {
    "sat": ["method=sat", "backbone.options.depth=3", "method.num_blocks=2"],
    "scm": ["method=scm", "backbone.options.depth=2", "method.num_blocks=2", "method.iterations=[16,4]"],
    "bas_vit": ["method=bas_vit", SHALLOW, "method.num_blocks=1"],
    "cam_aligned_scg": ["method=cam", "backbone.align=true", "+postprocess=scg"],
}
QUICK = ("cam_aligned_scg", "ffe", "sat", "scm", "ts_cam")

CLASS_AGNOSTIC = ("c2am", "ffe", "frozen_c2am", "ornet", "psol", "sat", "trilite")


class Exported(NamedTuple):
    module: WSOLModule
    onnx: Path
    torch_export: Path


def small(*overrides: str) -> WSOLModule:
    torch.manual_seed(0)
    return build_module(load_config(*overrides, "dataset=shapes")).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Both files of a model, written once."""
    folder, made = tmp_path_factory.mktemp("programs"), dict[str, Exported]()

    def get(name: str) -> Exported:
        if name not in made:
            made[name] = Exported(small(*MODELS[name]), folder / f"{name}.onnx", folder / f"{name}.pt2")
            program = programs.trace(made[name].module, 64)
            programs.write_onnx(program, made[name].onnx, {"is": name})
            programs.write_torch_export(program, made[name].torch_export, {"is": name})
        return made[name]

    return get


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {*QUICK}))
def test_every_method_is_traced(name: str) -> None:
    """What both formats are written from gives the logits and maps of the model; the slow tests write them."""
    module = small(*MODELS[name])
    image = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = module.localize(image, "all")
    logits, maps = programs.trace(module, 64).module()(image)
    assert maps.shape[1] == (1 if name in CLASS_AGNOSTIC else 8)
    assert (logits - expected.logits).abs().max() < TOLERANCE
    assert (maps - expected.maps).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", or_slow(MODELS, QUICK))
def test_programs_give_the_logits_and_maps_of_the_model(name: str, exported: Callable[[str], Exported]) -> None:
    """In batches of any size, for both formats, and of all classes in one go what `localize` gives of each."""
    module, onnx_file, pt2 = exported(name)
    runs = {"onnx": programs.run_onnx(onnx_file), "torch_export": programs.run_torch_export(pt2)}
    for batch in (1, 2, 5):
        image = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))
        expected = module.localize(image, torch.arange(8).expand(batch, -1))
        for form, run in runs.items():
            logits, maps = (torch.from_numpy(output) for output in run(image.numpy()))
            assert maps.shape[1] == (1 if name in CLASS_AGNOSTIC else 8)
            assert maps.shape[2:] == expected.maps.shape[2:]
            assert (logits - expected.logits).abs().max() < TOLERANCE, form
            assert (maps - expected.maps).abs().max() < TOLERANCE, form


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_nothing_of_scm_s_blocks_is_left(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    """Its iterations, up to 16 of them, leave no node: it has TS-CAM's, and those of one min-max."""
    with_blocks = exported("scm").onnx
    without = tmp_path / "none.onnx"
    programs.write_onnx(programs.trace(small(*MODELS["ts_cam"], "method=scm", "method.num_blocks=0"), 64), without, {})
    assert operators(with_blocks) == operators(without)
    ts_cam = operators(exported("ts_cam").onnx)
    assert not ts_cam - operators(with_blocks)
    beyond = operators(with_blocks) - ts_cam
    min_max = {"ReduceMin", "ReduceMax", "Sub", "Div", "Where", "Cast", "Reshape", "Constant"}
    flat = {"Equal", "Abs", "Max", "Mul", "LessOrEqual"}  # whether a map is constant, but for rounding
    assert set(beyond) <= min_max | flat
    assert beyond["ReduceMin"] == beyond["ReduceMax"] == beyond["Div"] == 1
    assert not any("calibration" in part.name for part in onnx.load(with_blocks).graph.initializer)
    assert not any("calibration" in name for name in torch.export.load(exported("scm").torch_export).state_dict)
    assert any("calibration" in name for name in exported("scm").module.state_dict())  # the model keeps its own


def test_files_are_valid_and_described(exported: Callable[[str], Exported]) -> None:
    _, onnx_file, pt2 = exported("sat")
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", programs.OPSET)]
    assert {entry.key: entry.value for entry in model.metadata_props} == {"wsolkit": '{"is": "sat"}'}
    extra = {"wsolkit.json": ""}
    torch.export.load(pt2, extra_files=extra)
    assert json.loads(extra["wsolkit.json"]) == {"is": "sat"}


def test_another_model_s_program_is_noticed(exported: Callable[[str], Exported]) -> None:
    _, onnx_file, _ = exported("ts_cam")
    *_, same = programs.differences(programs.run_onnx(onnx_file), exported("ts_cam").module, 64)
    *_, other = programs.differences(programs.run_onnx(onnx_file), exported("scm").module, 64)
    assert same
    assert not other


def save(path: Path, *overrides: str, size: int = 64) -> Path:
    """Write a checkpoint of an untrained model, which names its classes."""
    torch.manual_seed(0)
    names = ["cat", "dog", "emu"]
    module = build_module(
        load_config("dataset=folder", "dataset.root=.", f"dataset.image_size={size}", *overrides), names
    )
    content: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 0}
    module.on_save_checkpoint(content)
    content["wsolkit"]["thresholds"] = {"maxboxacc/gt_known_loc_predicted_class": 0.6}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint") / "x.ckpt", "method=cam", "backbone=cnn_micro")


def export(*arguments: str, cwd: Path) -> int:
    """The command in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["wsolkit.export", *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "0")  # put back afterwards: the command changes it
        try:
            main()
        except SystemExit as stopped:
            if isinstance(stopped.code, str):
                print(stopped.code, file=sys.stderr)
            return 1
    return 0


def test_file_carries_what_its_user_needs(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(f"checkpoint={checkpoint}", "output=model.onnx", cwd=tmp_path) == 0
    assert "Differs from the model by up to " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    (entry,) = onnx.load(tmp_path / "model.onnx").metadata_props
    described = json.loads(entry.value)
    rules = described.pop("protocol")
    assert described == {
        "wsolkit": wsolkit.__version__,
        "method": "cam",
        "backbone": "cnn_micro",
        "exif": "apply",
        "postprocess": None,
        "class_names": ["cat", "dog", "emu"],
        "image_size": 64,
        "resize": 64,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "threshold": 0.6,
        "metrics": {},
    }
    assert (rules["name"], rules["interpolation"], rules["component"]) == ("maxboxacc", "bicubic", "largest_outline")


def test_file_is_not_overwritten_unless_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (f"checkpoint={checkpoint}", "output=model.pt2", "protocol=sat", "dataset.resize=72")
    (tmp_path / "model.pt2").write_text("mine")
    assert export(*arguments, cwd=tmp_path) == 1
    assert "'model.pt2' exists already: add overwrite=true" in capsys.readouterr().err
    assert (tmp_path / "model.pt2").read_text() == "mine"
    assert export(*arguments, "overwrite=true", cwd=tmp_path) == 0
    extra = {"wsolkit.json": ""}
    model = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    described = json.loads(extra["wsolkit.json"])
    assert (described["image_size"], described["resize"]) == (64, 72)  # SAT's rules cut the middle out
    assert model(torch.zeros(3, 3, 64, 64))[0].shape == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=model.onnx"], "required and not given: checkpoint. Add checkpoint=…"),
        (["checkpoint=gone.ckpt", "output=model.onnx"], "there is no checkpoint 'gone.ckpt'"),
        (["checkpoint={}"], "required and not given: output. Add output=…"),
        (["checkpoint={}", "output=model"], "'model' ends in none of .onnx, .pt2: add format=onnx"),
        (["checkpoint={}", "output=model.pt2", "format=onnx"], "'model.pt2' is named like format=torch_export"),
        (["checkpoint={}", "output=model.onnx", "format=tflite"], "format='tflite': Input should be 'onnx' or"),
        (["checkpoint={}", "output=no/model.onnx"], "expected the name of a file in a folder that exists, got 'no/m"),
        (["checkpoint={}", "output=model.onnx", "method=sat"], "method=sat: the checkpoint's method is cam"),
    ],
)
def test_messages(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(checkpoint) for argument in arguments]
    assert export(*given, cwd=tmp_path) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_maps_that_need_scm_s_blocks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "x.ckpt", "method=scm", "backbone=vit_micro", "method.semantic_level=2")
    assert export(f"checkpoint={path}", "output=model.onnx", cwd=tmp_path) == 1
    assert "SCM's diffusion blocks are for training, and are left out" in capsys.readouterr().err


def test_without_its_packages_the_message_names_the_extra(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export(f"checkpoint={checkpoint}", "output=model.onnx", cwd=tmp_path) == 1
    assert "pip install 'wsolkit[export]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_format_may_be_said_by_the_ending_or_a_setting() -> None:
    assert file_format(Path("a.onnx"), None) == file_format(Path("a.bin"), "onnx") == "onnx"
    assert file_format(Path("a.pt2"), None) == file_format(Path("a"), "torch_export") == "torch_export"


def test_example_refuses_other_rules(tmp_path: Path) -> None:
    program = programs.trace(small("method=cam"), 64)
    programs.write_onnx(program, tmp_path / "x.onnx", {"protocol": {"name": "sat", "threshold_rule": "above"}})
    call = [sys.executable, str(EXAMPLE), "x.onnx", "photo.png", "boxed.png"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "protocol sat has other rules than this example: export with protocol=maxboxacc" in done.stderr


@pytest.mark.parametrize(("method", "backbone"), [("cam", "cnn_micro"), ("sat", "vit_micro")])
def test_example_draws_localizer_s_box_without_torch(method: str, backbone: str, tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt", f"method={method}", f"backbone={backbone}")
    assert export(f"checkpoint={path}", "output=model.onnx", cwd=tmp_path) == 0
    localizer = Localizer.from_checkpoint(path, device="cpu")
    rng = np.random.default_rng(0)
    code = "import runpy, sys; sys.modules['torch'] = sys.modules['wsolkit'] = None; runpy.run_path(sys.argv.pop(1))"
    for number, size in enumerate([(90, 60), (64, 64), (50, 200)]):
        coarse = PIL.Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        exif = PIL.Image.Exif()
        exif[0x0112] = [1, 3, 6][number]
        coarse.resize(size, PIL.Image.Resampling.NEAREST).save(tmp_path / "photo.png", exif=exif)
        label = ["cat", "emu", None][number]
        given = [] if label is None else [label]
        call = [sys.executable, "-c", code, str(EXAMPLE), "model.onnx", "photo.png", "boxed.png", *given]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = localizer(tmp_path / "photo.png", label, threshold=localizer.threshold)
        assert json.loads(done.stdout) == {"label": found.label, "box": found.boxes[0].tolist()}
        assert PIL.Image.open(tmp_path / "boxed.png").size == found.mask.shape[::-1]
