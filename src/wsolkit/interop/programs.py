"""Write a trained model as a program that runs without wsolkit: as ONNX, or with `torch.export`.

Either takes normalised images `image` [B, 3, S, S] for any B, and returns `logits` [B, C] and raw score maps `maps`,
which are [B, C, h, w] with one map per class, or [B, 1, h, w] if the method has the same map for all classes. It
contains a description as JSON, under `METADATA` in ONNX's metadata_props, or as the extra file `EXTRA_FILE` of a
`torch.export` program.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from wsolkit.errors import ConfigError
from wsolkit.methods.base import WSOLModule

METADATA, EXTRA_FILE = "wsolkit", "wsolkit.json"
OPSET = 18

Run = Callable[[npt.NDArray[np.float32]], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
"""image [B, 3, S, S] → logits [B, C] and maps [B, C or 1, h, w]."""


class _AllMaps(nn.Module):
    def __init__(self, module: WSOLModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits, maps = self.module.localize(image, "all")
        return logits, maps


def trace(module: WSOLModule, image_size: int) -> ExportedProgram:
    """Return the program of a module's inference, without the parts that only training needs.

    Raises:
        ConfigError: the post-process takes gradients, which a program cannot.
    """
    if getattr(getattr(module.network, "postprocess", None), "sees_network", False):
        raise ConfigError(
            "the post-process takes gradients of the network, which an exported program cannot: export with "
            "postprocess=none"
        )
    model = _AllMaps(copy.deepcopy(module).eval())
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            layer.num_batches_tracked = None  # Only training counts.
    program = _trace(model, image_size)
    unread = {node.name for node in program.graph.nodes if node.op == "placeholder" and not node.users}
    targets = [spec.target for spec in program.graph_signature.input_specs if spec.arg.name in unread and spec.target]
    for target in targets:  # SCM's blocks are an example.
        owner, _, name = target.rpartition(".")
        delattr(model.get_submodule(owner), name)
    return _trace(model, image_size) if targets else program


def _trace(model: nn.Module, image_size: int) -> ExportedProgram:
    example = torch.zeros(2, 3, image_size, image_size)  # With one image, the batch size would count as fixed.
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes={"image": {0: Dim("batch")}}, strict=False)


def write_onnx(program: ExportedProgram, path: Path, description: Mapping[str, Any]) -> None:
    """Write a program as an ONNX file.

    Raises:
        ConfigError: packages are missing.
    """
    onnx, _ = _packages()
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # They concern its own workings.
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits", "maps"],
            external_data=False,
            verbose=False,
        )
    assert made is not None
    model = made.model_proto
    onnx.helper.set_model_props(model, {METADATA: json.dumps(description)})
    onnx.save_model(model, path)


def run_onnx(path: Path) -> Run:
    """Return an ONNX file as a function, on this machine's CPU.

    Raises:
        ConfigError: packages are missing.
    """
    _, onnxruntime = _packages()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: tuple(session.run(["logits", "maps"], {"image": image}))


def _packages() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise ConfigError(f"format=onnx needs other packages ({error}): pip install 'wsolkit[export]'") from error
    return onnx, onnxruntime


def write_torch_export(program: ExportedProgram, path: Path, description: Mapping[str, Any]) -> None:
    """Write a program in PyTorch's format, for `torch.export.load`."""
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={EXTRA_FILE: json.dumps(description)})


def run_torch_export(path: Path) -> Run:
    """Return a program in PyTorch's format as a function."""
    with path.open("rb") as file:
        model = torch.export.load(file).module()
    return lambda image: tuple(output.numpy() for output in model(torch.from_numpy(image)))


def differences(run: Run, module: WSOLModule, image_size: int) -> tuple[float, float, bool]:
    """Compare a program with its model on random images, in batches of 1 and 3.

    Returns:
        the largest differences of logits and maps, as shares of the largest value, and whether the model is the same.
        It is the same if the differences are below a thousandth. In maps, one in a hundred values may differ by more,
        because a post-process cuts maps at thresholds, which rounding can cross.
    """
    noise = np.random.default_rng(0)
    logits, maps, same = 0.0, 0.0, True
    for batch in (1, 3):
        image = noise.standard_normal((batch, 3, image_size, image_size), np.float32)
        expected = [output.numpy() for output in module.localize(torch.from_numpy(image), "all")]
        off = [abs(got - own) / max(abs(own).max(), 1e-12) for got, own in zip(run(image), expected, strict=True)]
        logits, maps = max(logits, float(off[0].max())), max(maps, float(off[1].max()))
        same &= bool(off[0].max() < 1e-3 and np.quantile(off[1], 0.99) < 1e-3)
    return logits, maps, same
