"""Create transformers and convolutional networks of timm, load their weights, and find their input statistics."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import huggingface_hub.constants as hub
import requests
import timm
from torch import Tensor, nn

from wsolkit.errors import CheckpointError, ConfigError

# These arguments of timm name a file or an address. Settings may come from a checkpoint of another person.
_SOURCES = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}


def create(model: str, pretrained: bool, settings: Mapping[str, Any]) -> nn.Module:
    """Create a timm model, with weights from its hub if `pretrained` is set.

    Raises:
        ConfigError: timm has no such model, or none with these settings.
        CheckpointError: the weights could not be downloaded.
    """
    for name in sorted(_SOURCES & settings.keys()):
        raise ConfigError(
            f"backbone.options.{name}: options change the shape of timm's model and read nothing from elsewhere: "
            "set weights as backbone.weights=FILE or backbone.pretrained=true"
        )
    if not timm.is_model(model):
        raise ConfigError(f"timm has no model '{model}'; similar names: {_similar(model)}")
    unreachable = _why_unreachable() if pretrained else None
    try:
        with _offline(unreachable is not None):
            network: nn.Module = timm.create_model(model, pretrained=pretrained, **settings)
    except TypeError as error:
        raise ConfigError(f"backbone.options: timm's '{model}' does not take {dict(settings)} ({error})") from error
    except Exception as error:  # The errors of the hub's client have no common base class.
        if not pretrained:
            raise
        raise CheckpointError(
            f"the weights of '{model}' could not be loaded from timm's hub "
            f"({unreachable or f'{type(error).__name__}: {str(error).splitlines()[0]}'}). "
            "Give a local file with backbone.weights=FILE, or train from scratch with backbone.pretrained=false. With "
            "a file of any transformer, method=ffe learns from a few hundred images in seconds: see docs/frozen.md"
        ) from error
    return network


_TRIES = 2
_TIMEOUT = 3.0  # Seconds to connect, and to wait for an answer.
_PAUSE = 1.0


def _why_unreachable() -> str | None:
    """Ask the hub for any answer. Return why there is none, or None if there is one or the user works offline.

    The hub's own client would try for a minute, and print a warning each time.
    """
    if hub.HF_HUB_OFFLINE:
        return None
    reason = ""
    for attempt in range(_TRIES):
        time.sleep(_PAUSE * attempt)
        try:
            requests.head(hub.ENDPOINT, timeout=_TIMEOUT)
            return None
        except requests.RequestException as error:
            reason = f"{hub.ENDPOINT} cannot be reached: {type(error).__name__}"
    return reason


@contextmanager
def _offline(needed: bool) -> Iterator[None]:
    """Restrict the hub's client to its cache, if needed."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or needed
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def load(network: nn.Module, state: Mapping[str, Tensor], classifier: str, source: str) -> None:
    """Load weights in timm's names into a network. Weights of its classifier, which has a prefix, may be missing.

    Raises:
        CheckpointError: an entry is missing, unknown or has another shape.
    """
    own = {name: value for name, value in network.state_dict().items() if not name.startswith(f"{classifier}.")}
    given = {name: value for name, value in state.items() if not name.startswith(f"{classifier}.")}
    # Files may lack BatchNorm's counters, which only matter for a cumulative average.
    missing = sorted(name for name in own.keys() - given.keys() if not name.endswith("num_batches_tracked"))
    unknown = sorted(given.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(given[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    problems = {"missing": missing, "not part of the model": unknown, "of another shape": shapes}
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names)
        raise CheckpointError(
            f"weights in '{source}' do not fit the backbone: {found}. Choose the backbone that they belong to."
        )
    network.load_state_dict(given, strict=False)


def normalization(
    model: str | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of the network's input, for values in [0, 1].

    Args:
        model: timm's name, or None for a network that timm does not have.
        mean, std: of red, green and blue. None takes the values with which timm's weights of this model were trained.

    Raises:
        ConfigError: they are not three numbers each, or timm would have to provide them and has no such model.
    """
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        numbers = isinstance(values, Sequence) and all(isinstance(value, int | float) for value in values)
        if not numbers or len(values) != 3 or (name == "std" and min(values) <= 0):
            raise ConfigError(
                f"backbone.{name}={values}: expected three numbers, of red, green and blue"
                + (", above 0" if name == "std" else "")
            )
    if mean is not None and std is not None:
        return tuple(mean), tuple(std)
    if model is None:
        raise ConfigError("backbone.mean and backbone.std: expected three numbers each, since timm has no such network")
    pretrained = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    if pretrained is None:
        raise ConfigError(f"timm has no model '{model}' with pretrained weights; similar names: {_similar(model)}")
    return tuple(mean or pretrained.mean), tuple(std or pretrained.std)


def _similar(model: str) -> str:
    known = timm.list_models(pretrained=True) + timm.list_models("vit_*")
    return ", ".join(difflib.get_close_matches(model, known, n=5, cutoff=0.3))
