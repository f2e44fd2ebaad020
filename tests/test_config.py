"""Settings: every combination composes and is accepted, names are right, and answers about them come fast."""

from __future__ import annotations

import itertools
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

import wsolkit
from tests.conftest import CNN_METHODS, REPOSITORY, TOKEN_METHODS, TYPICAL, or_slow
from wsolkit import load_config
from wsolkit.errors import ConfigError
from wsolkit.settings.checks import check_config
from wsolkit.settings.conf import CONF


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def is_typical(recipe: str) -> bool:
    return recipe.rpartition("_")[0] in TYPICAL


@pytest.mark.parametrize("group", ["method", "dataset", "backbone"])
def test_names_are_those_of_their_files(group: str) -> None:
    for name in names(group):
        assert yaml.safe_load((CONF / group / f"{name}.yaml").read_text())["name"] == name


def pairs() -> list[Any]:
    """Every method with every data set; those that have no recipe, and so nothing of their own, are for the slow tests."""
    found: list[Any] = []
    for method, dataset in itertools.product(names("method"), names("dataset")):
        quick = dataset == "shapes" or method == "sat" or f"{method}_{dataset}" in names("recipe")
        found.append(pytest.param(method, dataset, marks=[] if quick else [pytest.mark.slow]))
    return found


@pytest.mark.parametrize(("method", "dataset"), pairs())
def test_every_method_composes_with_every_data_set(method: str, dataset: str) -> None:
    cfg = load_config(f"method={method}", f"dataset={dataset}", *([] if dataset == "shapes" else ["dataset.root=x"]))
    check_config(cfg)
    OmegaConf.resolve(cfg)
    assert cfg.method.name == method
    kind = "CNN" if method in CNN_METHODS else "TokenBackbone" if method in TOKEN_METHODS else "ViT"
    assert cfg.backbone._target_.endswith(f".{kind}")
    assert cfg.optimizer._target_.endswith("SGD" if kind == "CNN" else "AdamW")


