"""Names are text: whatever a class, an image, a folder or a setting is called, every output says it and stays whole."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.text import Text
from omegaconf import OmegaConf

from tests.fresh import command
from wsolkit import load_config
from wsolkit.data.benchmarks.folder import _share
from wsolkit.interop.coco import Source, prediction_files
from wsolkit.interop.score_maps import ScoreMaps
from wsolkit.localizer import Prediction
from wsolkit.metrics.evaluation import Outcome
from wsolkit.predict import _overlay_path
from wsolkit.reporting import figure, pictures
from wsolkit.reporting.charts import Shown
from wsolkit.reporting.examples import read_examples, write_examples
from wsolkit.reporting.figure import PlainFigure, fallback
from wsolkit.reporting.images import ImageRow
from wsolkit.reporting.overlay import prediction_figure
from wsolkit.reporting.page import write_page
from wsolkit.reporting.report import describe
from wsolkit.reporting.table import print_results, write_results
from wsolkit.reporting.terminal import PlainConsole, picture
from wsolkit.settings.compose import save_config
from wsolkit.settings.jobs import job_name
from wsolkit.sweep_report import write
from wsolkit.sweeps.charts import charts
from wsolkit.sweeps.comparison import comparison
from wsolkit.sweeps.tables import Run, Sweep, as_markdown, group_runs, markdown, means_csv, runs_csv
from wsolkit.system.names import AS_IN_FILES, file_name, one_line, readable, shortened
from wsolkit.train import train
from wsolkit.training import report

DOLLARS, MARKUP = "a_$x^$b", '[bold]red[/bold] & <b>"x"</b>'
NAMES = [
    *(
        DOLLARS,
        MARKUP,
        "_nolegend_",
        r"$\frac{1}{2}$ \alpha \$",
        ":smile: 100% %s {0} {x}",
        "</script><script>x()</script>",
    ),
    *("a\nb", "a\rb", "a\tb", "\x1b[31mred\x07\x00", "caf\udce9", "\ud800", "", " ", "two  spaces", "\u202eevil"),
    *(
        "数据集",
        "العربية",
        "नमस्ते",
        "e\u0301",
        "🐦\u200d⬛",
        "x" * 300,
        "语" * 200,
        "a/b",
        "..",
        "CON",
        "-rf",
        ".hidden",
    ),
    *('=1+1,"q"', "*a*|_b_ `c` [d](e) ~~f~~", "null", "1e3", "${oc.env:HOME}", "it's"),
]
METRIC = "maxboxacc/max_box_acc"


def shown(name: str) -> Shown:
    image = np.full((8, 8, 3), 99, np.uint8)
    box = np.array([[1, 1, 5, 5]])
    return Shown(name, image, np.full((8, 8), 0.5), box, box, name, NAMES[0], 0.5)


def sweep(x: list[str], lines: list[str], directory: Path | None = None) -> Sweep:
    runs = []
    for number, (value, line) in enumerate([(x[0], line) for line in lines] + [(value, lines[0]) for value in x[1:]]):
        settings = {"dataset": {"name": value}, "tag": line}
        overrides = {"dataset.name": value, "tag": line}
        runs.append(Run(f"job{number}", "finished", overrides, settings, {METRIC: 50.0 + number}))
        if directory is not None:
            write_examples(directory / f"job{number}", [shown(name) for name in NAMES], "maxboxacc", 0.5)
    return group_runs(runs, ["dataset.name", "tag"], [METRIC])


def texts(drawn: Figure) -> list[str]:
    """What a figure says once it is drawn."""
    drawn.savefig(io.BytesIO(), format="png", dpi=20)
    found = [text for text in drawn.findobj(Text) if text.get_text()]
    assert not any(text.get_usetex() or ("$" in text.get_text() and text.get_parse_math()) for text in found)
    return [text.get_text() for text in found]


class Cells(HTMLParser):
    """The texts of a page's elements of some kind, and the values of their attributes."""

    def __init__(self, page: str, tag: str) -> None:
        super().__init__()
        self.tag, self.open, self.texts, self.tags, self.alt = tag, False, list[str](), set[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.alt += [value or "" for name, value in attrs if name == "alt"]
        if tag == self.tag:
            self.open = True
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.open &= tag != self.tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[-1] += data


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [ImageRow(name, name, NAMES[0], 0.5, "correct", True) for name in NAMES]
    write_results(tmp_path, Outcome({METRIC: 50.0}, {}), NAMES, {"maxboxacc": rows})
    assert json.loads((tmp_path / "metrics.json").read_bytes())["class_names"] == NAMES
    with (tmp_path / "images.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        found = [row["image"] for row in csv.DictReader(file)]
    assert found == [name.replace("\ud800", "\ufffd") for name in NAMES]  # which no file can have


def test_examples_come_back_as_they_were(tmp_path: Path) -> None:
    write_examples(tmp_path, [shown(name) for name in NAMES], "maxboxacc", 0.5)
    examples = read_examples(tmp_path)
    assert [example.image for example in examples] == [example.label for example in examples] == NAMES
    assert (tmp_path / "examples" / "00_map.jpg").is_file()


def test_settings_come_back_as_they_were(tmp_path: Path) -> None:
    names = [name for name in NAMES if "${" not in name]
    save_config(OmegaConf.create({"names": names}), tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == {"names": names}


@pytest.mark.parametrize("name", NAMES)
def test_tables_in_the_terminal_say_names(name: str) -> None:
    output = io.StringIO()
    console = PlainConsole(file=output, width=2000)
    numbers = {METRIC: 50.0, "maxboxacc/threshold": 0.5}
    print_results(console, numbers, {"maxboxacc": "val"}, name, f"of {name}")
    console.print(f"Written to {name}", soft_wrap=True)
    printed = " ".join(output.getvalue().split())
    for line in readable(name).split("\n"):
        assert printed.count(" ".join(line.split())) >= 3
    assert "\x1b" not in output.getvalue()


def test_pictures_say_names() -> None:
    said = texts(pictures.draw_examples([shown(name) for name in NAMES], f"of {DOLLARS}"))
    assert f"of {DOLLARS}" in said
    labels = [text.split("\n")[0].partition(", taken for ")[0].strip("\u2068\u2069") for text in said if "IoU" in text]
    assert labels[:3] == [DOLLARS, MARKUP, "_nolegend_"]
    assert labels == [shortened(name, 64 if name == DOLLARS else 30).strip("\u2068\u2069") for name in NAMES]
    image, box = np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4), np.int64)
    for name in NAMES[:6]:
        assert shortened(name, 80) in ["", *texts(prediction_figure(image, np.zeros((4, 4)), box, name))]


def test_report_says_names(tmp_path: Path) -> None:
    for name in NAMES[:13]:
        report = describe(
            title=name,
            method=name,
            results={METRIC: 50.0},
            curves={"maxboxacc/per_class/gt_known_loc": [50.0] * len(NAMES)},
            class_names=NAMES,
            worst=[shown(name)],
            best=[],
            protocols={"maxboxacc": {name: name}},
            chosen_on={"maxboxacc": name},
            settings=yaml.safe_dump({"name": name}),
        )
        write_page(tmp_path / "report.html", report)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        heads = Cells(page, "th").texts
        assert heads[-len(NAMES) :] == list(map(readable, NAMES))
        assert readable(name) in Cells(page, "h1").texts
        figures, everything = Cells(page, "figcaption"), Cells(page, "pre")
        assert figures.texts[-1].startswith(readable(name))
        assert readable(name) in figures.alt[0]
        assert yaml.safe_load(everything.texts[0]) == {"name": name}
        assert len(Cells(page, "script").texts) == 1


def test_comparison_says_names(tmp_path: Path) -> None:
    page, problems = comparison(sweep([DOLLARS, MARKUP], NAMES[:2], tmp_path), tmp_path)
    assert page is not None
    assert not problems
    assert {DOLLARS, MARKUP} <= set(Cells(page, "th").texts)
    found = Cells(page, "b").texts
    assert all(readable(name) in found for name in NAMES)


def test_draws_by_name_take_any_name() -> None:
    for name in ("caf\udce9", "数据"):
        assert len(job_name([f"dataset.root={name}"])) < 120
        ids = [f"{name}/{place}.png" for place in range(4)]
        assert len(_share(ids, [0] * 4, [name], 0.5, evaluated=True)) == 2


def test_sweep_says_names(tmp_path: Path) -> None:
    swept = sweep(NAMES, NAMES[:8])
    figures = charts(swept, "dataset.name")
    (tmp_path / "out").mkdir()
    files, plots = write(swept, figures, None, tmp_path / "out")
    assert plots
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, *plots}
    for made, column in ((runs_csv, 2), (means_csv, 0)):
        rows = list(csv.reader(io.StringIO(made(swept), newline="")))[1:]
        assert {row[column] for row in rows} == set(NAMES)
    said = texts(figures["maxboxacc_max_box_acc_by_dataset.name"])
    legend = [text.get_text() for text in figures["maxboxacc_max_box_acc_by_dataset.name"].legends[0].get_texts()]
    assert sorted(legend) == sorted(shortened(name, 24) for name in NAMES[:8])
    assert {shortened(name, 24) for name in NAMES if name} <= set(said)
    report = markdown(swept)
    report.encode()
    assert "| \\*a\\*\\|\\_b\\_ \\`c\\` [d\\](e) \\~\\~f\\~\\~ |" in report
    assert len([line for line in report.splitlines() if line.startswith("| ")]) == 2 + len(swept.rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset.batch_size", "dataset.batch_size"),
        ("[16,4,4,4]", "[16,4,4,4]"),
        ("_a_ a_b", "\\_a\\_ a_b"),
        ("<b> & $x$", "\\<b> \\& \\$x\\$"),
        ("a\nb", "a b"),
    ],
)
def test_markdown_shows_text_as_it_is(text: str, expected: str) -> None:
    assert as_markdown(text) == expected


