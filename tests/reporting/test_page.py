"""The report page: what it shows, what it leaves out, and that a browser agrees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import PIL.Image
import pytest
from markupsafe import escape

from tests.conftest import browse
from wsolkit.reporting.charts import Shown, charts, example_image
from wsolkit.reporting.page import write_page
from wsolkit.reporting.report import describe

BASELINES = ("center_box", "gaussian", "full_image")
HOSTILE = '<script>alert("x")</script> & <b>'


class Report(TypedDict):
    title: str
    method: str
    results: dict[str, float]
    curves: dict[str, Sequence[Any]]
    class_names: Sequence[str]
    worst: Sequence[Shown]
    best: Sequence[Shown]
    protocols: dict[str, dict[str, object]]
    chosen_on: dict[str, str]
    settings: str


def box_numbers(protocol: str, classes: int) -> tuple[dict[str, float], dict[str, Sequence[Any]]]:
    """Results and curves of an evaluation with boxes: curves that rise to a peak and fall, as real ones do."""
    rng = np.random.default_rng(0)
    tau = np.arange(1000) / 1000

    def hump(height: float, peak: float, start: float) -> np.ndarray[Any, Any]:
        return np.where(
            tau < peak,
            start + (height - start) * np.sin(np.pi * tau / peak / 2),
            height * np.cos(np.pi / 2 * (tau - peak) / (1 - peak)),
        )

    curves: dict[str, Sequence[Any]] = {
        "curves/threshold": tau.tolist(),
        "curves/gt_known_loc_30": hump(96.3, 0.21, 83).tolist(),
        "curves/gt_known_loc_50": hump(87.7, 0.24, 42).tolist(),
        "curves/gt_known_loc_70": hump(61.2, 0.31, 11).tolist(),
        "center_box/curves/gt_known_loc_50": hump(59.1, 0.15, 42).tolist(),
        "gaussian/curves/gt_known_loc_50": hump(59.3, 0.45, 42).tolist(),
        "full_image/curves/gt_known_loc_50": [42.0] * 1000,
        "iou_histogram": np.histogram(rng.beta(5, 2.2, 5794), 100, (0, 1))[0].tolist(),
        "per_class/images": [30] * (classes - 1) + [0],
        "per_class/top1_cls": [*rng.uniform(50, 100, classes - 1), None],
        "per_class/gt_known_loc": [*rng.uniform(20, 100, classes - 1), float("nan")],
        "per_class/top1_loc": [*rng.uniform(10, 50, classes - 1), None],
    }
    results = {
        **{"gt_known_loc": 87.654, "gt_known_loc_predicted_class": 85.2, "top1_loc": 71.3, "top5_loc": 83.9},
        **{"max_box_acc": 87.7, "max_box_acc_30": 96.3, "max_box_acc_50": 87.7, "max_box_acc_70": 61.2},
        **{"max_box_acc_v2": 81.7, "threshold": 0.237, "iou_median": 71.2, "iou_median_correct": 74.9},
        **{
            "error_correct": 71.3,
            "error_cls": 19.7,
            "error_m_ins": 0.4,
            "error_part": 3.1,
            "error_more": 5.2,
            "error_other": 0.3,
        },
    }
    for name in BASELINES:
        results |= {f"{name}/max_box_acc": 59.1, f"{name}/max_box_acc_v2": 55.5, f"{name}/threshold": 0.151}
    return {f"{protocol}/{k}": v for k, v in results.items()}, {f"{protocol}/{k}": v for k, v in curves.items()}


def mask_numbers(protocol: str) -> tuple[dict[str, float], dict[str, Sequence[Any]]]:
    """Results and curves of an evaluation with masks."""
    rng = np.random.default_rng(1)
    t = np.linspace(0, 255, 1000)
    sizes, ious = rng.beta(1.6, 4, 5794), rng.beta(5, 3, 5794)
    curves: dict[str, Sequence[Any]] = {
        "curves/pixel_threshold": t.tolist(),
        "curves/pixel_iou": (22 + 46.4 * np.exp(-(((t - 91) / 70) ** 2))).tolist(),
        "curves/recall": (100 * (1 - t / 255)).tolist(),
        "curves/precision": (22 + 75 * (t / 255) ** 0.4).tolist(),
        "mask_iou_by_size": np.histogram2d(sizes, ious, 20, ((0, 1), (0, 1)))[0].tolist(),
    }
    results = {"pxap": 74.44, "peak_iou": 68.4, "peak_threshold": 91.0}
    results |= {f"{name}/{key}": 40.0 for name in BASELINES for key in ("pxap", "peak_iou")}
    return {f"{protocol}/{k}": v for k, v in results.items()}, {f"{protocol}/{k}": v for k, v in curves.items()}


def shown(name: str, iou: float, predicted_label: str | None = "Laysan Albatross") -> Shown:
    y, x = np.mgrid[:56, :56]
    image = np.stack([x * 4, y * 4, 255 - x * 4], axis=2).astype(np.uint8)
    score_map = np.exp(-((x - 30) ** 2 + (y - 20) ** 2) / 200)
    truth, predicted = np.array([[10, 5, 40, 45]]), np.array([[18, 8, 42, 32]])
    return Shown(name, image, score_map, truth, predicted, "Black-footed Albatross", predicted_label, iou)


def report(classes: int = 12, kinds: str = "boxes masks", protocols: Sequence[str] = ("maxboxacc", "sat")) -> Report:
    results: dict[str, float] = {"top1_cls": 80.12, "top5_cls": 94.6}
    curves: dict[str, Sequence[Any]] = {}
    for protocol in protocols:
        for kind, numbers in (("boxes", box_numbers(protocol, classes)), ("masks", mask_numbers(protocol))):
            if kind in kinds:
                results |= numbers[0]
                curves |= numbers[1]
    return {
        "title": "SCM on CUB-200-2011, test",
        "method": "SCM",
        "results": results,
        "curves": curves,
        "class_names": [f"{i:03d}.Class_{i}" for i in range(classes)],
        "worst": [shown(f"birds/{i:04d}.jpg", 0.05 + i / 30) for i in range(6)],
        "best": [shown(f"birds/{i:04d}.jpg", 0.97 - i / 90, "Black-footed Albatross") for i in range(6)],
        "protocols": {
            name: {"resolution": 224, "interpolation": "bicubic", "select": select, "iou_thresholds": [0.3, 0.5, 0.7]}
            for name, select in (("maxboxacc", "largest"), ("sat", "all"))
        },
        "chosen_on": {"maxboxacc": "val", "sat": "fixed"},
        "settings": "method:\n  _target_: wsolkit.methods.scm.SCM\n  num_blocks: 4\n",
    }


NOTHING: Report = {
    "title": "An empty run",
    "method": "SCM",
    "results": {},
    "curves": {},
    "class_names": [],
    "worst": [],
    "best": [],
    "protocols": {},
    "chosen_on": {},
    "settings": "",
}


def written(folder: Path, data: Report) -> str:
    write_page(folder / "report.html", describe(**data))
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of `report()`."""
    return written(tmp_path_factory.mktemp("page"), report())