@pytest.mark.parametrize(
    ("group", "name"), [(g, n) for g in ("backbone", "trainer", "protocol", "logger") for n in names(g)]
)
def test_every_option_is_accepted(group: str, name: str) -> None:
    check_config(load_config(f"{group}={name}"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", names("recipe"))
def test_every_recipe_is_accepted_with_another_data_set(recipe: str) -> None:
    method = next(name for name in names("method") if recipe.startswith(f"{name}_"))
    check_config(load_config(f"recipe={recipe}", f"method={method}"))


def test_recipe_is_chosen_by_method_and_data_set() -> None:
    """The papers' values, as ../shared/spec has them."""
    sat = load_config("method=sat", "dataset=imagenet", "dataset.root=x")
    assert (sat.method.area_prior, sat.optimizer.lr, sat.dataset.batch_size) == (0.35, 1.5e-5, 512)
    assert (sat.trainer.max_epochs, sat.method.num_blocks, sat.backbone.name) == (1, 3, "deit_small")
    ts_cam = load_config("method=ts_cam", "dataset=imagenet", "dataset.root=x")
    assert (ts_cam.optimizer.lr, ts_cam.dataset.batch_size, ts_cam.trainer.max_epochs) == (5e-4, 256, 20)
    assert list(ts_cam.schedule.milestones) == [10, 12]
    assert ts_cam.method.keep_head_bias is True
    cub = load_config("method=sat", "dataset=listed", "dataset.root=x", "recipe=sat_cub")
    assert (cub.method.area_prior, cub.optimizer.lr, cub.dataset.batch_size) == (0.25, 1e-4, 256)
    cub = load_config("method=ts_cam", "dataset=listed", "dataset.root=x", "recipe=ts_cam_cub")
    assert (cub.optimizer.lr, cub.dataset.batch_size, cub.trainer.max_epochs) == (5e-5, 128, 60)


@pytest.mark.parametrize("recipe", or_slow(names("recipe"), [name for name in names("recipe") if is_typical(name)]))
def test_every_recipe_goes_with_its_method_and_data_set(recipe: str) -> None:
    """`method=sat dataset=cub` is all that sat_cub needs."""
    method, _, dataset = recipe.rpartition("_")
    root = [] if dataset == "shapes" else ["dataset.root=x"]
    given = [f"method={method}", f"dataset={dataset}", *root]
    assert load_config(*given) == load_config(*given, f"recipe={recipe}")


@pytest.mark.parametrize("method", or_slow(names("method")))
def test_folders_have_the_settings_of_lists(method: str) -> None:
    folder, listed = (
        load_config(f"method={method}", f"dataset={name}", "dataset.root=x") for name in ("folder", "listed")
    )
    for group in ("method", "optimizer", "schedule", "trainer"):
        assert folder[group] == listed[group]
    assert folder.dataset.batch_size == listed.dataset.batch_size


def test_values_for_cub_go_with_it() -> None:
    cub = load_config("method=sat", "dataset=cub", "dataset.root=x", "protocol=[sat,ts_cam,spa]")
    assert (cub.method.area_prior, cub.optimizer.lr, cub.dataset.batch_size) == (0.25, 1e-4, 256)
    assert (cub.protocol.sat.threshold, cub.protocol.ts_cam.threshold) == (0.4, 0.1)
    assert (cub.protocol.spa.far_corner_shift, list(cub.protocol.spa.threshold_range)) == (-1, [0.1, 0.35])
    scg = load_config("method=spa", "dataset=cub", "dataset.root=x").postprocess
    assert (scg.first_order_threshold, scg.high_order_threshold, scg.high_order_weight) == (0.1, 0.5, 2.0)


def test_recipes_of_convolutional_networks_have_the_papers_values() -> None:
    def lists(name: str) -> list[str]:
        return [f"method={name.rpartition('_')[0]}", "dataset=listed", "dataset.root=x", f"recipe={name}"]

    def read(cfg: DictConfig) -> tuple[object, ...]:
        schedule, trainer = cfg.schedule, cfg.trainer
        milestones = tuple(schedule.milestones)
        return cfg.optimizer.lr, cfg.dataset.batch_size, trainer.max_epochs, milestones, schedule.gamma

    spa = load_config(*lists("spa_cub"))
    assert read(spa) == (1e-3, 30, 100, (80,), 0.1)
    assert (spa.backbone.name, spa.method.start_epoch, spa.method.background_threshold, spa.method.gap) == (
        *("vgg16", 20, 0.1, 0.2),
    )
    assert (list(spa.method.head_channels), list(spa.postprocess.stages)) == ([1024, 1024], ["pool4", "conv5"])
    spa = load_config("method=spa", "dataset=imagenet", "dataset.root=x")
    assert read(spa) == (1e-3, 16, 20, (10, 15), 0.1)
    assert (spa.method.start_epoch, spa.method.background_threshold, spa.method.gap) == (5, 0.4, 0.1)
    scg = spa.postprocess
    assert (scg.first_order_threshold, scg.high_order_threshold, scg.high_order_weight) == (0.2, 0.2, 1.0)
    assert (spa.method.fine_tuning.new_lr_factor, spa.method.fine_tuning.bias_lr_factor) == (10, 2)
    assert (spa.optimizer.momentum, spa.optimizer.nesterov, spa.optimizer.weight_decay) == (0.9, True, 5e-4)

    def losses(cfg: DictConfig) -> tuple[float, ...]:
        own = cfg.method
        weights = own.similarity_weight, own.foreground_threshold, own.background_threshold, own.norm_weight
        return *weights, own.drop_weight, own.drop_probability, own.drop_threshold

    # λ_sim, τ_fg, τ_bg, λ_norm, λ_drop, p, γ
    resnet, vgg = load_config(*lists("bridging_gap_cub")), load_config(*lists("bridging_gap_cub"), "backbone=vgg16")
    assert losses(resnet) == (0.5, 0.4, 0.2, 0.05, 2, 0.25, 0.8)
    assert losses(vgg) == (0.5, 0.6, 0.1, 0.15, 3, 0.5, 0.8)
    assert read(resnet) == (0.002, 32, 70, (41, 61), 0.2)
    assert read(vgg) == (0.004, 64, 70, (41, 61), 0.2)
    assert [(cfg.backbone.stride, cfg.method.warmup_epochs, cfg.method.similarity) for cfg in (resnet, vgg)] == [
        *((8, 20, "max"), (16, 20, "max")),
    ]
    assert [(cfg.method.drop_after, cfg.method.fine_tuning.new_from) for cfg in (resnet, vgg)] == [
        *(("layer4.0", "layer4"), ("conv4", "head")),
    ]
    assert [(cfg.method.fine_tuning.new_lr_factor, cfg.optimizer.weight_decay) for cfg in (resnet, vgg)] == [
        *((10, 1e-4), (5, 5e-4)),
    ]
    for data in ("imagenet", "openimages"):
        resnet = load_config(*lists(f"bridging_gap_{data}"))
        vgg = load_config(*lists(f"bridging_gap_{data}"), "backbone=vgg16")
        assert losses(resnet) == (8, 0.28, 0.25, 1, 2, 0.25, 0.8)
        assert losses(vgg) == (0.5, 0.5, 0.3, 0.2, 3, 0.5, 0.8)
        assert (read(resnet), resnet.method.warmup_epochs) == ((1e-5, 32, 30, (21, 31), 0.1), 14)
        assert (read(vgg), vgg.method.warmup_epochs) == ((2e-5, 32, 40, (11, 31), 0.1), 5)


def test_backbone_follows_the_kind_of_method_and_the_data_set() -> None:
    def backbone(*overrides: str) -> str:
        return str(load_config(*overrides).backbone.name)

    real = ("dataset=listed", "dataset.root=x")
    assert [backbone(f"method={name}") for name in ("sat", "cam", "spa")] == ["vit_micro", "cnn_micro", "cnn_micro"]
    assert [backbone(f"method={name}", *real) for name in ("sat", "cam", "spa")] == ["deit_small", "resnet50", "vgg16"]
    assert backbone("method=spa", "backbone=inception_v3") == backbone("backbone=inception_v3") == "inception_v3"


def test_postprocess_is_added_or_left_out() -> None:
    assert load_config("method=cam").get("postprocess", {}) == {}
    for setting in ("+postprocess=scg", "postprocess=scg"):
        assert load_config("method=cam", setting).postprocess.name == "scg"
    assert load_config("method=spa").postprocess.name == "scg"
    assert load_config("method=spa", "postprocess=none").get("postprocess", {}) == {}


def test_recipe_gives_way_to_the_command_line() -> None:
    cfg = load_config("optimizer.lr=0.5", "backbone=vit_tiny", "dataset.batch_size=8")
    assert (cfg.optimizer.lr, cfg.backbone.name, cfg.dataset.batch_size) == (0.5, "vit_tiny", 8)
    assert load_config("~recipe").method.num_blocks == 3


def test_protocols_are_given_as_a_list() -> None:
    assert list(load_config("protocol=[maxboxacc_v2]").protocol) == ["maxboxacc_v2"]
    assert list(load_config("protocol=maxboxacc").protocol) == ["maxboxacc"]
    assert list(load_config().protocol) == ["maxboxacc", "maxboxacc_v2"]


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "predict", "demo"])
@pytest.mark.parametrize("question", [["--help"], ["--cfg", "job"]])
def test_questions_are_answered_without_torch(command: str, question: list[str], tmp_path: Path) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['wsolkit.{command}', *{question!r}]\n"
        "try:\n"
        f"    runpy.run_module('wsolkit.{command}', run_name='__main__')\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # whatever else the machine does
    assert done.returncode == 0, done.stderr
    assert ("Settings" if question == ["--help"] else "dataset:") in done.stdout
    assert not list(tmp_path.iterdir())


