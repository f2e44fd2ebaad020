"""Run notebooks and store them with what they show: python notebooks/execute.py [NOTEBOOK …]."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path, folder: Path, seconds: int = 600) -> NotebookNode:
    """A notebook run anew with this checkout's wsolkit, by default on two threads; without what tells when and where.

    Args:
        path: of the notebook, which stays as it is.
        folder: in which it runs.
        seconds: that a cell may take.

    Raises:
        CellExecutionError: a cell fails. CellTimeoutError: a cell takes longer.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=seconds,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": folder}},
    )
    own = {"PYTHONPATH": str(HERE.parent / "src"), "IPYTHONDIR": str(folder / ".ipython")}
    client.execute(env={"OMP_NUM_THREADS": "2"} | os.environ | own)
    notebook.metadata = nbformat.from_dict(_METADATA | {"wsolkit": {"sources": digest(notebook)}})
    return notebook


def digest(notebook: NotebookNode) -> str:
    """What tells whether a notebook's code has changed since it was run."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def main() -> None:
    """Store the notebooks that are named, or all."""
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(path, Path(folder)), path)
        print(path.name)


if __name__ == "__main__":
    main()
