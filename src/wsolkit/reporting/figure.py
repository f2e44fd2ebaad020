"""Draw figures in which text appears as it is."""

from __future__ import annotations

import functools
import logging
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.ticker import ScalarFormatter

from wsolkit.reporting.terminal import warn
from wsolkit.system.names import readable

_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # Characters of these categories need no glyph.
_NO_GLYPHS = (
    "Last Resort",
    "LastResort",
    "Adobe Blank",
    "AdobeBlank",
)  # These fonts have every character, but show none.


class PlainFigure(Figure):
    """A Matplotlib figure in which dollars do not start mathematics, and which never uses TeX.

    If a text's font lacks a character, an installed font that has it is used.
    """

    def draw(self, renderer: Any) -> None:
        """Draw the figure. All of its pictures go through this method."""
        for axes in self.axes:
            for axis in (axes.xaxis, axes.yaxis):
                formatter = axis.get_major_formatter()
                if isinstance(formatter, ScalarFormatter):  # It would write `$\mathdefault{0.5}$` for TeX.
                    formatter.set_useMathText(False)
                    formatter._usetex = False  # type: ignore[attr-defined]
        texts = [text for text in _texts(self) if text.get_text()]
        lacking = {text: _lacking(text) for text in texts}
        families = fallback(frozenset().union(*lacking.values()))
        for text in texts:
            text.set(text=readable(text.get_text()), parse_math=False, usetex=False)
            if lacking[text]:
                text.set_fontfamily(list(dict.fromkeys([*text.get_fontfamily(), *families])))
        with warnings.catch_warnings(), _quiet_search():
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)  # `fallback` has warned of it.
            super().draw(renderer)


def _texts(artist: Artist) -> Iterator[Text]:
    """Return the texts of an artist, without the ticks of axes that are off. Asking for those would make them."""
    if isinstance(artist, Text):
        yield artist
    off = (artist.xaxis, artist.yaxis) if isinstance(artist, Axes) and not artist.axison else ()
    for child in artist.get_children():
        if child not in off:
            yield from _texts(child)


@contextmanager
def _quiet_search() -> Iterator[None]:
    """Suppress a line for each font that has no regular face."""
    log = logging.getLogger(font_manager.__name__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _lacking(text: Text) -> set[str]:
    """Return the characters of a text that its own font lacks."""
    characters = {char for char in readable(text.get_text()) if ord(char) > 126 and _needs_glyph(char)}
    if not characters:
        return set()
    font = font_manager.get_font(font_manager.findfont(text.get_fontproperties()))
    return {char for char in characters if not font.get_char_index(ord(char))}


def _needs_glyph(char: str) -> bool:
    return unicodedata.category(char) not in _INVISIBLE and not "\ufe00" <= char <= "\ufe0f"


_chosen: dict[str, str | None] = {}
"""The font family that is used for a character, or None if no installed font has it."""


def fallback(characters: Iterable[str]) -> list[str]:
    """Return as few installed font families as possible that have the characters. Warn once of those that no font has.

    It looks through fonts only for characters that were not requested before.
    """
    new = np.array(sorted(ord(char) for char in characters if char not in _chosen), np.int64)
    while len(new):
        best, known = max(
            ((family, np.isin(new, known)) for family, known in _installed()),
            key=lambda found: (int(found[1].sum()), "Sans" in found[0]),
            default=("", np.zeros(len(new), bool)),
        )
        if not known.any():
            if None not in _chosen.values():
                _say_missing([chr(code) for code in new])
            _chosen.update(dict.fromkeys(map(chr, new), None))
            break
        _chosen.update(dict.fromkeys(map(chr, new[known]), best))
        new = new[~known]
    return list(dict.fromkeys(family for char in sorted(characters) if (family := _chosen[char]) is not None))


@functools.cache
def _installed() -> list[tuple[str, npt.NDArray[np.int64]]]:
    """Return each installed font family, and the codes of the characters in its regular face."""
    listed = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in listed:  # Matplotlib keeps the list that it has made once.
            # The font is damaged, or made of pictures.
            with suppress(OSError, RuntimeError, ValueError):
                font_manager.fontManager.addfont(path)
    faces: dict[str, Any] = {}
    for entry in font_manager.fontManager.ttflist:
        known = faces.get(entry.name)
        if not entry.name.startswith(_NO_GLYPHS) and (known is None or _slant(entry) < _slant(known)):
            faces[entry.name] = entry
    found = []
    for family, entry in faces.items():
        with suppress(OSError, RuntimeError, ValueError):  # The font was deleted since, or is damaged.
            found.append((family, np.array(list(FT2Font(entry.fname).get_charmap()), np.int64)))
    return found


def _slant(entry: Any) -> tuple[bool, bool]:
    return entry.style != "normal", entry.weight not in (400, "normal", "regular")


def _say_missing(characters: list[str]) -> None:
    some = " ".join(characters[:10]) + " …" * (len(characters) > 10)
    warn(f"no installed font has {some}: pictures show boxes instead; a font such as Noto Sans for that script helps")
