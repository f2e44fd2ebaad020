"""All figures of this project that need a GPU, in one command of at most nine minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py minutes=4 output=outputs/gpu
    python benchmarks/gpu.py device=cpu size=small

Writes gpu.json and gpu.md after every part. The tables of gpu.md go into docs/cost.md and docs/scm.md. A part that
fails leaves its error there, and the others go on. Parts that no longer fit into the time are skipped. Weights are
random and images noise, which does not change the speed. `size=small` tries the script out.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from attention import as_released
from loading import drawn, own, write
from omegaconf import DictConfig
from scm_diffusion import block_forward, kept_for_backward
from timing import CNNS, HALF, TERMS, TRANSFORMERS, finish, milliseconds, name, steps
from torch.utils.flop_counter import FlopCounterMode

from wsolkit import build_module, load_config
from wsolkit.build import build_protocols
from wsolkit.methods.scm import COSTS, Costs, choose_solver
from wsolkit.metrics.evaluation import Evaluation
from wsolkit.system.cores import available_cores
from wsolkit.system.drafts import draft
from wsolkit.system.libraries import quieten_libraries
from wsolkit.types import EvaluationBatch

Row = dict[str, Any]
"""What is measured, by the name of the column."""


class Size(NamedTuple):
    """How much is measured.

    Attributes:
        batch: images a step.
        classes: the number of classes.
        transformer, cnn: backbones.
        overrides: further settings of every method.
        tokens: timm's model for token extraction, its image sizes and its options.
        grids, batches, iterations: of SCM's solvers. Products of matrices above `dense` entries are left out.
        pictures, epochs: images to read, and how often.
        seconds: how long each figure is measured, at least.
        compiled: whether compiled networks are measured.
    """

    batch: int
    classes: int
    transformer: str
    cnn: str
    overrides: tuple[str, ...]
    tokens: tuple[str, tuple[int, ...], dict[str, Any]]
    grids: tuple[int, ...]
    batches: tuple[int, ...]
    iterations: tuple[int, ...]
    dense: float
    pictures: int
    epochs: int
    seconds: float
    compiled: bool


SIZES = {
    "full": Size(
        batch=64,
        classes=1000,
        transformer="deit_small",
        cnn="resnet50",
        overrides=(),
        tokens=("vit_small_patch14_dinov2", (224, 448), {}),
        grids=(14, 28, 56),
        batches=(16, 64, 256),
        iterations=(1, 2, 4, 6, 8),
        dense=2e8,
        pictures=64,
        epochs=48,
        seconds=1.0,
        compiled=True,
    ),
    "small": Size(
        batch=2,
        classes=3,
        transformer="vit_micro",
        cnn="cnn_micro",
        overrides=("dataset.image_size=32", "dataset.resize=32"),
        tokens=("vit_tiny_patch16_224", (32,), {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}),
        grids=(4, 6),
        batches=(1, 2),
        iterations=(1, 2),
        dense=2e8,
        pictures=4,
        epochs=1,
        seconds=0.0,
        compiled=False,
    ),
}


class Part(NamedTuple):
    """One part of the whole: the table to which its rows belong, what it measures, and how long it may take."""

    table: str
    what: str
    seconds: float
    measure: Callable[[], list[Row]]


def settings(method: str, size: Size, *overrides: str) -> DictConfig:
    """Settings of a method on its backbone."""
    return load_config(
        f"method={method}",
        f"backbone={size.transformer if method in TRANSFORMERS else size.cnn}",
        *("dataset=listed", "dataset.root=none", f"dataset.num_classes={size.classes}", "backbone.pretrained=false"),
        f"dataset.batch_size={size.batch}",
        *TERMS.get(method, []),
        *size.overrides,
        *overrides,
    )


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second in the product of two large square matrices: the bound of a step."""
    side = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    (duration,) = milliseconds(lambda: a @ b, device=device, seconds=0.2, rounds=3)
    return 2 * side**3 / duration * 1e3


