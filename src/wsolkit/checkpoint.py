"""Read checkpoints.

A checkpoint may come from anywhere, and a setting named `_target_` runs code. A checkpoint therefore only stores the
names of its method, backbone and data set, which must be YAML files of this installation. It also stores plain values
for the settings in those files.
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
    """Say whether every part of a checkpoint has the checksum that was written with it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # The reader may fail in any way on damaged bytes.
        return False


GROUPS = ("method", "backbone", "dataset", "postprocess")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint, without the trainer's state.

    config: the resolved settings of its run; class_names: the names by label; version: the version of wsolkit;
    thresholds: the τ that validation selected, as `<protocol>/<condition>`, or {} without boxes; metrics: the numbers
    of its last validation; mean, std: the normalisation of the network's input, () in early checkpoints; optimizer: the
    settings of its parameter groups; optimizer_state: the names of what it remembers of each parameter; place: the
    position in the training images, see `wsolkit.data.dataset.Place`; epochs: the number of epochs that the run has
    begun; parts: the settings of its method that named other checkpoints, with a description of the model whose weights
    this checkpoint holds too, or None if only training read that checkpoint.
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
    parts: Mapping[str, Any] = field(default_factory=dict)

    def load_into(self, module: torch.nn.Module) -> None:
        """Load the weights into a module.

        Raises:
            CheckpointError: they belong to another model.
        """
        try:
            module.load_state_dict(self.state_dict)
        except RuntimeError as error:
            raise CheckpointError(f"'{self.path}' does not fit the model it names: {error}") from error

    def names(self) -> dict[str, str]:
        """Return the names of the method, backbone, data set and post-process of its training, or "none" for none."""
        return choices(self.config)

    @property
    def protocol(self) -> str:
        """Return the name of the first protocol of its evaluation."""
        return str(next(iter(self.config.get("protocol") or ["maxboxacc"])))


def choices(config: Mapping[str, Any] | DictConfig) -> dict[str, str]:
    """Return the names that settings choose in the groups of a model, or "none" for no choice."""
    return {group: name_of(config, group) for group in GROUPS}


def name_of(config: Mapping[str, Any] | DictConfig, group: str) -> str:
    """Return the name that settings choose in a group, or "none" for no choice."""
    node = config.get(group)
    return str(node["name"]) if node else "none"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of `python -m wsolkit.train`, without running any code in it.

    It warns if another version of wsolkit wrote the checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged, written by another program, or holds pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint '{path}': runs leave theirs in checkpoints/best.ckpt and last.ckpt"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch.serialization.get_unsafe_globals_in_checkpoint cannot read PyTorch's older format.
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = f"pickled code ({code[1]})" if code else "something else than tensors and plain containers"
        raise CheckpointError(
            f"'{path}' holds {found}, or is damaged. It is not read, since that could run anything on this machine"
        ) from error
    except Exception as error:  # The reader may fail in any way on damaged bytes.
        named = isinstance(error, RuntimeError | EOFError | OSError) and str(error)
        reason = str(error).split(". ")[0] if named else type(error).__name__
        raise CheckpointError(f"'{path}' cannot be read, perhaps it was cut short ({reason})") from error
    own = content.get("wsolkit") if isinstance(content, dict) else None
    if own is None:
        raise CheckpointError(
            f"'{path}' is not a checkpoint of wsolkit: expected one from `python -m wsolkit.train`, found "
            f"{_described(content)}"
        )
    if zipfile.is_zipfile(path) and not is_whole(path):  # PyTorch's reader ignores checksums.
        raise CheckpointError(f"'{path}' is damaged: a part of it does not have the checksum that was written with it")
    try:
        checkpoint = _checked(path, content, own)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is a damaged checkpoint of wsolkit ({_first_line(error)})") from error
    if checkpoint.version != wsolkit.__version__:
        warnings.warn(
            f"'{path}' was written by wsolkit {checkpoint.version}, and this is {wsolkit.__version__}. If its results "
            "have changed since then, use that version",
            stacklevel=1,
        )
    return checkpoint


