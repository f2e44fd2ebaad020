"""Sweeps before they run: names of their jobs, the list of --dry-run, and --cfg."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fresh import command
from wsolkit.settings.jobs import Job, folder_name


def record(folder: Path, *overrides: str, **settings: object) -> None:
    """Leave what a finished job leaves."""
    Job(list(overrides), settings, state="finished", seconds=60.0).write(folder)
    (folder / "metrics.json").write_text("{}")


def test_job_is_named_after_what_differs(tmp_path: Path) -> None:
    constant = ["dataset=shapes", "trainer.max_epochs=3"]
    assert folder_name(tmp_path, ["optimizer.lr=0.1", "seed=0", *constant], ["optimizer.lr=0.1", "seed=0"]) == (
        "lr_0.1-seed_0"
    )
    assert folder_name(tmp_path, ["method=sat", *constant], ["method=sat"]) == "method_sat"
    assert folder_name(tmp_path, ["method.iterations=[16,4]"], ["method.iterations=[16,4]"]) == "iterations_16_4"
    assert folder_name(tmp_path, constant, []) == "job"


def test_settings_of_one_last_name_are_told_apart(tmp_path: Path) -> None:
    varied = ["method.num_blocks=1", "backbone.num_blocks=2"]
    assert folder_name(tmp_path, varied, varied) == "method.num_blocks_1-backbone.num_blocks_2"


@pytest.mark.parametrize("values", [("a/b", "a/c"), ("x y", "x_y"), ("'q'", "q"), ("l" * 99 + "1", "l" * 99 + "2")])
def test_values_that_no_name_can_hold_are_told_apart(values: tuple[str, str], tmp_path: Path) -> None:
    names = {folder_name(tmp_path, [f"dataset.root={value}"], [f"dataset.root={value}"]) for value in values}
    assert len(names) == 2
    assert all(len(name) < 100 and not set(name) & set("/ '\"") for name in names)


def test_same_job_keeps_its_directory_and_another_gets_its_own(tmp_path: Path) -> None:
    """Two commands share a directory, and one of them is later extended by a setting."""
    first, second = ["seed=0", "optimizer.lr=0.1"], ["seed=0", "optimizer.lr=0.2"]
    assert folder_name(tmp_path, first, ["seed=0"]) == "seed_0"
    record(tmp_path / "seed_0", *first)
    other = folder_name(tmp_path, second, ["seed=0"])
    assert other.startswith("seed_0-")
    record(tmp_path / other, *second)
    assert folder_name(tmp_path, first, ["seed=0"]) == "seed_0"
    assert folder_name(tmp_path, second, ["seed=0"]) == other
    assert folder_name(tmp_path, first, first) == "seed_0"


def test_directory_under_an_earlier_name_is_found(tmp_path: Path) -> None:
    record(tmp_path / "num_blocks_2-shapes-1a2b3c4d", "method.num_blocks=2", "dataset=shapes")
    job = ["dataset=shapes", "method.num_blocks=2", "hydra.mode=MULTIRUN"]
    assert folder_name(tmp_path, job, ["method.num_blocks=2"]) == "num_blocks_2-shapes-1a2b3c4d"


def test_dry_run_lists_the_jobs_and_makes_nothing(tmp_path: Path) -> None:
    arguments = ("-m", "sweep=sat_area", "method.area_prior=0.1,0.2", "seed=0", "dataset=shapes", "--dry-run")
    done = command("train", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2 jobs in outputs/sweeps/sat_area_shapes:",
        "  area_prior_0.1  method.area_prior=0.1",
        "  area_prior_0.2  method.area_prior=0.2",
        "All of them have seed=0 sweep=sat_area dataset=shapes",
        "Estimated time: unknown. To compare with, 2 of 2 jobs have no finished one of the same method, backbone, "
        "data set and length.",
        "Nothing was run, and no folder was made.",
    ]
    assert not list(tmp_path.iterdir())


def test_dry_run_estimates_by_finished_jobs_of_the_same_kind(tmp_path: Path) -> None:
    composed = command("train", "--cfg", "job", "--resolve", cwd=tmp_path)
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(OmegaConf.create(composed.stdout))
    assert isinstance(settings, dict)
    record(tmp_path / "outputs" / "elsewhere" / "seed_7", "seed=7", **{str(key): settings[key] for key in settings})
    done = command("train", "-m", "seed=0,1,2", "--dry-run", cwd=tmp_path)
    assert "Estimated time: 3 min, one after the other, by 1 finished jobs of the same kind.\n" in done.stdout


def test_dry_run_of_a_single_run_says_where_it_goes(tmp_path: Path) -> None:
    done = command("train", "method=ts_cam", "hydra.run.dir=there/run", "--dry-run", cwd=tmp_path)
    assert done.stdout.startswith("1 job in there:\n  run  method=ts_cam\n")
    wrong = command("train", "seed=0,1", "--dry-run", cwd=tmp_path)
    assert "'seed=0,1' has several values: add -m to run each of them" in wrong.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("sweep=sat_area",), ("-m", "sweep=sat_area"), ("-m", "seed=3,4")])
def test_settings_of_a_sweep_are_shown(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = command("train", "--cfg", "job", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"\nseed: {3 if 'seed=3,4' in arguments else 0}\n" in done.stdout
    assert not list(tmp_path.iterdir())
