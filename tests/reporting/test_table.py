"""The table at the end of a run shows what there is, once."""

from __future__ import annotations

import io

from wsolkit.reporting.table import print_results
from wsolkit.reporting.terminal import PlainConsole


def printed(results: dict[str, float]) -> list[list[str]]:
    """The words of each line."""
    output = io.StringIO()
    print_results(PlainConsole(file=output, width=100), results, {"v1": "val", "v2": "test"}, "sat", "sat on photos")
    return [line.split() for line in output.getvalue().splitlines() if line.split()]


def localized(protocol: str, accuracy: float, **baselines: float) -> dict[str, float]:
    numbers = {"top1_cls": 80.0, "threshold": 0.25, "max_box_acc": accuracy}
    numbers |= {f"{name}/max_box_acc": value for name, value in baselines.items()}
    return {f"{protocol}/{name}": value for name, value in numbers.items()}


def test_without_boxes_classification_is_said_once() -> None:
    classified = {"top1_cls": 43.75, "top5_cls": 100.0}
    of_protocols = {f"{name}/{key}": value for name in ("v1", "v2") for key, value in classified.items()}
    title, top, head, _, row, *said = printed(classified | of_protocols)
    assert (title, top, head, row) == (
        ["sat", "on", "photos"],
        ["Top-1", "Top-5"],
        ["sat", "Cls", "Cls"],
        ["classification", "43.8", "100.0"],
    )
    assert " ".join(word for line in said for word in line) == (
        "In percent. The images have neither boxes nor masks: classification is all that can be evaluated."
    )


def test_baselines_on_which_protocols_agree_are_listed_once() -> None:
    agreeing = localized("v1", 61.0, center_box=50.0) | localized("v2", 62.0, center_box=50.0)
    rows = printed({"top1_cls": 80.0} | agreeing | localized("v3", 63.0, center_box=40.0))[4:9]
    assert rows == [
        ["v1", "0.250", "val", "80.0", "61.0"],
        ["v2", "0.250", "test", "80.0", "62.0"],
        ["center_box", "–", "–", "–", "50.0"],
        ["v3", "0.250", "80.0", "63.0"],
        ["center_box", "–", "–", "–", "40.0"],
    ]


def test_a_protocol_that_classifies_in_its_own_way_keeps_its_row() -> None:
    rows = printed({"top1_cls": 80.0, "v1/top1_cls": 80.0, "v2/top1_cls": 81.0})
    assert ["v2", "81.0"] in [[row[0], row[-1]] for row in rows]
    assert not any(row[0] == "v1" for row in rows)
