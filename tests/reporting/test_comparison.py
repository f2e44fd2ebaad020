"""The page that compares runs image by image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from tests.conftest import browse
from tests.reporting.test_page import HOSTILE, Tags, shown
from wsolkit.reporting.examples import write_examples
from wsolkit.sweeps.comparison import comparison
from wsolkit.sweeps.tables import Run, group_runs

IMAGES = ("birds/1.jpg", "birds/2.jpg", "birds/3.jpg")


def add_run(sweep: Path, name: str, images: tuple[str, ...] = IMAGES, **overrides: Any) -> Run:
    """A finished run, with pictures of some images."""
    dataset = overrides.pop("dataset", "cub")
    (sweep / name).mkdir(parents=True)
    if images:
        write_examples(sweep / name, [shown(image, 0.5) for image in images], "maxboxacc", 0.25)
    metrics = {"maxboxacc/max_box_acc": 60.0 + overrides.get("seed", 0), "top1_cls": 80.0}
    return Run(name, "finished", {"seed": 0, **overrides}, {"dataset": {"name": dataset}}, metrics)


def page(folder: Path, *runs: Run, keys: list[str] | None = None) -> str:
    content, problems = comparison(group_runs(runs, keys), folder)
    assert content is not None
    assert not problems
    return content


def heading(page: str) -> list[list[str]]:
    """The rows of the table's head, as text."""
    head = re.search(r"<thead>(.*?)</thead>", page.replace("<wbr>", ""), re.DOTALL)
    assert head
    return [re.findall(r"<th[^>]*>(.*?)</th>", row) for row in re.findall(r"<tr.*?</tr>", head[1], re.DOTALL)]


def body(page: str) -> list[list[str]]:
    """The rows below, as text without tags."""
    rows = re.findall(r"<tr>(.*?)</tr>", page[page.index("<tbody>") :], re.DOTALL)
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[" ".join(re.sub("<[^>]*>", " ", cell).split()) for cell in row] for row in cells]


def test_damaged_pictures_leave_out_their_run(tmp_path: Path) -> None:
    runs = [add_run(tmp_path, name, method=name) for name in ("cam", "sat", "scm")]
    path = tmp_path / "cam" / "examples" / "examples.json"
    path.write_text("[")
    drawn, (problem,) = comparison(group_runs(runs), tmp_path)
    assert drawn is not None
    assert heading(drawn)[0] == ["method", "sat", "scm"]
    assert "Rows of the table without pictures: 1." in drawn
    assert str(path) in problem


def test_columns_are_the_rows_of_the_table(tmp_path: Path) -> None:
    drawn = page(tmp_path, add_run(tmp_path, "a", method="sat", lr=0.1), add_run(tmp_path, "b", method="cam", lr=0.1))
    assert heading(drawn) == [
        ["method", "cam", "sat"],
        ["maxboxacc/max_box_acc", "60.0", "60.0"],
        ["top1_cls", "80.0", "80.0"],
        ["boxes at", "τ 0.250 (maxboxacc)", "τ 0.250 (maxboxacc)"],
    ]
    said = "IoU 0.50 , taken for Laysan Albatross"
    first = ["Black-footed Albatross birds/1.jpg", f"{said} cam", f"{said} sat"]
    assert body(drawn) == [[first[0].replace("1", number), *first[1:]] for number in "123"]
    assert "Same in all jobs: dataset=cub, lr=0.1" in drawn
    tags = Tags(drawn)
    assert tags.open == tags.wrong == []


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    drawn = page(tmp_path, *(add_run(tmp_path, name, method=name) for name in ("cam", "sat")))
    sources = re.findall(r"""(?:src|href)=["'](.{23})""", drawn)
    assert sources == ["data:image/jpeg;base64,"] * 9
    assert "http" not in drawn.replace("http-equiv", "")


def test_of_several_seeds_the_lowest_with_pictures_is_shown(tmp_path: Path) -> None:
    runs = [
        add_run(tmp_path, "sat0", method="sat", seed=0, images=()),
        add_run(tmp_path, "sat2", method="sat", seed=2),
        add_run(tmp_path, "sat10", method="sat", seed=10),
        add_run(tmp_path, "cam0", method="cam", seed=0),
    ]
    drawn = page(tmp_path, *runs)
    assert heading(drawn)[1:4] == [
        ["seeds", "1", "3"],
        ["shown", "–", "seed=2"],
        ["maxboxacc/max_box_acc", "60.0", "64.0 ± 5.3"],  # of all seeds, as in the table: 60, 62, 70
    ]