def test_package_names_are_found_and_others_are_not() -> None:
    assert wsolkit.load_config is load_config
    assert callable(wsolkit.build_module)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        wsolkit.nothing  # noqa: B018


def test_python_fills_in_no_defaults_of_methods() -> None:
    """Every setting stands in YAML: constructors named there have no default arguments."""
    import inspect

    from wsolkit.settings.checks import locate

    for path in [*CONF.glob("method/*.yaml"), *CONF.glob("backbone/*.yaml"), CONF / "loader" / "default.yaml"]:
        target = locate(yaml.safe_load(path.read_text())["_target_"], "")
        defaults = [n for n, p in inspect.signature(target).parameters.items() if p.default is not p.empty]
        assert not defaults, (path, defaults)


def test_every_number_in_a_recipe_says_where_it_is_from() -> None:
    for path in (CONF / "recipe").glob("*.yaml"):
        text = path.read_text()
        head = text.split("\n")[1]
        if "The values are chosen here" in text or "Your own images" in text:
            continue  # said once, in the header
        assert any(conference in head for conference in ("ICCV", "CVPR", "ECCV", "AAAI", "IJCV"))
        for line in text.splitlines():
            if any(character.isdigit() for character in line.split("#")[0]):
                assert "paper" in line or "released" in line, f"{path.name}: {line}"


