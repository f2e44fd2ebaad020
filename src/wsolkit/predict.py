"""python -m wsolkit.predict checkpoint=PATH source=DIR|FILE|GLOB output=DIR: find boxes and masks in images.

The output folder holds predictions.json (COCO results), pseudo_labels.json, predictions.csv, settings.json and
progress.jsonl. pseudo_labels.json is a COCO data set with images, categories and annotations. The annotations are the
objects of the given or the most probable class of each image. overlays/ holds pictures on request. If some images have
no predictions, failed.csv lists them, and the exit code is 3.
"""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wsolkit.errors import ConfigError, DataError
from wsolkit.settings.checks import check_config
from wsolkit.settings.command import run_command_on_checkpoint
from wsolkit.settings.compose import plain
from wsolkit.settings.conf import as_named, given_overrides
from wsolkit.system.names import file_name

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wsolkit.data.dataset import Sample, WSOLDataset
    from wsolkit.interop.coco import Source
    from wsolkit.localizer import Localizer, Prediction
    from wsolkit.types import EvaluationBatch, Exif

UNREADABLE = 3
"""The exit code if all is done, except for images that have no predictions."""

OVERLAYS = "overlays"


@dataclass
class PredictionSettings:
    """The settings that predict and demo share, see conf/prediction.yaml."""

    checkpoint: str
    threshold: float | None
    select: Literal["largest", "all"]
    exif: Literal["apply", "ignore"] | None
    device: str
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]


@dataclass
class Settings(PredictionSettings):
    """The settings of conf/predict.yaml."""

    source: str
    output: str
    classes: str | int | None
    top_k: int
    overlays: bool
    batch_size: int
    num_workers: int | Literal["auto"]
    progress: bool


