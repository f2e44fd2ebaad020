"""python -m wsolkit.prepare dataset=NAME dataset.root=DIR: make a data set ready for training.

It unpacks archives in the root, and downloads them if that needs no login. It checks that the data set is complete, and
writes its index, with which runs start in seconds. Files that can be read already need no archive, wherever they lie.
After an interruption, the same command continues. It never deletes an archive.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wsolkit.errors import ConfigError, DataError
from wsolkit.settings.checks import check_config, locate
from wsolkit.settings.command import run_command
from wsolkit.settings.compose import arguments, plain
from wsolkit.settings.conf import CONF
from wsolkit.system.drafts import remove_drafts
from wsolkit.system.locks import alone

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wsolkit.data.preparing.archives import Archive
    from wsolkit.data.records import FileRecords, Records, Split


@dataclass
class Settings:
    """The settings of conf/prepare.yaml."""

    progress: bool


def prepare(cfg: DictConfig, _: Path, typed: Sequence[str] = ()) -> None:
    """Prepare `cfg.dataset`.

    Args:
        cfg: the settings.
        typed: the arguments of the command, which the printed training command repeats.
    """
    check_config(cfg, Settings)
    name = cfg.dataset.name
    if cfg.dataset.get("root") is None:
        choices = ", ".join(sorted(path.stem for path in (CONF / "dataset").glob("*.yaml") if path.stem != name))
        raise ConfigError(f"dataset={name} is made in memory: there is nothing to prepare; choose from: {choices}")
    from wsolkit.build import build_records
    from wsolkit.data.preparing.archives import STATE
    from wsolkit.data.preparing.index import write_index

    root = Path(cfg.dataset.root)
    archives = needed_archives(cfg)
    index = Path(cfg.dataset.index or root / STATE / "index.arrow")
    if not archives and not root.is_dir():
        raise DataError(f"dataset.root: there is no folder '{root}'; dataset={name} reads what you put there")
    read = build_records(cfg)
    splits: list[Split] = ["train", "val", "test"] if cfg.dataset.held_out else ["train", "test"]
    todo = {name: archive for name, archive in archives.items() if not archive.finished(root)}
    if todo:
        unreadable = what_cannot_be_read(read, splits)
        todo = {
            name: archive
            for name, archive in todo.items()
            if archive.started(root) or not unreadable.keys().isdisjoint(archive.splits)
        }
        check_there(todo, cfg, root, unreadable)
    # A data set that is only indexed may lie where nobody can write.
    places = [index.with_name(f".{index.name}.lock"), *([root / STATE / "lock"] if todo else [])]
    with ExitStack() as locks:
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                locks.enter_context(alone(place, f"preparing '{root}'"))
            except OSError as error:
                raise DataError(
                    f"'{place.parent}' cannot be written to ({error}). Set dataset.index=FILE to another place"
                ) from error
        remove_leftovers(index, root / STATE)
        install(todo, root, cfg.progress)
        print(f"Reading {', '.join(splits)} of {name} and writing the index", flush=True)
        records = write_index(index, splits, read, plain(cfg)["dataset"]["records"], root)
    # Other files are read as they are.
    files = [root / archive.file for archive in archives.values() if archive.unpack]
    show(cfg, records, index, [path for path in files if path.is_file()])
    own = [argument for argument in typed if not argument.startswith(("progress=", "hydra."))]
    print(f"Train: {shlex.join(['python', '-m', 'wsolkit.train', *own])}")


def remove_leftovers(index: Path, state: Path) -> None:
    """Remove the drafts that killed processes have left and nobody continues, of the index and of pooch's downloads."""
    remove_drafts([index])
    by_earlier_versions = (path for path in index.parent.glob(f"{index.name}.*") if path.suffix[1:].isdigit())
    for path in (*by_earlier_versions, *state.glob("tmp*")):
        path.unlink(missing_ok=True)


