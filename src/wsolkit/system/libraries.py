"""Control what libraries print."""

from __future__ import annotations

import logging
import warnings


def quieten_libraries() -> None:
    """Keep the warnings that a user can act upon, and drop Lightning's remarks about itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "Experiment logs directory",  # The run directory is meant to hold the log.
        "Checkpoint directory .* exists and is not empty",
        ".*does not have many workers",  # The built-in data set needs no workers.
        ".*treespec, LeafSpec.*",
        "The number of training batches",
        "Found .* module.s. in eval mode",  # A frozen backbone stays in it.
        ".*sync_dist=True",  # The logged values are over all processes already.
        "`broadcast_buffers` is deprecated",
        ".*compute.*method of metric .* was called before",  # A process may get no image of a small split.
    ):
        warnings.filterwarnings("ignore", message=message)
