"""Read weight files without executing anything in them, and download published ones."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import pooch
import requests
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from wsolkit.errors import CheckpointError

StateDict = dict[str, Tensor]

_TIMEOUT = 10.0  # Seconds to connect, and between two pieces.
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


def download_weights(url: str) -> Path:
    """Return the path of published weights, which are downloaded once into PyTorch's folder of weights (`TORCH_HOME`).

    Args:
        url: the address. If the file's name ends in eight or more hexadecimal digits, as in "…-3065dcf5.pth", the
            SHA-256 of the file must begin with them.

    Raises:
        CheckpointError: the file cannot be downloaded, or is a different one.
    """
    name = PurePosixPath(urlsplit(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    by_hand = "Give a local file with backbone.weights=FILE, or train from scratch with backbone.pretrained=false"
    pooch.get_logger().setLevel(logging.ERROR)  # It would print the checksum and advice for programmers.
    draft = f"{name}.{os.getpid()}.part"  # Several processes of a run may download at the same time.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        downloader = pooch.HTTPDownloader(timeout=_TIMEOUT)
        part = Path(pooch.retrieve(url, None, draft, path.parent, downloader=downloader))
    except (requests.RequestException, OSError) as error:
        # requests' own text of a connection that fails repeats the address and names its parts.
        lost = isinstance(error, requests.ConnectionError | requests.Timeout)
        reason = f"{urlsplit(url).netloc} cannot be reached: {type(error).__name__}" if lost else str(error)
        raise CheckpointError(
            f"the weights at '{url}' cannot be downloaded to '{path.parent}' ({reason}). {by_hand}"
        ) from error
    digits = re.search(r"-([0-9a-f]{8,})\.", name)
    found = pooch.file_hash(str(part), alg="sha256")
    if digits and not found.startswith(digits[1]):
        part.unlink()
        raise CheckpointError(
            f"what is at '{url}' is not the file that was published: its SHA-256 begins with {found[:8]}, expected "
            f"{digits[1]}. {by_hand}"
        )
    part.replace(path)
    return path