def predict(cfg: DictConfig, folder: Path) -> None:
    """Write the predictions for the images of `cfg.source` into a folder.

    Raises:
        SystemExit: some images have no predictions. The code is 3.
    """
    from omegaconf import OmegaConf
    from rich.progress import track

    from wsolkit.checkpoint import read_checkpoint
    from wsolkit.data.records import file_records
    from wsolkit.interop.coco import FAILED, Source, prediction_files
    from wsolkit.localizer import Localizer, check_request, predictions, samples, used_threshold
    from wsolkit.settings.restore import restore
    from wsolkit.system.libraries import quieten_libraries

    lacking = [name for name in ("checkpoint", "source") if OmegaConf.is_missing(cfg, name) or cfg[name] is None]
    if lacking:
        raise ConfigError(f"required and not given: {lacking[0]}. Add {lacking[0]}=…")
    checkpoint = read_checkpoint(cfg.checkpoint)
    cfg = restore(cfg, checkpoint, given_overrides(), protocols=True)
    check_config(cfg, Settings)
    if cfg.batch_size < 1:
        raise ConfigError(f"batch_size={cfg.batch_size}: expected 1 or more")
    quieten_libraries()
    base, names = find_images(cfg.source, folder)
    localizer = Localizer(cfg, checkpoint, cfg.device, cfg.precision, cfg.exif)
    labels = given_labels(cfg.classes, base, names, localizer.class_names)
    if labels is not None and cfg.top_k > 1:
        raise ConfigError(f"top_k={cfg.top_k} chooses classes by their probability. It does not go with classes=…")
    threshold = used_threshold(localizer, cfg.threshold, given=labels is not None)
    check_request(localizer, cfg.top_k, cfg.select)
    sources = [
        Source(name, _stamp(base / name), None if labels is None else labels[place]) for place, name in enumerate(names)
    ]
    failed: dict[str, str] = {}
    with prediction_files(folder, localizer.class_names, _settings(cfg, threshold, localizer)) as files:
        missing = files.missing(sources, lambda name: not cfg.overlays or _overlay_path(folder, name).is_file())
        chosen = [names[place] for place in missing]
        classes, upright = localizer.class_names, localizer.exif == "apply"
        records = file_records(base, chosen, [0] * len(chosen), classes, {}, None, upright=upright)
        batches = -(-len(missing) // cfg.batch_size)
        loaded = _load(samples(localizer, records), cfg, localizer)
        for batch, places, reasons in track(loaded, "Predicting", batches, disable=not cfg.progress):
            failed |= {chosen[place]: reason for place, reason in reasons.items()}
            if batch is not None:
                given = None if labels is None else [labels[missing[place]] for place in places]
                found = predictions(localizer, batch, given, cfg.top_k, threshold, cfg.select)
                of_batch = [sources[missing[place]] for place in places]
                files.add(_each(of_batch, found, failed, base, folder if cfg.overlays else None, localizer.exif))
        count = files.write(sources, failed)
    print(
        f"{count} images, {len(missing) - len(failed)} of them new, threshold {threshold:g} ({_origin(cfg, localizer)})"
    )
    print(f"Written to {as_named(folder)}")
    if failed:
        first, reason = next(iter(failed.items()))
        print(
            f"{len(failed)} images have no predictions, see {as_named(folder) / FAILED}. '{first}': {reason}",
            file=sys.stderr,
        )
        sys.exit(UNREADABLE)


def _stamp(path: Path) -> list[int]:
    """Return the size of a file in bytes and the time of its last change, or [] if it has gone."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def find_images(source: str, output: Path) -> tuple[Path, list[str]]:
    """Find the images of a file, a folder or a pattern.

    Args:
        source: the file, folder or pattern.
        output: a folder whose pictures are left out.

    Returns:
        a folder, and paths relative to it in alphabetical order.

    Raises:
        DataError: there are no images.
    """
    from wsolkit.data.files import IMAGE_SUFFIXES, image_paths, say_left_out, walk

    path = Path(source)
    if path.is_file():
        return path.parent, [path.name]
    is_folder = path.is_dir()
    base, pattern = (path, ("**",)) if is_folder else _pattern(path)
    # Other files count if the pattern names their suffix.
    ending = Path(pattern[-1]).suffix.lower()
    suffixes = (*IMAGE_SUFFIXES, ending) if ending and not set("*?[") & set(ending) else IMAGE_SUFFIXES
    names: list[str] = []
    left_out: Counter[str] = Counter()
    for found in walk(base, skip=(output, output / OVERLAYS)):
        place = tuple(found.path.split("/")) if found.path else ()
        found.folders[:] = [name for name in found.folders if _matches((*place, name), pattern, partly=True)]
        for of_folder in (found.files, found.broken):
            of_folder[:] = [name for name in of_folder if _matches((*place, name), pattern)]
        names += image_paths(found, left_out, suffixes)
    say_left_out(path, left_out)
    if not names:
        raise DataError(
            f"source: '{source}' {'holds no images' if is_folder else 'matches no image'} ({', '.join(suffixes)})"
        )
    return base, sorted(names)


def _pattern(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Return the folder in which a pattern begins, and its parts below that folder.

    Raises:
        DataError: it is not a pattern, or its folder does not exist.
    """
    parts = path.parts
    fixed = next((place for place in range(len(parts)) if not Path(*parts[: place + 1]).is_dir()), len(parts))
    base, pattern = Path(*parts[:fixed]), parts[fixed:]
    if not set("*?[") & set(pattern[0]):
        raise DataError(f"source: there is no file or folder '{path}'")
    if ".." in pattern:
        raise DataError(f"source: '{path}' goes up after a pattern, which is not supported. Write the path without ..")
    return base, pattern


def _matches(parts: Sequence[str], pattern: Sequence[str], partly: bool = False) -> bool:
    """Say whether a path fits a pattern, in which `**` stands for any folders.

    Args:
        parts: the parts of the path.
        pattern: the parts of the pattern.
        partly: whether it is enough that a path inside it may fit.
    """
    if tuple(pattern) == ("**",):
        return True
    if not parts or not pattern:
        return not parts and (partly or all(part == "**" for part in pattern))
    if pattern[0] == "**":
        return _matches(parts, pattern[1:], partly) or _matches(parts[1:], pattern, partly)
    return fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:], partly)


