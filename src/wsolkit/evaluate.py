"""python -m wsolkit.evaluate checkpoint=PATH: evaluate a trained model and report.

Method, backbone and data set are the checkpoint's. Another data set (`dataset=…`), another place for it
(`dataset.root=…`) or other protocols (`protocol=…`) can be given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wsolkit.config import check_config, run_command
from wsolkit.errors import CheckpointError, ConfigError, WsolkitError
from wsolkit.train import finish, report, save_config, title

if TYPE_CHECKING:
    from lightning import Callback
    from omegaconf import DictConfig


def evaluate(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Evaluate a checkpoint and report into a run directory; returns the metrics."""
    import lightning
    from hydra.core.hydra_config import HydraConfig
    from lightning.pytorch.callbacks import RichProgressBar

    from wsolkit.build import build_datamodule, build_loggers, build_module, build_trainer, quieten_libraries
    from wsolkit.checkpoint import read_checkpoint, restore
    from wsolkit.reporting.pictures import ExamplePictures

    checkpoint = read_checkpoint(cfg.checkpoint)
    cfg = restore(cfg, checkpoint, HydraConfig.get().overrides.task)
    check_config(cfg)
    quieten_libraries()
    lightning.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    datamodule.setup("validate")
    datamodule.setup("test")
    known = len(checkpoint.class_names)
    labels = datamodule.dataset("test").records.labels
    if int(labels.max()) >= known:
        raise ConfigError(
            f"'{checkpoint.path}' was trained on {known} classes, but the test split has labels up to {labels.max()}: "
            "evaluate it on a data set with the classes it was trained on"
        )
    module = build_module(cfg, checkpoint.class_names)
    try:
        module.load_state_dict(checkpoint.state_dict)
    except RuntimeError as error:
        raise CheckpointError(f"'{checkpoint.path}' does not fit the model it names: {error}") from error

    loggers = build_loggers(cfg, folder)
    callbacks: list[Callback] = [ExamplePictures(folder, cfg.num_examples, title(cfg))]
    if cfg.trainer.enable_progress_bar:
        callbacks.append(RichProgressBar())
    trainer = build_trainer(cfg, folder, callbacks, loggers)
    save_config(cfg, folder, trainer)
    try:
        if datamodule.held_out:
            trainer.validate(module, datamodule, verbose=False)  # selects the thresholds
        trainer.test(module, datamodule, verbose=False)
    finally:
        finish(loggers)
    report(cfg, module, trainer, folder)
    return module.results


def main() -> None:
    """Entry point of the command: the checkpoint's method, backbone and data set come before the user's settings."""
    given = sys.argv[1:]
    paths = [argument.removeprefix("checkpoint=") for argument in given if argument.startswith("checkpoint=")]
    if paths:
        from wsolkit.checkpoint import read_checkpoint

        try:
            names = read_checkpoint(paths[-1].strip("'")).names()
        except WsolkitError as error:
            sys.exit(f"error: {error}")
        for argument in given:
            group, _, name = argument.partition("=")
            if group in ("method", "backbone") and name != names[group]:
                sys.exit(f"error: {argument}: the checkpoint's {group} is {names[group]}; leave the setting out")
        sys.argv[1:] = [f"{group}={name}" for group, name in names.items()] + given
    run_command("evaluate", evaluate)


if __name__ == "__main__":
    main()