class Tags(HTMLParser):
    """Collects ids, and tags that are not closed in the order they were opened."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr", "wbr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)


@pytest.mark.parametrize("data", [report(), report(kinds="boxes"), report(kinds="masks"), NOTHING])
def test_page_is_well_formed(tmp_path: Path, data: Report) -> None:
    tags = Tags(written(tmp_path, data))
    assert tags.open == []
    assert tags.wrong == []
    assert len(tags.ids) == len(set(tags.ids))


def test_every_reference_inside_the_page_has_a_target(page: str) -> None:
    referenced = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page))
    assert referenced <= set(Tags(page).ids)
    assert len(referenced) > 10


def test_page_needs_nothing_else(page: str) -> None:
    assert set(re.findall(r"https?://[^\"'\s<>]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    sources = re.findall(r"""(?:src|href)=["'](?!#)(.{20})""", page)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert "<link" not in page
    assert "@import" not in page


def test_main_table_holds_the_numbers(page: str) -> None:
    table = re.search(r'<table class="results">.*?</table>', page, re.DOTALL)
    assert table
    method, _, baseline, *_ = re.findall(r'<tr class="(?:method|baseline)">(.*?)</tr>', table[0])
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", method)
    assert cells == [
        "SCM",
        "0.237",
        "val",
        "80.1",
        "94.6",
        "87.7",
        "85.2",
        "71.3",
        "83.9",
        "87.7",
        "81.7",
        "74.4",
        "68.4",
    ]
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", baseline)
    assert cells == ["center box", "0.151", *["–"] * 7, "59.1", "55.5", "40.0", "40.0"]


