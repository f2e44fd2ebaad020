"""Write and read wsolkit's checkpoints, and compose the settings of the model in one.

A checkpoint is there as a whole or not at all: it is written beside its place and then moved there. The last one
stands beside the one before it, in case its disk damages it.

A checkpoint may come from anywhere, and a setting named `_target_` makes code run. So a checkpoint says only the names
of its method, backbone and data set, which must be YAML files of this installation, and plain values for the settings
that those files have.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint as Checkpointing
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_warn
from omegaconf import DictConfig, OmegaConf

import wsolkit
from wsolkit.backbones.weights import StateDict
from wsolkit.config import CONF, as_named, load_config, plain
from wsolkit.csv_log import RunLog
from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.methods.base import WSOLModule
from wsolkit.overrides import escaped
from wsolkit.signals import SIGNALS


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint as `best.ckpt`; a resumed run takes along the one beside the checkpoint it continues.

    A checkpoint says which file was the best. Nothing that it says is read, copied or deleted as a file: it may come
    from anywhere.

    Args:
        folder: of the checkpoints.
        monitor: the metric of which the best checkpoint has most.
        resume: the checkpoint that the run continues; None: it begins anew.
    """

    def __init__(self, folder: Path, monitor: str, resume: str | Path | None) -> None:
        super().__init__(folder, filename="best", monitor=monitor, mode="max", enable_version_counter=False)
        self._here = folder / "best.ckpt"
        self._earlier = None if resume is None else Path(resume).parent / "best.ckpt"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning's hook: make the score of the earlier run's best checkpoint, and the file, those of this run."""
        score = state_dict.get("best_model_score")
        if self._earlier is None or not isinstance(score, torch.Tensor) or not self._earlier.is_file():
            return
        if self._earlier.resolve() != self._here.resolve():
            self._here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._earlier, self._here)
        self.best_model_score = self.kth_value = score
        self.best_model_path = self.kth_best_model_path = str(self._here)
        self.best_k_models = {str(self._here): score}


_STEPS_BETWEEN_LOOKS = 16  # at the clock: to agree upon it, processes wait for each other
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and moves it there when it is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Lightning's hook.

        Raises:
            CheckpointError: it cannot be written; what was there before stays.
        """
        place = Path(path)
        draft = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(place)
        except (OSError, RuntimeError) as error:  # torch's writer says of a full disk that it failed to write
            draft.unlink(missing_ok=True)
            reason, free = str(error).splitlines()[0], shutil.disk_usage(place.parent).free / 2**20
            raise CheckpointError(
                f"checkpoint '{place}' cannot be written ({reason}); {free:.0f} MiB are free there. Make room and "
                "continue from the checkpoint before with resume=auto"
            ) from error


class LastCheckpoint(Checkpointing):
    """Keeps checkpoints from which a run goes on exactly: `last.ckpt`, and the one before it as `previous.ckpt`.

    Written at the end of each epoch, after its validation; in between, now and then and when a signal stops the run.

    Args:
        folder: of the checkpoints.
        every_n_steps: also after so many optimizer steps.
        every_n_minutes: also after so many minutes.
        requeue: a run that SIGTERM stops puts its job back into SLURM's queue, if it is one.

    Attributes:
        saved_step: the optimizer step after which the last was written, or after which the run went on.
    """

    def __init__(self, folder: Path, every_n_steps: int | None, every_n_minutes: float | None, requeue: bool) -> None:
        for name, value in {"every_n_steps": every_n_steps, "every_n_minutes": every_n_minutes}.items():
            if value is not None and value <= 0:
                raise ConfigError(f"checkpoints.{name}={value}: expected more than 0, or null")
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.requeue = requeue
        self._saved_at = time.monotonic()
        self.saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        self._saved_at, self.saved_step = time.monotonic(), trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook: a validation that is begun again counts from 0."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        if loop.restarted_mid_evaluation:
            loop.batch_progress.reset()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        if between_steps(trainer) and self._is_due(trainer):
            self._save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            return True
        if self.every_n_minutes is None or step % _STEPS_BETWEEN_LOOKS:
            return False
        late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        return bool(trainer.strategy.broadcast(late))  # the clocks of processes differ

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning's hook."""
        together = isinstance(exception, SIGTERMException)  # all processes are here
        if together and trainer.global_step > self.saved_step:
            if trainer.training and between_steps(trainer):
                self._save(trainer)
            elif trainer.validating and trainer.state.fn == TrainerFn.FITTING:
                _begin_validation_again(trainer)
                self._save(trainer)
        if self.requeue and trainer.is_global_zero and signal.SIGTERM in (SIGNALS.reason, SIGNALS.received):
            _requeue()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        self._save(trainer)

    def left(self) -> str:
        """What a run that ends now leaves to go on from, in a few words."""
        last = self.folder / LAST
        if not last.is_file():
            return "nothing was saved yet"
        return f"saved after step {self.saved_step} as '{as_named(last)}'"

    def _save(self, trainer: Trainer) -> None:
        if isinstance(trainer.lightning_module, WSOLModule):
            trainer.lightning_module.log_losses()  # what comes before the checkpoint will not be logged again
        for logger in trainer.loggers:
            logger.sync() if isinstance(logger, RunLog) else logger.save()
        last = self.folder / LAST
        if trainer.is_global_zero and last.is_file():
            draft = self.folder / f".{PREVIOUS}.{os.getpid()}"
            draft.unlink(missing_ok=True)
            os.link(last, draft)  # so that last.ckpt is there at any moment
            draft.replace(self.folder / PREVIOUS)
        trainer.save_checkpoint(last)
        self._saved_at, self.saved_step = time.monotonic(), trainer.global_step


def between_steps(trainer: Trainer) -> bool:
    """Whether a run could go on exactly from here.

    Not at the end of an epoch: it would leave out its validation. Nor where gradients of several batches are being
    gathered: they are no part of a checkpoint.
    """
    loop = trainer.fit_loop.epoch_loop
    return not loop.batch_progress.is_last_batch and loop._accumulated_batches_reached()


def _begin_validation_again(trainer: Trainer) -> None:
    """Say that the validation of an epoch has begun, and none of its batches is done: a resumed run does them all.

    What was counted of the first ones is no part of a checkpoint.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset()
    progress.increment_ready()
    progress.increment_started()


def _requeue() -> None:
    """Put this job back into SLURM's queue."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        rank_zero_warn(f"SLURM did not take job {job} back into its queue: {reason}")


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint from which the run in a directory goes on; None: it has not come to any.

    A damaged one is left out, with a warning.

    Raises:
        CheckpointError: all are damaged.
    """
    there = [path for path in (folder / "checkpoints" / LAST, folder / "checkpoints" / PREVIOUS) if path.is_file()]
    for path in there:
        if is_whole(path):
            return path
        rank_zero_warn(f"'{path}' is damaged or was cut short: the checkpoint before it is used, if there is one")
    if there:
        raise CheckpointError(
            f"no checkpoint in '{folder / 'checkpoints'}' is whole: delete them to begin anew, or give another one as "
            "resume=PATH"
        )
    return None


def is_whole(path: Path) -> bool:
    """Whether every part of a checkpoint has the check sum that was written with it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # damaged bytes make the reader fail in any way
        return False


GROUPS = ("method", "backbone", "dataset", "postprocess")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds beside the trainer's state.

    config: settings of its run, resolved; class_names: by label; version: of wsolkit; thresholds: τ that validation
    selected, as `<protocol>/<condition>`, {} where there were no boxes; metrics: numbers of its last validation;
    mean, std: of the network's input, () in early checkpoints; optimizer: settings of its groups of parameters;
    optimizer_state: what it remembers of each parameter, by name; place: where in the training images it is, see
    `wsolkit.data.dataset.Place`; epochs: how many it has begun.
    """

    path: Path
    state_dict: StateDict
    config: Mapping[str, Any]
    class_names: list[str]
    version: str
    step: int
    thresholds: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    optimizer: Sequence[Mapping[str, Any]] = ()
    optimizer_state: Set[str] = frozenset()
    place: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 0

    def names(self) -> dict[str, str]:
        """Names of the method, backbone, data set and post-process it was trained with; "none" for none."""
        return choices(self.config)

    @property
    def protocol(self) -> str:
        """Name of the first protocol that it was evaluated under."""
        return str(next(iter(self.config.get("protocol") or ["maxboxacc"])))


def choices(config: Mapping[str, Any] | DictConfig) -> dict[str, str]:
    """Names of what settings take from the groups that make a model; "none" for nothing."""
    return {group: _name(config, group) for group in GROUPS}


def _name(config: Mapping[str, Any] | DictConfig, group: str) -> str:
    node = config.get(group)
    return str(node["name"]) if node else "none"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of `python -m wsolkit.train`, without executing anything in it.

    Warns where it is of another version of wsolkit.

    Raises:
        CheckpointError: the file is missing, damaged, of another program, or holds pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint '{path}': runs leave theirs in checkpoints/best.ckpt and last.ckpt"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not torch.serialization.get_unsafe_globals_in_checkpoint, which cannot read PyTorch's older format.
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = f"pickled code ({code[1]})" if code else "something else than tensors and plain containers"
        raise CheckpointError(
            f"'{path}' holds {found}, or is damaged; it is not read, since that could run anything on this machine"
        ) from error
    except Exception as error:  # damaged bytes make the reader fail in any way
        named = isinstance(error, RuntimeError | EOFError | OSError) and str(error)
        reason = str(error).split(". ")[0] if named else type(error).__name__
        raise CheckpointError(f"'{path}' cannot be read, perhaps it was cut short ({reason})") from error
    own = content.get("wsolkit") if isinstance(content, dict) else None
    if own is None:
        raise CheckpointError(
            f"'{path}' is not a checkpoint of wsolkit: expected one from `python -m wsolkit.train`, found "
            f"{_described(content)}"
        )
    if zipfile.is_zipfile(path) and not is_whole(path):  # PyTorch's reader looks at no check sums
        raise CheckpointError(f"'{path}' is damaged: a part of it has not the check sum that was written with it")
    try:
        checkpoint = _checked(path, content, own)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is a damaged checkpoint of wsolkit ({_first_line(error)})") from error
    if checkpoint.version != wsolkit.__version__:
        warnings.warn(
            f"'{path}' was written by wsolkit {checkpoint.version}, this is {wsolkit.__version__}: if its results are "
            "not those of then, use that version",
            stacklevel=1,
        )
    return checkpoint


# Fields of a checkpoint, beside the trainer's state, and their types; early checkpoints lack the last four.
_FIELDS: Mapping[str, Any] = {
    "config": dict[str, Any],
    "class_names": list[str],
    "version": str,
    "thresholds": dict[str, float],
    "metrics": dict[str, float],
    "mean": list[float],
    "std": list[float],
}
_SCALARS = (type(None), bool, int, float, str)


def _checked(path: Path, content: Mapping[str, Any], own: Mapping[str, Any]) -> Checkpoint:
    """Take the fields of a checkpoint that are of their types.

    Raises:
        TypeError, ValueError: a field is missing, or its content is not what a run of wsolkit writes.
    """
    if not isinstance(own, dict):
        raise TypeError(f"its field 'wsolkit' is a {type(own).__name__}")
    lacking = [name for name in ("config", "class_names", "version") if name not in own]
    if lacking:
        raise TypeError(f"it has no '{lacking[0]}'")
    for name, kind in _FIELDS.items():
        if name in own:
            _check_type(name, own[name], kind)
    for name, kind in {"state_dict": dict[str, torch.Tensor], "global_step": int}.items():
        _check_type(name, content.get(name), kind)
    fields = {name: own[name] for name in _FIELDS if name in own}
    training = _training(content)
    checkpoint = Checkpoint(path, content["state_dict"], step=content["global_step"], **fields, **training)
    _check_plain(checkpoint.config, "config")
    for group in GROUPS:
        node = checkpoint.config.get(group) or {}
        _check_type(group, node, dict[str, Any])
        if not isinstance(node.get("name"), str) and (node or group != "postprocess"):
            raise TypeError(f"its settings have no {group} with a name")
    for side in ("image_size", "resize"):
        _check_type(f"dataset.{side}", checkpoint.config["dataset"].get(side), int)
    protocols = checkpoint.config.get("protocol") or {}
    _check_type("protocol", protocols, dict[str, dict[str, Any]])
    for group, name in [*checkpoint.names().items(), *(("protocol", name) for name in protocols)]:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"its {group} is called {name!r}: expected the plain name of a YAML file in conf/{group}")
    return checkpoint


# Names go into Hydra's grammar, where a path or a list would mean another file, and null nothing at all.
_PLAIN_NAME = re.compile(r"(?!null$)[A-Za-z0-9_-]+", re.IGNORECASE)


def _check_type(name: str, value: object, kind: Any) -> None:
    adapter = pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
    try:
        adapter.validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        raise TypeError(f"{name}: {error.errors()[0]['msg']}") from None


def _check_plain(value: object, where: str) -> None:
    """Check that settings hold nothing but dictionaries, lists and scalars."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has a key of type {type(key).__name__}")
            _check_plain(inner, f"{where}.{key}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            _check_plain(inner, f"{where}[{place}]")
    elif type(value) not in _SCALARS:
        raise TypeError(f"{where} is a {type(value).__name__}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _training(content: Mapping[str, Any]) -> dict[str, Any]:
    """What decides how a run can go on from a checkpoint; {} where it holds a model alone.

    Raises:
        TypeError: the trainer's state is not what Lightning writes.
    """
    if "loops" not in content or not content.get("optimizer_states"):
        return {}
    try:
        optimizer = content["optimizer_states"][0]
        found = {
            "optimizer": optimizer["param_groups"],
            "optimizer_state": {key for state in optimizer["state"].values() for key in state},
            "place": content.get("WSOLDataModule", {}),
            "epochs": content["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"],
        }
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise TypeError(f"the trainer's state is incomplete ({error})") from error
    kinds = {
        "optimizer": list[dict[str, Any]],
        "optimizer_state": set[str],
        "place": dict[str, int | bool],
        "epochs": int,
    }
    for name, kind in kinds.items():
        _check_type(name, found[name], kind)
    return found


def _described(content: object) -> str:
    """What a file holds that is not ours, in a few words."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    keys = ", ".join(list(map(str, content))[:4])
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return f"{len(content)} tensors alone, such as {keys}"
    return f"a file of another program, with the entries {keys}" if content else "nothing"


def check_known(path: Path, names: Mapping[str, str], config_dir: str | Path | None, remedy: str) -> None:
    """Check that there are YAML files of what a checkpoint names: the package's, or those of the user.

    Args:
        path: of the checkpoint.
        names: by group, as from `Checkpoint.names`.
        config_dir: the user's folder; None: none.
        remedy: how the user names that folder.

    Raises:
        CheckpointError: there is none.
    """
    folders = [CONF] if config_dir is None else [CONF, Path(config_dir)]
    for group, name in names.items():
        if any((folder / group / f"{name}.yaml").is_file() for folder in folders):
            continue
        where = "wsolkit has" if config_dir is None else f"neither wsolkit nor '{config_dir}' has"
        raise CheckpointError(
            f"'{path}' was trained with {group}={name}, and {where} {'no' if config_dir is None else 'a'} file "
            f"{group}/{name}.yaml: name the folder of YAML files that has it, as in training, with {remedy}"
        )


def choose_groups(given: Sequence[str], with_protocol: bool = False) -> list[str]:
    """A command line with the groups of its checkpoint before `checkpoint=…`, so that the user's settings prevail.

    Args:
        given: arguments in Hydra's grammar, one of them `checkpoint=…`.
        with_protocol: whether the first protocol of the checkpoint is chosen too.

    Raises:
        CheckpointError: the checkpoint cannot be read, or another method or backbone than its own is given.
    """
    parse = OverridesParser.create().parse_override
    override = parse([argument for argument in given if argument.startswith("checkpoint=")][-1])
    if override.is_sweep_override():  # over checkpoints of one method
        override = parse(f"checkpoint={next(override.sweep_string_iterator())}")
    path = override.value()
    if path is None:
        return list(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who builds the model says it
        checkpoint = read_checkpoint(str(OmegaConf.create({"path": path}).path))
    names = checkpoint.names()
    parts = [argument.partition("=") for argument in given if not argument.startswith("-")]
    chosen = {setting.lstrip("+~"): value for setting, _, value in parts}
    for group in ("method", "backbone"):
        if chosen.get(group, names[group]) != names[group]:
            raise CheckpointError(
                f"{group}={chosen[group]}: the checkpoint's {group} is {names[group]}; leave the setting out"
            )
    folder = _config_dir(given)
    own = {group: name for group, name in names.items() if group not in chosen}
    check_known(checkpoint.path, own, folder, "--config-dir FOLDER")
    if choices(load_config(f"method={names['method']}", config_dir=folder))["postprocess"] == names["postprocess"]:
        del names["postprocess"]  # comes with the method, unless a ready grid has another
    if with_protocol:
        names["protocol"] = f"[{checkpoint.protocol}]"
    first = next(index for index, argument in enumerate(given) if argument.startswith("checkpoint="))
    added = [f"{group}={name}" for group, name in names.items() if group not in chosen]
    return [*given[:first], *added, *given[first:]]


def _config_dir(given: Sequence[str]) -> str | None:
    """The folder that a command line names with `--config-dir`."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config-dir", "-cd")
    return flags.parse_known_args(given)[0].config_dir  # type: ignore[no-any-return]


def check_resumable(path: str | Path, cfg: DictConfig) -> Checkpoint:
    """Read a checkpoint and check that it continues a run of these settings' method, backbone and part of a data set.

    What depends on the classes, the model and the images, `wsolkit.resume` checks.
    Where the run in a directory goes on by itself (resume=auto), all settings have to be its own that make a difference
    to what it learns.

    Raises:
        CheckpointError: it does not, or cannot be read.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.step == 0:
        raise CheckpointError(f"resume={path} was imported: it holds a model, and no training that could go on")
    for group, name in checkpoint.names().items():
        own = _name(cfg, group)
        if own != name:
            raise CheckpointError(f"resume={path} is of a run with {group}={name}, these settings say {own}")
    keys = ["fraction", "shots"]
    if not (cfg.dataset.fraction is None and cfg.dataset.shots is None):
        keys.append("subset_seed")
    for key in keys:
        saved, given = checkpoint.config["dataset"].get(key), cfg.dataset[key]
        if saved != given:
            raise CheckpointError(f"resume={path} is of a run with dataset.{key}={saved}, these settings say {given}")
    if cfg.resume == "auto":
        changed = changed_settings(cfg, checkpoint)
        if changed:
            difference = ", ".join(f"{key}={values}" for key, values in changed.items())
            raise CheckpointError(
                f"the run that '{path}' is of was begun with other settings: {difference}. Give the run another place "
                f"with hydra.run.dir=DIR, or go on all the same with resume={path}"
            )
    return checkpoint


def changed_settings(cfg: DictConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """Settings, of those that decide what a run learns, that differ from a checkpoint's: "now (was then)", by name."""
    now, before = _flat(plain(cfg)), _flat(checkpoint.config)
    keys = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key)]
    return {key: f"{now.get(key)} (was {before.get(key)})" for key in keys}


