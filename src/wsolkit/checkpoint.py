"""Read checkpoints.

A checkpoint may come from anywhere, and a setting named `_target_` makes code run. So a checkpoint says only the names
of its method, backbone and data set, which must be YAML files of this installation, and plain values for the settings
that those files have.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import torch
from omegaconf import DictConfig

import wsolkit
from wsolkit.errors import CheckpointError


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
    state_dict: Mapping[str, torch.Tensor]
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

    def load_into(self, module: torch.nn.Module) -> None:
        """Give a module the weights.

        Raises:
            CheckpointError: they are another model's.
        """
        try:
            module.load_state_dict(self.state_dict)
        except RuntimeError as error:
            raise CheckpointError(f"'{self.path}' does not fit the model it names: {error}") from error

    def names(self) -> dict[str, str]:
        """Names of the method, backbone, data set and post-process it was trained with; "none" for none."""
        return choices(self.config)

    @property
    def protocol(self) -> str:
        """Name of the first protocol that it was evaluated under."""
        return str(next(iter(self.config.get("protocol") or ["maxboxacc"])))


def choices(config: Mapping[str, Any] | DictConfig) -> dict[str, str]:
    """Names of what settings take from the groups that make a model; "none" for nothing."""
    return {group: name_of(config, group) for group in GROUPS}


def name_of(config: Mapping[str, Any] | DictConfig, group: str) -> str:
    """The name of what settings take from a group; "none" for nothing."""
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
