"""Build the page of `python -m wsolkit.demo` with its controls. It needs Gradio."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from html import escape
from itertools import islice
from pathlib import Path

import gradio as gr
import numpy as np
import PIL.Image
from fastapi import FastAPI
from gradio.utils import get_upload_folder

from wsolkit.data.classes import repeated
from wsolkit.data.records import read_image
from wsolkit.errors import DataError, WsolkitError
from wsolkit.localizer import Localizer, Prediction, RawMap, raw_maps_of_labels
from wsolkit.reporting.charts import PREDICTED, jpeg
from wsolkit.reporting.overlay import overlay
from wsolkit.serving.uploads import MAX_BYTES, KnownHosts, OnlyUploads, Uploads
from wsolkit.system.names import readable
from wsolkit.types import Exif, Image, Select

_RANKED = 5
_EXAMPLES = 24
_THUMBNAIL = 160
_MAX_SIDE = 1024  # The browser gets pictures of this size at most.
_KEPT = 3600
"""Seconds after which uploaded files, and the images of visitors who left, are forgotten."""

_WELCOME = '<p class="note">Drop an image, and what the model finds in it appears here.</p>'

_STYLE = f"""
.pictures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: 16px; }}
.pictures figure {{ margin: 0; min-width: 0; }}
.pictures svg {{ display: block; width: 100%; max-height: 75vh; overflow: visible; }}
.pictures rect {{ fill: none; stroke: {PREDICTED}; stroke-width: 2.5px; vector-effect: non-scaling-stroke; }}
.pictures .rim rect {{ stroke: white; stroke-width: 5px; }}
.pictures figcaption {{ margin-top: 6px; text-align: center; }}
.boxes {{ max-height: 340px; overflow: auto; }}
.boxes table {{ width: 100%; margin: 0; font-variant-numeric: tabular-nums; }}
.boxes caption {{ text-align: left; padding-bottom: 8px; }}
.boxes th, .boxes td {{ padding: 4px 10px; text-align: right; }}
.note, .error {{ padding: 12px 16px; border-radius: 6px; background: var(--background-fill-secondary); }}
.error {{ background: var(--error-background-fill); color: var(--error-text-color); overflow-wrap: anywhere; }}
.examples .grid-wrap {{ height: auto; min-height: 0; max-height: none; padding-top: 24px; }}
.examples .caption-label {{ display: none; }}
.examples .grid-container {{ grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); }}
"""

_network = threading.Lock()  # One image at a time goes through the network.


class Opened:
    """An image that a visitor looks at, and the maps of the classes that were looked for in it so far.

    It keeps a small picture. The image itself is read again when it is needed.

    Args:
        localizer: finds the objects.
        read: reads the image, [H, W, 3].
        name: the name of the image.

    Attributes:
        ranked: the most probable classes and their probabilities, by label.
    """

    def __init__(self, localizer: Localizer, read: Callable[[], Image], name: str) -> None:
        self._localizer, self._read, self.name = localizer, read, name
        image = read()
        with _network:
            found = localizer.raw_maps(image, top_k=min(_RANKED, len(localizer.class_names)))
        self._maps = {raw.label_index: _without_pixels(raw) for raw in found}
        self.ranked = {raw.label_index: raw.score for raw in found}
        small = PIL.Image.fromarray(image)
        small.thumbnail((_MAX_SIDE, _MAX_SIDE))
        self.small: Image = np.asarray(small)

    def find(self, label: int, threshold: float | None, select: Select) -> Prediction:
        """Find where the image shows a class. Only a new class needs the network."""
        if label not in self._maps:
            with _network:
                (raw,) = raw_maps_of_labels(self._localizer, self._read(), [label])
            self._maps[label] = _without_pixels(raw)
        return self._localizer.at_threshold(self._maps[label], threshold, select)


def _without_pixels(raw: RawMap) -> RawMap:
    """Return a map with an image that has the right shape but takes no memory."""
    return replace(raw, image=np.broadcast_to(np.uint8(0), raw.image.shape))


def build_app(
    localizer: Localizer,
    threshold: float,
    select: Select,
    examples: Sequence[Path],
    host: str = "127.0.0.1",
    hosts: Sequence[str] = (),
) -> FastAPI:
    """Build the app that answers the browser. It loads nothing from elsewhere, and keeps no record of the images.

    Close its `state.uploads` in the end.

    Args:
        localizer, threshold, select, examples: see `build_page`.
        host, hosts: the address of the page, and its other names, see `KnownHosts`.
    """
    uploads = Uploads(Path(get_upload_folder()), localizer.exif)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400")
    page = build_page(localizer, threshold, select, examples, uploads)
    app = FastAPI()
    app.add_middleware(OnlyUploads, uploads=uploads)
    app.add_middleware(KnownHosts, host=host, others=hosts)
    app.state.uploads = uploads
    look = {"footer_links": [], "run_history": False, "ssr_mode": False, "theme": theme, "css": _STYLE}
    return gr.mount_gradio_app(app, page, path="/", max_file_size=MAX_BYTES, **look)


def build_page(
    localizer: Localizer, threshold: float, select: Select, examples: Sequence[Path], uploads: Uploads
) -> gr.Blocks:
    """Build the page.

    Args:
        localizer: finds the objects.
        threshold, select: the values at the start.
        examples: images to choose from. The page shows the first ones that can be read.
        uploads: reads what visitors upload.
    """
    names = unlike(list(map(readable, localizer.class_names)))
    offered = list(islice(thumbnails(examples, localizer.exif), _EXAMPLES))

    def choices(ranked: dict[int, float]) -> list[tuple[str, int]]:
        """List all classes, with the most probable ones first."""
        probable = [(f"{names[label]} ({score:.1%})", label) for label, score in ranked.items()]
        return probable + [(name, label) for label, name in enumerate(names) if label not in ranked]

    def show(opened: Opened | None, label: int | None, threshold: float | None, select: Select) -> tuple[str, str]:
        """Return the pictures and the boxes."""
        if opened is None or label is None:
            return _WELCOME, ""
        try:
            found = opened.find(label, threshold, select)
        except WsolkitError as error:
            return message(str(error)), ""
        return pictures(opened.small, found), boxes(opened.name, found)

    def open_upload(path: str | None, threshold: float | None, select: Select) -> tuple[object, ...]:
        return open_image(path, uploads.read, threshold, select)

    def open_image(
        path: str | None, read: Callable[[Path], Image], threshold: float | None, select: Select
    ) -> tuple[object, ...]:
        """Return the opened image, classes, probabilities, pictures and boxes."""
        nothing = None, gr.Dropdown(choices({}), value=None), None
        if path is None:
            return *nothing, _WELCOME, ""
        name = readable(Path(path).name)
        try:
            opened = Opened(localizer, partial(read, Path(path)), name)
        except DataError as error:
            reason = str(error).replace(str(Path(path).resolve()), name).replace(path, name)
            return *nothing, message(f"{name} cannot be read as an image ({reason})"), ""
        except WsolkitError as error:
            return *nothing, message(str(error)), ""
        best = next(iter(opened.ranked))
        probabilities = {names[label]: score for label, score in opened.ranked.items()}
        classes = gr.Dropdown(choices(opened.ranked), value=best)
        return opened, classes, probabilities, *show(opened, best, threshold, select)

    def show_class(
        chosen: gr.SelectData, opened: Opened | None, threshold: float | None, select: Select
    ) -> tuple[int, str, str]:
        """Return the class, the pictures and the boxes."""
        label = names.index(chosen.value)
        return label, *show(opened, label, threshold, select)

    def open_example(chosen: gr.SelectData, threshold: float | None, select: Select) -> tuple[object, ...]:
        return None, *open_image(str(offered[chosen.index][1]), uploads.decode, threshold, select)

    with gr.Blocks(title="wsolkit", analytics_enabled=False, delete_cache=(_KEPT, _KEPT), fill_width=True) as page:
        model = f"{localizer.method} on {localizer.backbone}, {len(names)} classes; boxes as in {localizer.protocol}"
        gr.HTML(f"<h1>wsolkit</h1><p>{escape(model)}</p>")
        opened = gr.State(None, time_to_live=_KEPT)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                file = gr.File(label="Image", height=140)
                classes = gr.Dropdown(choices({}), value=None, label="Class", info="The most probable ones come first.")
                step = 1 / localizer.rules.num_thresholds
                selected = localizer.threshold_origin != "default"
                own = f"The model's own is {localizer.threshold:g}." if selected else "None was selected in validation."
                tau = gr.Slider(0, 1 - step, threshold, step=step, label="Threshold τ", info=own)
                tau.preprocess = lambda typed: typed  # `show` answers a value out of range, instead of a traceback.
                parts = gr.Radio(
                    [("largest component", "largest"), ("all components", "all")], value=select, label="Boxes around"
                )
            with gr.Column(scale=3, min_width=300):
                pictured = gr.HTML(_WELCOME)
                with gr.Row():
                    with gr.Column(min_width=280):
                        listed = gr.HTML()
                    with gr.Column(min_width=280):
                        probabilities = gr.Label(label="Probabilities", num_top_classes=_RANKED, show_heading=False)
                if offered:
                    gallery = gr.Gallery(
                        [(picture, readable(path.name)) for picture, path in offered],
                        label="Examples",
                        allow_preview=False,
                        buttons=[],
                        elem_classes="examples",
                    )
        outputs = [opened, classes, probabilities, pictured, listed]
        # A slider gives many events. While the page handles one, it keeps only the last of those after it. Gradio's
        # queue is for slow work, and sometimes loses the answer to a quick event.
        on = partial(gr.on, trigger_mode="always_last", show_progress="hidden", queue=False)
        on([file.upload, file.clear], open_upload, [file, tau, parts], outputs)
        on([classes.input, tau.input, parts.input], show, [opened, classes, tau, parts], [pictured, listed])
        on(probabilities.select, show_class, [opened, tau, parts], [classes, pictured, listed])
        if offered:
            on(gallery.select, open_example, [tau, parts], [file, *outputs])
    return page


def unlike(names: Sequence[str]) -> list[str]:
    """Return names of classes, with a number where several are the same, since the page needs unique names."""
    several = set(repeated(names))
    return [f"{name} (number {label})" if name in several else name for label, name in enumerate(names)]


def thumbnails(paths: Sequence[Path], exif: Exif) -> Iterator[tuple[Image, Path]]:
    """Yield small pictures of the images that can be read."""
    for path in paths:
        with suppress(Exception):  # Decoders raise all kinds of errors on broken files.
            picture = PIL.Image.fromarray(read_image(path, exif))
            picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
            yield np.asarray(picture), path


def message(text: str) -> str:
    """Return a message about an error, as HTML."""
    return f'<p class="error" role="alert">{escape(readable(text))}</p>'


def pictures(image: Image, found: Prediction) -> str:
    """Return the image, the image under its score map, and the image with the mask, each with boxes, as HTML.

    Args:
        image: [h, w, 3], with the proportions of the original.
        found: the prediction.
    """
    height, width = found.score_map.shape
    mask = PIL.Image.fromarray(found.mask).resize(image.shape[1::-1], PIL.Image.Resampling.NEAREST)
    drawn = {
        "Box": image,
        "Score map": overlay(image, found.score_map, found.boxes[:0]),
        "Mask": np.where(np.asarray(mask)[..., None], image, image // 4),
    }
    rectangles = "".join(
        f'<rect x="{x0}" y="{y0}" width="{x1 - x0 + 1}" height="{y1 - y0 + 1}"/>' for x0, y0, x1, y1 in found.boxes
    )
    label = escape(f"{readable(found.label)} ({found.score:.1%})")
    figures = "".join(
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{title} of {label}">'
        f'<image href="data:image/jpeg;base64,{base64.b64encode(jpeg(picture)).decode()}" width="{width}" '
        f'height="{height}" preserveAspectRatio="none"/><g class="rim">{rectangles}</g>{rectangles}</svg>'
        f"<figcaption>{title}</figcaption></figure>"
        for title, picture in drawn.items()
    )
    return f'<h2>{label}</h2><div class="pictures">{figures}</div>'


def boxes(name: str, found: Prediction) -> str:
    """Return a table of the boxes in an image, as HTML."""
    height, width = found.score_map.shape
    count = f"{len(found.boxes)} box{'' if len(found.boxes) == 1 else 'es'}"
    head = "".join(f'<th scope="col">{corner}</th>' for corner in ("x0", "y0", "x1", "y1"))
    rows = "".join(f"<tr>{''.join(f'<td>{value}</td>' for value in box)}</tr>" for box in found.boxes.tolist())
    return (
        f'<div class="boxes" tabindex="0"><table><caption>{count} above τ = {found.threshold:g}, in pixels of '
        f"{escape(readable(name))} ({width}×{height}), both corners inside</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )
