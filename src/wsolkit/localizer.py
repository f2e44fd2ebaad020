"""Localize objects with a trained model: from images to boxes, masks, classes and scores.

    localizer = wsolkit.Localizer.from_checkpoint("best.ckpt")
    found = localizer("bird.jpg")
    found.label, found.score, found.boxes, found.mask, found.score_map
    found.plot().savefig("bird.png")

The boxes are the same that an evaluation under the same protocol draws, in pixels of the original image.
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

# Slow imports come when they are used, so that `from wsolkit import Localizer` is quick.
if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from omegaconf import DictConfig

    from wsolkit.checkpoint import Checkpoint
    from wsolkit.data.dataset import WSOLDataset
    from wsolkit.data.records import Records
    from wsolkit.localization.boxes import Levels
    from wsolkit.methods.base import WSOLModule


class BinaryFile(Protocol):
    """A file that is open for reading in binary mode, or an object with the same method, for example an upload."""

    def read(self) -> bytes:
        """Return what is left to read."""


ImageLike = str | Path | bytes | bytearray | memoryview | BinaryFile | PIL.Image.Image | npt.NDArray[Any] | Tensor
"""An image in one of these forms:

- the path of a file;
- the content of a file: bytes, or a file that is open in binary mode and is read from its current position;
- a PIL image in any mode;
- pixels: an array [H, W] or [H, W, C], or a tensor [H, W] or [C, H, W]. C is 1, 3 or 4. The last of 4 channels is
  opacity, and is ignored. The type is uint8, uint16, bool, or floating point from 0 to 1, see
  wsolkit/data/decoding.py.
"""

_FORMS = "a path, bytes, a file that is open in binary mode, a PIL image, an array or a tensor"

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

_BATCH_SIZE = 32
_MAX_SIDE = 32767
_LONGEST = 200  # An error shows this many characters of a path.


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """Where an image shows a class, in pixels of the image as it was read. That is upright, unless EXIF is ignored.

    label, label_index: the name and the number of the class; score: its probability, in [0, 1]; boxes [n, 4]: x0, y0,
    x1, y1 with both corners inside, n = 0 if nothing is above the threshold; score_map [H, W]: in [0, 1]; regions [H,
    W]: 0 outside, i + 1 in the object of box i; threshold: the τ of the boxes; image [H, W, 3]: None if it was not
    kept.
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
        """Return the mask of the objects, bool [H, W]."""
        return self.regions > 0

    def plot(self) -> Figure:
        """Draw the image beside the same image under the score map with boxes."""
        from wsolkit.reporting.overlay import prediction_figure

        title = f"{self.label}, {self.score:.2f}"
        return prediction_figure(self.image, self.score_map, self.boxes, title)

    def __repr__(self) -> str:
        height, width = self.score_map.shape
        boxes = self.boxes.tolist()
        return f"Prediction(label={self.label!r}, score={self.score:.3f}, boxes={boxes}, size={width}×{height})"


@dataclass(frozen=True, eq=False, repr=False)
class RawMap:
    """The network's result for an image and one class, from which boxes at any threshold can be drawn.

    label, label_index, score: as in `Prediction`; raw [h, w]: the score map at the network's resolution; image [H, W,
    3].
    """

    label: str
    label_index: int
    score: float
    raw: Tensor
    image: Image


