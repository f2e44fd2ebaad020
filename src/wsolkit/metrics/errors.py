"""Analyse the errors of boxes as in SPA (Pan et al., CVPR 2021, supplement, Algorithm 1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from wsolkit.localization.boxes import iou
from wsolkit.system.compiled import compiled

ERRORS = ("correct", "cls", "m_ins", "part", "more", "other")
"""The errors, one for every image: none, a wrong class, several objects in one box, a part of the object, too much."""

CORRECT, CLS, M_INS, PART, MORE, OTHER = range(len(ERRORS))


@compiled
def localization_errors(boxes: Any, truth: Any) -> Any:
    """Sort the boxes [m, 4] of rightly classified images by their error, given true boxes [n, 4]. Return uint8 [m].

    The first of these conditions that holds counts. correct: IoU > 0.5 with a true box. m_ins: more than one true box
    has IoG > 0.3. part: IoP > 0.5 with a true box. more: IoG > 0.7 with a true box. other: none of these. IoG and IoP
    divide the intersection by the area of the true and of the predicted box. Both corners are inside a box.
    """
    kinds = np.full(len(boxes), OTHER, np.uint8)
    for m in range(len(boxes)):
        box = boxes[m]
        area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
        correct, part, more, instances = False, False, False, 0
        for n in range(len(truth)):
            true = truth[n]
            width = max(min(box[2], true[2]) - max(box[0], true[0]) + 1, 0)
            height = max(min(box[3], true[3]) - max(box[1], true[1]) + 1, 0)
            of_truth = width * height / ((true[2] - true[0] + 1) * (true[3] - true[1] + 1))
            correct |= iou(box, true) > 0.5
            instances += of_truth > 0.3
            part |= width * height / area > 0.5
            more |= of_truth > 0.7
        if correct:
            kinds[m] = CORRECT
        elif instances > 1:
            kinds[m] = M_INS
        elif part:
            kinds[m] = PART
        elif more:
            kinds[m] = MORE
    return kinds