def test_charts_of_other_keys_have_files_of_their_own() -> None:
    names = ["数据", "分类", "x" * 300, "x" * 301]
    runs = [Run(str(n), "finished", dict.fromkeys(names, n), {"a": 1}, {METRIC: float(n)}) for n in range(2)]
    made = charts(group_runs(runs, names, [METRIC]))
    assert len(made) == 4
    assert all(len(name.encode()) < 250 for name in made)


def test_predictions_come_back_as_they_were(tmp_path: Path) -> None:
    box, regions = np.array([[0, 0, 1, 1]]), np.zeros((3, 3), np.int32)
    regions[:2, :2] = 1
    found = Prediction.__new__(Prediction)
    for field, value in {
        "label_index": 0,
        "score": 0.5,
        "boxes": box,
        "regions": regions,
        "score_map": np.zeros((3, 3)),
    }.items():
        object.__setattr__(found, field, value)
    sources = [Source(name, [1, 2], None) for name in NAMES]
    for _ in range(2):  # the second time, from what the first has left
        with prediction_files(tmp_path, NAMES, {"source": DOLLARS, "exif": "apply"}) as files:
            missing = files.missing(sources, lambda name: True)
            files.add((sources[place], [found]) for place in missing)
            assert files.write(sources, {NAMES[-1]: MARKUP}) == len(NAMES) - 1
    assert not missing
    content = json.loads((tmp_path / "pseudo_labels.json").read_bytes())
    assert [image["file_name"] for image in content["images"]] == NAMES[:-1]
    assert [category["name"] for category in content["categories"]] == NAMES
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        read = [row["file_name"] for row in csv.DictReader(file)]
    assert read == [name.replace("\ud800", "\ufffd") for name in NAMES[:-1]]


