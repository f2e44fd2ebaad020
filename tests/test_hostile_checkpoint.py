"""Checkpoints of somebody who wants to run code here: nothing in one may choose what runs, or which files change."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from omegaconf import OmegaConf

from wsolkit import Localizer
from wsolkit.backbones.pretrained import create
from wsolkit.checkpoint import read_checkpoint
from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.settings.checks import check_config, locate
from wsolkit.settings.compose import load_config, plain
from wsolkit.settings.overrides import escaped
from wsolkit.settings.restore import choose_groups, restore
from wsolkit.training.checkpointing import BestCheckpoint

NAMES = [
    "../../../elsewhere/evil",
    "/elsewhere/evil",
    "evil@_global_",
    "sat,cam",
    "[sat,cam]",
    "null",
    "",
    "${oc.env:HOME}",
    "${oc.create:{_target_: os.system}}",
    "pkg://evil/method",
    "sat\nevil",
]


@pytest.fixture(scope="module")
def content(shapes_checkpoint: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(shapes_checkpoint, weights_only=True)
    return loaded


@pytest.fixture
def hostile(content: dict[str, Any], tmp_path: Path) -> Any:
    """Write a checkpoint with one field of its settings, named by the keys that lead there, changed."""

    def write(*keys: str, value: Any) -> Path:
        changed = {"state_dict": {}, "global_step": 1, "wsolkit": copy.deepcopy(content["wsolkit"])}
        node: Any = changed
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        path = tmp_path / "hostile.ckpt"
        torch.save(changed, path)
        return path

    return write


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", ["method", "backbone", "dataset"])
def test_names_are_plain(hostile: Any, group: str, name: str) -> None:
    path = hostile("wsolkit", "config", group, "name", value=name)
    with pytest.raises(CheckpointError, match=f"its {group} is called .*: expected the plain name of a YAML file"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match=f"its {group} is called"):
        choose_groups([f"checkpoint={path}"])


@pytest.mark.parametrize("name", NAMES)
def test_names_of_protocols_and_post_processes_are_plain(hostile: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match="its protocol is called"):
        read_checkpoint(hostile("wsolkit", "config", "protocol", value={name: {}}))
    with pytest.raises(CheckpointError, match="its postprocess is called"):
        read_checkpoint(hostile("wsolkit", "config", "postprocess", value={"name": name}))


def test_a_file_elsewhere_does_not_run(hostile: Any, tmp_path: Path) -> None:
    """The path would lead from conf/method to a YAML file of the attacker."""
    (tmp_path / "evil.yaml").write_text(f"_target_: os.mkdir\nname: evil\npath: {tmp_path / 'ran'}\n")
    up = "/".join([".."] * 30)
    with pytest.raises(CheckpointError, match="its method is called"):
        Localizer.from_checkpoint(hostile("wsolkit", "config", "method", "name", value=f"{up}{tmp_path}/evil"))
    assert not (tmp_path / "ran").exists()


VALUES = [
    "../../evil.yaml",
    "${oc.env:HOME}",
    "\\${oc.env:HOME}",
    "${hydra:runtime.cwd} \\\\${now:%Y}",
    "${oc.create:{_target_: os.system, command: touch ran}}",
    "pkg://evil",
    "???",
]


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) and value else [(*path, key)]


@pytest.mark.parametrize("value", [*VALUES, [VALUES[1]], {"_target_": "os.system"}, {"x": [{"_target_": "os.abort"}]}])
def test_values_are_text(shapes_checkpoint: Path, value: Any) -> None:
    """Every value of the settings at once: each arrives as it stands or not at all, and no `_target_` changes."""
    checkpoint = read_checkpoint(shapes_checkpoint)
    composed = load_config("method=ts_cam", "dataset=shapes", "backbone=vit_micro")
    before, saved = plain(composed), copy.deepcopy(dict(checkpoint.config))
    kept = {("dataset", "image_size"), ("dataset", "resize"), *((group, "name") for group in before)}
    changed = [path for path in leaves(saved) if path not in kept]
    for path in changed:
        node = saved
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
    object.__setattr__(checkpoint, "config", saved)
    restored = restore(composed, checkpoint, (), protocols=True)
    after = OmegaConf.to_container(restored, resolve=True, throw_on_missing=False)
    assert isinstance(after, dict)
    arrived = 0
    for path in leaves(before):
        old, new = _at(before, path), _at(after, path)
        if path[-1] == "_target_":
            assert new == old
        elif new != old and path[-1] not in ("pretrained", "weights", "cache", "mean", "std", "image_size"):
            assert new == value
            arrived += 1
    assert arrived > 10 or "_target_" in str(value)


def _at(node: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(node, dict):
            return node
        node = node[key]
    return node


@pytest.mark.parametrize("text", ["a${b}", "\\${b}", "\\\\${b}\\", "${", "$ {x}", "C:\\data\\", "a${b}c\\${d}"])
def test_text_stays_text_in_settings(text: str) -> None:
    assert OmegaConf.create(escaped({"a": [text]})).a[0] == text


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("wsolkit",), [1], "its field 'wsolkit' is a list"),
        (("wsolkit",), {}, "it has no 'config'"),
        (("wsolkit", "config"), [], "config: Input should be a valid dictionary"),
        (("wsolkit", "config", "method"), "sat", "method: Input should be a valid dictionary"),
        (("wsolkit", "config", "method"), None, "its settings have no method with a name"),
        (("wsolkit", "config", "backbone", "name"), 3, "its settings have no backbone with a name"),
        (("wsolkit", "config", "backbone", "model"), torch.zeros(1), "config.backbone.model is a Tensor"),
        (("wsolkit", "config", "dataset", "image_size"), "${seed}", "dataset.image_size: Input should be a valid int"),
        (("wsolkit", "config", "dataset", "resize"), None, "dataset.resize: Input should be a valid integer"),
        (("wsolkit", "config", "seed"), {1: 2}, "config.seed has a key of type int"),
        (("wsolkit", "config", "protocol"), ["maxboxacc"], "protocol: Input should be a valid dictionary"),
        (("wsolkit", "class_names"), "ab", "class_names: Input should be a valid list"),
        (("wsolkit", "class_names"), ["a", 1], "class_names: Input should be a valid string"),
        (("wsolkit", "version"), None, "version: Input should be a valid string"),
        (("wsolkit", "thresholds"), {"maxboxacc/gt_known_loc": "x"}, "thresholds: Input should be a valid number"),
        (("wsolkit", "mean"), "abc", "mean: Input should be a valid list"),
        (("state_dict",), {"a": "b"}, "state_dict: Input should be an instance of Tensor"),
        (("state_dict",), None, "state_dict: Input should be a valid dictionary"),
        (("global_step",), "1", "global_step: Input should be a valid integer"),
    ],
)
def test_fields_have_their_types(hostile: Any, keys: tuple[str, ...], value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match="hostile.ckpt' is a damaged checkpoint of wsolkit") as caught:
        read_checkpoint(hostile(*keys, value=value))
    assert message in str(caught.value)


def test_settings_nested_without_end_are_refused(hostile: Any) -> None:
    nested: dict[str, Any] = {}
    for _ in range(20_000):
        nested = {"a": nested}
    path = hostile("wsolkit", "version", value="x")
    content = torch.load(path, weights_only=True)
    content["wsolkit"]["config"]["seed"] = nested  # PyTorch can read such a file, and cannot write it
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="is a damaged checkpoint"):
        patch.setattr("torch.load", lambda *_, **__: content)
        read_checkpoint(path)


@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.run", "wsolkit.interop.foreign.read_foreign", "builtins.exec", "torch.load"]
)
def test_only_what_yaml_files_name_runs(target: str) -> None:
    with pytest.raises(ConfigError, match=f"method._target_={target}: wsolkit runs only what its own YAML files"):
        locate(target, "method.")
    with pytest.raises(ConfigError, match="wsolkit runs only what"):
        check_config(load_config(f"+more={{_target_: {target}}}"))


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"])
def test_options_of_a_backbone_name_no_files(name: str) -> None:
    with pytest.raises(ConfigError, match=f"backbone.options.{name}: .* backbone.weights=FILE"):
        create("vit_tiny_patch16_224", False, {name: "evil.pth"})


def test_resuming_touches_no_file_that_the_checkpoint_names(tmp_path: Path) -> None:
    """Lightning deletes the file that was the best so far when a better one comes."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for own in (None, tmp_path / "run" / "checkpoints" / "last.ckpt"):
        best = BestCheckpoint(tmp_path / "run" / "checkpoints", "val/x", own)
        state = best.state_dict() | {"best_model_score": torch.tensor(1.0), "kth_value": torch.tensor(1.0)}
        state |= {key: str(precious) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best.load_state_dict(state | {"best_k_models": {str(precious): torch.tensor(1.0)}})
        assert best.best_model_path == best.kth_best_model_path == best.last_model_path == ""
        assert best.best_k_models == {}
    assert precious.read_text() == "mine"
    assert list((tmp_path).rglob("*")) == [precious]


def test_the_best_checkpoint_comes_along(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier" / "best.ckpt"
    earlier.parent.mkdir()
    earlier.write_text("weights")
    best = BestCheckpoint(tmp_path / "run", "val/x", earlier.with_name("last.ckpt"))
    best.load_state_dict(best.state_dict() | {"best_model_score": torch.tensor(70.0)})
    assert (tmp_path / "run" / "best.ckpt").read_text() == "weights"
    assert best.best_model_path == str(tmp_path / "run" / "best.ckpt")
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert not best.check_monitor_top_k(trainer, torch.tensor(60.0))
    assert best.check_monitor_top_k(trainer, torch.tensor(80.0))
    assert not math.isnan(float(best.best_model_score or math.nan))
