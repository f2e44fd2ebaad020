"""The notebooks run, and what is stored in them is what they show."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks.execute import digest, execute
from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
PICTURES = {"image/png", "image/jpeg"}
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
ABSOLUTE = re.compile(r"(?<![\w.:/<])/(?:\w[\w.-]*/)+")

# How far numbers may be from the stored ones, by a cell's tag. Training from scratch differs between processors by many
# points; where single images are shown, everything may differ.
FREEDOM = {"": 1e-3, "trained": 40.0, "example": float("inf")}


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: NotebookNode) -> Iterator[str]:
    """What a cell shows as text, and the kind of what it shows as a picture."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield COLOURS.sub("", output.text)
        elif found := PICTURES & output.get("data", {}).keys():
            yield f"a picture, {found.pop()}"
        else:
            yield COLOURS.sub("", output.data["text/plain"])


def agree(new: str, stored: str, tolerance: float) -> bool:
    """Whether texts have the same words, and the same numbers up to a tolerance or a thousandth."""
    words, known = (" ".join(re.sub("[─ ]+", " ", NUMBER.sub(" # ", text)).split()) for text in (new, stored))
    if words != known:
        return False
    numbers = ([float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (new, stored))
    return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=tolerance) for a, b in zip(*numbers, strict=True))


def test_there_are_five() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == list("12345")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_as_it_ran(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 600 * 1024
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert notebook.metadata.wsolkit.sources == digest(notebook), "changed since it was run: make notebooks"
    for cell in code(notebook):
        assert cell.outputs, cell.source
        assert set(cell.metadata) <= {"tags"}
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result"), cell.source
            assert output.get("name") != "stderr", output.text
            shown = json.dumps(
                [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k not in PICTURES)]
            )
            assert not ABSOLUTE.findall(COLOURS.sub("", shown).replace("</", "<")), cell.source
            assert tempfile.gettempdir() not in shown


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_shows_what_is_stored(path: Path, tmp_path: Path) -> None:
    stored = nbformat.read(path, as_version=4)
    for new, old in zip(code(execute(path, tmp_path)), code(stored), strict=True):
        (tag,) = old.metadata.get("tags") or [""]
        for text, known in zip_longest(texts(new), texts(old), fillvalue=""):
            assert agree(text, known, FREEDOM[tag]), f"{old.source}\n\nshows now\n\n{text}\n\nstored\n\n{known}"


def test_stale_notebooks_are_noticed() -> None:
    assert agree("cam   81.5 %", "cam 80.9 %", 40)
    assert not agree("cam 81.5 %", "cam 12.0 %", 40)
    assert not agree("cam 81.5 %", "cam 80.9 %", 1e-3)
    assert not agree("cam 81.5 %", "sat 81.5 %", float("inf"))
    assert not agree("cam 81.5 %", "cam 81.5 % 1.0", float("inf"))
    assert agree("1,000 steps", "1,000.4 steps", 1e-3)
