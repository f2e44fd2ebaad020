"""Random numbers that depend on what they are for and on nothing else."""

from __future__ import annotations

import numpy as np


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2³²) from non-negative integers, such as (seed, epoch, index): equal parts, equal seed."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
