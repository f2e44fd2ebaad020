"""python -m wsolkit.demo: the page as a visitor has it, in a browser, and what the command answers to bad input."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest
import requests

from wsolkit import Localizer
from wsolkit.demo import listen, main
from wsolkit.types import Exif

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CLASSES = 8
RANKED = 5


@dataclass
class Demo:
    """A page that is served, and the model behind it."""

    url: str
    localizer: Localizer
    examples: list[Path]
    runs: list[int] = field(default_factory=list)  # how many images each run of the network saw


@pytest.fixture(scope="module")
def demo(shapes_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    pytest.importorskip("gradio", reason="the extra 'demo' is not installed")
    import uvicorn

    folder = tmp_path_factory.mktemp("demo")
    examples = [folder / "wide.png", folder / "high.jpg"]
    save(examples[0], (130, 90), seed=1)
    save(examples[1], (60, 110), seed=2)
    localizer = Localizer.from_checkpoint(shapes_checkpoint, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        from wsolkit.serving.page import build_app

        with listen("127.0.0.1", 0) as listening:
            served = Demo(f"http://127.0.0.1:{listening.getsockname()[1]}", localizer, examples)
            patch.setattr(localizer, "_forward", counted(localizer._forward, served.runs))
            app = build_app(localizer, localizer.threshold, "largest", [Path(__file__), *examples])
            server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
            thread = threading.Thread(target=server.run, args=([listening],))
            thread.start()
            yield served
            server.should_exit = True
            thread.join(60)


def counted(forward: Any, runs: list[int]) -> Any:
    def run(batch: Any, *arguments: Any) -> Any:
        runs.append(len(batch["image"]))
        return forward(batch, *arguments)

    return run


def save(path: Path, size: tuple[int, int], seed: int = 0, mode: str = "RGB", **options: Any) -> Path:
    """Write an image of soft spots."""
    rng = np.random.default_rng(seed)
    image = PIL.Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)).resize(size)
    if mode == "I;16":
        image = PIL.Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(path, **options)
    return path


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, demo: Demo) -> Iterator[Any]:
    """Opens the page as another visitor; afterwards nothing may have gone wrong in the browser.

    Requests to other addresses than the page's fail, as they do without a network.
    """
    troubles: list[str] = []

    def opened(width: int = 1280) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900})
        context.set_default_timeout(20_000)
        page = context.new_page()

        def answer(route: Any) -> None:
            if route.request.url.startswith(f"{demo.url}/"):
                route.continue_()
            else:
                troubles.append(f"asked {route.request.url}")
                route.abort()

        page.route("**/*", answer)
        page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("response", lambda got: troubles.append(f"{got.status} {got.url}") if got.status >= 400 else None)
        page.goto(demo.url)
        page.get_by_label("Class").wait_for()
        return page

    yield opened
    for context in browser.contexts:
        context.close()
    assert not troubles


def drop(page: Page, path: Path) -> None:
    """Give the page an image and wait for what it finds."""
    if (clear := page.get_by_label("Clear", exact=True)).is_visible():
        clear.click()
        page.get_by_text("Drop an image").wait_for()
    page.locator("input[type=file]").set_input_files(path)
    page.locator(".boxes caption", has_text=path.name).or_(page.get_by_role("alert")).wait_for()


def boxes(page: Page) -> list[list[int]]:
    rows = page.locator(".boxes tbody tr").all()
    return [[int(cell) for cell in row.locator("td").all_inner_texts()] for row in rows]


def picture(page: Page, title: str) -> str:
    """What is in one of the pictures."""
    return page.locator(f'svg[aria-label^="{title}"] image').get_attribute("href") or ""


def set_threshold(page: Page, threshold: float) -> None:
    page.get_by_label("number input for Threshold τ").fill(str(threshold))
    page.get_by_label("number input for Threshold τ").press("Enter")
    page.locator(".boxes caption", has_text=f"τ = {threshold:g},").wait_for()


@pytest.mark.parametrize(("exif", "shape"), [("apply", (60, 40, 3)), ("ignore", (40, 60, 3))])
def test_photos_are_offered_as_the_model_sees_them(tmp_path: Path, exif: Exif, shape: tuple[int, ...]) -> None:
    pytest.importorskip("gradio", reason="the extra 'demo' is not installed")
    from wsolkit.serving.page import thumbnails

    noted = PIL.Image.Exif()
    noted[0x0112] = 6
    photo = save(tmp_path / "photo.jpg", (60, 40), exif=noted)
    assert [(picture.shape, path) for picture, path in thumbnails([Path(__file__), photo], exif)] == [(shape, photo)]


def test_visitor_sees_what_the_localizer_finds(visit: Any, demo: Demo) -> None:
    page, path = visit(), demo.examples[0]
    drop(page, path)
    ranked = demo.localizer(path, top_k=CLASSES)
    best = ranked[0]
    assert boxes(page) == best.boxes.tolist()
    assert page.get_by_label("Class").input_value() == f"{best.label} ({best.score:.1%})"
    for each in ranked[:RANKED]:
        assert f"{each.score:.0%}" in page.get_by_test_id(f"{each.label}-confidence-set").inner_text()
    assert page.locator("meter").count() == RANKED
    (x0, y0, x1, y1) = boxes(page)[0]
    drawn = page.locator('svg[aria-label^="Box"] > rect')
    assert [drawn.get_attribute(name) for name in ("x", "y", "width", "height")] == [
        str(value) for value in (x0, y0, x1 - x0 + 1, y1 - y0 + 1)
    ]

    # A threshold: other boxes and another mask of the same map, without the network.
    demo.runs.clear()
    before = picture(page, "Score map"), picture(page, "Mask")
    set_threshold(page, 0.7)
    raw = demo.localizer.raw_maps(path)[0]
    assert boxes(page) == demo.localizer.at_threshold(raw, 0.7).boxes.tolist()
    assert boxes(page) != best.boxes.tolist()
    assert picture(page, "Score map") == before[0]
    assert picture(page, "Mask") != before[1]
    page.get_by_label("all components").check()
    everything = demo.localizer.at_threshold(raw, 0.7, "all").boxes.tolist()
    page.locator(".boxes tbody tr").nth(len(everything) - 1).wait_for()
    assert boxes(page) == everything
    assert demo.runs == [1]  # of this test, for `raw`

    # A class beyond those shown: another map, with the same threshold.
    other = ranked[-1].label
    page.get_by_label("Class").click()
    page.get_by_role("option", name=other).click()
    page.get_by_role("heading", name=other).wait_for()
    assert picture(page, "Score map") != before[0]
    assert boxes(page) == demo.localizer(path, other, threshold=0.7, select="all").boxes.tolist()
    # One of those shown: a click on its probability does.
    page.get_by_test_id(f"{ranked[1].label}-confidence-set").click()
    page.get_by_role("heading", name=ranked[1].label).wait_for()
    assert page.get_by_label("Class").input_value().startswith(ranked[1].label)
    assert boxes(page) == demo.localizer(path, ranked[1].label, threshold=0.7, select="all").boxes.tolist()


def test_page_keeps_up_with_a_moving_slider(visit: Any, demo: Demo) -> None:
    """However many thresholds it passes by, what is shown in the end is that of the last one."""
    page, path = visit(), demo.examples[0]
    drop(page, path)
    slider = page.get_by_label("range slider for Threshold τ")
    place = slider.bounding_box()
    assert place is not None
    for end in (0.9, 0.2, 0.6):
        page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
        page.mouse.down()
        page.mouse.move(place["x"] + end * place["width"], place["y"] + place["height"] / 2, steps=40)
        page.mouse.up()
        threshold = float(slider.input_value())
        assert abs(threshold - end) < 0.05
        page.locator(".boxes caption", has_text=f"τ = {threshold:g},").wait_for()
        assert boxes(page) == demo.localizer(path, threshold=threshold).boxes.tolist()


def test_threshold_out_of_range_is_said_on_the_page(visit: Any, demo: Demo) -> None:
    page = visit()
    drop(page, demo.examples[0])
    page.get_by_label("number input for Threshold τ").fill("5")
    page.get_by_text("threshold=5: expected a number from 0 to less than 1").wait_for()
    set_threshold(page, 0.5)


def test_what_is_no_image_is_said_on_the_page(visit: Any, demo: Demo, tmp_path: Path) -> None:
    page = visit()
    for name, content in {
        "cut.jpg": demo.examples[1].read_bytes()[:300],
        "cut.png": demo.examples[0].read_bytes()[:300],
        "notes.txt": b"<b>no image",
        "empty.png": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        drop(page, tmp_path / name)
        said = page.get_by_role("alert").inner_text()
        assert said.startswith(f"{name} cannot be read as an image (")
        assert "uploads" not in said  # where it lies is nobody's business
        assert not page.locator(".boxes").is_visible()
    drop(page, demo.examples[0])
    assert boxes(page) == demo.localizer(demo.examples[0]).boxes.tolist()


def test_images_of_any_mode_and_size(visit: Any, demo: Demo, tmp_path: Path) -> None:
    page = visit()
    forms: dict[str, dict[str, Any]] = {
        "grey.png": {"mode": "L"},
        "deep.png": {"mode": "I;16"},
        "print.jpg": {"mode": "CMYK"},
        "palette.gif": {"mode": "P"},
        "clear.png": {"mode": "RGBA"},
        "scan.tif": {},
        "tiny.bmp": {"size": (1, 1)},
        "line.png": {"size": (3000, 2)},
    }
    for name, options in forms.items():
        path = save(tmp_path / name, **{"size": (50, 40), **options})
        drop(page, path)
        assert boxes(page) == demo.localizer(path).boxes.tolist()


def test_visitors_see_only_their_own_images(visit: Any, demo: Demo) -> None:
    first, second = visit(), visit()
    drop(first, demo.examples[0])
    drop(second, demo.examples[1])
    for page, path, threshold in ((first, demo.examples[0], 0.6), (second, demo.examples[1], 0.8)):
        set_threshold(page, threshold)
        assert boxes(page) == demo.localizer(path, threshold=threshold).boxes.tolist()
        assert path.name in page.locator(".boxes caption").inner_text()


@pytest.mark.parametrize("width", [1280, 400])
def test_page_fits_its_window(width: int, visit: Any, demo: Demo, tmp_path: Path) -> None:
    """Nothing makes it scroll sideways, all pictures are there, and every control has a name."""
    page = visit(width)
    page.get_by_label("Thumbnail 2 of 2").click()
    page.locator(".boxes caption", has_text=demo.examples[1].name).wait_for()
    assert boxes(page) == demo.localizer(demo.examples[1]).boxes.tolist()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for shown in (*page.locator(".pictures svg").all(), page.locator(".boxes table")):
        place = shown.bounding_box()
        assert place is not None
        assert place["x"] >= 0
        assert place["x"] + place["width"] <= width
        assert place["width"] > 200
    unnamed = page.locator("input, button, [role=slider], [role=combobox]").evaluate_all(
        "all => all.filter(e => e.checkVisibility() && !(e.ariaLabel || e.labels?.length || e.innerText.trim()))"
        ".map(e => e.outerHTML)"
    )
    assert unnamed == []
    page.screenshot(path=tmp_path / "page.png")
    pixels = np.array(PIL.Image.open(tmp_path / "page.png").convert("L"))
    assert 0.1 < (pixels < 250).mean() < 0.9


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def failing(*arguments: str) -> str:
    """The message of the command, in this process since starting one takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["wsolkit.demo", *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "0")  # put back afterwards: the command changes it
        with pytest.raises(SystemExit) as stopped:
            main()
    assert stopped.value.code not in (None, 0)
    return str(stopped.value.code)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "required and not given: checkpoint. Add checkpoint=…"),
        (["checkpoint=gone.ckpt"], "there is no checkpoint 'gone.ckpt'"),
        (["checkpoint={}", "port=99999"], "host=127.0.0.1, port=99999: the page cannot be served there ("),
        (["checkpoint={}", "port=soon"], "port='soon': Input should be a valid integer"),
        (["checkpoint={}", "host=203.0.113.1"], "host=203.0.113.1, port=7860: the page cannot be served there ("),
        (["checkpoint={}", "source=nowhere"], "source: there is no file or folder 'nowhere'"),
        (["checkpoint={}", "threshold=2"], "threshold=2: expected a number from 0 to less than 1"),
    ],
)
def test_wrong_calls_are_answered_with_one_message(
    settings: list[str], message: str, shapes_checkpoint: Path, capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    pytest.importorskip("gradio", reason="the extra 'demo' is not installed")
    said = failing(*(each.format(shapes_checkpoint) for each in settings)) + capsys.readouterr().err
    assert f"error: {message}" in said
    assert "Traceback" not in said
    assert not list(in_tmp.iterdir())


def test_port_that_is_taken_is_named(
    taken: int, shapes_checkpoint: Path, capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    pytest.importorskip("gradio", reason="the extra 'demo' is not installed")
    failing(f"checkpoint={shapes_checkpoint}", f"port={taken}", "device=cpu")
    expected = f"error: host=127.0.0.1, port={taken}: the page cannot be served there (Address already in use). port=0 "
    assert expected in capsys.readouterr().err


def test_missing_extra_is_named(
    shapes_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    monkeypatch.setattr("wsolkit.demo.find_spec", lambda name: None)
    failing(f"checkpoint={shapes_checkpoint}")
    assert capsys.readouterr().err == "error: the page needs another package: pip install 'wsolkit[demo]'\n"


def post(demo: Demo, path: str, meta: bool = False, **headers: str) -> requests.Response:
    """Ask for an image by the path that a request may name, without having uploaded it."""
    image = {"path": path} | ({"meta": {"_type": "gradio.FileData"}} if meta else {})
    content = {"data": [image, 0.3, "largest"], "fn_index": 0, "session_hash": "visitor"}
    return requests.post(f"{demo.url}/gradio_api/run/open_upload", json=content, headers=headers, timeout=60)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/zero", "EXAMPLE"])
def test_a_request_cannot_name_files_of_this_machine(demo: Demo, path: str, meta: bool) -> None:
    answer = post(demo, str(demo.examples[0]) if path == "EXAMPLE" else path, meta)
    assert answer.status_code == 403
    assert answer.text.endswith("was not uploaded here")


def test_other_sites_names_are_refused(demo: Demo) -> None:
    assert post(demo, "/etc/passwd", Host="evil.example").status_code == 421
    assert requests.get(demo.url, headers={"Host": "evil.example:80"}, timeout=60).status_code == 421
    assert requests.get(demo.url, timeout=60).status_code == 200


def test_a_visitor_costs_no_memory_of_the_size_of_the_image(demo: Demo, tmp_path: Path) -> None:
    from wsolkit.serving.page import Opened

    picture = np.zeros((3000, 2000, 3), np.uint8)
    opened = Opened(demo.localizer, lambda: picture, "large.png")
    held = [opened.small, *(raw.image for raw in opened._maps.values())]
    assert all(part.shape == (3000, 2000, 3) for part in held[1:])
    assert sum(part.nbytes for part in held if part.strides[-1]) < 3 * 2**20
    assert opened.find(next(iter(opened.ranked)), 0.3, "largest").score_map.shape == (3000, 2000)
