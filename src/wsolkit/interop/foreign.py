"""Read PyTorch files of other programs without running any code in them.

Such a file is a pickle, which may call any function while an object is made. PyTorch's restricted reader
(`weights_only=True`) only makes tensors and plain containers. Research code also leaves other objects in its files, for
example settings as an `argparse.Namespace` or a `CfgNode`. These become empty dictionaries here. Nothing of their
classes is imported, and no function is called.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wsolkit.backbones.weights import StateDict
from wsolkit.errors import CheckpointError

_WRAPPERS = ("state_dict", "model", "model_state_dict")
# PyTorch's restricted reader knows these by itself. They also make numbers of numpy's versions 1 and 2.
_KNOWN = re.compile(
    r"torch\.\w+|torch\.(_utils|_tensor|storage|serialization|nn\.parameter)\.\w+|_codecs\.encode"
    r"|collections\.(OrderedDict|Counter)|builtins\.(set|bytearray|complex)|numpy\.dtype"
    r"|numpy\._?core\.multiarray\.scalar"
)
_ADVICE = (
    "Best is to load the file with the code it comes from and save the model's state_dict() alone. If you trust it as "
    "you would a program, and have the packages it needs, add trust=true"
)
# Before version 1.6, a PyTorch file was a row of pickles: its mark, version, system, and the content.
_LEGACY_PICKLES = 4


class Foreign(NamedTuple):
    """The content of a file: weights; its other entries; the classes and functions from which nothing was made."""

    state_dict: StateDict
    others: Mapping[str, Any]
    left_out: list[str]


class _Nothing:
    """Stands for any class or function. A new object of it, or a call, gives an empty dictionary."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


class _Number:
    """Stands for numpy's function that makes a number."""

    def __new__(cls, dtype: np.dtype[Any], data: bytes) -> Any:
        return np.frombuffer(data, dtype)[0].item()


class _Array:
    """Stands for numpy's function that begins an array. Its content then comes as a state of another form."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _stand_in(name: str) -> type:
    module, _, own = name.rpartition(".")
    kinds: dict[str, type] = {"scalar": _Number, "_reconstruct": _Array} if module.endswith("core.multiarray") else {}
    return type(own, (kinds.get(own, _Nothing),), {"__module__": module, "__qualname__": own})


def read_foreign(path: Path, trust: bool = False) -> Foreign:
    """Read the weights in a file, wrapped or not, without the prefix "module." of data parallelism.

    Args:
        path: the path of the file.
        trust: whether to read everything, which runs what the file says.

    Raises:
        CheckpointError: the file is missing, damaged, holds no weights, or cannot be read without running its code.
    """
    if not path.is_file():
        raise CheckpointError(f"source: there is no file '{path}'")
    names = _names(path)
    foreign = [name for name in names if not _KNOWN.fullmatch(name)]
    try:
        if trust:
            content = torch.load(path, map_location="cpu", weights_only=False)
        else:
            dtypes: list[Any] = [np.dtype, *(type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU")]
            stand_ins = [_stand_in(name) for name in names if name != "numpy.dtype"]
            with torch.serialization.safe_globals([*stand_ins, *dtypes]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise CheckpointError(f"'{path}' needs a package to be read with trust=true: {error}") from error
    except Exception as error:  # The reader may fail in any way on damaged bytes.
        cut_short = isinstance(error, RuntimeError | EOFError | OSError)
        if trust or cut_short or not (foreign or isinstance(error, pickle.UnpicklingError)):
            reason = str(error).split(". ")[0] or type(error).__name__
            raise CheckpointError(f"'{path}' is not a readable PyTorch file, perhaps cut short ({reason})") from error
        refused = re.findall(r"Unsupported \w+ \S+", str(error)) or [type(error).__name__]
        raise CheckpointError(
            f"'{path}' cannot be read without running what is in it ({', '.join(foreign) or refused[0]}), or is "
            f"damaged. {_ADVICE}"
        ) from error
    return _unwrapped(content, path, [] if trust else foreign)


def _unwrapped(content: Any, path: Path, left_out: list[str]) -> Foreign:
    others: dict[str, Any] = {}
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping | nn.Module):
            others |= {str(name): value for name, value in content.items() if name != wrapper}
            content = content[wrapper]
    if isinstance(content, nn.Module):
        content = content.state_dict()
    state = content if isinstance(content, Mapping) else {}
    tensors = {str(name).removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        named = f". Of {', '.join(left_out)} nothing was made, which would run code. {_ADVICE}" if left_out else ""
        found = f"entries {', '.join([*others, *map(str, state)][:5])}" if others or state else type(content).__name__
        raise CheckpointError(
            f"'{path}' holds no weights: expected a state dict, or one as {' or '.join(map(repr, _WRAPPERS))}; found "
            f"{found}{named}"
        )
    return Foreign(tensors, others, left_out)


def _names(path: Path) -> list[str]:
    """Return the classes and functions that a file names."""
    named: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                (content,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(content) as file:
                    named = _named(file)  # type: ignore[arg-type]
        else:
            with path.open("rb") as file:
                for _ in range(_LEGACY_PICKLES):
                    named |= _named(file)
    except Exception:
        pass  # damaged, in whatever way; the reader says it better
    return sorted(named)


def _named(file: BinaryIO) -> set[str]:
    found: set[str] = set()
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            # Files have Python 2's names.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            found.add(f"{module}.{name}")
    return found
