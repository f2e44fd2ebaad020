"""benchmarks/gpu.py, in small on a CPU, and what the benchmarks of the methods compare with."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY
from wsolkit import build_module, load_config
from wsolkit.methods.scm import Costs


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("gpu")


def new_result() -> dict[str, Any]:
    return {"device": "a CPU", "kind": "cpu", "cores": 2, "torch": "2", "timm": "1", "parts": []}


def test_first_part_of_each_table_is_measured(gpu: Any, tmp_path: Path) -> None:
    """Methods, tokens, solvers, evaluation and reading; JSON and Markdown hold the same rows."""
    first = {part.table: part for part in reversed(list(gpu.parts(torch.device("cpu"), gpu.SIZES["small"])))}
    result = new_result()
    gpu.measure(iter(first.values()), result, 600, tmp_path)
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
    assert {part["table"] for part in result["parts"]} == {"methods", "tokens", "solvers", "evaluation", "reading"}
    assert all(part["rows"] for part in result["parts"]), result["parts"]
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "## Methods" in text
    assert "| sat | vit_micro | 32-true | training | 2 |" in text
    assert "Fitted `COSTS` of methods/scm.py: `Costs(step=" in text
    assert "## Missing" not in text


def test_every_method_is_measured_on_its_backbone(gpu: Any) -> None:
    parts = [part.what for part in gpu.parts(torch.device("cuda"), gpu.SIZES["full"]) if part.table == "methods"]
    for method in ("sat", "ts_cam", "scm", "cam", "spa", "bridging_gap"):
        assert [what.removeprefix(f"{method} ") for what in parts if what.startswith(f"{method} ")] == [
            "32-true",
            "bf16-mixed",
            "bf16-mixed, compiled",
        ]
    cfg = gpu.settings("sat", gpu.SIZES["full"])
    assert (cfg.backbone.name, gpu.settings("spa", gpu.SIZES["full"]).backbone.name) == ("deit_small", "resnet50")


def test_failed_part_leaves_its_error_and_late_ones_are_skipped(gpu: Any, tmp_path: Path) -> None:
    def broken() -> list[Any]:
        raise RuntimeError("out of memory")

    def parts() -> Iterator[Any]:
        yield gpu.Part("tokens", "broken", 1, broken)
        yield gpu.Part("tokens", "good", 1, lambda: [{"images/s": 1234.5, "peak": None}])
        assert len(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == 2  # written after every part
        yield gpu.Part("tokens", "long", 100, broken)

    result = new_result()
    gpu.measure(parts(), result, 30, tmp_path)
    text = gpu.markdown(result)
    assert "| images/s | peak |\n| --- | --- |\n| 1234 | – |" in text
    assert "- tokens, broken: RuntimeError: out of memory" in text
    assert "- tokens, long: needs up to 100 s, and " in text


def test_costs_are_found_again(gpu: Any) -> None:
    """From times that follow them; without those of dense products that were left out."""
    true = Costs(0.11, 2e-7, 0.04, 3e-10)
    rows = []
    for grid, batch, p in [(14, 16, 1), (14, 64, 4), (28, 16, 2), (28, 256, 8), (56, 64, 4)]:
        row: dict[str, float] = {"grid": grid, "batch": batch, "p": p}
        row["stencil, ms"] = 2**p * (true.step + true.element * grid**2 * batch)
        if grid < 56:
            row["dense, ms"] = p * (true.product + true.term * grid**6 * batch)
        rows.append(row)
    assert gpu.fit_costs(rows) == pytest.approx(true, rel=0.01)


def test_without_a_gpu_it_says_so(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="PyTorch finds no GPU.*device=cpu size=small"):
        gpu.main([])
    with pytest.raises(SystemExit, match="'colour=red': expected device=…, minutes=…, output=…, size=…"):
        gpu.main(["colour=red"])


@pytest.mark.parametrize("method", ["sat", "ts_cam", "scm"])
def test_rival_computes_what_the_method_does(gpu: Any, method: str) -> None:
    """The released code, as benchmarks/attention.py writes it out: the script fails if results differ."""
    cfg = load_config(
        f"method={method}", "backbone.options.depth=2", *(["method.num_blocks=1"] if method == "sat" else [])
    )
    own, released = build_module(cfg), build_module(cfg)
    released.load_state_dict(own.state_dict())
    attention = importlib.import_module("attention")
    attention.check(own, attention.as_released(released), 64)
