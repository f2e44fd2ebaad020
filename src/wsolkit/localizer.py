"""A trained model at work: images in, boxes, masks, classes and scores out.

    localizer = wsolkit.Localizer.from_checkpoint("best.ckpt")
    found = localizer("bird.jpg")
    found.label, found.score, found.boxes, found.mask, found.score_map
    found.plot().savefig("bird.png")

Boxes are those that an evaluation under the same protocol draws, carried over to the pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args, overload

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor

from wsolkit.data.classes import class_label
from wsolkit.errors import CheckpointError, ConfigError, DataError
from wsolkit.system.names import shortened
from wsolkit.types import Boxes, EvaluationBatch, Exif, Image, Select

# What takes long to import comes when it is used, so that `from wsolkit import Localizer` is quick.
if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from omegaconf import DictConfig

    from wsolkit.checkpoint import Checkpoint
    from wsolkit.data.dataset import WSOLDataset
    from wsolkit.data.records import Records
    from wsolkit.localization.boxes import Levels
    from wsolkit.methods.base import WSOLModule


class BinaryFile(Protocol):
    """A file that is open for reading in binary mode, or what stands for one, such as an upload."""

    def read(self) -> bytes:
        """What is left to read."""


ImageLike = str | Path | bytes | bytearray | memoryview | BinaryFile | PIL.Image.Image | npt.NDArray[Any] | Tensor
"""An image comes as

- the path of a file;
- what a file holds: bytes, or a file that is open in binary mode, which is read from where it stands;
- a PIL image in any mode;
- pixels: an array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W]. C is 1, 3 or 4, and the last of 4 channels is
  opacity, which is left out. They are uint8, uint16, bool, or floating point from 0 to 1: see
  wsolkit/data/decoding.py.
"""

_FORMS = "a path, bytes, a file that is open in binary mode, a PIL image, an array or a tensor"

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

_BATCH_SIZE = 32
_MAX_SIDE = 32767
_LONGEST = 200  # characters of a path in an error


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """Where an image shows a class, in pixels of that image as it was read: upright, unless the localizer ignores EXIF.

    label, label_index: name and number of the class; score: its probability, in [0, 1]; boxes [n, 4]: x0, y0, x1, y1,
    both corners inside, n = 0 where nothing is above the threshold; score_map [H, W] in [0, 1]; regions [H, W]: 0
    outside, i + 1 in the object of box i; threshold: τ of the boxes; image [H, W, 3], None if it was not kept.
    """

    label: str
    label_index: int
    score: float
    boxes: Boxes
    score_map: npt.NDArray[np.float32]
    regions: npt.NDArray[np.int32]
    threshold: float
    image: Image | None

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Where the objects are: bool [H, W]."""
        return self.regions > 0

    def plot(self) -> Figure:
        """The image, and the same under the score map with boxes, side by side."""
        from wsolkit.reporting.overlay import prediction_figure

        title = f"{self.label}, {self.score:.2f}"
        return prediction_figure(self.image, self.score_map, self.boxes, title)

    def __repr__(self) -> str:
        height, width = self.score_map.shape
        boxes = self.boxes.tolist()
        return f"Prediction(label={self.label!r}, score={self.score:.3f}, boxes={boxes}, size={width}×{height})"


@dataclass(frozen=True, eq=False, repr=False)
class RawMap:
    """What the network makes of an image for one class: all that boxes at any threshold are drawn from.

    label, label_index, score: as in `Prediction`; raw [h, w]: the score map at the network's resolution; image
    [H, W, 3].
    """

    label: str
    label_index: int
    score: float
    raw: Tensor
    image: Image


