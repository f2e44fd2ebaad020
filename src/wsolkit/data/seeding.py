"""Derive random seeds from what they are for."""

from __future__ import annotations

import numpy as np


def derive_seed(*parts: int) -> int:
    """Return a seed in [0, 2³²) from non-negative integers, such as (seed, epoch, index). Equal parts give one seed."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
