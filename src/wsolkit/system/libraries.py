"""What libraries say of themselves."""

from __future__ import annotations

import logging
import warnings


def quieten_libraries() -> None:
    """Leave warnings that a user can act upon, and drop what Lightning says of itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "Experiment logs directory",  # the run directory is meant to hold the log
        "Checkpoint directory .* exists and is not empty",
        ".*does not have many workers",  # the built-in data set needs none
        ".*treespec, LeafSpec.*",
        "The number of training batches",
        ".*sync_dist=True",  # what is logged is of all processes already
        "`broadcast_buffers` is deprecated",
        ".*compute.*method of metric .* was called before",  # a process may get no image of a small split
    ):
        warnings.filterwarnings("ignore", message=message)
