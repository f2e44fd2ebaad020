"""`wsolkit COMMAND …` does the same as `python -m wsolkit.COMMAND …`.

It imports nothing until it knows the command.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Mapping

COMMANDS: Mapping[str, Mapping[str, str]] = {
    "Get a data set ready": {
        "prepare": "unpack or download a data set, check it, and index it",
    },
    "Train and compare": {
        "train": "train a method, evaluate it and write a report; with -m, a sweep",
        "evaluate": "evaluate a checkpoint, or score maps of another program",
        "sweep_report": "gather the runs of a sweep into tables and charts",
        "dashboard": "make a W&B dashboard of a sweep",
    },
    "Hand one model's boxes or masks to another": {
        "pseudo_boxes": "draw boxes in training images, for method=psol",
        "pseudo_masks": "make masks of training images, for method=spol",
    },
    "Use a trained model": {
        "predict": "write boxes and masks of your own images",
        "demo": "try a model on a page in the browser",
        "export": "write a model as ONNX or as a program of torch.export",
        "import_checkpoint": "take over a checkpoint that a paper released",
    },
}


def overview() -> str:
    """Return what `wsolkit --help` prints."""
    lines = ["Usage: wsolkit COMMAND [SETTING=VALUE ...]"]
    for purpose, commands in COMMANDS.items():
        lines += ["", f"{purpose}:", *(f"  {name:<18} {text}" for name, text in commands.items())]
    lines += ["", "wsolkit COMMAND --help lists the settings of a command. wsolkit --version prints the version."]
    return "\n".join(lines)


def main() -> None:
    """Run the command that the command line names."""
    given = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if given in ("--help", "-h", "help"):
        try:
            print(overview(), flush=True)
        except BrokenPipeError:  # For example, from `wsolkit --help | head`.
            from wsolkit.system.signals import leave_without_reader

            leave_without_reader()
        return
    if given in ("--version", "-V"):
        from wsolkit import __version__

        print(f"wsolkit {__version__}")
        return
    known = [name for commands in COMMANDS.values() for name in commands]
    name = given.replace("-", "_")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        print(f"error: there is no command '{given}'{hint}; choose from: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    # This acts like `python -m`, so a process that DDP starts for another device finds the command again.
    runpy.run_module(f"wsolkit.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
