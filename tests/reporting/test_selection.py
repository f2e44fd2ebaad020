"""What choosing without ground truth costs, as the numbers of one run tell it."""

from __future__ import annotations

from wsolkit.reporting.selection import COLUMNS, chosen_epochs, selection_rows

EPOCHS = {
    "epochs/epoch": [1.0, 2.0, 3.0],
    "epochs/top1_cls": [50.0, 60.0, 70.0],
    "epochs/v1/pseudo_max_box_acc": [40.0, 45.0, 45.0],
    "epochs/v1/max_box_acc": [66.0, 64.0, 61.0],
}
RESULTS = {
    **{"v1/threshold_by_pseudo": 0.31, "v1/gt_known_loc_by_pseudo": 62.0},
    **{"v1/threshold_by_truth": 0.27, "v1/gt_known_loc_by_truth": 63.4},
    **{"v2/threshold_by_truth": 0.25, "v2/gt_known_loc_by_truth": 70.0},
}


def test_each_way_to_choose_takes_its_best_epoch() -> None:
    """The earlier one of equal epochs, as the checkpoint is kept."""
    chosen = chosen_epochs(RESULTS, EPOCHS)
    assert chosen == {"epochs/by_classification": 3, "epochs/by_pseudo": 2, "epochs/by_truth": 1}


def test_rows_have_the_epoch_of_the_first_protocol_and_the_threshold_of_each() -> None:
    rows = selection_rows(RESULTS | chosen_epochs(RESULTS, EPOCHS), EPOCHS, {"v1": "pseudo", "v2": "fixed"})
    assert [(row.protocol, row.name, *row.cells) for row in rows] == [
        ("v1", "pseudo boxes (this run)", "2", "60.0", "45.0", "64.0", "0.310", "62.0"),
        ("v1", "classification", "3", "70.0", "45.0", "61.0", "–", "–"),
        ("v1", "ground truth (val)", "1", "50.0", "40.0", "66.0", "0.270", "63.4"),
        ("v2", "ground truth (val)", "–", "–", "–", "–", "0.250", "70.0"),
    ]
    assert {len(row.cells) for row in rows} == {len(COLUMNS)}


def test_evaluation_without_training_compares_thresholds_alone() -> None:
    rows = selection_rows(RESULTS, {}, {})
    assert [row.cells[:4] for row in rows] == [("–",) * 4] * 3


def test_run_that_chose_by_ground_truth_compares_nothing() -> None:
    results = {"v1/threshold": 0.3, "v1/gt_known_loc": 60.0}
    assert chosen_epochs(results, EPOCHS) == {}
    assert selection_rows(results, EPOCHS, {"v1": "val"}) == []
