"""python -m wsolkit.predict checkpoint=PATH source=DIR|FILE|GLOB output=DIR: boxes and masks of images.

The output folder holds predictions.json (COCO's results), pseudo_labels.json (a COCO data set: images, categories and,
as annotations, the objects of each image's given or most probable class), predictions.csv, settings.json,
progress.jsonl; overlays/ on request; failed.csv, if images could not be read. The exit code is then 3.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsolkit.config import as_named, check_config, given_overrides, plain, run_command_on_checkpoint
from wsolkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wsolkit.data.dataset import Sample, WSOLDataset
    from wsolkit.interop.coco import Source
    from wsolkit.localizer import Localizer, Prediction
    from wsolkit.types import EvaluationBatch

UNREADABLE = 3
"""Exit code where all is done but for images that could not be read."""

OVERLAYS = "overlays"


def predict(cfg: DictConfig, folder: Path) -> None:
    """Write the predictions for the images of `cfg.source` into a folder.

    Raises:
        SystemExit: with code 3, some images could not be read.
    """
    from omegaconf import OmegaConf
    from rich.progress import track

    from wsolkit.build import quieten_libraries
    from wsolkit.checkpoint import read_checkpoint, restore
    from wsolkit.data.records import file_records
    from wsolkit.interop.coco import FAILED, Source, prediction_files
    from wsolkit.localizer import Localizer

    lacking = [name for name in ("checkpoint", "source") if OmegaConf.is_missing(cfg, name) or cfg[name] is None]
    if lacking:
        raise ConfigError(f"required and not given: {lacking[0]}. Add {lacking[0]}=…")
    checkpoint = read_checkpoint(cfg.checkpoint)
    cfg = restore(cfg, checkpoint, given_overrides(), protocols=True)
    check_config(cfg)
    if cfg.batch_size < 1:
        raise ConfigError(f"batch_size={cfg.batch_size}: expected 1 or more")
    quieten_libraries()
    base, names = find_images(cfg.source, folder)
    localizer = Localizer(cfg, checkpoint, cfg.device, cfg.precision)
    labels = given_labels(cfg.classes, base, names, localizer)
    if labels is not None and cfg.top_k > 1:
        raise ConfigError(f"top_k={cfg.top_k} chooses classes by their probability: it does not go with classes=…")
    threshold = localizer.tau(cfg.threshold, given=labels is not None)
    localizer.check(cfg.top_k, cfg.select)
    sources = [
        Source(name, _stamp(base / name), None if labels is None else labels[place]) for place, name in enumerate(names)
    ]
    failed: dict[str, str] = {}
    with prediction_files(folder, localizer.class_names, _settings(cfg, threshold)) as files:
        missing = files.missing(sources, lambda name: not cfg.overlays or _overlay_path(folder, name).is_file())
        chosen = [names[place] for place in missing]
        dataset = localizer.dataset(file_records(base, chosen, [0] * len(chosen), localizer.class_names, {}, None))
        batches = -(-len(missing) // cfg.batch_size)
        loaded = _load(dataset, cfg, localizer)
        for batch, places, reasons in track(loaded, "Predicting", batches, disable=not cfg.progress):
            failed |= {chosen[place]: reason for place, reason in reasons.items()}
            if batch is not None:
                given = None if labels is None else [labels[missing[place]] for place in places]
                predictions = localizer.localize(batch, given, cfg.top_k, threshold, cfg.select)
                of_batch = [sources[missing[place]] for place in places]
                files.add(_each(of_batch, predictions, base, folder if cfg.overlays else None))
        count = files.write(sources, failed)
    print(
        f"{count} images, {len(missing) - len(failed)} of them new; threshold {threshold:g} ({_origin(cfg, localizer)})"
    )
    print(f"Written to {as_named(folder)}")
    if failed:
        first, reason = next(iter(failed.items()))
        print(
            f"{len(failed)} images could not be read, see {as_named(folder) / FAILED}; '{first}': {reason}",
            file=sys.stderr,
        )
        sys.exit(UNREADABLE)


def _stamp(path: Path) -> list[int]:
    """Size in bytes and time of change of a file; [] if it has gone."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def find_images(source: str, output: Path) -> tuple[Path, list[str]]:
    """The images of a file, a folder or a pattern: a folder, and paths relative to it in alphabetical order.

    Args:
        output: folder whose pictures are left out.

    Raises:
        DataError: there are none.
    """
    from wsolkit.data.files import IMAGE_SUFFIXES

    path = Path(source)
    if path.is_file():
        return path.parent, [path.name]
    if path.is_dir():
        base, found = path, (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        what = f"holds no images ({', '.join(IMAGE_SUFFIXES)})"
    else:
        parts = path.parts
        patterns = (place for place, part in enumerate(parts) if set("*?[") & set(part))
        fixed = next((place for place in patterns if not Path(*parts[: place + 1]).exists()), None)
        if fixed is None:
            raise DataError(f"source: there is no file or folder '{source}'")
        if ".." in parts[fixed:]:
            raise DataError(
                f"source: '{source}' goes up after a pattern, which is not followed: write the path plainly"
            )
        base = Path(*parts[:fixed])
        found, what = base.glob(str(Path(*parts[fixed:]))), "matches no file"
    left_out = output.resolve()
    relative = (file.relative_to(base) for file in found if file.is_file() and left_out not in file.resolve().parents)
    names = sorted(file.as_posix() for file in relative if not any(part.startswith(".") for part in file.parts))
    if not names:
        raise DataError(f"source: '{source}' {what}")
    return base, names


def given_labels(classes: str | int | None, base: Path, names: Sequence[str], localizer: Localizer) -> list[int] | None:
    """The label of each image, as the setting `classes` says; None: classes are predicted.

    Raises:
        ConfigError: there is no such class. DataError: an image has none.
    """
    if classes is None:
        return None
    if classes == "folder":
        folders = [name.split("/")[0] if "/" in name else base.resolve().name for name in names]
        known = {folder: _label(localizer, folder, "classes=folder") for folder in set(folders)}
        return [known[folder] for folder in folders]
    if str(classes).endswith(".csv"):
        return _listed_labels(Path(str(classes)), names, localizer)
    return [localizer.label(classes)] * len(names)


def _listed_labels(path: Path, names: Sequence[str], localizer: Localizer) -> list[int]:
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = [(number, line) for number, line in enumerate(csv.reader(file), start=1) if line]
    except OSError as error:
        raise DataError(f"classes: '{path}' cannot be read ({error.strerror})") from error
    wanted, found = set(names), {}
    for number, line in lines:
        if len(line) != 2:
            raise DataError(f"{path}:{number}: {line} has {len(line)} fields, expected 2: path,class")
        if line[0] in wanted:
            if line[0] in found:
                raise DataError(f"{path}:{number}: '{line[0]}' is listed twice")
            found[line[0]] = _label(localizer, line[1], f"{path}:{number}")
    without = [name for name in names if name not in found]
    if without:
        raise DataError(
            f"'{path}' has no line for {len(without)} of {len(names)} images, such as '{without[0]}': expected lines "
            "path,class, with paths relative to the source"
        )
    return [found[name] for name in names]


def _label(localizer: Localizer, name: str, where: str) -> int:
    try:
        return localizer.label(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _settings(cfg: DictConfig, threshold: float) -> dict[str, Any]:
    """What predictions depend on, flat."""
    values = plain(cfg)
    with Path(cfg.checkpoint).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    kept: dict[str, Any] = {"checkpoint": digest.hexdigest(), "source": str(Path(cfg.source).absolute())}
    (protocol, rules), *_ = values["protocol"].items()
    kept |= {key: values[key] for key in ("classes", "top_k", "select", "precision")}
    kept |= {"protocol": protocol, "threshold": threshold}
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
    if localizer.rules.threshold is not None:
        return f"of protocol {localizer.protocol}"
    if localizer.threshold is None:
        return "validation had no boxes to select one by: look at overlays=true and set threshold=…"
    return f"selected in validation, by {localizer.protocol}"


def _load(
    dataset: WSOLDataset, cfg: DictConfig, localizer: Localizer
) -> Iterator[tuple[EvaluationBatch | None, list[int], dict[int, str]]]:
    """Batches, the positions of their images, and why others could not be read, by position."""
    from torch.utils.data import DataLoader

    from wsolkit.cores import available_cores
    from wsolkit.data.dataset import one_thread

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
    """Samples by position; of images that cannot be read the reason."""

    def __init__(self, dataset: WSOLDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> tuple[int, Sample | str]:
        try:
            return place, self.dataset[0, place]
        except Exception as error:  # decoders of broken files raise whatever comes
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
    sources: Sequence[Source], found: Iterator[list[Prediction]], base: Path, folder: Path | None
) -> Iterator[tuple[Source, list[Prediction]]]:
    """The images of a batch with their predictions, one by one; pictures of them are written, if there is a folder."""
    from wsolkit.data.records import read_image
    from wsolkit.reporting.charts import jpeg
    from wsolkit.reporting.overlay import overlay

    for source, predictions in zip(sources, found, strict=True):
        if folder is not None:
            path = _overlay_path(folder, source.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            best = predictions[0]
            path.write_bytes(jpeg(overlay(read_image(base / source.name), best.score_map, best.boxes)))
        yield source, predictions


def _overlay_path(folder: Path, name: str) -> Path:
    return folder / OVERLAYS / f"{name}.jpg"


def main() -> None:
    """Entry point of the command."""
    run_command_on_checkpoint("predict", predict)


if __name__ == "__main__":
    main()
