"""Classes are their names: looking one up, and matching those of a data set with those of a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from wsolkit.data.classes import check_same_classes, class_label, known_labels
from wsolkit.data.records import Records, file_records
from wsolkit.data.subset import part_of
from wsolkit.errors import CheckpointError, ConfigError, DataError

CRANES = ["ant", "crane", "crane", "2", "dog"]


@pytest.mark.parametrize(
    ("given", "label"), [("ant", 0), (1, 1), ("1", 1), ("2", 3), (2, 3), ("dog", 4), (4, 4), ("3", 3)]
)
def test_a_class_is_found_by_name_then_by_number(given: str | int, label: int) -> None:
    assert class_label(CRANES, given) == label


def test_a_number_that_is_a_name_is_said_to_be_one() -> None:
    with pytest.warns(UserWarning, match="a number that is the name of a class means that class"):
        class_label(CRANES, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        class_label(["0", "1"], 1)  # name and number are one


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("crane", "2 classes are called 'crane': say which one by its number, 1 or 2"),
        ("Dog", "there is no class 'Dog' (did you mean 'dog'?); there are 5, by name or from 0 to 4: ant, crane"),
        (5, "there is no class '5'"),
        (-1, "there is no class '-1'"),
        ("01", "there is no class '01'"),  # a folder's name rather than a number
        (True, "there is no class 'True'"),
    ],
)
def test_what_is_no_class_is_named(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        class_label(CRANES, given)
    assert message in str(caught.value)


ANIMALS = ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    ("classes", "known", "labels"),
    [
        (ANIMALS, ANIMALS, [0, 1, 2]),
        (["cat", "ant", "bee"], ANIMALS, [2, 0, 1]),  # in another order
        (["ant", "cat"], ANIMALS, [0, 2]),  # without one
        (["ant", "crane", "crane"], ["ant", "crane", "crane"], [0, 1, 2]),
        (["crane", "ant"], ["ant", "crane", "bee", "bee"], [1, 0]),  # those of one name are not asked for
        (["0", "2"], ["0", "1", "2"], [0, 2]),
        (ANIMALS, ["0", "1", "2"], [0, 1, 2]),  # an imported model without names
        (["0", "1"], ANIMALS, [0, 1]),  # lists without names
    ],
)
def test_classes_of_a_data_set_have_the_labels_of_the_model(
    classes: list[str], known: list[str], labels: list[int]
) -> None:
    everything = range(len(classes))
    assert known_labels(classes, everything, set(everything), known) == labels


@pytest.mark.parametrize(
    ("classes", "known", "message"),
    [
        (
            ["ant", "bees", "cat"],
            ANIMALS,
            "the model does not know 'bees' (did you mean 'bee'?) of the data set's classes; it was trained on 3, of "
            "which the data set lacks 'bee'. Classes are matched by name: rename them",
        ),
        (
            [*ANIMALS, "dog"],
            ANIMALS,
            "does not know 'dog' of the data set's classes; it was trained on 3, all of which",
        ),
        (["crane", "ant"], ["ant", "crane", "crane"], "several classes are called 'crane', and"),
        (["crane", "ant", "crane"], ["ant", "crane"], "several classes are called 'crane', and"),
        (ANIMALS, ["0", "1"], "the data set has 3 classes and the model knows 2; those of the model have numbers"),
        (["ant", "bee"], ["0", "1", "2"], "the data set has 2 classes and the model knows 3; those of the model"),
        (["0", "1", "2", "3"], ANIMALS, "has 4 classes and the model knows 3; those of the data set have numbers"),
    ],
)
def test_classes_that_cannot_be_matched_are_named(classes: list[str], known: list[str], message: str) -> None:
    everything = range(len(classes))
    with pytest.raises(DataError) as caught:
        known_labels(classes, everything, set(everything), known)
    assert message in str(caught.value)


def records(classes: list[str], labels: list[int]) -> Records:
    return file_records(Path(), [f"{number}.jpg" for number in range(len(labels))], labels, classes, {}, None)


def test_a_split_is_numbered_as_the_model_is() -> None:
    zoo = records(["dog", "cat", "ant"], [0, 1, 2, 1])
    known = ["ant", "bee", "cat", "dog"]
    with pytest.warns(
        UserWarning, match=r"the test split has no images of 1 of the 4 classes .* \('bee'\): accuracy is"
    ):
        part = part_of(zoo, "test", None, None, None, 0, known)
    assert (list(part.classes), part.labels.tolist()) == (known, [3, 2, 0, 2])
    assert [part.name(index) for index in range(4)] == [zoo.name(index) for index in range(4)]
    kept = part_of(zoo, "test", ["ant", 1], None, None, 0, known)  # by names and numbers of the data set
    assert ([kept.name(index) for index in range(3)], kept.labels.tolist()) == (["1.jpg", "2.jpg", "3.jpg"], [2, 0, 2])
    assert part_of(zoo, "test", None, None, None, 0, ["dog", "cat", "ant"]) is zoo


def test_a_class_without_images_need_not_be_known() -> None:
    zoo = records(["ant", "zebra", "cat"], [0, 2])
    assert part_of(zoo, "test", None, None, None, 0, ["ant", "cat"]).labels.tolist() == [0, 1]
    assert part_of(
        records(["zebra", "cat", "ant"], [0, 1]), "val", ["cat"], None, None, 0, ["cat"]
    ).labels.tolist() == [0]


@pytest.mark.parametrize(
    ("found", "difference"),
    [
        (["ant", "bee"], "the data set lacks 'cat'"),
        ([*ANIMALS, "dog"], "the data set has 'dog'"),
        (["ant", "bees", "cat"], "the data set lacks 'bee' and has 'bees' (did you mean 'bee'?)"),
        (["ant", "cat", "bee"], "they are in another order: 1 was 'bee' and is 'cat'"),
        (["ant", "bee", "cat", "cat"], "the data set has 4"),
        (["0", "1"], "the data set lacks 'ant', 'bee', 'cat' and has '0', '1'"),
    ],
)
def test_training_goes_on_with_its_classes_only(found: list[str], difference: str) -> None:
    check_same_classes(ANIMALS, ANIMALS, "resume=x")
    check_same_classes(ANIMALS, ["0", "1", "2"], "resume=x")  # one side has no names
    with pytest.raises(CheckpointError) as caught:
        check_same_classes(ANIMALS, found, "resume=x")
    assert f"resume=x belongs to a run on 3 classes, but these differ: {difference}. A run" in str(caught.value)
