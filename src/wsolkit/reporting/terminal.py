"""Print text as it is, and name the pictures that are missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from wsolkit.system.names import one_line, readable


class PlainConsole(Console):
    """A console that prints text as it is: [brackets] and :colons: have no meaning, and nothing moves the cursor.

    Args:
        options: the options of rich's console.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string as plain text. Every string goes through this method, also in tables."""
        return super().render_str(readable(text), **options)


@contextmanager
def picture(what: Path | str) -> Iterator[None]:
    """Leave out a picture if it fails within this context. One line on stderr says which picture failed, and why.

    Args:
        what: the file of the picture, which is deleted if it fails, or its name.
    """
    try:
        yield
    except Exception as error:
        if isinstance(what, Path):
            what.unlink(missing_ok=True)
        reason = f"{type(error).__name__}: {error}".strip(": \n")
        name = what if isinstance(what, str) else what.name
        warn(f"{name} cannot be drawn ({reason}): it is left out, and the results are complete")


def warn(message: str) -> None:
    """Print a warning in one line."""
    print(f"warning: {one_line(message)}", file=sys.stderr, flush=True)
