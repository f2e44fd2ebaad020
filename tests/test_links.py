"""What README and pages link to is there, and every page can be found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

README, DOCS = REPOSITORY / "README.md", REPOSITORY / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The text of a page or of a notebook's cells, without indented blocks."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n".join(
            "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
        )
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def anchors(page: Path) -> set[str]:
    """What a link may have behind #: the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return [link for link in LINK.findall(prose(page)) if not link.startswith(("http://", "https://"))]


@pytest.mark.parametrize(
    "page",
    [*PAGES, *sorted((REPOSITORY / "notebooks").glob("*.ipynb"))],
    ids=lambda page: str(page.relative_to(REPOSITORY)),
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(REPOSITORY), link
        if anchor:
            assert anchor in anchors(target), link


def test_index_lists_every_page_once() -> None:
    index = DOCS / "README.md"
    assert sorted(link for link in links(index) if not link.startswith("..")) == sorted(
        page.relative_to(DOCS).as_posix() for page in PAGES if page not in (README, index)
    )
    assert "docs/README.md" in links(README)


def test_pictures_are_shown() -> None:
    """Every picture beside the pages is on one of them."""
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page) if link.endswith(".png")}
    assert shown == {*DOCS.glob("*.png")}


def test_readme_is_short() -> None:
    assert README.stat().st_size <= 12_000
