"""Read weight files without executing anything in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from wsolkit.errors import CheckpointError

StateDict = dict[str, Tensor]

_WRAPPERS = ("state_dict", "model", "model_state_dict")


def load_weights(path: str | Path) -> StateDict:
    """Read a safetensors file or a PyTorch state dict, in float32.

    A state dict may be wrapped (`{"model": …}` or `{"state_dict": …}`) and prefixed with `module.`, as research code
    saves it. The reader uses `weights_only=True`, which refuses pickled code.

    Raises:
        CheckpointError: the file is missing, has another format, or holds something other than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weight file at '{path}': give the path of a .safetensors, .pth or .pt file")
    if path.suffix == ".safetensors":
        try:
            state: Mapping[str, object] = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"'{path}' is not a readable safetensors file ({error})") from error
    else:
        state = _load_pickle(path)
    for wrapper in _WRAPPERS:
        inner = state.get(wrapper)
        if isinstance(inner, Mapping):
            state = inner
    tensors = {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise CheckpointError(f"'{path}' holds no tensors: expected a state dict, found keys {list(state)[:5]}")
    return tensors


def _load_pickle(path: Path) -> Mapping[str, object]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' is not a plain state dict: reading it would run code stored in the file, or the file is "
            f"damaged. Save it again as a state dict or as safetensors. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # The reader may fail in any way on damaged bytes.
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"'{path}' is not a readable PyTorch file, perhaps cut short ({reason})") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"'{path}' holds a {type(state).__name__}, expected a state dict")
    return state
