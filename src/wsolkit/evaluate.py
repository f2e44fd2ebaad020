"""python -m wsolkit.evaluate: evaluate a trained model, or score maps that another program saved, and report.

checkpoint=PATH: method, backbone and data set are the checkpoint's. Another data set (`dataset=…`), another place for
it (`dataset.root=…`) or other protocols (`protocol=…`) can be given; `save_maps=DIR` writes the maps.
score_maps=DIR dataset=…: the maps are read from files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wsolkit.config import check_config, given_overrides, run_command_on_checkpoint
from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.run_directory import one_run
from wsolkit.train import EvaluationSettings, finish, method_name, report, save_config, title

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning import Callback
    from omegaconf import DictConfig
    from torch import Tensor

    from wsolkit.data.dataset import WSOLDataset
    from wsolkit.interop.score_maps import ScoreMaps
    from wsolkit.types import EvaluationBatch


@dataclass
class Settings(EvaluationSettings):
    """See conf/evaluate.yaml."""

    checkpoint: str | None
    score_maps: str | None
    save_maps: str | None


@one_run
def evaluate(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Evaluate a checkpoint or a folder of score maps and report into a run directory; returns the metrics."""
    if cfg.score_maps is not None:
        return evaluate_score_maps(cfg, folder)
    if cfg.checkpoint is None:
        raise ConfigError("required and not given: checkpoint. Add checkpoint=…, or score_maps=DIR")
    return evaluate_checkpoint(cfg, folder)