def test_settings_averaged_over_say_which_run_is_shown(tmp_path: Path) -> None:
    runs = [add_run(tmp_path, f"{method}{lr}", method=method, lr=lr) for method in ("cam", "sat") for lr in (1, 2)]
    runs.append(add_run(tmp_path, "cam again", method="cam", lr=1))
    assert heading(page(tmp_path, *runs, keys=["method"]))[2] == ["shown", "lr=1", "lr=1"]
    again = [run for run in runs if run.overrides["lr"] == 1]
    assert heading(page(tmp_path, *again))[2] == ["shown", "cam1", "–"]


def test_images_that_most_columns_show_come_first(tmp_path: Path) -> None:
    drawn = page(
        tmp_path,
        add_run(tmp_path, "a", ("one", "two", "alone"), method="a"),
        add_run(tmp_path, "b", ("two", "one"), method="b"),
        add_run(tmp_path, "c", ("two",), method="c"),
        add_run(tmp_path, "d", ("two", "one"), method="d", dataset="ilsvrc"),  # other images of the same name
        add_run(tmp_path, "e", (), method="e"),
    )
    rows = body(drawn)
    assert [row[0].split()[-1] for row in rows] == ["two", "one"]
    assert [cell == "–" for cell in rows[0]] == [False, False, False, False, True]
    assert [cell == "–" for cell in rows[1]] == [False, False, False, True, True]
    assert "Rows of the table without pictures: 1." in drawn


@pytest.mark.parametrize("second", [(), ("other",)])
def test_without_a_common_image_there_is_no_page(tmp_path: Path, second: tuple[str, ...]) -> None:
    runs = [add_run(tmp_path, "a", method="a"), add_run(tmp_path, "b", second, method="b")]
    assert comparison(group_runs(runs), tmp_path) == (None, [])


def test_more_columns_than_are_read_are_cut_and_say_so(tmp_path: Path) -> None:
    runs = [add_run(tmp_path, f"{a}{b}", IMAGES[:1], a=a, b=b) for a in range(7) for b in range(2)]
    drawn = page(tmp_path, *runs)
    assert len(heading(drawn)[0]) == 13
    assert "The first 12 of 14 rows of the table are shown; keys=[…] with fewer of a, b makes fewer columns." in drawn
    assert len(heading(page(tmp_path, *runs, keys=["a"]))[0]) == 8


def test_text_from_runs_is_escaped(tmp_path: Path) -> None:
    runs = [add_run(tmp_path, str(number), method=HOSTILE + str(number)) for number in range(2)]
    for run in runs:
        image = shown(HOSTILE, 0.1, HOSTILE)._replace(label="x" + HOSTILE)
        write_examples(tmp_path / run.name, [image], HOSTILE, 0.5)
    drawn = page(tmp_path, *runs)
    assert "<script>alert" not in drawn
    assert drawn.count("<script>") == 1
    assert drawn.count(escape(HOSTILE)) > 10


# --- in a browser -----------------------------------------------------------------------------------------------------

ASK = """<script>
addEventListener("load", () => {
  const container = document.querySelector(".wide"), first = document.querySelector("tbody th");
  container.scrollLeft = 10000;
  const root = document.documentElement;
  const broken = [...document.images].filter(image => !image.naturalWidth).length;
  parent.document.title = [
    innerWidth, root.scrollWidth, document.images.length, broken, Math.round(container.scrollLeft),
    Math.round(first.getBoundingClientRect().left - container.getBoundingClientRect().left),
    Math.round(document.images[0].width),
  ].join("|");
});
</script>"""


@pytest.mark.parametrize(("width", "columns", "scrolls"), [(1400, 2, False), (1400, 12, True), (400, 2, True)])
def test_browser_shows_the_page(chromium: str, tmp_path: Path, width: int, columns: int, scrolls: bool) -> None:
    runs = [
        add_run(tmp_path, str(number), IMAGES[:2], method=f"{number}_" + 40 * "m", **{"a/long/setting.of_all": 1e-3})
        for number in range(columns)
    ]
    drawn = page(tmp_path, *runs).replace(' loading="lazy"', "").replace("</body>", ASK + "</body>")
    dom = browse(chromium, tmp_path, drawn, width, "--dump-dom")
    title = re.search(r"<title>(\d+\|.*?)</title>", dom)
    assert title, "the page's script did not run"
    inner, scroll, images, broken, scrolled, first, side = map(int, title[1].split("|"))
    assert inner == width
    assert scroll <= width  # nothing makes the page scroll sideways
    assert (images, broken) == (2 * (columns + 1), 0)
    assert (scrolled > 0) == scrolls  # the table does, in its place
    assert first == 0  # and its first column stays
    assert 140 <= side <= 320
