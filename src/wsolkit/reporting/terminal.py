"""What is printed: text as it is, and which pictures are missing."""

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
    """A console for which text is text: [brackets] are no markup, :colons: no emoji, and nothing moves the cursor.

    Args:
        options: of rich's console.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Rich's hook, through which every string goes, those in tables too."""
        return super().render_str(readable(text), **options)


@contextmanager
def picture(what: Path | str) -> Iterator[None]:
    """What fails within costs this picture alone: one line on stderr says which, and why.

    Args:
        what: its file, of which nothing is left if it fails, or its name.
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
