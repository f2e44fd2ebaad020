"""What the process that others are forked from does before, so that none of them has to: see `tests.fresh`.

It imports, composes settings, loads what numba has compiled and draws a picture; torch computes nothing in it, since a
fork would lack torch's threads.
"""

import gc
import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from wsolkit.localization.boxes import boxes_at_thresholds
from wsolkit.reporting.figure import PlainFigure
from wsolkit.settings.compose import load_config

load_config()
boxes_at_thresholds(np.eye(8, dtype=np.float32), np.array([0.2, 0.5]), "largest")
figure = PlainFigure()
figure.add_subplot().set_title("warm")
FigureCanvasAgg(figure).print_png(io.BytesIO())
gc.collect()
gc.freeze()  # a fork then shares the memory of what is there
