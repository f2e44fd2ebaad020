"""python -m wsolkit.train: train a method on a data set, evaluate it, report.

A run directory holds metrics.json, config.yaml, metrics.csv, images.csv, checkpoints/{best,last}.ckpt, report.html,
examples.png and examples/; profile.json, of trainer=profile; train_images.txt, where only a part of the training images
was used.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.hydra_config import HydraConfig

from wsolkit.config import (
    CONF,
    as_named,
    check_config,
    chosen_file,
    command_to_resume,
    given_overrides,
    plain,
    run_command,
)
from wsolkit.drafts import write_text
from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.overrides import escaped
from wsolkit.run_directory import one_run
from wsolkit.signals import Stopped, is_first

if TYPE_CHECKING:
    from lightning import Callback
    from lightning.pytorch.loggers import Logger
    from omegaconf import DictConfig

    from wsolkit.data.records import Records


@dataclass
class EvaluationSettings:
    """What train and evaluate share, see conf/evaluation.yaml."""

    seed: int
    selection: Literal["val", "test"]
    compile: bool | str
    allow_not_finite: bool
    num_examples: int
    examples: list[str]
    num_table_images: int | None


@dataclass
class Checkpoints:
    """See `wsolkit.checkpoint.LastCheckpoint`."""

    every_n_steps: int | None
    every_n_minutes: float | None
    requeue: bool


@dataclass
class Settings(EvaluationSettings):
    """See conf/train.yaml."""

    monitor: str | None
    resume: str | None
    fit_memory: bool
    checkpoints: Checkpoints


@one_run
def train(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Train, test the best checkpoint and report, into a run directory; returns the metrics."""
    import lightning
    from lightning.pytorch.callbacks import LearningRateMonitor

    from wsolkit.build import (
        build_datamodule,
        build_loggers,
        build_module,
        build_trainer,
        log_settings,
        quieten_libraries,
    )
    from wsolkit.checkpoint import BestCheckpoint, LastCheckpoint, check_resumable, latest_checkpoint
    from wsolkit.companions import stoppable
    from wsolkit.data.subset import Subset
    from wsolkit.profiling import StepProfiler
    from wsolkit.progress import Progress
    from wsolkit.reporting.pictures import Report, choose_examples
    from wsolkit.resume import Continuation, check_continuation
    from wsolkit.speed import Speed
    from wsolkit.trouble import (
        FiniteLoss,
        FitMemory,
        check_finite,
        named_compilation,
        named_trouble,
        parts_that_fit,
    )

    check_config(cfg, Settings)
    if HydraConfig.initialized() and is_first():
        logging.getLogger(__package__).info(about_recipe(cfg, chosen_file("recipe"), given_overrides()))
    resume = latest_checkpoint(folder) if cfg.resume == "auto" else cfg.resume
    continued = None if resume is None else check_resumable(resume, cfg)
    quieten_libraries()
    lightning.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    datamodule.setup("fit")  # a broken data set is named before anything is built or downloaded
    datamodule.setup("test")
    choose_examples(datamodule.dataset("test"), cfg.num_examples, cfg.examples)  # named now, or an error
    module = build_module(cfg, datamodule.class_names)
    if continued is not None:
        check_continuation(continued, cfg, module, datamodule)
    monitor = cfg.monitor or _monitor(datamodule.dataset("val").records, next(iter(module.evaluation.protocols)))
    if monitor not in module.evaluation.names:
        raise ConfigError(f"monitor={monitor}: expected one of {', '.join(module.evaluation.names)}")

    best = BestCheckpoint(folder / "checkpoints", f"val/{monitor}", resume)
    last = LastCheckpoint(folder / "checkpoints", **cfg.checkpoints)
    pictures = Report(folder, cfg.num_examples, cfg.examples, cfg.num_table_images, title(cfg, cfg), method_name(cfg))
    callbacks: list[Callback] = [FiniteLoss(cfg.trainer.log_every_n_steps), best, last, pictures]
    if continued is not None:
        callbacks.append(Continuation())
    here = resume is not None and Path(resume).resolve().parent == (folder / "checkpoints").resolve()
    loggers = build_loggers(cfg, folder, continued.step if continued and here else None)
    if loggers:
        callbacks += [LearningRateMonitor("step"), Speed()]
    if cfg.trainer.enable_progress_bar:
        callbacks.append(Progress())
    trainer = build_trainer(cfg, folder, callbacks, loggers)
    datamodule.check(trainer)
    profiler = trainer.profiler  # type: ignore[attr-defined]
    if isinstance(profiler, StepProfiler):
        profiler.watch(module)
    if cfg.fit_memory:
        trainer.callbacks.append(FitMemory(parts_that_fit(module, datamodule, trainer)))  # type: ignore[attr-defined]
    if trainer.is_global_zero:
        save_config(cfg, folder)
        training = datamodule.dataset("train").records
        if isinstance(training, Subset):
            names = [training.name(index) for index in range(len(training.labels))]
            write_text(folder / "train_images.txt", "".join(f"{name}\n" for name in names))
    try:
        with stoppable(trainer):
            log_settings(loggers, module.training_settings.config, folder)
            # Absolute, since names such as "last" mean something else to Lightning.
            start = None if resume is None else Path(resume).absolute()
            with named_trouble(cfg.dataset.batch_size), named_compilation():
                trainer.fit(module, datamodule, ckpt_path=start, weights_only=True)
            if not best.best_model_path:
                raise CheckpointError(
                    "no checkpoint was written: no validation took place. Set trainer.check_val_every_n_epoch to at "
                    f"most trainer.max_epochs={cfg.trainer.max_epochs}"
                )
            trainer.test(module, datamodule, ckpt_path=best.best_model_path, weights_only=True, verbose=False)
    except Stopped as stop:
        stop.advice = f"{last.left()}; go on with {command_to_resume(folder)}"
        raise
    finally:
        finish(loggers)
    if trainer.is_global_zero:
        chosen_on = module.evaluation.chosen_on(datamodule.held_out)
        report(folder, title(cfg, cfg), method_name(cfg), chosen_on, module.results)
        print(what_next(folder, cfg))
        if isinstance(profiler, StepProfiler):
            profiler.report(folder)
        network = f"the network of '{as_named(folder)}'"
        check_finite(module, datamodule.dataset("test").records, network, cfg.allow_not_finite)
    return module.results