@pytest.mark.parametrize("name", ["a.png", "f/" + "x" * 255, "f/" + "语" * 85, "f/caf\udce9" + "y" * 251, "-", "a.b"])
def test_files_named_after_images(name: str, tmp_path: Path) -> None:
    maps = ScoreMaps(tmp_path)
    maps.write(name, np.full((2, 2), 0.5, np.float32))
    assert maps.read(name, [(2, 2)]).max() == 0.5
    path = _overlay_path(tmp_path, name)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert path.suffix == ".jpg"


def test_long_names_stay_apart() -> None:
    assert len({file_name("x" * 300 + end, ".npy") for end in ("a", "b", "")}) == 3
    assert file_name("folder/" + "x" * 251, ".npy") == "folder/" + "x" * 251 + ".npy"


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("abc", 3, "abc"),
        ("abcdefgh", 5, "ab…gh"),
        ("abcdefgh", 4, "ab…h"),
        ("数据集很大", 6, "数…大"),
        ("a\r\nb\x1b", 9, "a↵b\ufffd"),
        ("e\u0301" * 5, 5, "e\u0301" * 5),
    ],
)
def test_text_is_shortened_by_its_width(text: str, width: int, expected: str) -> None:
    assert shortened(text, width) == expected


def test_every_name_can_be_written() -> None:
    for name in NAMES:
        readable(name).encode()
        assert "\n" not in one_line(name)
    assert "caf\udce9 \ud800".encode(errors=AS_IN_FILES) == b"caf\xe9 \xef\xbf\xbd"


def test_characters_are_drawn_in_a_font_that_has_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figure, "_chosen", {})
    monkeypatch.setattr(
        figure, "_installed", lambda: [("A", np.array([1, 2])), ("B", np.array([2, 3, 4])), ("C", np.array([3]))]
    )
    assert fallback("\1\2\3\4") == ["A", "B"]
    assert fallback("\3") == ["B"]
    assert not capsys.readouterr().err
    assert fallback("\5") == fallback("\6\5") == []
    assert capsys.readouterr().err.count("warning: no installed font has") == 1


