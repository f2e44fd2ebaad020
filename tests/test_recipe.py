"""What a run says of its recipe."""

from __future__ import annotations

from wsolkit import load_config
from wsolkit.reporting.summary import about_recipe
from wsolkit.settings.conf import CONF


def test_recipe_is_named_with_its_source() -> None:
    path = CONF / "recipe" / "sat_cub.yaml"
    said = about_recipe(load_config("dataset=cub", "dataset.root=x"), path, [])
    assert said == "recipe=sat_cub: SAT on CUB-200-2011 (Wu et al., ICCV 2023), DeiT-S."


def test_pair_without_recipe_is_said_with_the_values_that_nobody_chose() -> None:
    given = ["method=ts_cam", "dataset=dogs", "dataset.root=x", "optimizer.lr=1e-4"]
    assert about_recipe(load_config(*given), None, given) == (
        "No recipe is taken for method=ts_cam on dataset=dogs. The defaults schedule.name=constant, "
        "dataset.batch_size=64, trainer.max_epochs=10 are not tuned for them. Give these settings, or take a recipe "
        "with recipe=NAME: ts_cam_cub, ts_cam_folder, ts_cam_imagenet, ts_cam_listed, ts_cam_shapes."
    )


def test_every_recipe_says_what_it_is_in_its_first_sentence() -> None:
    for path in (CONF / "recipe").glob("*.yaml"):
        said = about_recipe(load_config(), path, [])
        assert len(said) > len(path.stem) + 20, path
        assert said.endswith("."), path