def test_checked_settings_are_only_of_their_type() -> None:
    cfg = load_config()
    OmegaConf.update(cfg, "method.area_prior", "much")
    with pytest.raises(ConfigError, match=r"method\.area_prior='much': Input should be a valid number"):
        check_config(cfg)


def test_yaml_files_of_users_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "ours.yaml"
    path.parent.mkdir()
    path.write_text("# @package _global_\nseed: 77\n", encoding="utf-8-sig")
    assert load_config(f"hydra.searchpath=[file://{tmp_path}]", "+mine=ours").seed == 77


def import_order(page: str) -> list[set[str]]:
    """The order of imports that a page tells: levels of packages and modules, each of which imports earlier ones."""
    (told,) = re.findall(
        r"Imports go in one order:([^.]+) →\s+commands\.", (REPOSITORY / page).read_text(encoding="utf-8")
    )
    return [set(re.findall(r"`(\w+)`", level)) for level in told.split("→")]


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_imports_go_in_the_order_that_the_pages_tell(page: str) -> None:
    """A package imports itself and what stands before it, at the top of a file and within functions."""
    levels = import_order(page)
    source = REPOSITORY / "src" / "wsolkit"
    told = set().union(*levels)
    rooms = {path.parent.name for path in source.glob("*/__init__.py")}
    assert rooms <= told
    for level, names in enumerate(levels):
        earlier = set().union(*levels[:level])
        for name in names:
            for path in [source / f"{name}.py"] if name not in rooms else (source / name).rglob("*.py"):
                text = re.sub(r"if TYPE_CHECKING:\n(?:    .*\n|\n)+", "", path.read_text(encoding="utf-8"))
                imported = set(re.findall(r"^ *(?:from|import) wsolkit\.(\w+)", text, re.MULTILINE))
                assert imported <= earlier | {name}, f"{path.relative_to(source)}: {imported - earlier - {name}}"


@pytest.mark.parametrize("trainer", ["ddp_multinode", "slurm"])
def test_processes_of_a_cluster_have_one_run_directory(trainer: str) -> None:
    cfg = load_config(f"trainer={trainer}", "trainer.num_nodes=2")
    assert (cfg.resume, cfg.trainer.strategy, cfg.trainer.num_nodes, cfg.trainer.devices) == ("auto", "ddp", 2, -1)