def test_fonts_that_are_installed_help_out(recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]) -> None:
    drawn = PlainFigure()
    text = drawn.text(0.5, 0.5, "数据集 " + chr(0x10FFFD))
    drawn.savefig(io.BytesIO(), format="png")
    known = {family for family, codes in figure._installed() if ord("数") in codes}
    assert bool(known) == bool(known & set(text.get_fontfamily()))
    assert not [one for one in recwarn if "Glyph" in str(one.message)]
    assert capfd.readouterr().err.count("\n") <= 1
    assert unicodedata.category(chr(0x10FFFD)) == "Co"


def test_numbers_on_a_logarithmic_axis_are_plain() -> None:
    runs = [Run(str(n), "finished", {"lr": 10.0**-n}, {"lr": 10.0**-n}, {METRIC: float(n)}) for n in range(12)]
    (drawn,) = charts(group_runs(runs, ["lr"], [METRIC])).values()
    assert not any("$" in text for text in texts(drawn))
    assert "1e-10" in texts(drawn)


def failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no picture\ntoday")


def test_what_a_failing_picture_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"half")
    with picture(tmp_path / "a.png"):
        failing()
    assert not (tmp_path / "a.png").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "warning: a.png cannot be drawn (RuntimeError: no picture↵today): it is left out, and the results are complete"
    )


@pytest.mark.report
def test_pictures_that_fail_cost_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("draw_examples", "show"):
        monkeypatch.setattr(pictures, name, failing)
    monkeypatch.setattr(report, "write_inside", failing)
    monkeypatch.setattr("wsolkit.reporting.page._svg", failing)
    cfg = load_config(
        *("method=cam", "dataset.records.sizes={train: 16, val: 8, test: 8}", "dataset.batch_size=8", "trainer=smoke"),
        *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
    )
    results = train(cfg, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["top1_cls"] == results["top1_cls"]
    assert (tmp_path / "images.csv").is_file()
    assert "<h2>Results</h2>" in (tmp_path / "report.html").read_text()
    printed = capsys.readouterr()
    assert "top1" in printed.out.lower() or "Top-1" in printed.out
    missing = [line.split(" cannot be drawn (RuntimeError: no picture↵today)")[0] for line in printed.err.splitlines()]
    assert {"warning: inside.png", "warning: the examples", "warning: chart 'Threshold' of report.html"} <= set(missing)


def test_training_on_classes_of_any_name(tmp_path: Path) -> None:
    root, classes = tmp_path / "数据 $a^$ [b]", sorted([DOLLARS, '[bold]red[b] & <b>"x"<', "数据集\n_"])
    rng = np.random.default_rng(0)
    files = ["$a^$ {0}.png", '[red]"q" & <i>.png', "x" * 251 + ".png", "caf\udce9.png"]
    for split in ("train", "val"):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for file in files:
                pixels = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
                pixels[8:20, 8:20, label] = 255
                PIL.Image.fromarray(pixels).save(root / split / name / file)
    names = [f"val/{name}/{file}" for name in classes for file in sorted(files)]
    annotations = {
        "images": [{"id": n, "file_name": name, "width": 32, "height": 32} for n, name in enumerate(names)],
        "annotations": [
            {"image_id": n, "category_id": n // len(files), "bbox": [8, 8, 12, 12]} for n in range(len(names))
        ],
        "categories": [{"id": label, "name": name} for label, name in enumerate(classes)],
    }
    (root / "val.json").write_text(json.dumps(annotations), encoding="utf-8")
    done = command(
        "train",
        *("method=ts_cam", "backbone=vit_micro", "dataset=folder", "dataset.image_size=32", "dataset.batch_size=4"),
        *("trainer=smoke", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "num_examples=4"),
        *(
            "dataset.num_workers=0",
            "logger=[wandb,tensorboard]",
            "dataset.annotations=val.json",
            f"dataset.root='{root}'",
            "hydra.run.dir=run",
        ),
        cwd=tmp_path,
        report=True,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.replace("warning: no installed font", "")
    assert json.loads((tmp_path / "run" / "metrics.json").read_bytes())["class_names"] == classes
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert set(classes) <= set(Cells(page, "th").texts)
    assert set(map(readable, names)) >= set(Cells(page, "small").texts) > set()
    with (tmp_path / "run" / "images.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as table:
        listed = [(row["image"], row["label"]) for row in csv.DictReader(table) if row["protocol"] == "maxboxacc"]
    assert listed == [(name, classes[n // len(files)]) for n, name in enumerate(names)]
    assert (tmp_path / "run" / "examples.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_bytes())["dataset"]["root"] == str(root)
    assert {example.label for example in read_examples(tmp_path / "run")} <= set(classes)
