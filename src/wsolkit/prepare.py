"""python -m wsolkit.prepare dataset=NAME dataset.root=DIR: make a data set ready to be trained on.

Unpacks its archives, which lie in the root or are downloaded where that needs no login; checks that it is complete; and
writes its index, with which runs start in seconds. Interrupted and run again, it goes on. It never deletes an archive.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from wsolkit.config import CONF, arguments, check_config, locate, plain, run_command
from wsolkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wsolkit.data.archives import Archive
    from wsolkit.data.records import FileRecords, Split


def prepare(cfg: DictConfig, _: Path, typed: Sequence[str] = ()) -> None:
    """Prepare `cfg.dataset`.

    Args:
        typed: arguments of the command, which training is to be given too.
    """
    check_config(cfg)
    name = cfg.dataset.name
    if cfg.dataset.get("root") is None:
        choices = ", ".join(sorted(path.stem for path in (CONF / "dataset").glob("*.yaml") if path.stem != name))
        raise ConfigError(f"dataset={name} is made in memory: there is nothing to prepare; choose from: {choices}")
    from filelock import FileLock, Timeout

    from wsolkit.build import build_records
    from wsolkit.data.archives import STATE
    from wsolkit.data.index import write_index

    root = Path(cfg.dataset.root)
    archives = needed_archives(cfg)
    index = Path(cfg.dataset.index or root / STATE / "index.arrow")
    if not archives and not root.is_dir():
        raise DataError(f"dataset.root: there is no folder '{root}'; dataset={name} reads what you put there")
    todo = {name: archive for name, archive in archives.items() if not archive.finished(root)}
    check_there(todo, cfg, root)
    # A data set that is only indexed may lie where nobody can write.
    place = root / STATE / "lock" if todo else index.with_name(f".{index.name}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place).acquire(blocking=False)
    except Timeout as error:
        raise DataError(f"another process is preparing '{root}': wait until it ends") from error
    except OSError as error:
        raise DataError(f"'{place.parent}' cannot be written to ({error}); dataset.index=FILE is elsewhere") from error
    with lock:
        install(todo, root, cfg.progress)
        splits: list[Split] = ["train", "val", "test"] if cfg.dataset.held_out else ["train", "test"]
        print(f"Reading {', '.join(splits)} of {name} and writing the index", flush=True)
        records = write_index(index, splits, build_records(cfg), plain(cfg)["dataset"]["records"], root)
    files = [root / archive.file for archive in archives.values()]
    show(cfg, records, index, [path for path in files if path.is_file()])
    own = [argument for argument in typed if not argument.startswith(("progress=", "hydra."))]
    print(f"Train: {shlex.join(['python', '-m', 'wsolkit.train', *own])}")


def needed_archives(cfg: DictConfig) -> dict[str, Archive]:
    """The archives of a data set that its settings need, by name."""
    archives: dict[str, Archive] = {}
    for name, node in (cfg.dataset.get("archives") or {}).items():
        archive: Archive = locate(node._target_, f"dataset.archives.{name}.")(**arguments(node))
        if archive.setting is None or cfg.dataset[archive.setting]:
            archives[str(name)] = archive
    return archives


def check_there(archives: Mapping[str, Archive], cfg: DictConfig, root: Path) -> None:
    """Check that archives which cannot be downloaded lie in the root.

    Raises:
        DataError: some do not; the message says where each is from, and where to put it.
    """
    absent = [archive for archive in archives.values() if archive.url is None and not (root / archive.file).is_file()]
    if not absent:
        return
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
                "Put them there as they are, without unpacking them, and run the same command again",
            ]
        )
    )


def install(archives: Mapping[str, Archive], root: Path, show_progress: bool) -> None:
    """Unpack archives, those that do not lie in the root after a download.

    Raises:
        DataError: one cannot be downloaded, or is damaged.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from wsolkit.data.download import download

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not show_progress) as progress:
        for name, archive in archives.items():
            if not (root / archive.file).is_file():
                download(archive, root, progress)
            archive.install(name, root, progress)


def show(cfg: DictConfig, records: Mapping[Split, FileRecords], index: Path, archives: Sequence[Path]) -> None:
    """Print what there is, and what to do with it."""
    from rich.console import Console
    from rich.table import Table

    from wsolkit.data.masks import MaskFiles

    table = Table("split", title=str(cfg.dataset.name))
    for column in ("images", "classes", "boxes", "masks"):
        table.add_column(column, justify="right")
    for split, found in records.items():
        masks = found.masks.count() if isinstance(found.masks, MaskFiles) else 0
        numbers = len(found.labels), len(found.classes), len(found.box_table), masks
        table.add_row(split, *(f"{number:,}" for number in numbers))
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    say(f"Index: {index} ({index.stat().st_size / 2**20:.1f} MiB), used from now on without being asked for")
    if archives:
        say(f"No longer needed: {', '.join(map(str, archives))}")


def main() -> None:
    """Entry point of the command."""
    if {"-m", "--multirun"} & set(sys.argv):
        sys.exit("error: data sets are prepared one by one: leave out -m")
    run_command("prepare", partial(prepare, typed=sys.argv[1:]))


if __name__ == "__main__":
    main()