def evaluate_checkpoint(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Evaluate `cfg.checkpoint`."""
    import lightning
    from lightning_utilities.core.rank_zero import rank_zero_warn

    from wsolkit.build import (
        build_datamodule,
        build_loggers,
        build_module,
        build_trainer,
        log_settings,
        quieten_libraries,
    )
    from wsolkit.checkpoint import read_checkpoint, restore
    from wsolkit.companions import stoppable
    from wsolkit.data.classes import are_numbers
    from wsolkit.interop.score_maps import ScoreMaps
    from wsolkit.profiling import StepProfiler
    from wsolkit.progress import Progress
    from wsolkit.reporting.pictures import Report, choose_examples
    from wsolkit.trouble import check_finite, named_compilation

    checkpoint = read_checkpoint(cfg.checkpoint)
    cfg = restore(cfg, checkpoint, given_overrides())
    check_config(cfg, Settings)
    quieten_libraries()
    lightning.seed_everything(cfg.seed, verbose=False)
    if are_numbers(checkpoint.class_names):
        rank_zero_warn(
            f"the {len(checkpoint.class_names)} classes of '{checkpoint.path}' have numbers for names: labels are not "
            "matched with the data set's by name, but taken as they are"
        )
    datamodule = build_datamodule(cfg, checkpoint.class_names)
    datamodule.setup("validate")
    datamodule.setup("test")
    choose_examples(datamodule.dataset("test"), cfg.num_examples, cfg.examples)  # named now, or an error
    module = build_module(cfg, checkpoint.class_names)
    try:
        module.load_state_dict(checkpoint.state_dict)
    except RuntimeError as error:
        raise CheckpointError(f"'{checkpoint.path}' does not fit the model it names: {error}") from error

    heading = title(cfg, checkpoint.config)
    loggers = build_loggers(cfg, folder)
    pictures = Report(folder, cfg.num_examples, cfg.examples, cfg.num_table_images, heading, method_name(cfg))
    callbacks: list[Callback] = [pictures]
    if cfg.trainer.enable_progress_bar:
        callbacks.append(Progress())
    trainer = build_trainer(cfg, folder, callbacks, loggers)
    if trainer.is_global_zero:
        save_config(cfg, folder)
    profiler = trainer.profiler  # type: ignore[attr-defined]
    if isinstance(profiler, StepProfiler):
        profiler.watch(module)
    saved = None if cfg.save_maps is None else ScoreMaps(cfg.save_maps)
    log_settings(loggers, module.training_settings.config, folder)
    try:
        with stoppable(trainer), named_compilation():
            if datamodule.held_out:
                module.evaluation.on_maps = _writer(saved, datamodule.dataset("val"))
                trainer.validate(module, datamodule, verbose=False)  # selects the thresholds
            module.evaluation.on_maps = _writer(saved, datamodule.dataset("test"))
            trainer.test(module, datamodule, verbose=False)
    finally:
        finish(loggers)
    if trainer.is_global_zero:
        chosen_on = module.evaluation.chosen_on(datamodule.held_out)
        report(folder, heading, method_name(cfg), chosen_on, module.results)
        if isinstance(profiler, StepProfiler):
            profiler.report(folder)
        network = f"the network of '{checkpoint.path}'"
        check_finite(module, datamodule.dataset("test").records, network, cfg.allow_not_finite)
    return module.results


def _writer(folder: ScoreMaps | None, dataset: WSOLDataset) -> Callable[[EvaluationBatch, list[Tensor]], None] | None:
    """What writes the maps of a split's batches to files."""
    if folder is None:
        return None

    def write(batch: EvaluationBatch, maps: list[Tensor]) -> None:
        for index, score in zip(batch["index"].tolist(), maps, strict=True):
            folder.write(dataset.records.name(index), score.cpu().numpy())

    return write


def evaluate_score_maps(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Evaluate the maps in `cfg.score_maps`."""
    from rich.progress import track

    from wsolkit.build import build_datamodule, build_protocols, quieten_libraries
    from wsolkit.config import plain
    from wsolkit.interop.score_maps import ScoreMaps
    from wsolkit.metrics.evaluation import Evaluation, outcome
    from wsolkit.reporting.images import ImageTables
    from wsolkit.reporting.pictures import choose_examples, write_report
    from wsolkit.reporting.table import write_results

    if cfg.checkpoint is not None or cfg.save_maps is not None:
        raise ConfigError("score_maps=… evaluates maps from files: it goes with neither checkpoint=… nor save_maps=…")
    if not Path(cfg.score_maps).is_dir():
        raise ConfigError(
            f"score_maps: there is no folder '{cfg.score_maps}'; it should hold a .npy file for each image"
        )
    check_config(cfg, Settings)
    quieten_libraries()
    protocols = build_protocols(cfg)
    for setting in ("input", "resolution"):
        values = {name: getattr(rules, setting) for name, rules in protocols.items()}
        if len(set(values.values())) > 1:
            raise ConfigError(
                f"the maps in '{cfg.score_maps}' have one {setting}, but these protocols differ in it: "
                f"{', '.join(f'{name} ({value})' for name, value in values.items())}. Evaluate them one by one"
            )
    datamodule = build_datamodule(cfg)
    datamodule.setup("validate")
    datamodule.setup("test")
    examples = choose_examples(datamodule.dataset("test"), cfg.num_examples, cfg.examples)  # named now, or an error
    class_names = list(datamodule.dataset("test").records.classes)
    evaluation = Evaluation(protocols, len(class_names))
    maps = ScoreMaps(cfg.score_maps)

    def read(batch: EvaluationBatch, dataset: WSOLDataset) -> list[Tensor]:
        import torch

        names = map(dataset.records.name, batch["index"].tolist())
        sizes = evaluation.map_sizes(batch)
        return [torch.from_numpy(maps.read(name, size)) for name, size in zip(names, sizes, strict=True)]

    def evaluate_split(split: str) -> None:
        dataset = datamodule.dataset(split)  # type: ignore[arg-type]
        loader = datamodule.val_dataloader() if split == "val" else datamodule.test_dataloader()
        for batch in track(loader, f"Evaluating {split}", disable=not cfg.trainer.enable_progress_bar):
            evaluation.update_maps(batch, read(batch, dataset))

    if datamodule.held_out:
        evaluate_split("val")
        evaluation.select(outcome(evaluation.compute()).results)
        evaluation.reset()
    test, first = datamodule.dataset("test"), next(iter(evaluation.protocols.values()))
    tables = ImageTables(evaluation, test, cfg.num_table_images)
    evaluate_split("test")
    result = outcome(evaluation.compute())
    save_config(cfg, folder)
    write_results(folder, result, class_names, tables.rows(result.results, class_names))
    heading = f"score maps of {cfg.score_maps}, {cfg.dataset.name}"
    write_report(
        folder,
        heading,
        "score maps",
        class_names,
        plain(cfg),
        datamodule,
        evaluation,
        result,
        lambda batch: (first.at_size(read(batch, test), batch), [None] * len(batch["label"])),
        examples,
    )
    report(folder, heading, "score maps", evaluation.chosen_on(datamodule.held_out), result.results)
    return result.results


def main() -> None:
    """Entry point of the command."""
    run_command_on_checkpoint(
        "evaluate", evaluate, with_protocol=False, stopped="nothing is kept; the same command begins anew"
    )


if __name__ == "__main__":
    main()
