"""Read PyTorch files of other programs without running anything that is in them.

Such a file is a pickle, which may name any function to be called in the making of an object. It is read by PyTorch's
restricted reader (`weights_only=True`), which makes tensors and plain containers. What else research code leaves in its
files, such as settings as an `argparse.Namespace` or a `CfgNode`, becomes an empty dictionary here: nothing of such a
class is imported, and nothing called.
"""

from __future__ import annotations

import pickle
import pickletools
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
# Numbers of numpy, under the names of its versions 1 and 2.
_NUMPY: dict[str, Any] = {
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray.scalar": np._core.multiarray.scalar,  # type: ignore[attr-defined]
    "numpy._core.multiarray.scalar": np._core.multiarray.scalar,  # type: ignore[attr-defined]
}
# A file in PyTorch's format of before version 1.6 is a row of pickles: its mark, version, system, and the content.
_LEGACY_PICKLES = 4


class Foreign(NamedTuple):
    """What a file holds: weights; its other entries, by name; names of classes and functions of which nothing was made."""

    state_dict: StateDict
    others: Mapping[str, Any]
    left_out: list[str]


class _Nothing:
    """Stands for any class or function: a new one of it, or calling it, is an empty dictionary."""

    def __new__(cls, *_: object) -> Any:  # noqa: D102
        return OrderedDict()


def read_foreign(path: Path, trust: bool = False) -> Foreign:
    """Read the weights in a file, wrapped or not, with or without the "module." that data parallelism puts before names.

    Args:
        trust: read everything, which runs what the file says.

    Raises:
        CheckpointError: the file is missing, damaged, holds no weights, or cannot be read without running it.
    """
    if not path.is_file():
        raise CheckpointError(f"source: there is no file '{path}'")
    names = _unknown(path)
    try:
        if trust:
            content = torch.load(path, map_location="cpu", weights_only=False)
        else:
            stand_ins = [(_NUMPY.get(name, type(name, (_Nothing,), {})), name) for name in names]
            dtypes = [type(np.dtype(kind)) for kind in "?bhilqBHILQefd"]
            with torch.serialization.safe_globals([*stand_ins, *dtypes]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, TypeError, ValueError, AttributeError) as error:
        found = f" It names {', '.join(names)}." if names else ""
        raise CheckpointError(
            f"'{path}' cannot be read without running what is in it, or is damaged ({str(error).splitlines()[0]})."
            f"{found} If you trust where it comes from as you would a program, and have its packages installed, add "
            "trust=true; better, load it with the code it comes from and save the model's state_dict() alone"
        ) from error
    except ImportError as error:
        raise CheckpointError(f"'{path}' needs a package to be read with trust=true: {error}") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"'{path}' is not a readable PyTorch file, perhaps cut short ({error})") from error
    left_out = [] if trust else [name for name in names if name not in _NUMPY]
    return _unwrapped(content, path, left_out)


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
        named = f"; of {', '.join(left_out)} nothing was made" if left_out else ""
        found = f"entries {', '.join([*others, *map(str, state)][:5])}" if others or state else type(content).__name__
        raise CheckpointError(
            f"'{path}' holds no weights: expected a state dict, or one as {' or '.join(map(repr, _WRAPPERS))}; found "
            f"{found}{named}"
        )
    return Foreign(tensors, others, left_out)


def _unknown(path: Path) -> list[str]:
    """The classes and functions that a file names, but for those which PyTorch's restricted reader knows."""
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
    except (ValueError, OSError, zipfile.BadZipFile, UnicodeDecodeError):
        pass  # damaged, which the reader says better
    known = ("torch.", "collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set")
    return sorted(name for name in named if not name.startswith(known))


def _named(file: BinaryIO) -> set[str]:
    found: set[str] = set()
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            # Files have Python 2's names.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            found.add(f"{module}.{name}")
    return found