class Localizer:
    """A trained model that finds the object of a class in images.

    Attributes:
        class_names: the names of the classes by label.
        method, backbone: their names.
        protocol, rules: the name and the rules of the evaluation that turns maps into boxes.
        threshold: the τ of the boxes, unless a call gives another one. Validation may have selected different values
            for given and for predicted classes. This is the one for predicted classes. Each prediction has the one it
            used.
        threshold_origin: the origin of the threshold: "protocol" if the paper states it, "validation" if it was best
            there, "maps" if validation had no boxes and the maps alone gave it, see `wsolkit.metrics.map_values`, or
            "default" for 0.3, if there was no validation.
        image_size: the side length of the network's input in training.
        mean, std: the normalisation of the network's input.
        metrics: the numbers of the last validation before the checkpoint was written, in percent.
        version: the version of wsolkit that wrote the checkpoint.
        device: the device of the network.
        exif: "apply" turns files and PIL images upright, as their EXIF orientation says. "ignore" reads them as they
            are stored. You may change it.

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
        """Build the model of a checkpoint of `python -m wsolkit.train`, without running any code in it.

        Args:
            path: the path of the checkpoint.
            device: "auto" takes a GPU if there is one. Otherwise, PyTorch's name, for example "cpu" or "cuda:1".
            protocol: the protocol that turns maps into boxes, see conf/protocol. None takes the first one of the
                training.
            precision: as in Lightning.
            exif: see the attribute. None means "apply", unless the model was trained with dataset.exif=ignore.
            config_dir: the folder of your own YAML files that the model was trained with, as for `--config-dir`. Code
                that they name as a `_target_` runs, so name a folder that you trust.

        Raises:
            CheckpointError: it cannot be read, or its model cannot be built.
            ConfigError: a setting is wrong.
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
        # The data set is the user's own, and nothing of it is read.
        if not (CONF / "dataset" / f"{names['dataset']}.yaml").is_file():
            groups += ["dataset=folder", "dataset.root=."]
        cfg = load_config(*groups, f"protocol=[{protocol or checkpoint.protocol}]", config_dir=config_dir)
        quieten_libraries()
        return cls(restore(cfg, checkpoint, (), protocols=True), checkpoint, device, precision, exif)

    def __init__(
        self, cfg: DictConfig, checkpoint: Checkpoint, device: str, precision: Precision, exif: Exif | None = None
    ) -> None:
        """Build the model of restored settings. Most users call `from_checkpoint` instead."""
        from wsolkit.build import build_model, build_protocols
        from wsolkit.data.dataset import Sizes
        from wsolkit.data.transforms import Transform

        self.class_names = checkpoint.class_names
        self._path = checkpoint.path
        self.method, self.backbone = str(cfg.method.name), str(cfg.backbone.name)
        self.protocol, self.rules = next(iter(build_protocols(cfg).items()))
        self.metrics, self.version = dict(checkpoint.metrics), checkpoint.version
        self.image_size: int = cfg.dataset.image_size
        self.device = device_of(device)
        self.exif = _exif(exif, checkpoint)
        self._module = _loaded(build_model(cfg, self.class_names), checkpoint).to(self.device)
        settings = self._module.description
        self.mean, self.std = tuple(settings.mean), tuple(settings.std)
        fixed, conditions = self.rules.threshold, ("gt_known_loc", "gt_known_loc_predicted_class")
        selected = {condition: checkpoint.thresholds.get(f"{self.protocol}/{condition}") for condition in conditions}
        self._thresholds = selected if fixed is None else dict.fromkeys(conditions, fixed)
        self._by_maps = checkpoint.thresholds.get(f"{self.protocol}/by_maps")
        self._autocast = _autocast(precision, self.device)
        self._transform = Transform(self.image_size, self.image_size, False, self.mean, self.std)
        self._uncropped = None
        self._ten_crop = self.rules.classification == "ten_crop"
        if self.rules.input != "resize" or self._ten_crop:
            self._uncropped = Transform(cfg.dataset.resize, cfg.dataset.resize, False, self.mean, self.std)
        larger = None if self._uncropped is None else cfg.dataset.resize
        seen = cfg.dataset.eval_image_size, cfg.dataset.eval_flip
        self._sizes = Sizes.of(self.image_size, larger, *seen, self.mean, self.std)

    @property
    def module(self) -> WSOLModule:
        """Return the model itself, to use its `network`, its `localize` or its `inside`."""
        return self._module

    @property
    def threshold(self) -> float:
        """Return the threshold, see the class."""
        return used_threshold(self, None, given=False)

    @property
    def threshold_origin(self) -> Literal["protocol", "validation", "maps", "default"]:
        """Return the origin of the threshold, see the class."""
        if self.rules.threshold is not None:
            return "protocol"
        if self._thresholds["gt_known_loc_predicted_class"] is not None:
            return "validation"
        return "default" if self._by_maps is None else "maps"

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
        """Find the object in an image, or in each image of a list.

        Args:
            images: one image or a list, see `ImageLike`.
            classes: the names or numbers of the classes to look for: one for all images, or one for each. A name takes
                precedence over a number. None means the predicted classes.
            top_k: the number of most probable classes of each image. The result is then a list, most probable first.
            threshold: τ in [0, 1). None takes that of the protocol or the checkpoint, see `threshold`.
            select: "largest" for one box, or "all" for a box around each component above the threshold.

        Returns:
            a `Prediction`, or a list of them for a list of images. With `top_k`, each image has a list.

        Raises:
            DataError: an image cannot be read.
            ConfigError: another argument is wrong.
            CheckpointError: the network gives logits or score maps that are not finite.
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
        """Run the network on an image without drawing boxes, which `at_threshold` does.

        Args:
            image: see `ImageLike`.
            classes: the names or numbers of the classes to look for. None means the `top_k` most probable ones, in
                order.
            top_k: the number of classes, if `classes` is None.

        Raises:
            DataError: the image cannot be read.
            ConfigError: another argument is wrong.
        """
        labels = None if classes is None else [class_label(self.class_names, name) for name in classes]
        return raw_maps_of_labels(self, image, labels, top_k)

    def at_threshold(self, found: RawMap, threshold: float | None = None, select: Select = "largest") -> Prediction:
        """Draw the boxes of a map from `raw_maps` at a threshold, see `__call__`."""
        check_request(self, 1, select)
        tau = used_threshold(self, threshold, given=False)
        height, width = found.image.shape[:2]
        (drawn,) = self._maps_and_levels(found.raw[None, None], [(width, height)], tau)
        return self._prediction(*drawn, found.label_index, found.score, width, height, tau, select, found.image)

    def _forward(
        self, batch: EvaluationBatch, labels: Sequence[Sequence[int]] | None, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the network on a batch.

        Returns:
            the classes [B, K], given or most probable, their probabilities [B, K], and their raw score maps [B, K, h,
            w].
        """
        from wsolkit.localization.inputs import images_to, localize_views, network_views, ten_crop_probabilities

        weights = next(self._module.parameters())
        batch = images_to(batch, weights)
        with torch.inference_mode(), self._autocast:
            pooled = ten_crop_probabilities(batch, self._module) if self._ten_crop else None

            def classes_of(logits: Tensor) -> Tensor:
                if labels is not None:
                    return torch.tensor(labels, device=logits.device)
                return (logits if pooled is None else pooled).topk(top_k, dim=1).indices

            views = network_views(batch, self.rules.input)
            logits, maps = localize_views(views, self._module.localize, classes_of)
            probabilities = logits.float().softmax(dim=1) if pooled is None else pooled
            classes = classes_of(logits)
            return classes.cpu(), probabilities.gather(1, classes).cpu(), maps

    def _maps_and_levels(
        self, raw: Tensor, sizes: Sequence[tuple[int, int]], tau: float
    ) -> Iterator[tuple[npt.NDArray[np.float32], Levels]]:
        """Yield the localization maps and their levels at τ, image by image, from raw maps [B, K, h, w]."""
        rules, at = self.rules, np.array([tau])
        parts: Iterable[tuple[Tensor, tuple[int, int] | None]] = [(raw.flatten(0, 1), None)]
        if rules.frame == "original":
            parts = ((maps, (height, width)) for maps, (width, height) in zip(raw, sizes, strict=True))
        for maps, size in parts:
            if size is not None and max(size) > _MAX_SIDE:
                raise DataError(
                    f"an image of {size[1]}×{size[0]} pixels: protocol {self.protocol} draws boxes at the image's "
                    f"size, up to {_MAX_SIDE} pixels a side. Choose another protocol"
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
        """Draw the boxes of a localization map at τ, in pixels of its image."""
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
    """Make samples of images, transformed as in the evaluation of a localizer's model."""
    from wsolkit.data.dataset import WSOLDataset

    return WSOLDataset(records, localizer._transform, 0, localizer._uncropped, sizes=localizer._sizes)


def predictions(
    localizer: Localizer,
    batch: EvaluationBatch,
    labels: Sequence[int] | None,
    top_k: int,
    threshold: float | None,
    select: Select,
    images: Sequence[Image] | None = None,
) -> Iterator[list[Prediction]]:
    """Yield the predictions of a batch of `samples` image by image, so that only a few large maps are in memory.

    An image has none if its logits or score maps are not finite.

    Args:
        localizer: the model.
        batch: the samples.
        labels: one class for each image, or None for the `top_k` most probable classes.
        top_k, threshold, select: see `Localizer.__call__`.
        images: the images, which the predictions keep.
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
    """Run `Localizer.raw_maps` for classes that are given as labels, whatever their names are."""
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
        ConfigError: it cannot do this.
    """
    count = len(localizer.class_names)
    if not 1 <= top_k <= count:
        raise ConfigError(f"top_k={top_k}: expected 1 to {count}, the number of classes")
    if select not in get_args(Select):
        raise ConfigError(f"select={select!r}: expected 'largest' or 'all'")


def used_threshold(localizer: Localizer, threshold: float | None, given: bool) -> float:
    """Return the threshold τ at which a localizer draws boxes, rounded to the protocol's grid if the grid has it.

    Args:
        localizer: the model.
        threshold: the user's threshold, or None for the localizer's own.
        given: whether classes are given and not predicted. Validation may have selected another τ for given classes.

    Raises:
        ConfigError: it is not in [0, 1).
    """
    from wsolkit.localization.protocol import UNKNOWN_THRESHOLD

    if threshold is None:
        threshold = localizer._thresholds.get("gt_known_loc" if given else "gt_known_loc_predicted_class")
    if threshold is None:
        threshold = UNKNOWN_THRESHOLD if localizer._by_maps is None else localizer._by_maps
    if not 0 <= threshold < 1:
        raise ConfigError(f"threshold={threshold}: expected a number from 0 to less than 1")
    place = localizer.rules.index_of(threshold)
    return threshold if place is None else float(localizer.rules.thresholds[place])


@dataclass(frozen=True)
class _Pictures:
    """Images in memory that act as records."""

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
    """Say whether an object is one image: it has a form of `ImageLike`, or it cannot be a list of images."""
    form = (str, Path, bytes, bytearray, memoryview, PIL.Image.Image, np.ndarray, Tensor, Mapping)
    return isinstance(images, form) or hasattr(images, "read") or not isinstance(images, Iterable)


def as_rgb(image: ImageLike, exif: Exif, what: str = "an image") -> Image:
    """Return the pixels [H, W, 3] uint8 of an image in any form of `ImageLike`.

    Args:
        image: the image.
        exif: whether to turn it as its EXIF orientation says.
        what: names an image without a path in errors.

    Raises:
        DataError: it cannot be read, or has none of these forms.
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
            raise DataError(f"{what} came as {type(image).__name__}: expected {_FORMS}. Pass several images as a list")
        pixels = _array(image) if isinstance(image, Tensor) else np.asarray(image)
    if isinstance(image, Tensor) and pixels.ndim == 3:
        pixels = np.moveaxis(pixels, 0, -1)  # [C, H, W] → [H, W, C]
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        kind, form = ("a tensor", "[C, H, W]") if isinstance(image, Tensor) else ("an array", "[H, W, C]")
        raise DataError(
            f"{what} came as {kind} of shape {tuple(np.shape(image))}: expected [H, W] or {form} with C = 1, 3 or "
            "4. Pass several images as a list"
        )
    levels = to_8_bits(pixels[..., :3], f"{what} came as")
    return np.ascontiguousarray(np.broadcast_to(levels, (*levels.shape[:2], 3)))


def _check_file(path: Path) -> None:
    try:
        there, is_folder = path.exists(), path.is_dir()
    except OSError:  # The name is too long for a file. It may be encoded pixels.
        there = is_folder = False
    if is_folder:
        raise DataError(f"image '{path}' is a folder: expected an image file. Pass its images as a list of paths")
    if not there:
        raise DataError(
            f"image '{shortened(str(path), _LONGEST)}' does not exist: expected the path of an image file. A relative "
            f"path starts in '{Path.cwd()}'"
        )


def _content(file: BinaryFile, what: str) -> bytes:
    """Return the rest of a file, from its current position."""
    from wsolkit.data.decoding import decoding

    with decoding(what):
        content: object = file.read()
    if not isinstance(content, bytes | bytearray | memoryview):
        raise DataError(
            f"{what} came as a file whose read() gives {type(content).__name__}: expected bytes. Open a file with "
            "mode 'rb'. If read() has to be awaited, pass the bytes"
        )
    if not content:
        raise DataError(f"{what} came as a file with nothing left to read: go back to its beginning with seek(0)")
    return bytes(content)


def _array(image: Tensor) -> npt.NDArray[Any]:
    pixels = image.detach().cpu()
    half = pixels.is_floating_point() and pixels.itemsize < 4  # NumPy has no bfloat16.
    return np.asarray(pixels.float() if half else pixels)


def _loaded(module: WSOLModule, checkpoint: Checkpoint) -> WSOLModule:
    """Return a module with a checkpoint's weights, ready for inference."""
    checkpoint.load_into(module)
    return module.eval().requires_grad_(False)


def device_of(name: str) -> torch.device:
    """Return the device of a name, in which "auto" is a GPU if there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return gpu or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device={name}: not available here ({reason}). Expected auto, cpu, cuda, cuda:1, mps, …"
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
