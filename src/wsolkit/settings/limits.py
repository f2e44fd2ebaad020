"""Check the ranges of numbers among the settings, before anything is read or built."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from wsolkit.errors import ConfigError


class Limits(NamedTuple):
    """The range of a setting, with `words` that describe it.

    low, high: the ends of the range, which belong to it unless `open_low` or `open_high` is set.
    """

    words: str
    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def hold(self, value: float) -> bool:
        """Say whether a number is in the range."""
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)


_COUNT = Limits("1 or more", 1)
_NOT_NEGATIVE = Limits("0 or more", 0)
_POSITIVE = Limits("a number above 0", 0, open_low=True)
_SHARE = Limits("a number from 0 to less than 1", 0, 1, open_high=True)

# The keys are dotted names of settings, or of lists of numbers. Other values, such as null and auto, pass.
LIMITS: Mapping[str, Limits] = {
    "patience": _COUNT,
    "seed": Limits("a whole number from 0 to 4294967295", 0, 2**32 - 1),  # NumPy accepts these seeds.
    "num_examples": _NOT_NEGATIVE,
    "num_table_images": _NOT_NEGATIVE,
    "num_workers": _NOT_NEGATIVE,
    "batch_size": _COUNT,
    "top_k": _COUNT,
    "checkpoints.every_n_steps": _COUNT,
    "checkpoints.every_n_minutes": _POSITIVE,
    "optimizer.lr": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.momentum": _SHARE,
    "optimizer.betas": _SHARE,
    "optimizer.eps": _NOT_NEGATIVE,
    "schedule.warmup_epochs": _NOT_NEGATIVE,
    "dataset.num_workers": _NOT_NEGATIVE,
    "dataset.batch_size": _COUNT,
    "dataset.eval_batch_size": _COUNT,
    "dataset.image_size": _COUNT,
    "dataset.eval_image_size": _COUNT,
    "dataset.resize": _COUNT,
    "dataset.num_classes": _COUNT,
    "dataset.subset_seed": _NOT_NEGATIVE,
    "backbone.drop_path_rate": _SHARE,
    "trainer.num_nodes": _COUNT,
    "trainer.max_epochs": _COUNT,
    "trainer.accumulate_grad_batches": _COUNT,
    "trainer.gradient_clip_val": _NOT_NEGATIVE,
    "trainer.check_val_every_n_epoch": _COUNT,
    "trainer.log_every_n_steps": _COUNT,
    "trainer.limit_train_batches": _NOT_NEGATIVE,
    "trainer.limit_val_batches": _NOT_NEGATIVE,
    "trainer.limit_test_batches": _NOT_NEGATIVE,
}


def check_limits(settings: Mapping[str, Any]) -> None:
    """Check that every number of the settings is finite and in its range, if `LIMITS` has one.

    Raises:
        ConfigError: a number is not. The message names it.
    """
    for key, value in _numbers(settings, ""):
        limits = LIMITS.get(key)
        if not math.isfinite(value):
            raise ConfigError(f"{key}={value}: expected {limits.words if limits else 'a finite number'}")
        if limits and not limits.hold(value):
            raise ConfigError(f"{key}={value}: expected {limits.words}")


def _numbers(node: Any, key: str) -> Iterator[tuple[str, float]]:
    """Yield every number in the settings with its dotted name. A number in a list has the name of the list."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _numbers(value, key)
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield key, node