def operations(function: Callable[[], object]) -> int:
    """Count the floating-point operations of products, convolutions and attention in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def peak_mib(function: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory that a call adds to what is there, such as weights, in MiB, or None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    finish(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure_method(method: str, precision: str, compiled: bool, device: torch.device, size: Size) -> list[Row]:
    """Measure a method beside its plain form, which is not compiled.

    That is the released code's attention for transformers, and maps channel by channel for convolutional networks.
    """
    cfg = settings(method, size, f"trainer.precision={precision}")
    torch.manual_seed(0)
    ours = eager = steps(cfg, device)
    if compiled:
        torch._dynamo.reset()  # It would stop compiling after some networks of one class.
        ours = steps(settings(method, size, f"trainer.precision={precision}", "compile=true"), device)
    if method in TRANSFORMERS:
        plain = steps(cfg, device, as_released(build_module(cfg)))
    else:
        layout = "backbone.channels_last=false"
        plain = steps(settings(method, size, f"trainer.precision={precision}", layout), device)
    rate = product_rate(device, HALF.get(precision, torch.float32))
    rows = []
    for what, own_step, plain_step, counted in (
        ("training", ours.train, plain.train, eager.train),
        ("inference", ours.infer, plain.infer, eager.infer),
    ):
        own_ms, plain_ms = milliseconds(own_step, plain_step, device=device, seconds=size.seconds)
        rows.append(
            {
                "method": method,
                "backbone": cfg.backbone.name,
                "precision": f"{precision}, compiled" if compiled else precision,
                "step": what,
                "batch": size.batch,
                "images/s": 1e3 * size.batch / own_ms,
                "plain": 1e3 * size.batch / plain_ms,
                "ratio": plain_ms / own_ms,
                "peak, MiB": peak_mib(own_step, device),
                "plain, MiB": peak_mib(plain_step, device),
                "share of the bound, %": 100 * operations(counted) / (own_ms / 1e3) / rate,
            }
        )
    return rows


def measure_tokens(side: int, precision: str, device: torch.device, size: Size) -> list[Row]:
    """Measure how fast a network gives the tokens of its last block."""
    model, _, options = size.tokens
    network = timm.create_model(model, pretrained=False, img_size=side, **options).to(device).eval()
    image = torch.randn(size.batch, 3, side, side, device=device)
    half = HALF.get(precision)

    def extract() -> None:
        with torch.inference_mode(), torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None):
            network.forward_intermediates(image, indices=1, intermediates_only=True)

    rate = product_rate(device, half or torch.float32)
    (duration,) = milliseconds(extract, device=device, seconds=size.seconds)
    return [
        {
            "network": model,
            "image": side,
            "precision": precision,
            "batch": size.batch,
            "images/s": 1e3 * size.batch / duration,
            "peak, MiB": peak_mib(extract, device),
            "share of the bound, %": 100 * operations(extract) / (duration / 1e3) / rate,
        }
    ]


def measure_solvers(batch: int, side: int, device: torch.device, size: Size) -> list[Row]:
    """Measure both solvers of one of SCM's blocks, forward and backward, for each p."""
    rows = []
    for iterations in size.iterations:
        row: Row = {"grid": side, "batch": batch, "p": iterations}
        for solver in ("stencil", "dense"):
            if solver == "dense" and batch * side**4 > size.dense:
                continue
            forward = block_forward(batch, side, iterations, solver, device)
            run = lambda forward=forward: forward().backward()  # noqa: E731
            (row[f"{solver}, ms"],) = milliseconds(run, device=device, seconds=size.seconds / 4)
            row[f"{solver}, MiB"] = kept_for_backward(forward) / 2**20
        row["auto"] = choose_solver(device.type, batch, side**2, iterations)
        rows.append(row)
    return rows