# Where and how a run goes, not what it learns.
_FREE = (
    "resume",
    "checkpoints",
    "logger",
    "trainer",
    "compile",
    "backbone.channels_last",
    "num_examples",
    "examples",
    "num_table_images",
    "dataset.num_workers",
    "dataset.cache",
    "sweep",
)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings that are to stay, by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if name in _FREE:
            continue
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def restore(cfg: DictConfig, checkpoint: Checkpoint, overrides: Iterable[str], protocols: bool = False) -> DictConfig:
    """Put a checkpoint's values into settings composed for its method, backbone and data set.

    Args:
        cfg: settings as composed.
        checkpoint: whose model is to be built. Values of its data set count only if `cfg` has the same data set.
        overrides: what the user gave on the command line, which prevails.
        protocols: whether the rules of evaluation are the checkpoint's too, where it has protocols of these names.
    """
    cfg = cfg.copy()
    saved = checkpoint.config
    groups = [group for group in GROUPS if cfg.get(group) and _name(cfg, group) == _name(saved, group)]
    nodes = [(cfg[group], saved[group]) for group in groups]
    if protocols:
        known = saved.get("protocol") or {}
        nodes += [(rules, known[name]) for name, rules in cfg.protocol.items() if name in known]
        cfg.dataset.resize = saved["dataset"]["resize"]
    for derived in (False, True):
        for node, values in nodes:
            _merge(node, values, derived)
    cfg.dataset.image_size = saved["dataset"]["image_size"]
    cfg.backbone.pretrained, cfg.backbone.weights = False, None  # the weights are in the checkpoint
    cfg.dataset.cache = None  # it would write where the checkpoint says, and evaluation reads no cache
    if checkpoint.mean:
        cfg.backbone.mean, cfg.backbone.std = list(checkpoint.mean), list(checkpoint.std)
    for override in OverridesParser.create().parse_overrides(overrides=list(overrides)):
        key, value = override.key_or_group, override.value()
        present = OmegaConf.select(cfg, key, default=cfg)  # a choice from a group that adds nothing, as sweep=…, is not
        if not isinstance(present, DictConfig) or (isinstance(value, dict) and present is not cfg):
            OmegaConf.update(cfg, key, value)
    return cfg


def _merge(node: DictConfig, saved: Mapping[str, Any], derived: bool) -> None:
    """Put saved values into a node: those that stand for themselves, or those that it derives from others.

    A derived value stays so where it comes to the saved one anyway: it then follows what the user overrides.
    """
    for key, value in saved.items():
        if key not in list(node) or str(key).startswith("_"):  # `in node` says no of a value that is required: ???
            continue
        if OmegaConf.is_interpolation(node, key) != derived and not isinstance(value, Mapping):
            continue
        if isinstance(value, Mapping) and isinstance(node[key], DictConfig) and "_target_" in node[key]:
            _merge(node[key], value, derived)
        elif not _mentions_target(value) and not (derived and node[key] == value):
            node[key] = escaped(value)


def _mentions_target(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(str(key) == "_target_" or _mentions_target(inner) for key, inner in value.items())
    return isinstance(value, list) and any(_mentions_target(inner) for inner in value)