def test_baselines_on_which_protocols_agree_are_listed_once(tmp_path: Path) -> None:
    page = written(tmp_path, report())
    assert page.count('<tr class="baseline">') == len(BASELINES)
    assert "baselines under maxboxacc and sat" in page
    data = report()
    data["results"] |= {"sat/center_box/max_box_acc": 12.3}
    page = written(tmp_path, data)
    assert page.count('<tr class="baseline">') == 2 * len(BASELINES)
    assert "baselines under" not in page


def test_without_ground_truth_classification_is_said_once(tmp_path: Path) -> None:
    data = NOTHING.copy()
    classified = {"top1_cls": 43.8, "top5_cls": 100.0}
    data["results"] = classified | {f"{name}/{key}": value for name in ("a", "b") for key, value in classified.items()}
    data["protocols"] = {"a": {"select": "largest"}, "b": {"select": "all"}}
    data["worst"] = [shown("x.jpg", float("nan"))._replace(truth=np.zeros((0, 4), np.int64))]
    page = written(tmp_path, data)
    assert re.findall(r"<td>(.*?)</td>", page) == ["43.8", "100.0"]
    assert Tags(page).headings == ["Results", "Gallery", "Worst"]
    assert "IoU" not in page
    assert "ground truth" not in page


def test_a_protocol_may_classify_and_choose_thresholds_in_its_own_way(tmp_path: Path) -> None:
    data = report()
    data["results"] |= {"sat/top1_cls": 91.2, "sat/threshold_top1_loc": 0.3}
    page = written(tmp_path, data)
    first, second = re.findall(r'<tr class="method">(.*?)</tr>', page)
    assert "<td>80.1</td>" in first
    assert "<td>91.2</td>" in second
    assert "Under sat each Loc has its own τ" in page


def test_text_from_data_is_escaped(tmp_path: Path) -> None:
    data = report()
    data["title"] = data["method"] = data["settings"] = HOSTILE
    data["class_names"] = [HOSTILE] * 12
    data["worst"] = [shown(HOSTILE, 0.1, HOSTILE)._replace(label=HOSTILE)]
    data["protocols"] = {"maxboxacc": {HOSTILE: HOSTILE}}
    data["chosen_on"] = {"maxboxacc": HOSTILE}
    page = written(tmp_path, data)
    assert "<script>alert" not in page
    assert page.count("<script>") == 1
    assert page.count(escape(HOSTILE)) > 20


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("boxes masks", {"threshold", "iou", "errors", "size", "pixels"}),
        ("boxes", {"threshold", "iou", "errors"}),
        ("masks", {"size", "pixels"}),
        ("", set()),
    ],
)
def test_charts_without_data_are_left_out(kinds: str, expected: set[str]) -> None:
    data = report(kinds=kinds)
    drawn = charts(data["results"], data["curves"])
    assert set(drawn) == {f"{protocol}/{name}" for protocol in ("maxboxacc", "sat") for name in expected}


def test_sections_without_data_are_left_out(tmp_path: Path, page: str) -> None:
    everything = ["Results", "Protocol maxboxacc", "Protocol sat", "Gallery", "Worst", "Best", "Classes", "Settings"]
    assert Tags(page).headings == everything
    masks_only = written(tmp_path, report(kinds="masks"))
    assert "Classes" not in Tags(masks_only).headings
    assert "MaxBoxAcc" not in masks_only
    assert "There is nothing to show" in written(tmp_path, NOTHING)


def test_classification_alone_is_shown(tmp_path: Path) -> None:
    page = written(tmp_path, report(protocols=()))
    assert Tags(page).headings == ["Results", "Gallery", "Worst", "Best", "Settings"]
    assert "<td>80.1</td><td>94.6</td>" in page


def test_any_number_may_be_missing(tmp_path: Path) -> None:
    data = report(protocols=("maxboxacc",))
    results = data["results"]
    data["curves"], data["worst"], data["best"] = {}, [], []
    for missing in results:
        data["results"] = {key: value for key, value in results.items() if key != missing}
        written(tmp_path, data)


