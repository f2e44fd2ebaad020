"""What the process that others are forked from does before, so that none of them has to: see `tests.fresh`.

It imports every module, composes settings, loads what numba has compiled and draws a picture. Torch computes nothing in
it, since a fork would lack torch's threads.
"""

import gc
import io
import pkgutil
from importlib import import_module

import numpy as np
import pytest  # noqa: F401  # the main module of a run that is not distributed
from matplotlib.backends.backend_agg import FigureCanvasAgg

import wsolkit
from wsolkit.localization.boxes import boxes_at_thresholds
from wsolkit.reporting.figure import PlainFigure
from wsolkit.settings.compose import load_config

RARE = ("wsolkit.__main__", "wsolkit.serving.page")  # this one imports gradio, which takes long

for module in pkgutil.walk_packages(wsolkit.__path__, "wsolkit."):
    if module.name not in RARE:
        import_module(module.name)
for name in ("tests.fresh", "pydantic.main", "lightning.pytorch.loggers", "torch.distributed.optim"):
    import_module(name)

load_config()
boxes_at_thresholds(np.eye(8, dtype=np.float32), np.array([0.2, 0.5]), "largest")
figure = PlainFigure()
figure.add_subplot().set_title("warm")
FigureCanvasAgg(figure).print_png(io.BytesIO())
gc.collect()
gc.freeze()  # a fork then shares the memory of what is there