class Localizer:
    """A trained model that finds the object of a class in images.

    Attributes:
        class_names: by label.
        method, backbone: their names.
        protocol, rules: name and rules of the evaluation by which maps become boxes.
        threshold: τ of the boxes, unless a call gives another. Validation may have selected another for given classes
            than for predicted ones: this is that of predicted ones, and each prediction says its own.
        threshold_origin: where it comes from: "protocol": the paper says it; "validation": it was best there;
            "default": validation had no boxes to select one by, and 0.3 is taken.
        image_size: side of the network's input; mean, std: by which it is normalised.
        metrics: numbers of the last validation before the checkpoint was written, in percent.
        version: of wsolkit, which wrote the checkpoint.
        device: on which the network is.
        exif: "apply": files and PIL images are turned upright, as their EXIF orientation says; "ignore": they are read
            as they are stored. It may be changed.

    >>> from wsolkit import Localizer
    >>> localizer = Localizer.from_checkpoint("best.ckpt", device="cpu")
    >>> found = localizer("photo.png")
    >>> found.label in localizer.class_names, found.boxes.shape, found.mask.shape
    (True, (1, 4), (48, 64))
    >>> first, second = localizer("photo.png", top_k=2, threshold=0.5)
    >>> first.score >= second.score
    True
    """

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str = "auto",
        protocol: str | None = None,
        precision: Precision = "32-true",
        exif: Exif | None = None,
        config_dir: str | Path | None = None,
    ) -> Localizer:
        """Build the model of a checkpoint of `python -m wsolkit.train`; nothing that is in it is executed.

        Args:
            path: of the checkpoint.
            device: "auto": a GPU if there is one; or PyTorch's name, such as "cpu" or "cuda:1".
            protocol: by whose rules maps become boxes, see conf/protocol; None: the first one of its training.
            precision: as Lightning has it.
            exif: see the attribute; None: "apply", unless the model was trained with dataset.exif=ignore.
            config_dir: the folder of your own YAML files that the model was trained with, as `--config-dir` named it.
                What they name as a `_target_` runs, so name a folder that you trust.

        Raises:
            CheckpointError: it cannot be read, or its model cannot be built. ConfigError: a setting is wrong.
        """
        from wsolkit.checkpoint import read_checkpoint
        from wsolkit.settings.compose import load_config
        from wsolkit.settings.conf import CONF
        from wsolkit.settings.restore import check_known, restore
        from wsolkit.system.libraries import quieten_libraries

        checkpoint = read_checkpoint(path)
        names = checkpoint.names()
        of_model = {group: name for group, name in names.items() if group != "dataset"}
        check_known(checkpoint.path, of_model, config_dir, 'config_dir="FOLDER"')
        groups = [f"{group}={name}" for group, name in names.items()]
        if not (CONF / "dataset" / f"{names['dataset']}.yaml").is_file():  # one's own, of which nothing is read
            groups += ["dataset=folder", "dataset.root=."]
        cfg = load_config(*groups, f"protocol=[{protocol or checkpoint.protocol}]", config_dir=config_dir)
        quieten_libraries()
        return cls(restore(cfg, checkpoint, (), protocols=True), checkpoint, device, precision, exif)

    def __init__(
        self, cfg: DictConfig, checkpoint: Checkpoint, device: str, precision: Precision, exif: Exif | None = None
    ) -> None:
        """Build the model of restored settings; `from_checkpoint` is for everybody else."""
        from wsolkit.build import build_model, build_protocols
        from wsolkit.data.transforms import Transform

        self.class_names = checkpoint.class_names
        self._path = checkpoint.path
        self.method, self.backbone = str(cfg.method.name), str(cfg.backbone.name)
        self.protocol, self.rules = next(iter(build_protocols(cfg).items()))
        self.metrics, self.version = dict(checkpoint.metrics), checkpoint.version
        self.image_size: int = cfg.dataset.image_size
        self.device = _device(device)
        self.exif = _exif(exif, checkpoint)
        self._module = _loaded(build_model(cfg, self.class_names), checkpoint).to(self.device)
        settings = self._module.description
        self.mean, self.std = tuple(settings.mean), tuple(settings.std)
        fixed, conditions = self.rules.threshold, ("gt_known_loc", "gt_known_loc_predicted_class")
        selected = {condition: checkpoint.thresholds.get(f"{self.protocol}/{condition}") for condition in conditions}
        self._thresholds = selected if fixed is None else dict.fromkeys(conditions, fixed)
        self._autocast = _autocast(precision, self.device)
        self._transform = Transform(self.image_size, self.image_size, False, self.mean, self.std)
        self._uncropped = None
        self._ten_crop = self.rules.classification == "ten_crop"
        if self.rules.input != "resize" or self._ten_crop:
            self._uncropped = Transform(cfg.dataset.resize, cfg.dataset.resize, False, self.mean, self.std)

    @property
    def module(self) -> WSOLModule:
        """The model itself, for a look inside: its `network`, its `localize`, its `inside`."""
        return self._module

    @property
    def threshold(self) -> float:
        """See the class."""
        return used_threshold(self, None, given=False)

    @property
    def threshold_origin(self) -> Literal["protocol", "validation", "default"]:
        """See the class."""
        if self.rules.threshold is not None:
            return "protocol"
        return "default" if self._thresholds["gt_known_loc_predicted_class"] is None else "validation"

    def __repr__(self) -> str:
        return (
            f"Localizer(method={self.method}, backbone={self.backbone}, classes={len(self.class_names)}, "
            f"protocol={self.protocol}, threshold={self.threshold}, device={self.device}, wsolkit={self.version})"
        )

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a path is a sequence of strings too
        self,
        images: ImageLike,
        classes: str | int | None = None,
        *,
        top_k: None = None,
        threshold: float | None = None,
        select: Select = "largest",
    ) -> Prediction: ...

    @overload
    def __call__(
        self,
        images: Sequence[ImageLike],
        classes: str | int | Sequence[str | int] | None = None,
        *,
        top_k: None = None,
        threshold: float | None = None,
        select: Select = "largest",
    ) -> list[Prediction]: ...

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, images: ImageLike, *, top_k: int, threshold: float | None = None, select: Select = "largest"
    ) -> list[Prediction]: ...

    @overload
    def __call__(
        self, images: Sequence[ImageLike], *, top_k: int, threshold: float | None = None, select: Select = "largest"
    ) -> list[list[Prediction]]: ...

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        classes: str | int | Sequence[str | int] | None = None,
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        select: Select = "largest",
    ) -> Prediction | list[Prediction] | list[list[Prediction]]:
        """Find the object in an image, or in each of a list.

        Args:
            images: one, or a list; see `ImageLike`.
            classes: names or numbers of the classes to look for: one for all images, or one for each; a name goes
                before a number; None: the predicted ones.
            top_k: the most probable classes of each image, as a list, the most probable one first.
            threshold: τ in [0, 1); None: that of the protocol or the checkpoint, see `threshold`.
            select: one box, or one around each component above the threshold.

        Returns:
            a `Prediction`; for a list of images a list; with `top_k` a list for each image.

        Raises:
            DataError: an image cannot be read. ConfigError: another argument is wrong. CheckpointError: the network
                gives logits or score maps that are not finite.
        """
        from wsolkit.data.dataset import evaluation_batch

        single = _is_one(images)
        given = cast("list[ImageLike]", [images] if single else list(cast("Sequence[ImageLike]", images)))
        labels = None if classes is None else self._labels(classes, len(given))
        if labels is not None and top_k is not None:
            raise ConfigError("top_k chooses classes by their probability: it does not go with given classes")
        found: list[list[Prediction]] = []
        for start in range(0, len(given), _BATCH_SIZE):
            chosen = slice(start, start + _BATCH_SIZE)
            pictures = [
                as_rgb(image, self.exif, "an image" if single else f"image {place} of those given")
                for place, image in enumerate(given[chosen], start)
            ]
            dataset = samples(self, _Pictures(self.class_names, pictures))
            batch = evaluation_batch([dataset[0, index] for index in range(len(pictures))])
            part = None if labels is None else labels[chosen]
            found += predictions(self, batch, part, top_k or 1, threshold, select, pictures)
        self._check_finite(bool(of_image) for of_image in found)
        results = found if top_k is not None else [each[0] for each in found]
        return results[0] if single else results

    def raw_maps(self, image: ImageLike, classes: Sequence[str | int] | None = None, top_k: int = 1) -> list[RawMap]:
        """Run the network on an image, and leave the boxes to `at_threshold`.

        Args:
            classes: names or numbers of the classes to look for; None: the `top_k` most probable ones, in this order.

        Raises:
            DataError: the image cannot be read. ConfigError: another argument is wrong.
        """
        labels = None if classes is None else [class_label(self.class_names, name) for name in classes]
        return raw_maps_of_labels(self, image, labels, top_k)

    def at_threshold(self, found: RawMap, threshold: float | None = None, select: Select = "largest") -> Prediction:
        """What a map of `raw_maps` holds above a threshold; see `__call__`."""
        check_request(self, 1, select)
        tau = used_threshold(self, threshold, given=False)
        height, width = found.image.shape[:2]
        (drawn,) = self._maps_and_levels(found.raw[None, None], [(width, height)], tau)
        return self._prediction(*drawn, found.label_index, found.score, width, height, tau, select, found.image)

    def _forward(
        self, batch: EvaluationBatch, labels: Sequence[Sequence[int]] | None, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classes [B, K], given or the most probable, their probabilities [B, K], and raw score maps [B, K, h, w]."""
        from wsolkit.localization.inputs import network_input, ten_crop_probabilities

        weights = next(self._module.parameters())
        uncropped = None if batch["uncropped"] is None else batch["uncropped"].to(weights)
        batch = {**batch, "image": batch["image"].to(weights), "uncropped": uncropped}
        image, _ = network_input(batch, self.rules.input)
        with torch.inference_mode(), self._autocast:
            pooled = ten_crop_probabilities(batch, self._module) if self._ten_crop else None

            def classes_of(logits: Tensor) -> Tensor:
                if labels is not None:
                    return torch.tensor(labels, device=logits.device)
                return (logits if pooled is None else pooled).topk(top_k, dim=1).indices

            logits, maps = self._module.localize(image, classes_of)
            probabilities = logits.float().softmax(dim=1) if pooled is None else pooled
            classes = classes_of(logits)
            return classes.cpu(), probabilities.gather(1, classes).cpu(), maps

    def _maps_and_levels(
        self, raw: Tensor, sizes: Sequence[tuple[int, int]], tau: float
    ) -> Iterator[tuple[npt.NDArray[np.float32], Levels]]:
        """Localization maps, and their levels at τ, of raw maps [B, K, h, w], of image after image."""
        rules, at = self.rules, np.array([tau])
        parts: Iterable[tuple[Tensor, tuple[int, int] | None]] = [(raw.flatten(0, 1), None)]
        if rules.frame == "original":
            parts = ((maps, (height, width)) for maps, (width, height) in zip(raw, sizes, strict=True))
        for maps, size in parts:
            if size is not None and max(size) > _MAX_SIDE:
                raise DataError(
                    f"an image of {size[1]}×{size[0]} pixels: protocol {self.protocol} draws boxes at the image's "
                    f"size, up to {_MAX_SIDE} pixels a side; choose another protocol"
                )
            with torch.inference_mode():
                score_maps = rules.localization_maps(maps, size)
                levels = rules.levels(score_maps, at)
            yield from zip(score_maps.cpu().numpy(), levels, strict=True)

    def _prediction(
        self,
        score_map: npt.NDArray[np.float32],
        levels: Levels,
        label: int,
        score: float,
        width: int,
        height: int,
        tau: float,
        select: Select,
        image: Image | None,
    ) -> Prediction:
        """What a localization map holds above τ, in pixels of its image."""
        from wsolkit.localization.boxes import regions

        found = regions(levels, self.rules.box_rule, select)
        score_map, carried = self.rules.on_image(score_map, found, width, height)
        return Prediction(
            label=self.class_names[label],
            label_index=label,
            score=score,
            boxes=carried.boxes,
            score_map=score_map.clip(0, 1),
            regions=carried.labels,
            threshold=tau,
            image=image,
        )

    def _check_finite(self, finite: Iterable[bool]) -> None:
        for place, fine in enumerate(finite):
            if not fine:
                raise CheckpointError(
                    f"the network of '{self._path}' gives logits or score maps that are not finite for image "
                    f"{place} of those given: try precision='32-true', or another checkpoint"
                )

    def _labels(self, classes: str | int | Sequence[str | int], count: int) -> list[int]:
        if isinstance(classes, str | int):
            return [class_label(self.class_names, classes)] * count
        if len(classes) != count:
            raise ConfigError(f"{len(classes)} classes for {count} images: give one for all, or one for each")
        return [class_label(self.class_names, name) for name in classes]


def samples(localizer: Localizer, records: Records) -> WSOLDataset:
    """Samples of images, transformed as the evaluation of a localizer's model does."""
    from wsolkit.data.dataset import WSOLDataset

    return WSOLDataset(records, localizer._transform, 0, localizer._uncropped)


def predictions(
    localizer: Localizer,
    batch: EvaluationBatch,
    labels: Sequence[int] | None,
    top_k: int,
    threshold: float | None,
    select: Select,
    images: Sequence[Image] | None = None,
) -> Iterator[list[Prediction]]:
    """Predictions of a batch of `samples`, image by image, so that few large maps are in memory at a time.

    There are none for an image whose logits or score maps are not finite.

    Args:
        labels: whose maps, one for each image; None: of the `top_k` most probable classes.
        threshold, select: see `Localizer.__call__`.
        images: kept in the predictions.
    """
    check_request(localizer, top_k, select)
    tau = used_threshold(localizer, threshold, given=labels is not None)
    given = None if labels is None else [[label] for label in labels]
    classes, scores, raw = localizer._forward(batch, given, top_k)
    sizes = batch["size"].tolist()
    found = localizer._maps_and_levels(raw, sizes, tau)
    finite = (raw.isfinite().flatten(1).all(dim=1).cpu() & scores.isfinite().all(dim=1)).tolist()
    for row, (width, height) in enumerate(sizes):
        picture = None if images is None else images[row]
        each = zip(classes[row].tolist(), scores[row].tolist(), strict=True)
        drawn = [localizer._prediction(*next(found), *one, width, height, tau, select, picture) for one in each]
        yield drawn if finite[row] else []


def raw_maps_of_labels(
    localizer: Localizer, image: ImageLike, labels: Sequence[int] | None, top_k: int = 1
) -> list[RawMap]:
    """`Localizer.raw_maps` of classes that are given as labels, whatever they are called."""
    from wsolkit.data.dataset import evaluation_batch

    check_request(localizer, top_k, "largest")
    picture = as_rgb(image, localizer.exif)
    batch = evaluation_batch([samples(localizer, _Pictures(localizer.class_names, [picture]))[0, 0]])
    given = None if labels is None else [labels]
    found = localizer._forward(batch, given, top_k)
    localizer._check_finite([bool(found[1].isfinite().all() and found[2].isfinite().all())])
    chosen = zip(*(of_image[0] for of_image in found), strict=True)
    return [
        RawMap(localizer.class_names[label], int(label), float(score), raw, picture) for label, score, raw in chosen
    ]


def check_request(localizer: Localizer, top_k: int, select: Select) -> None:
    """Check what a localizer is asked for.

    Raises:
        ConfigError: it is not to be had.
    """
    count = len(localizer.class_names)
    if not 1 <= top_k <= count:
        raise ConfigError(f"top_k={top_k}: expected 1 to {count}, the number of classes")
    if select not in get_args(Select):
        raise ConfigError(f"select={select!r}: expected 'largest' or 'all'")


def used_threshold(localizer: Localizer, threshold: float | None, given: bool) -> float:
    """The threshold τ that a localizer draws boxes at, on the protocol's grid where the grid has it.

    Args:
        threshold: the user's; None: the localizer's own.
        given: whether classes are given, not predicted: validation may have selected another τ for these.

    Raises:
        ConfigError: it is not in [0, 1).
    """
    from wsolkit.localization.protocol import UNKNOWN_THRESHOLD

    if threshold is None:
        threshold = localizer._thresholds.get("gt_known_loc" if given else "gt_known_loc_predicted_class")
    if threshold is None:
        threshold = UNKNOWN_THRESHOLD
    if not 0 <= threshold < 1:
        raise ConfigError(f"threshold={threshold}: expected a number from 0 to less than 1")
    place = localizer.rules.index_of(threshold)
    return threshold if place is None else float(localizer.rules.thresholds[place])


@dataclass(frozen=True)
class _Pictures:
    """Images in memory, as records."""

    classes: Sequence[str]
    pictures: Sequence[Image]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return np.zeros(len(self.pictures), np.int64)

    def name(self, index: int) -> str:
        return str(index)

    def source(self, index: int) -> None:
        return None

    def image(self, index: int) -> Image:
        return self.pictures[index]

    def boxes(self, index: int) -> Boxes:
        return np.zeros((0, 4), np.int64)

    def size(self, index: int) -> None:
        return None

    def mask(self, index: int) -> None:
        return None


def _is_one(images: object) -> bool:
    """Whether something is meant as one image: it is in a form of `ImageLike`, or it is no series of images."""
    form = (str, Path, bytes, bytearray, memoryview, PIL.Image.Image, np.ndarray, Tensor, Mapping)
    return isinstance(images, form) or hasattr(images, "read") or not isinstance(images, Iterable)


def as_rgb(image: ImageLike, exif: Exif, what: str = "an image") -> Image:
    """Pixels [H, W, 3] uint8 of an image in any of the forms of `ImageLike`.

    Args:
        what: names an image in errors that has no path.

    Raises:
        DataError: it cannot be read, or is in none of them.
    """
    from wsolkit.data.decoding import decoding, rgb, to_8_bits
    from wsolkit.data.records import decode_image

    if isinstance(image, str | Path):
        path = Path(image)
        _check_file(path)
        return decode_image(path, exif, f"image '{path}'")
    if hasattr(image, "read"):
        image = _content(image, what)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_image(bytes(image), exif, what)
    with decoding(what):
        if isinstance(image, PIL.Image.Image):
            return rgb(image, exif, what)
        if not hasattr(image, "__array__"):
            raise DataError(f"{what} came as {type(image).__name__}: expected {_FORMS}; several images go in a list")
        pixels = _array(image) if isinstance(image, Tensor) else np.asarray(image)
    if isinstance(image, Tensor) and pixels.ndim == 3:
        pixels = np.moveaxis(pixels, 0, -1)  # [C, H, W] → [H, W, C]
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        kind, form = ("a tensor", "[C, H, W]") if isinstance(image, Tensor) else ("an array", "[H, W, C]")
        raise DataError(
            f"{what} came as {kind} of shape {tuple(np.shape(image))}: expected [H, W] or {form} with C = 1, 3 or "
            "4; several images go in a list"
        )
    levels = to_8_bits(pixels[..., :3], f"{what} came as")
    return np.ascontiguousarray(np.broadcast_to(levels, (*levels.shape[:2], 3)))


def _check_file(path: Path) -> None:
    try:
        there, is_folder = path.exists(), path.is_dir()
    except OSError:  # the name is too long for a file: encoded pixels, perhaps
        there = is_folder = False
    if is_folder:
        raise DataError(f"image '{path}' is a folder: expected an image file; give its images as a list of paths")
    if not there:
        raise DataError(
            f"image '{shortened(str(path), _LONGEST)}' does not exist: expected the path of an image file; a relative "
            f"one begins in '{Path.cwd()}'"
        )


def _content(file: BinaryFile, what: str) -> bytes:
    """What a file holds, from where it stands."""
    from wsolkit.data.decoding import decoding

    with decoding(what):
        content: object = file.read()
    if not isinstance(content, bytes | bytearray | memoryview):
        raise DataError(
            f"{what} came as a file whose read() gives {type(content).__name__}: expected bytes. Open a file with "
            "mode 'rb'; of a file that is to be awaited, give the bytes"
        )
    if not content:
        raise DataError(f"{what} came as a file with nothing left to read: go back to its beginning with seek(0)")
    return bytes(content)


def _array(image: Tensor) -> npt.NDArray[Any]:
    pixels = image.detach().cpu()
    half = pixels.is_floating_point() and pixels.itemsize < 4  # numpy has no bfloat16
    return np.asarray(pixels.float() if half else pixels)


def _loaded(module: WSOLModule, checkpoint: Checkpoint) -> WSOLModule:
    """A module with a checkpoint's weights, for inference."""
    checkpoint.load_into(module)
    return module.eval().requires_grad_(False)


def _device(name: str) -> torch.device:
    if name == "auto":
        gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return gpu or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device={name}: not to be had here ({reason}); expected auto, cpu, cuda, cuda:1, mps, …"
        ) from error
    return device


def _exif(given: Exif | None, checkpoint: Checkpoint) -> Exif:
    if given not in (None, *get_args(Exif)):
        raise ConfigError(f"exif={given!r}: expected one of {', '.join(get_args(Exif))}")
    return given or ("ignore" if checkpoint.config["dataset"].get("exif") == "ignore" else "apply")


def _autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    if precision not in get_args(Precision):
        raise ConfigError(f"precision={precision!r}: expected one of {', '.join(get_args(Precision))}")
    if precision == "32-true":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16-mixed" else torch.float16)
