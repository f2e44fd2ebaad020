"""The log of a run: whole at any moment, and gone on with whatever has become of its end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from tests.test_run_directory import longest_file
from wsolkit.reporting.log_file import read_log
from wsolkit.training.csv_log import RunLog

ROWS: list[tuple[dict[str, Any], int]] = [
    ({"epoch": 0, "train/loss_step": 2.5}, 0),
    ({"lr/decay": 1e-3}, 1),
    ({"epoch": 0, "train/loss_step": torch.tensor(1.25)}, 1),
    ({"epoch": 0, "val/top1_cls": float("nan")}, 2),
    ({"epoch": 1, "train/loss_step": 0.5}, 3),
]


def write(folder: Path, log: CSVLogger | None = None, count: int = len(ROWS)) -> bytes:
    """Log rows one by one, as a trainer does; returns the file."""
    log = log or RunLog(folder, "", "")
    for row, step in ROWS[:count]:
        log.log_metrics(row, step)
        log.save()
    log.finalize("success")
    return (folder / "metrics.csv").read_bytes()


def test_file_is_as_lightning_writes_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("of an earlier run")
    own = RunLog(tmp_path, "", "")
    theirs = CSVLogger(tmp_path / "lightning", "", "")
    for log in (own, theirs):
        log.log_hyperparams({"method": {"name": "sat"}, "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}})
    assert write(tmp_path, own) == write(tmp_path / "lightning", theirs)
    assert (tmp_path / "hparams.yaml").read_text() == (tmp_path / "lightning" / "hparams.yaml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hparams.yaml", "lightning", "metrics.csv"]


WHOLE = {
    b"": None,
    b"0,,4,0.2": "1 line left out",
    b"0,,4,0.25,\r": "1 line left out",  # it may have been longer
    b"\0" * 5000: "1 line left out",
    b"\0" * 3_000_000 + b"0,,4,1,\r\n": "1 line left out",
    b"x" * 3_000_000: "1 line left out",
    "0,,4,0.2ä,\r\n".encode()[:-4]: "1 line left out",
    b"\xff\xfe\xfa\r\n\r\nrubbish\r\n": "3 lines left out",
    b"0,,4,0.2\0,\r\n": "1 line left out",
    b"0,,,0.25,\r\n": "1 line left out",
    b"0,,4.5,0.25,\r\n": "1 line left out",
    b"0,,4,0,25,\r\n": "1 line left out",
    b"0,,4,much,\r\n": "1 line left out",
    b'0,,4,"0.25,\r\n': "1 line left out",
    b"0,,4,0.\x000,,4,0.25,\r\n1,,5,0.25,\r\n": "1 line left out",  # a row that was cut, and two after it
    b"1,,5,0.25,\r\n": None,  # comes again
}


@pytest.mark.parametrize(("tail", "said"), WHOLE.items(), ids=[repr(tail[:24]) for tail in WHOLE])
def test_damaged_end_is_cut(tail: bytes, said: str | None, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "metrics.csv"
    expected = write(tmp_path)
    path.write_bytes(expected + tail)
    log = RunLog(tmp_path, "", "")
    log.go_on(4)
    assert path.read_bytes() == expected
    log.log_metrics({"epoch": 1, "lr/decay": 0.1}, 4)
    log.save()
    assert path.read_bytes() == expected + b"1,0.1,4,,\r\n"
    warned = [str(warning.message) for warning in recwarn if "metrics.csv" in str(warning.message)]
    assert warned == ([] if said is None else [f"'{path}' is damaged: {said}, 5 rows kept"])


def test_rows_from_the_step_on_are_dropped_with_columns_of_their_own(tmp_path: Path) -> None:
    expected = write(tmp_path, count=3)
    write(tmp_path)
    RunLog(tmp_path, "", "").go_on(2)
    assert (tmp_path / "metrics.csv").read_bytes() == expected


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"\0" * 100,
            b"a,b\r\n1,2\r\n",
            b"epoch,step",
            b"step,step\r\n1,1\r\n",
            b"\xff,step\r\n",
            b"x" * 3_000_000,
        ),
        b"0,,4,0.25,\r\n0,,5,0.25,\r\n",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_log_without_a_header_is_set_aside(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    log = RunLog(tmp_path, "", "")
    with pytest.warns(UserWarning, match=r"has no header that can be read: it is now metrics.csv.damaged, and 0 rows"):
        log.go_on(2)
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == content
    log.log_metrics({"epoch": 1}, 2)
    log.save()
    assert (tmp_path / "metrics.csv").read_bytes() == b"epoch,step\r\n1,2\r\n"


def test_columns_that_this_version_does_not_log_stay(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"\xef\xbb\xbfold,step\n1.5,0\n,1\n2.5,2\n")
    log = RunLog(tmp_path, "", "")
    log.go_on(2)
    log.log_metrics({"new": 3}, 2)
    log.save()
    assert read_log(tmp_path / "metrics.csv").rows == [
        {"old": "1.5", "step": "0"},
        {"step": "1"},
        {"new": "3", "step": "2"},
    ]


def test_nothing_to_go_on_with_is_no_error(tmp_path: Path) -> None:
    RunLog(tmp_path, "", "").go_on(2)
    assert not (tmp_path / "metrics.csv").exists()


def test_killed_while_a_column_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, "", "")
    expected = write(tmp_path, log, 3)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    log.log_metrics({"val/top1_cls": 1.0}, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        log.save()
    assert (tmp_path / "metrics.csv").read_bytes() == expected


def test_full_disk_cuts_no_row_and_loses_none(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "", "")
    before = write(tmp_path, log)
    log.log_metrics({"epoch": 2, "train/loss_step": 0.125}, 4)
    with longest_file(len(before) + 5), pytest.raises(OSError, match="No space left"):
        log.save()
    assert (tmp_path / "metrics.csv").read_bytes() == before
    log.save()
    assert (tmp_path / "metrics.csv").read_bytes() == before + b"2,,4,0.125,\r\n"