# These are the fields beside the trainer's state, with their types. Early checkpoints lack the last five.
_FIELDS: Mapping[str, Any] = {
    "config": dict[str, Any],
    "class_names": list[str],
    "version": str,
    "thresholds": dict[str, float],
    "metrics": dict[str, float],
    "mean": list[float],
    "std": list[float],
    "parts": dict[str, dict[str, Any] | None],
}

_SCALARS = (type(None), bool, int, float, str)


def _checked(path: Path, content: Mapping[str, Any], own: Mapping[str, Any]) -> Checkpoint:
    """Return the fields of a checkpoint, after checking their types.

    Raises:
        TypeError, ValueError: a field is missing, or holds what no run of wsolkit writes.
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
    _check_config(checkpoint.config)
    for name, part in checkpoint.parts.items():
        if part is not None:
            read_part(checkpoint.path, name, part)
    return checkpoint


def _check_config(config: Mapping[str, Any]) -> None:
    """Check the settings of a checkpoint.

    Raises:
        TypeError, ValueError: they hold what no run of wsolkit writes.
    """
    _check_plain(config, "config")
    for group in GROUPS:
        node = config.get(group) or {}
        _check_type(group, node, dict[str, Any])
        if not isinstance(node.get("name"), str) and (node or group != "postprocess"):
            raise TypeError(f"its settings have no {group} with a name")
    for side in ("image_size", "resize"):
        _check_type(f"dataset.{side}", config["dataset"].get(side), int)
    protocols = config.get("protocol") or {}
    _check_type("protocol", protocols, dict[str, dict[str, Any]])
    for group, name in [*choices(config).items(), *(("protocol", name) for name in protocols)]:
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"its {group} is called {name!r}: expected the plain name of a YAML file in conf/{group}")


def describe_part(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe the model of a checkpoint, so that a checkpoint that contains the model can build it again."""
    own = checkpoint.config
    sizes = {name: own["dataset"][name] for name in ("image_size", "resize")}
    return {
        "config": {
            "method": _without_targets(own["method"] | checkpoint.parts),
            "backbone": _without_targets(own["backbone"]),
            "dataset": {"name": "folder", **sizes},
        },
        "class_names": list(checkpoint.class_names),
        "mean": list(checkpoint.mean),
        "std": list(checkpoint.std),
    }


def read_part(path: Path, name: str, said: Mapping[str, Any]) -> Checkpoint:
    """Return a description of `describe_part` as a checkpoint without weights.

    Args:
        path: the checkpoint that contains the model.
        name: the setting that named the model's own checkpoint.
        said: the description.

    Raises:
        TypeError, ValueError: it holds what no run of wsolkit writes.
    """
    kinds = {key: _FIELDS[key] for key in ("config", "class_names", "mean", "std")}
    for key, kind in kinds.items():
        _check_type(f"parts.{name}.{key}", said.get(key), kind)
    _check_config(said["config"])
    return Checkpoint(path, {}, version=wsolkit.__version__, step=0, **{key: said[key] for key in kinds})


def _without_targets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_targets(inner) for key, inner in value.items() if not str(key).startswith("_")}
    return [_without_targets(inner) for inner in value] if isinstance(value, list) else value


# Hydra's grammar would read a path or a list as another file, and null as nothing.
_PLAIN_NAME = re.compile(r"(?!null$)[A-Za-z0-9_-]+", re.IGNORECASE)


def _check_type(name: str, value: object, kind: Any) -> None:
    adapter = pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
    try:
        adapter.validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        raise TypeError(f"{name}: {error.errors()[0]['msg']}") from None


def _check_plain(value: object, where: str) -> None:
    """Check that settings hold only dictionaries, lists and scalars."""
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
    """Return what decides how a run can continue from a checkpoint, or {} if it only holds a model.

    Raises:
        TypeError: the trainer's state is not in Lightning's format.
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
    """Say in a few words what a foreign file holds."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    keys = ", ".join(list(map(str, content))[:4])
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return f"{len(content)} tensors alone, such as {keys}"
    return f"a file of another program, with the entries {keys}" if content else "nothing"
