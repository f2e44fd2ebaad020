"""Identify classes by name: look one up, and match the classes of a data set with those of a model.

Classes without names are called by their numbers, "0", "1", …. This concerns data sets without a list of names, and
models that were imported without one.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_warn

from wsolkit.errors import CheckpointError, ConfigError, DataError

_FEW = 5  # A message shows this many names.
_LISTED = 8  # The message about a missing name lists this many others.


def class_label(names: Sequence[str], given: str | int) -> int:
    """Return the label of a class, by its name or its number. A name takes precedence over a number.

    Args:
        names: the names by label.
        given: a name, or a number from 0 on, also as text.

    Raises:
        ConfigError: there is no such class, or several have this name.
    """
    text = str(given)
    labels = [label for label, name in enumerate(names) if name == text]
    number = int(text) if text.isdecimal() and str(int(text)) == text and int(text) < len(names) else None
    if len(labels) > 1:
        raise ConfigError(
            f"{len(labels)} classes are called '{text}': say which one by its number, {_or(map(str, labels))}"
        )
    if labels:
        if number not in (None, labels[0]):
            rank_zero_warn("a number that is the name of a class means that class, whatever number it has itself")
        return labels[0]
    if number is not None:
        return number
    raise ConfigError(
        f"there is no class '{text}'{did_you_mean(text, names)}; there are {len(names)}, by name or from 0 to "
        f"{len(names) - 1}: {', '.join(names[:_LISTED])}{', …' if len(names) > _LISTED else ''}"
    )


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a hint at the most similar of some names, in brackets, or "" if none is similar."""
    folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f" (did you mean '{folded[close[0]]}'?)" if close else ""


def warn_of_numbers(names: Sequence[str], path: Path) -> None:
    """Warn if the classes of a checkpoint have numbers for names."""
    if are_numbers(names):
        rank_zero_warn(
            f"the {len(names)} classes of '{path}' have numbers for names: labels are not matched with the data set's "
            "by name, but taken as they are"
        )


def are_numbers(names: Sequence[str]) -> bool:
    """Say whether classes are called by their labels because they have no names."""
    return all(name == str(label) for label, name in enumerate(names))


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that several classes have."""
    return [name for name, count in Counter(names).items() if count > 1]


def known_labels(classes: Sequence[str], kept: Sequence[int], present: set[int], known: Sequence[str]) -> list[int]:
    """Return the label in a model of each class in a data set, matched by name.

    If one side has numbers for names, labels are used as they are, provided that the numbers of classes fit.

    Args:
        classes: the names in the data set, by label.
        kept: the labels of the classes to match.
        present: those of them that have images.
        known: the names in the model, by label.

    Returns:
        a label for each of `kept`, or -1 for a class without images that the model does not know.

    Raises:
        DataError: there are images of a class that the model does not know, or classes cannot be told apart.
    """
    names = [classes[label] for label in kept]
    if names == list(known):
        return list(range(len(known)))
    if list(classes) == list(known):
        return list(kept)
    wanted = [classes[label] for label in kept if label in present]
    unknown = sorted(set(wanted) - set(known))
    if unknown and (are_numbers(known) or are_numbers(classes)):
        # Labels of a data set without names are its numbers anyway, and the highest class may have no images.
        _check_numbers(
            classes, known, len(classes) <= len(known) if are_numbers(classes) else len(classes) == len(known)
        )
        return list(kept)
    if unknown:
        missing = _without(known, names)
        raise DataError(
            f"the model does not know {_each(unknown, missing or known)} of the data set's classes; it was trained on "
            f"{_others(missing, known)}. Classes are matched by name: rename them, or name those to evaluate with "
            "dataset.classes=[…]"
        )
    twice = sorted({*repeated(names), *repeated(known)} & set(wanted))
    if twice:
        raise DataError(
            f"several classes are called {_few(twice)}, and the data set's classes are not those of the model in the "
            "same order: which is which cannot be told by name"
        )
    label_of = {name: label for label, name in enumerate(known)}
    return [label_of.get(name, -1) for name in names]


def check_same_classes(trained: Sequence[str], found: Sequence[str], resume: str) -> None:
    """Check that a resumed run has the same classes in the same order.

    Args:
        trained: the names of the classes in the checkpoint, by label.
        found: the names in the data set, by label.
        resume: the setting that names the checkpoint.

    Raises:
        CheckpointError: the classes differ.
    """
    trained, found = list(trained), list(found)
    if trained == found:
        return
    lacking, new = _without(trained, found), _without(found, trained)
    if len(trained) != len(found) or not (are_numbers(trained) or are_numbers(found)):
        if lacking or new:
            parts = [f"lacks {_few(lacking)}"] * bool(lacking) + [f"has {_each(new, lacking)}"] * bool(new)
            difference = f"the data set {' and '.join(parts)}"
        elif len(trained) != len(found):
            difference = f"the data set has {len(found)}"
        else:
            label = next(label for label, name in enumerate(trained) if found[label] != name)
            difference = f"they are in another order: {label} was '{trained[label]}' and is '{found[label]}'"
        raise CheckpointError(
            f"{resume} belongs to a run on {len(trained)} classes, but these differ: {difference}. A run can only "
            "continue with the same classes"
        )
    _check_numbers(found, trained, True)


def _check_numbers(classes: Sequence[str], known: Sequence[str], fits: bool) -> None:
    numbered, named = ("the data set", known) if are_numbers(classes) else ("the model", classes)
    if not fits:
        raise DataError(
            f"the data set has {len(classes)} classes and the model knows {len(known)}; those of {numbered} have "
            f"numbers for names, so which of {_few(named)} is which cannot be told. Expected the classes that the "
            "model was trained on"
        )
    rank_zero_warn(
        f"classes of {numbered} have numbers for names ({len(classes)} in the data set, {len(known)} in the model): "
        "labels are taken as they are"
    )


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    left_out = set(others)
    return [name for name in names if name not in left_out]


def _each(names: Sequence[str], meant: Sequence[str]) -> str:
    """Return the first of some names, each with the name that may be meant."""
    shown = [f"'{name}'{did_you_mean(name, meant)}" for name in names[:_FEW]]
    return ", ".join(shown) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def _few(names: Sequence[str]) -> str:
    return _each(names, ())


def _others(missing: Sequence[str], known: Sequence[str]) -> str:
    if missing:
        return f"{len(known)}, of which the data set lacks {_few(missing)}"
    return f"{len(known)}, all of which the data set has"


def missing_classes(split: str, present: set[int], known: Sequence[str]) -> str | None:
    """Explain the accuracy if a split has no images of some classes of a model. Return None if it has images of all.

    Args:
        split: the split.
        present: the labels in the model that have images.
        known: the names of the model's classes, by label.
    """
    missing = [name for label, name in enumerate(known) if label not in present]
    if not missing:
        return None
    return (
        f"the {split} split has no images of {len(missing)} of the {len(known)} classes that the model knows "
        f"({_few(missing)}): accuracy is that of the images there are, told apart from all {len(known)} classes"
    )


def _or(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} or {last}"