def needed_archives(cfg: DictConfig) -> dict[str, Archive]:
    """Return the archives of a data set that its settings need, by name."""
    root = Path(cfg.dataset.root)
    archives: dict[str, Archive] = {}
    for name, node in (cfg.dataset.get("archives") or {}).items():
        archive: Archive = locate(node._target_, f"dataset.archives.{name}.")(**arguments(node))
        wanted = archive.setting is None or cfg.dataset[archive.setting]
        places = None if archive.place is None else cfg.dataset[archive.place]
        if wanted and (places is None or archive.is_looked_for(root, [places] if isinstance(places, str) else places)):
            archives[str(name)] = archive
    return archives


def what_cannot_be_read(read: Callable[[Split], Records], splits: Sequence[Split]) -> dict[Split, DataError]:
    """Return the splits that cannot be read from the files that are there, and why."""
    errors: dict[Split, DataError] = {}
    for split in splits:
        try:
            read(split)
        except DataError as error:
            errors[split] = error
    return errors


def check_there(
    archives: Mapping[str, Archive], cfg: DictConfig, root: Path, unreadable: Mapping[Split, DataError]
) -> None:
    """Check that archives which cannot be downloaded lie in the root.

    Args:
        archives: the archives by name.
        cfg: the settings.
        root: the folder of the data set.
        unreadable: the splits that cannot be read without them, and why.

    Raises:
        DataError: some are missing. The message says where to get each, and where to put it.
    """
    absent = [archive for archive in archives.values() if archive.url is None and not (root / archive.file).is_file()]
    if not absent:
        return
    reasons = list(unreadable.items()) if root.is_dir() else []
    lines = []
    for archive in absent:
        without = ""
        if archive.setting is not None:
            value = cfg.dataset[archive.setting]
            nothing = "false" if value is True else "null" if isinstance(value, str) else "[]"
            without = f"; not needed with dataset.{archive.setting}={nothing}"
        lines.append(f"  {root / archive.file}, from {archive.page} ({archive.described()}{without})")
    raise DataError(
        "\n".join(
            [
                f"dataset={cfg.dataset.name} needs files that you have to get yourself, by a login or a browser:",
                *lines,
                *(f"Without them, the {split} split cannot be read: {error}" for split, error in reasons),
                "Put them there as they are, without unpacking them, and run the same command again",
            ]
        )
    )


def install(archives: Mapping[str, Archive], root: Path, show_progress: bool) -> None:
    """Unpack archives, after downloading those that are missing in the root.

    Raises:
        DataError: an archive cannot be downloaded, or is damaged.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from wsolkit.data.preparing.download import download

    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not show_progress) as progress:
        for name, archive in archives.items():
            if not (root / archive.file).is_file():
                download(archive, root, progress)
            archive.install(name, root, progress)


def show(cfg: DictConfig, records: Mapping[Split, FileRecords], index: Path, archives: Sequence[Path]) -> None:
    """Print what there is, and what to do with it."""
    from rich.table import Table

    from wsolkit.data.masks import MaskFiles
    from wsolkit.reporting.terminal import PlainConsole

    table = Table("split", title=str(cfg.dataset.name))
    for column in ("images", "classes", "boxes", "masks"):
        table.add_column(column, justify="right")
    for split, found in records.items():
        masks = found.masks.count() if isinstance(found.masks, MaskFiles) else 0
        numbers = len(found.labels), len(found.classes), len(found.box_table), masks
        table.add_row(split, *(f"{number:,}" for number in numbers))
    console = PlainConsole()
    console.print(table)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    say(f"Index: {index} ({index.stat().st_size / 2**20:.1f} MiB), which runs use from now on")
    if archives:
        say(f"No longer needed: {', '.join(map(str, archives))}")


def main() -> None:
    """Run the command."""
    if {"-m", "--multirun"} & set(sys.argv):
        sys.exit("error: data sets are prepared one by one: leave out -m")
    run_command("prepare", partial(prepare, typed=sys.argv[1:]), stopped="the same command continues")


if __name__ == "__main__":
    main()