def test_any_curve_may_be_missing() -> None:
    curves = report(protocols=("maxboxacc",))["curves"]
    for missing in curves:
        charts({}, {key: values for key, values in curves.items() if key != missing})


def test_numbers_that_are_not_numbers_are_left_out(tmp_path: Path) -> None:
    data = report()
    data["results"] = dict.fromkeys(data["results"], float("nan"))
    data["curves"] = {key: [None] * len(values) for key, values in data["curves"].items()}
    assert Tags(written(tmp_path, data)).headings == [
        "Protocol maxboxacc",
        "Protocol sat",
        "Gallery",
        "Worst",
        "Best",
        "Settings",
    ]


def test_classes_start_with_the_worst_and_fold_when_there_are_many(tmp_path: Path) -> None:
    few, many = (written(tmp_path, report(classes, "boxes", ["maxboxacc"])) for classes in (30, 31))
    assert few.count("<details open>") == 1
    assert "<details open>" not in many
    table = re.search(r'<table class="classes">.*?</table>', few, re.DOTALL)
    assert table
    known = [
        cells[2] for row in re.findall(r"<tr>(.*?)</tr>", table[0]) if (cells := re.findall(r"<td>(.*?)</td>", row))
    ]
    assert known[-1] == "–"
    assert [float(value) for value in known[:-1]] == sorted(float(value) for value in known[:-1])


def test_boxes_are_drawn_where_they_lie() -> None:
    blank = np.zeros((8, 8, 3), np.uint8)
    truth, nothing = np.array([[0, 0, 3, 7]]), np.zeros((0, 4), np.int64)  # the left half
    picture = example_image(Shown("x", blank, np.zeros((8, 8)), truth, nothing, "a", None, 0.0), side=80)
    assert picture.shape == (80, 164, 3)
    for left in (0, 84):  # the plain image, and the one under the score map
        rows, columns = np.nonzero((picture[:, left : left + 80] == [0, 224, 0]).all(axis=2))
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 79, 0, 39)


# --- in a browser -----------------------------------------------------------------------------------------------------


# What the page says of itself goes into the outer title, which is part of the dumped DOM. All of it is said before the
# page's load event ends, and the outer page's own load event, after which the DOM is dumped, waits for that.
ASK = """<script>
addEventListener("load", () => {
  const column = () => [...document.querySelector("table.classes").tBodies[0].rows].map(row => row.cells[2].textContent);
  const head = document.querySelectorAll("table.classes th button")[2];
  head.click();
  const rising = column().join(" ");
  head.click();
  const root = document.documentElement;
  const broken = [...document.images].filter(image => !image.naturalWidth).length;
  parent.document.title = [
    innerWidth, root.scrollWidth, document.images.length, broken, rising, column().join(" "),
    head.parentElement.getAttribute("aria-sort"),
  ].join("|");
});
</script>"""


@pytest.mark.parametrize("width", [1400, 400])
def test_browser_shows_the_page(chromium: str, tmp_path: Path, page: str, width: int) -> None:
    page = page.replace(' loading="lazy"', "").replace("</body>", ASK + "</body>")
    dom = browse(chromium, tmp_path, page, width, "--dump-dom")
    title = re.search(r"<title>(\d+\|.*?)</title>", dom)
    assert title, "the page's script did not run"
    inner, scroll, images, broken, rising, falling, direction = title[1].split("|")
    assert int(inner) == width
    assert int(scroll) <= width  # nothing makes the page scroll sideways
    assert (int(images), int(broken)) == (12, 0)
    top1 = [float(value) for value in rising.split()[:-1]]
    assert top1 == sorted(top1)
    assert falling.split() == [*reversed(rising.split()[:-1]), "–"]  # classes without images stay last
    assert direction == "descending"


def test_screenshot_is_not_blank(chromium: str, tmp_path: Path, page: str) -> None:
    picture = tmp_path / "page.png"
    browse(chromium, tmp_path, page, 1400, f"--screenshot={picture}")
    pixels = np.array(PIL.Image.open(picture).convert("L"))[:3000]
    assert 0.02 < (pixels < 250).mean() < 0.9