def fit_costs(rows: Sequence[Row]) -> Costs:
    """Fit `COSTS` of SCM's solvers to their measured times, by least squares of relative errors.

    Args:
        rows: what `measure_solvers` returns.
    """

    def fit(solver: str, factors: Callable[[Row], tuple[float, float]]) -> list[float]:
        measured = [row for row in rows if f"{solver}, ms" in row]
        if len(measured) < 2:
            return [float("nan")] * 2
        relative = np.array([factors(row) for row in measured]) / np.array([[row[f"{solver}, ms"]] for row in measured])
        scale = relative.max(axis=0)  # the two columns differ by many powers of ten
        found = np.linalg.lstsq(relative / scale, np.ones(len(measured)), rcond=None)[0] / scale
        return [float(f"{max(value, 0):.2g}") for value in found]

    stencil = fit("stencil", lambda row: (2 ** row["p"], 2 ** row["p"] * row["grid"] ** 2 * row["batch"]))
    dense = fit("dense", lambda row: (row["p"], row["p"] * row["grid"] ** 6 * row["batch"]))
    return Costs(*stencil, *dense)


def measure_evaluation(method: str, device: torch.device, size: Size) -> list[Row]:
    """Measure batches of an evaluation under both default protocols beside the forward pass alone."""
    cfg = settings(method, size, "protocol=[maxboxacc,maxboxacc_v2]")
    module = build_module(cfg).to(device).eval()
    evaluation = Evaluation(build_protocols(cfg), size.classes).to(device)
    side = cfg.dataset.image_size
    batch: EvaluationBatch = {
        "image": torch.randn(size.batch, 3, side, side, device=device),
        "label": torch.randint(size.classes, (size.batch,), device=device),
        "boxes": [np.array([[side // 8, side // 8, side // 2, side // 2]])] * size.batch,
        "uncut_boxes": [np.array([[side // 8, side // 8, side // 2, side // 2]])] * size.batch,
        "size": torch.full((size.batch, 2), side),
        "mask": None,
        "index": torch.arange(size.batch, device=device),
        "uncropped": None,
        "uncropped_mask": None,
    }

    def forward() -> None:
        module.localize(batch["image"], batch["label"][:, None])

    batches = 8 if size.seconds else 1

    def evaluate() -> None:
        for _ in range(batches):
            evaluation.update(batch, module.localize, module)
        evaluation.compute()  # waits for the threads that draw boxes

    alone, whole = milliseconds(forward, evaluate, device=device, seconds=size.seconds)
    return [
        {
            "method": method,
            "backbone": cfg.backbone.name,
            "cores": available_cores(),
            "forward pass, images/s": 1e3 * size.batch / alone,
            "evaluation, images/s": 1e3 * size.batch * batches / whole,
        }
    ]


def measure_reading(cores: int, size: Size) -> list[Row]:
    """Measure how many 500×375 JPEGs a second are read, augmented and collated for training."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = write(itertools.islice(drawn(), size.pictures), Path(folder))[: size.pictures]
        loader = own(pictures * size.epochs, None, cores).train_dataloader()
        for _ in range(2):  # the first time starts the processes
            start = time.perf_counter()
            count = sum(len(batch["image"]) for batch in loader)
        seconds = time.perf_counter() - start
    return [{"processes": cores, "images": count, "images/s": count / seconds}]


def parts(device: torch.device, size: Size) -> Iterator[Part]:
    """List what is measured, the most useful first."""
    methods, precisions = (*TRANSFORMERS, *CNNS), ("32-true", "bf16-mixed")
    for method, precision in itertools.product(methods, precisions):
        run = functools.partial(measure_method, method, precision, False, device, size)
        yield Part("methods", f"{method} {precision}", 15, run)
    for side, precision in itertools.product(size.tokens[1], precisions):
        run = functools.partial(measure_tokens, side, precision, device, size)
        yield Part("tokens", f"{side} {precision}", 10, run)
    for batch, side in itertools.product(size.batches, size.grids):
        run = functools.partial(measure_solvers, batch, side, device, size)
        yield Part("solvers", f"{side}×{side}, batch {batch}", 15, run)
    for method in (TRANSFORMERS[0], CNNS[0]):
        yield Part("evaluation", method, 20, functools.partial(measure_evaluation, method, device, size))
    for cores in sorted({1, available_cores()}):
        yield Part("reading", f"{cores} processes", 30, functools.partial(measure_reading, cores, size))
    for method in methods if size.compiled else ():
        run = functools.partial(measure_method, method, "bf16-mixed", True, device, size)
        yield Part("methods", f"{method} bf16-mixed, compiled", 90, run)


def measure(todo: Iterator[Part], result: Row, seconds: float, folder: Path) -> None:
    """Run parts and write all results after each.

    Args:
        todo: the parts.
        result: to which each part is added: its rows, its error, or why it was skipped.
        seconds: the time for all parts. A part begins only if it would fit.
        folder: where gpu.json and gpu.md are written.
    """
    end = time.monotonic() + seconds
    for part in todo:
        entry: Row = {"table": part.table, "what": part.what}
        start = time.monotonic()
        if start + part.seconds > end:
            entry["skipped"] = f"needs up to {part.seconds:.0f} s, and {max(end - start, 0):.0f} s are left"
        else:
            try:
                entry["rows"] = part.measure()
            except Exception as error:  # whatever it is, the others go on
                entry["error"] = f"{type(error).__name__}: {error}"
            entry["seconds"] = time.monotonic() - start
        result["parts"].append(entry)
        print(f"{part.table}, {part.what}: {entry.get('error') or entry.get('skipped') or 'done'}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU
        with draft(folder / "gpu.json") as file:
            json.dump(result, file, indent=1)
        with draft(folder / "gpu.md") as file:
            file.write(markdown(result))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as a Markdown table with the columns of all of them."""
    columns = list(dict.fromkeys(column for row in rows for column in row))

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        return "–" if value is None else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(result: Mapping[str, Any]) -> str:
    """Write all results as Markdown: a table for each kind of part, the fitted costs, and what is missing."""
    pages = [f"{result['device']}, {result['cores']} CPU cores, torch {result['torch']}, timm {result['timm']}"]
    for kind in dict.fromkeys(part["table"] for part in result["parts"]):
        rows = [row for part in result["parts"] if part["table"] == kind for row in part.get("rows", [])]
        if rows:
            pages += [f"## {kind.capitalize()}", table(rows)]
        if rows and kind == "solvers":
            pages.append(f"Fitted `COSTS` of methods/scm.py: `{fit_costs(rows)}`; now `{COSTS.get(result['kind'])}`")
    missing = [part for part in result["parts"] if "rows" not in part]
    if missing:
        notes = [f"- {part['table']}, {part['what']}: {part.get('error') or part['skipped']}" for part in missing]
        pages += ["## Missing", "\n".join(notes)]
    return "\n\n".join(pages) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Measure, and write gpu.json and gpu.md."""
    given = {"device": "cuda", "minutes": "8.5", "output": "outputs/gpu", "size": "full"}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in given or not value:
            sys.exit(f"error: '{argument}': expected {', '.join(f'{key}=…' for key in given)}")
        given[key] = value
    if given["size"] not in SIZES:
        sys.exit(f"error: size={given['size']}: expected {' or '.join(SIZES)}")
    device, size, folder = torch.device(given["device"]), SIZES[given["size"]], Path(given["output"])
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no GPU. Run this where there is one, or try it out with device=cpu size=small")
    quieten_libraries()
    folder.mkdir(parents=True, exist_ok=True)
    result: Row = {
        "device": name(device),
        "kind": device.type,
        "cores": available_cores(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "parts": [],
    }
    measure(parts(device, size), result, 60 * float(given["minutes"]), folder)
    print(f"\n{markdown(result)}")
    failed = sum("error" in part for part in result["parts"])
    if failed:
        sys.exit(f"error: {failed} parts failed, see {folder / 'gpu.md'}")


if __name__ == "__main__":
    main(sys.argv[1:])
