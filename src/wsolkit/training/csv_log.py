"""Write the log of a run, metrics.csv, so that it survives a kill at any moment."""

from __future__ import annotations

import csv
import errno
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from omegaconf import OmegaConf
from torch import Tensor

from wsolkit.reporting.log_file import NAME, read_log
from wsolkit.system.drafts import draft, write_text


class RunLog(CSVLogger):
    """Lightning's CSV log with a file that is whole at any moment, see `LogWriter`. hparams.yaml holds the settings."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the writer of the files."""
        if self._experiment is None:
            self._experiment = LogWriter(Path(self.log_dir))  # type: ignore[assignment]
        return self._experiment

    @rank_zero_only
    def go_on(self, step: int) -> None:
        """Continue the existing log from a step, see `LogWriter`."""
        self.experiment.go_on(step)

    @rank_zero_only
    def sync(self) -> None:
        """Put all logged rows on the disk, before the run writes a checkpoint that comes after them."""
        self.save()
        self.experiment.sync()


class LogWriter:
    """Appends rows. If a row has a new column, it writes a whole new file, which then replaces the old one.

    Args:
        folder: the folder of the file. The first row replaces an existing log, unless `go_on` continues it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        self.metrics: list[Mapping[str, Any]] = []
        """Rows that are not in the file yet."""
        self._columns: list[str] = []
        self._settings: dict[str, Any] = {}

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Write settings to hparams.yaml."""
        self._settings |= params
        write_text(self.path.with_name("hparams.yaml"), OmegaConf.to_yaml(self._settings))

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add a row, which `save` writes."""
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self.metrics.append(row | {"step": step})

    def save(self) -> None:
        """Write the rows. Rows that cannot be written stay for the next time.

        Raises:
            OSError: the rows cannot be written. The file then holds no part of them.
        """
        if not self.metrics:
            return
        columns = sorted({*self._columns, *(name for row in self.metrics for name in row)})
        if columns == self._columns and self.path.is_file():
            self._append(self.metrics)
        else:
            earlier = self._rows() if self._columns else []
            self._replace([*earlier, *self.metrics], columns)
        self.metrics = []

    def go_on(self, step: int) -> None:
        """Keep the rows of the existing log before a step. Drop the later rows, which the run will log again."""
        rows = self._rows(step)
        if rows:
            self._replace(rows, sorted({name for row in rows for name in row}))

    def sync(self) -> None:
        """Put the file on the disk."""
        if self._columns and self.path.is_file():
            with self.path.open("r+b") as file:
                os.fsync(file.fileno())

    def _rows(self, before: float = math.inf) -> list[dict[str, str]]:
        """Return the rows of the file before a step.

        If the file is damaged, it warns and returns the rows that are whole. It sets a file without a header aside.
        """
        if not self.path.is_file():
            return []
        found = read_log(self.path)
        rows = [row for row in found.rows if int(row["step"]) < before]
        if not found.columns:
            aside = self.path.with_name(f"{NAME}.damaged")
            self.path.replace(aside)
            rank_zero_warn(f"'{self.path}' has no header that can be read: it is now {aside.name}, and 0 rows are kept")
        elif found.damaged:
            lines = "1 line" if found.damaged == 1 else f"{found.damaged} lines"
            rank_zero_warn(f"'{self.path}' is damaged: {lines} left out, {len(rows)} rows kept")
        return rows

    def _replace(self, rows: Sequence[Mapping[str, Any]], columns: list[str]) -> None:
        with draft(self.path) as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        self._columns = columns

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns).writerows(rows)
        content = text.getvalue().encode()
        with self.path.open("ab", buffering=0) as file:
            length = file.tell()
            if file.write(content) < len(content):  # A full disk may take only a part.
                file.truncate(length)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