def given_labels(classes: str | int | None, base: Path, names: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Return the label of each image, as the setting `classes` says, or None if classes are predicted.

    Args:
        classes: the setting.
        base, names: where the images are.
        known: the names of the model's classes, by label.

    Raises:
        ConfigError: there is no such class.
        DataError: an image has no class.
    """
    from wsolkit.data.classes import class_label

    if classes is None:
        return None
    if classes == "folder":
        folders = [name.split("/")[0] if "/" in name else base.resolve().name for name in names]
        labels = {folder: _label(known, folder, "classes=folder") for folder in set(folders)}
        return [labels[folder] for folder in folders]
    if str(classes).endswith(".csv"):
        return _listed_labels(Path(str(classes)), names, known)
    return [class_label(known, classes)] * len(names)


def _listed_labels(path: Path, names: Sequence[str], known: Sequence[str]) -> list[int]:
    from wsolkit.data.files import read_text

    try:
        reader = csv.reader(io.StringIO(read_text(path, errors="surrogateescape")))
        lines = [(reader.line_num, line) for line in reader if any(field.strip() for field in line)]
    except (FileNotFoundError, csv.Error) as error:
        raise DataError(f"classes: '{path}' cannot be read as a CSV file ({error})") from error
    wanted = set(names)
    found: dict[str, tuple[int, int]] = {}
    for number, line in lines:
        if len(line) != 2:
            raise DataError(f"{path}:{number}: {line} has {len(line)} fields, expected 2: path,class")
        given = line[0].strip()
        name = next((form for form in (line[0], given, given.replace("\\", "/")) if form in wanted), None)
        if name is not None:
            label = _label(known, line[1].strip(), f"{path}:{number}")
            first, before = found.setdefault(name, (number, label))
            if before != label:
                raise DataError(f"{path}:{number}: '{name}' has another class than in line {first}: keep one")
    without = [name for name in names if name not in found]
    if without:
        raise DataError(
            f"'{path}' has no line for {len(without)} of {len(names)} images, such as '{without[0]}': expected lines "
            "path,class, with paths relative to the source"
        )
    return [found[name][1] for name in names]


def _label(known: Sequence[str], name: str, where: str) -> int:
    from wsolkit.data.classes import class_label

    try:
        return class_label(known, name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _settings(cfg: DictConfig, threshold: float, localizer: Localizer) -> dict[str, Any]:
    """Return the settings that predictions depend on, as a flat dictionary."""
    values = plain(cfg)
    with Path(cfg.checkpoint).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    kept: dict[str, Any] = {"checkpoint": digest.hexdigest(), "source": str(Path(cfg.source).absolute())}
    (protocol, rules), *_ = values["protocol"].items()
    kept |= {key: values[key] for key in ("classes", "top_k", "select", "precision")}
    kept |= {"protocol": protocol, "threshold": threshold, "exif": localizer.exif}
    for group in ("method", "backbone", "postprocess"):
        kept |= dict(_flat(values.get(group) or {}, group))
    kept |= dict(_flat(rules, "rules"))
    return kept


def _flat(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}")
    else:
        yield path, node


def _origin(cfg: DictConfig, localizer: Localizer) -> str:
    if cfg.threshold is not None:
        return "given"
    if localizer.threshold_origin == "protocol":
        return f"of protocol {localizer.protocol}"
    if localizer.threshold_origin == "default":
        return "nothing selected it: look at overlays=true and set threshold=…"
    if localizer.threshold_origin == "maps":
        return "chosen by the maps alone, without boxes: look at overlays=true, and set threshold=… if need be"
    return f"selected in validation, by {localizer.protocol}"


def _load(
    dataset: WSOLDataset, cfg: DictConfig, localizer: Localizer
) -> Iterator[tuple[EvaluationBatch | None, list[int], dict[int, str]]]:
    """Yield batches with the positions of their images. Also yield, by position, why images could not be read."""
    from torch.utils.data import DataLoader

    from wsolkit.data.dataset import one_thread
    from wsolkit.system.cores import available_cores

    batches = -(-len(dataset) // cfg.batch_size)
    automatic = min(8, available_cores(), batches) if batches > 1 else 0
    return iter(
        DataLoader(
            _Readable(dataset),  # type: ignore[arg-type]
            batch_size=cfg.batch_size,
            num_workers=automatic if cfg.num_workers == "auto" else cfg.num_workers,
            collate_fn=_collate,
            worker_init_fn=one_thread,
            pin_memory=localizer.device.type == "cuda",
        )
    )


class _Readable:
    """Samples by position. For an image that cannot be read, the reason stands in its place."""

    def __init__(self, dataset: WSOLDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> tuple[int, Sample | str]:
        try:
            return place, self.dataset[0, place]
        except Exception as error:  # Decoders raise all kinds of errors on broken files.
            reason = error.__cause__ or error
            return place, f"{type(reason).__name__}: {reason}"


def _collate(
    loaded: Sequence[tuple[int, Sample | str]],
) -> tuple[EvaluationBatch | None, list[int], dict[int, str]]:
    from wsolkit.data.dataset import evaluation_batch

    samples = {place: sample for place, sample in loaded if not isinstance(sample, str)}
    reasons = {place: sample for place, sample in loaded if isinstance(sample, str)}
    return evaluation_batch(list(samples.values())) if samples else None, list(samples), reasons


def _each(
    sources: Sequence[Source],
    found: Iterator[list[Prediction]],
    failed: dict[str, str],
    base: Path,
    folder: Path | None,
    exif: Exif,
) -> Iterator[tuple[Source, list[Prediction]]]:
    """Yield the images of a batch with their predictions, one by one. Write pictures of them if there is a folder.

    An image without predictions is added to `failed`.
    """
    from wsolkit.data.records import read_image
    from wsolkit.reporting.charts import jpeg
    from wsolkit.reporting.overlay import overlay
    from wsolkit.reporting.terminal import picture

    for source, predictions in zip(sources, found, strict=True):
        if not predictions:
            failed[source.name] = "the network gives logits or score maps that are not finite for it"
            continue
        if folder is not None:
            path, best = _overlay_path(folder, source.name), predictions[0]
            with picture(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg(overlay(read_image(base / source.name, exif), best.score_map, best.boxes)))
        yield source, predictions


def _overlay_path(folder: Path, name: str) -> Path:
    return folder / OVERLAYS / file_name(name, ".jpg")


def main() -> None:
    """Run the command."""
    run_command_on_checkpoint("predict", predict, stopped="what is done is kept, and the same command does the rest")


if __name__ == "__main__":
    main()
