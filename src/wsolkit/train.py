"""python -m wsolkit.train: train a method on a data set, evaluate it, and write a report.

A run directory holds metrics.json, config.yaml, metrics.csv, images.csv, checkpoints/{best,last}.ckpt, report.html,
examples.png and examples/. With trainer=profile, it also holds profile.json. If the run used only a part of the
training images, train_images.txt lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wsolkit.settings.checks import check_config
from wsolkit.settings.command import command_to_resume, run_command
from wsolkit.settings.compose import save_config
from wsolkit.settings.conf import as_named
from wsolkit.settings.run_directory import one_run

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass
class EvaluationSettings:
    """The settings that train and evaluate share, see conf/evaluation.yaml."""

    seed: int
    selection: Literal["val", "test", "pseudo", "classification"]
    compile: bool | str
    allow_not_finite: bool
    num_examples: int
    examples: list[str]
    num_table_images: int | None


@dataclass
class Checkpoints:
    """The settings of `wsolkit.training.checkpointing.LastCheckpoint`."""

    every_n_steps: int | None
    every_n_minutes: float | None
    requeue: bool


@dataclass
class Settings(EvaluationSettings):
    """The settings of conf/train.yaml."""

    monitor: str | None
    patience: int | None
    resume: str | None
    fit_memory: bool
    checkpoints: Checkpoints


@one_run
def train(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Train, test the best checkpoint, and write a report into a run directory. Return the metrics."""
    import lightning

    from wsolkit.build import build_datamodule, build_module
    from wsolkit.reporting.summary import method_name, print_recipe, print_summary, title, what_next
    from wsolkit.system.libraries import quieten_libraries
    from wsolkit.training.checkpointing import BestCheckpoint, LastCheckpoint
    from wsolkit.training.evaluator import Evaluator, check_monitor
    from wsolkit.training.failures import FiniteLoss, FitMemory, named_trouble
    from wsolkit.training.report import Report
    from wsolkit.training.resume import Start
    from wsolkit.training.tokens import cache_tokens
    from wsolkit.training.trainer import running

    check_config(cfg, Settings)
    print_recipe(cfg)
    start = Start.of(cfg, folder)
    quieten_libraries()
    lightning.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    datamodule.read("train", "val", "test")  # This names a broken data set before the run builds or downloads anything.
    report = Report.of(cfg, folder, datamodule.dataset("test"), title(cfg, cfg), method_name(cfg))
    module = build_module(cfg, datamodule.class_names)
    datamodule.check_targets(module.targets, cfg.method.name)
    evaluator = module.attached(Evaluator)
    start.check(cfg, module, datamodule)
    monitor = check_monitor(cfg.monitor, evaluator.evaluation, datamodule.dataset("val").records)

    apart = {prefix: f"val/{metric}" for prefix, metric in module.chosen_apart.items()}
    best = BestCheckpoint(folder / "checkpoints", f"val/{monitor}", start.path, apart, cfg.patience)
    last = LastCheckpoint(folder / "checkpoints", **cfg.checkpoints)
    callbacks = [FiniteLoss(cfg.trainer.log_every_n_steps), best, last, report, *start.callbacks()]
    advice = lambda: f"{last.left()}. Continue with {command_to_resume(folder)}"  # noqa: E731
    with running(cfg, folder, module, callbacks, start.step, advice) as trainer:
        datamodule.check(trainer)
        if cfg.fit_memory:
            trainer.callbacks.append(FitMemory.tried(module, datamodule, trainer))  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            save_config(cfg, folder)
            datamodule.save_subset(folder / "train_images.txt")
        cache_tokens(module, datamodule, trainer, ("train", "val", "test"))
        with named_trouble(cfg.dataset.batch_size):
            trainer.fit(module, datamodule, ckpt_path=start.path, weights_only=True)
        trainer.test(module, datamodule, ckpt_path=best.found(cfg.trainer.max_epochs), weights_only=True, verbose=False)
    if trainer.is_global_zero:
        chosen_on = evaluator.evaluation.chosen_on(datamodule.held_out)
        print_summary(folder, report.title, report.method, chosen_on, report.outcome(evaluator))
        print(what_next(folder, cfg))
        if not cfg.allow_not_finite:
            evaluator.check_finite(datamodule.dataset("test").records, f"the network of '{as_named(folder)}'")
    return evaluator.results


def main() -> None:
    """Run the command."""
    run_command("train", train)


if __name__ == "__main__":
    main()