_OF_RECIPES = ("optimizer.lr", "schedule.name", "dataset.batch_size", "trainer.max_epochs")


def about_recipe(cfg: DictConfig, recipe: Path | None, overrides: Sequence[str]) -> str:
    """Return a sentence that says which recipe a run takes, or what it trains with where there is none.

    Args:
        cfg: settings.
        recipe: its file.
        overrides: what the user gave on the command line.
    """
    from omegaconf import OmegaConf

    if recipe is not None:
        comment = re.findall(r"^# ([^@].*)", recipe.read_text(encoding="utf-8-sig"), re.MULTILINE)
        return f"recipe={recipe.stem}: {' '.join(comment).split('. ')[0].removesuffix('.')}."
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    values = [f"{key}={OmegaConf.select(cfg, key)}" for key in _OF_RECIPES if key not in given]
    known = sorted(path.stem for path in (CONF / "recipe").glob(f"{cfg.method.name}_*.yaml"))
    return (
        f"No recipe is taken for method={cfg.method.name} on dataset={cfg.dataset.name}. "
        + (f"The defaults {', '.join(values)} are not tuned for them. " if values else "")
        + (f"Give these settings, or take a recipe with recipe=NAME: {', '.join(known)}." if known else "")
    ).strip()


def _monitor(records: Records, protocol: str) -> str:
    """The metric by which checkpoints are chosen, of those that there is ground truth for."""
    if len(records.boxes(0)):
        return f"{protocol}/max_box_acc"
    return "top1_cls" if records.mask(0) is None else f"{protocol}/pxap"


def title(cfg: DictConfig, trained: Mapping[str, Any]) -> str:
    """What was run on what, and where the checkpoint was chosen, in one line.

    Args:
        cfg: settings of this run.
        trained: settings of the run that the checkpoint is from.
    """
    held_out = trained["dataset"]["held_out"] and trained.get("selection") == "val"
    selected = "the held-out val split" if held_out else "the reported split itself"
    return f"{method_name(cfg)}, {cfg.backbone.name}, {cfg.dataset.name}; checkpoint selected on {selected}"


def method_name(cfg: DictConfig) -> str:
    """The method, and what refines its maps: "cam + scg"."""
    postprocess = cfg.get("postprocess")
    return f"{cfg.method.name} + {postprocess.name}" if postprocess else str(cfg.method.name)


def save_config(cfg: DictConfig, folder: Path) -> None:
    """Write the settings, resolved, to config.yaml, for OmegaConf to read: ${ in a text is escaped."""
    from omegaconf import OmegaConf

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(escaped(plain(cfg))))


def report(folder: Path, title: str, row: str, chosen_on: Mapping[str, str], results: Mapping[str, float]) -> None:
    """Print the table, and where everything is."""
    from wsolkit.reporting.table import results_table
    from wsolkit.reporting.terminal import PlainConsole

    table = results_table(results, chosen_on, row, title)
    console = PlainConsole()
    # Numbers that are cut off would be worse than long lines.
    console.width = max(console.width, PlainConsole(width=400).measure(table).maximum)
    console.print(table)
    console.print(f"Written to {as_named(folder)}", soft_wrap=True)


def what_next(folder: Path, cfg: DictConfig) -> str:
    """What to open, and which commands to try on the model in a run directory."""
    checkpoint = shlex.quote(f"checkpoint={as_named(folder) / 'checkpoints' / 'best.ckpt'}")
    settings = [f"method={'ts_cam' if cfg.method.name == 'sat' else 'sat'}", f"dataset={cfg.dataset.name}"]
    if "root" in cfg.dataset:
        settings.append(f"dataset.root={cfg.dataset.root}")
    commands = {
        f"python -m wsolkit.demo {checkpoint}": "try the model on an image, in the browser",
        f"python -m wsolkit.predict {checkpoint} source=FOLDER output=boxes": "write boxes and masks of images",
        f"python -m wsolkit.train {shlex.join(settings)}": "train another method",
    }
    width = max(map(len, commands))
    opened = [f"Open {as_named(folder) / 'report.html'} in a browser."] if (folder / "report.html").is_file() else []
    return "\n".join([*opened, "Next:", *(f"    {what:<{width}}  # {why}" for what, why in commands.items())])


def finish(loggers: Sequence[Logger]) -> None:
    """Close W&B's run, so that the next job of a multirun does not write into it."""
    from lightning.pytorch.loggers import WandbLogger

    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish()


def main() -> None:
    """Entry point of the command."""
    run_command("train", train)


if __name__ == "__main__":
    main()
