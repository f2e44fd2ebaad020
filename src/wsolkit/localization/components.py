"""What lies above every threshold at once: connected components, and the holes in them, of all level sets of a map.

The pixels above a threshold c are {levels > c}. As c falls, their 8-connected components appear, grow and join, and
never part; so one pass over the pixels from the highest level down, with a union-find, meets every component of every
threshold (the max-tree; Najman and Couprie, "Building the component tree in quasi-linear time", 2006). A *node* is a
component that stays the same over a range of thresholds. Holes are 4-connected components of {levels <= c} that are
shut off from the border; upside down they are components too.

Compiled by numba, without Python's lock, so that threads run it beside the network's forward pass. Maps are padded by
one pixel of level 0 all around (`pad`), and p stands for a pixel's index in the padded map, y · (W + 2) + x.

A table of nodes has a row for each node: x0, y0, x1, y1 (first and last pixel inside, unpadded), low and high (it is
there at the thresholds low <= c < high), rank (the sum of its pixels' gains), first (its first pixel in raster order),
branch. A *branch* begins with a pixel that no neighbour precedes and goes on until it joins a larger one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

LOW, HIGH, RANK, FIRST, BRANCH = range(4, 9)  # columns of a table of nodes, after its box
_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile to machine code that runs outside Python's lock; kept on disk where there is a place for it."""
    try:
        return cast(_Function, numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:  # no folder that numba may write its cache to
        return cast(_Function, numba.njit(nogil=True)(function))


def _arcs(diagonals: bool) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """Which neighbours of a pixel to join, for each set of neighbours that are in, a byte (bit 0: north, clockwise).

    Neighbours that touch one another around the pixel are in one component already, so one of them stands for all.
    Returns their number [256] and their positions around the pixel [256, 4].
    """
    count, chosen = np.zeros(256, np.int8), np.zeros((256, 4), np.int8)
    step = 1 if diagonals else 2
    for present in range(256):
        inside = [k for k in range(0, 8, step) if present >> k & 1]
        groups: list[set[int]] = []
        for k in inside:
            group = {k}
            # Next to each other around the pixel; the straight neighbours also across a corner.
            near = {(k + d) % 8 for d in ((1, -1) if diagonals else ())}
            if k % 2 == 0:
                corners = ((k + 1) % 8, (k + 2) % 8), ((k - 1) % 8, (k - 2) % 8)
                near |= {end for corner, end in corners if diagonals or present >> corner & 1}
            for other in [g for g in groups if g & near]:
                group |= other
                groups.remove(other)
            groups.append(group)
        count[present] = len(groups)
        chosen[present, : len(groups)] = [min(group) for group in groups]
    return count, chosen


def _area_gain() -> npt.NDArray[np.int8]:
    """By how much a pixel adds to twice the area that its component's outline encloses, for each set of neighbours.

    The outline runs through the centres of pixels. A 2×2 cell adds half a unit when its third pixel joins and half
    when its fourth does. So count the cells around the pixel of which two or three pixels are there before it.
    """
    gain = np.zeros(256, np.int8)
    for present in range(256):
        for k in (1, 3, 5, 7):  # each corner with the two straight neighbours beside it makes a cell
            cell = (k - 1, k, (k + 1) % 8)
            gain[present] += sum(present >> j & 1 for j in cell) >= 2
    return gain


_ARCS_8, _CHOSEN_8 = _arcs(diagonals=True)
_ARCS_4, _CHOSEN_4 = _arcs(diagonals=False)
AREA_GAIN = _area_gain()
"""Makes the rank of a component without holes twice `cv2.contourArea` of its outline."""
PIXEL_GAIN = np.ones(256, np.int8)
"""Makes the rank of a component its number of pixels."""


@compiled
def pad(levels: Any) -> Any:
    """Levels [H, W] → uint16 [H + 2, W + 2] with zeros around."""
    height, width = levels.shape
    padded = np.zeros((height + 2, width + 2), np.uint16)
    for y in range(height):
        for x in range(width):
            padded[y + 1, x + 1] = levels[y, x]
    return padded


@compiled
def fill_holes(padded: Any) -> Any:
    """Raise every hole to the level at which it opens to the border: min over 4-connected paths of their maximum.

    A pixel is in a hole at the thresholds from its own level to its filled one, exclusive. (Morphological
    reconstruction by erosion, by sweeps until nothing changes.)
    """
    height, width = padded.shape
    filled = np.full((height, width), np.uint16(65535), np.uint16)
    filled[0, :] = 0
    filled[height - 1, :] = 0
    filled[:, 0] = 0
    filled[:, width - 1] = 0
    for y in range(1, height - 1):
        left = np.uint16(0)
        for x in range(1, width - 1):
            left = max(min(left, filled[y - 1, x]), padded[y, x])
            filled[y, x] = left
    # From below and from the right; where a pixel could still lower a neighbour that has had its turn, remember it.
    level, fill = padded.ravel(), filled.ravel()
    waiting = np.zeros(level.size, np.bool_)
    queue = np.empty(level.size, np.int32)  # a ring; each pixel is in it once at most
    head = tail = 0
    for y in range(height - 2, 0, -1):
        right = np.uint16(0)
        for x in range(width - 2, 0, -1):
            right = max(min(filled[y, x], right, filled[y + 1, x]), padded[y, x])
            filled[y, x] = right
            p = y * width + x
            if (fill[p + 1] > right and fill[p + 1] > level[p + 1]) or (
                fill[p + width] > right and fill[p + width] > level[p + width]
            ):
                waiting[p] = True
                queue[tail] = p
                tail += 1
    pending = tail
    while pending > 0:
        p = queue[head]
        head = head + 1 if head + 1 < level.size else 0
        pending -= 1
        waiting[p] = False
        for q in (p - width, p - 1, p + 1, p + width):
            lower = max(fill[p], level[q])
            if fill[q] > lower:
                fill[q] = lower
                if not waiting[q]:
                    waiting[q] = True
                    queue[tail] = q
                    tail = tail + 1 if tail + 1 < level.size else 0
                    pending += 1
    return filled


@compiled
def _higher_neighbours(padded: Any) -> Any:
    """The neighbours that join before each pixel, as a byte: the higher ones, and of equals those before it."""
    height, width = padded.shape
    present = np.zeros((height, width), np.uint8)
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            v = padded[y, x]
            present[y, x] = (
                (padded[y - 1, x] >= v)
                | (padded[y - 1, x + 1] >= v) << 1
                | (padded[y, x + 1] > v) << 2
                | (padded[y + 1, x + 1] > v) << 3
                | (padded[y + 1, x] > v) << 4
                | (padded[y + 1, x - 1] > v) << 5
                | (padded[y, x - 1] >= v) << 6
                | (padded[y - 1, x - 1] >= v) << 7
            )
    return present


@compiled
def _sort(levels: Any, base: Any, num_levels: int) -> Any:
    """Pixels with levels > base, highest first, in raster order among equals; and where each level ends."""
    height, width = levels.shape
    end = np.zeros(num_levels + 2, np.int64)
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            if levels[y, x] > base[y, x]:
                end[levels[y, x]] += 1
    for level in range(num_levels - 1, -1, -1):
        end[level] += end[level + 1]
    place = end.copy()
    order = np.empty(end[0], np.int32)
    for y in range(height - 2, 0, -1):
        for x in range(width - 2, 0, -1):
            v = levels[y, x]
            if v > base[y, x]:
                place[v] -= 1
                order[place[v]] = y << 16 | x
    return order, end


@compiled
def _tree(levels: Any, base: Any, num_levels: int, arcs: Any, chosen: Any, gain: Any) -> Any:
    """Every component of {levels > c}, base <= c < num_levels.

    levels, base: [H + 2, W + 2] with a frame of zeros; base is the same all over a component, and ends it.

    Returns:
        nodes [n, 9]; label [pixels]: the branch that each pixel joined; joined, joined_at [branches]: into which
        branch it went, or -1, and the level there: at thresholds below it they are one.
    """
    width = levels.shape[1]
    around = np.array([-width, 1 - width, 1, 1 + width, width, width - 1, -1, -1 - width], np.int32)
    present = _higher_neighbours(levels).ravel()
    order, end = _sort(levels, base, num_levels)
    base = base.ravel()
    size = len(order)
    label = np.empty(levels.size, np.int32)
    # A component that no longer changes is written down as a node; each pixel makes one change at most.
    nodes = np.empty((2 * size, 9), np.int32)
    num_nodes = 0
    # Per branch: box (0–3), the level it changed at (4), rank (5), first pixel (6), number of pixels (7).
    state = np.empty((size, 8), np.int32)
    root = np.empty(size, np.int32)
    joined = np.empty(size, np.int32)
    joined_at = np.empty(size, np.int32)
    branches = 0
    position = 0
    for level in range(num_levels, 0, -1):
        while position < end[level]:
            x, y = order[position] & 0xFFFF, order[position] >> 16
            p = y * width + x
            position += 1
            neighbours = present[p]
            if arcs[neighbours] == 0:
                r = branches
                branches += 1
                root[r] = r
                joined[r] = -1
                state[r, 0], state[r, 1], state[r, 2], state[r, 3] = x, y, x, y
                state[r, 4], state[r, 5], state[r, 6], state[r, 7] = level, gain[neighbours], p, 1
                label[p] = r
                continue
            r = label[p + around[chosen[neighbours, 0]]]
            while root[r] != r:
                root[r] = root[root[r]]
                r = root[r]
            if state[r, 4] != level:
                _write(nodes, num_nodes, state, level, r)
                num_nodes += 1
                state[r, 4] = level
            for k in range(1, arcs[neighbours]):
                s = label[p + around[chosen[neighbours, k]]]
                while root[s] != s:
                    root[s] = root[root[s]]
                    s = root[s]
                if s == r:
                    continue
                if state[s, 4] != level:
                    _write(nodes, num_nodes, state, level, s)
                    num_nodes += 1
                if state[s, 7] > state[r, 7]:
                    r, s = s, r
                    state[r, 4] = level
                root[s] = r
                joined[s] = r
                joined_at[s] = level
                state[r, 0] = min(state[r, 0], state[s, 0])
                state[r, 1] = min(state[r, 1], state[s, 1])
                state[r, 2] = max(state[r, 2], state[s, 2])
                state[r, 3] = max(state[r, 3], state[s, 3])
                state[r, 5] += state[s, 5]
                state[r, 6] = min(state[r, 6], state[s, 6])
                state[r, 7] += state[s, 7]
            label[p] = r
            state[r, 0] = min(state[r, 0], x)
            state[r, 1] = min(state[r, 1], y)
            state[r, 2] = max(state[r, 2], x)
            state[r, 3] = max(state[r, 3], y)
            state[r, 5] += gain[neighbours]
            state[r, 6] = min(state[r, 6], p)
            state[r, 7] += 1
    for r in range(branches):
        if root[r] == r:
            _write(nodes, num_nodes, state, base[state[r, 6]], r)
            num_nodes += 1
    return nodes[:num_nodes], label, joined[:branches], joined_at[:branches]


@compiled
def _write(nodes: Any, number: int, state: Any, low: int, branch: int) -> None:
    for k in range(4):
        nodes[number, k] = state[branch, k] - 1  # without the padding
    nodes[number, LOW] = low
    nodes[number, HIGH] = state[branch, 4]
    nodes[number, RANK] = state[branch, 5]
    nodes[number, FIRST] = state[branch, 6]
    nodes[number, BRANCH] = branch


@compiled
def components(padded: Any, num_levels: int, gain: Any) -> Any:
    """The 8-connected components of {padded > c} for 0 <= c < num_levels; see `_tree` for what is returned.

    gain: what their rank counts: `PIXEL_GAIN`, or, of a map without holes, `AREA_GAIN`.
    """
    return _tree(padded, np.zeros(padded.shape, np.uint16), num_levels, _ARCS_8, _CHOSEN_8, gain)


@compiled
def holes(padded: Any, filled: Any, num_levels: int) -> Any:
    """The holes in the components of {padded > c}, with the boxes of their outlines, which run around the hole.

    filled: of `fill_holes`. See `_tree` for what is returned; here two branches are one from joined_at on upwards.
    """
    depth = np.zeros(padded.shape, np.uint16)  # upside down, a hole is a component
    base = np.zeros(padded.shape, np.uint16)
    for y in range(1, padded.shape[0] - 1):
        for x in range(1, padded.shape[1] - 1):
            depth[y, x] = num_levels - padded[y, x]
            base[y, x] = num_levels - filled[y, x]
    nodes, label, joined, joined_at = _tree(depth, base, num_levels, _ARCS_4, _CHOSEN_4, PIXEL_GAIN)
    for node in nodes:
        node[0] -= 1
        node[1] -= 1
        node[2] += 1
        node[3] += 1
        node[LOW], node[HIGH] = num_levels - node[HIGH], num_levels - node[LOW]
    return nodes, label, joined, num_levels - joined_at


@compiled
def highest_rank(nodes: Any, num_levels: int, last: bool) -> Any:
    """At each threshold, the node of highest rank; of equals, the one whose first pixel comes last, or first.

    Returns:
        row of the table for 0 <= c < num_levels, -1 where there is none.
    """
    best = np.full(num_levels, -1, np.int64)
    for n in range(len(nodes)):
        for c in range(nodes[n, LOW], nodes[n, HIGH]):
            b = best[c]
            if (
                b < 0
                or nodes[n, RANK] > nodes[b, RANK]
                or (nodes[n, RANK] == nodes[b, RANK] and (nodes[n, FIRST] > nodes[b, FIRST]) == last)
            ):
                best[c] = n
    return best


@compiled
def opencv_order(outer: Any, inner: Any, filled: Any, num_levels: int) -> Any:
    """The outlines at each threshold in the order of cv2.findContours with RETR_TREE.

    It scans for outlines in raster order; among those with one parent the last found comes first, and each is
    followed by what it contains. An outer outline is found at its first pixel, that of a hole at the pixel left
    of the hole's first; what is around an outline is at the pixel left of the former, and at the latter.

    Args:
        outer, inner: what `components` and `holes` return.
        filled: of `fill_holes`.

    Returns:
        rows, those of `inner` numbered after those of `outer`, threshold by threshold; and where each one's start.
    """
    nodes, label, joined, joined_at = outer
    hole_nodes, hole_label, hole_joined, hole_joined_at = inner
    count = len(nodes)
    found = np.concatenate((nodes[:, FIRST], hole_nodes[:, FIRST] - 1))
    low = np.concatenate((nodes[:, LOW], hole_nodes[:, LOW]))
    high = np.concatenate((nodes[:, HIGH], hole_nodes[:, HIGH]))
    start = np.zeros(num_levels + 1, np.int64)
    for n in range(len(found)):
        for c in range(low[n], high[n]):
            start[c + 1] += 1
    start = np.cumsum(start)
    place = start.copy()
    rows = np.empty(start[num_levels], np.int64)
    for n in np.argsort(found, kind="mergesort"):
        for c in range(low[n], high[n]):
            rows[place[c]] = n
            place[c] += 1

    fill = filled.ravel()
    where = np.empty(len(joined), np.int64)  # of each branch that is there, its place at this threshold
    where_hole = np.empty(len(hole_joined), np.int64)
    largest = max(np.diff(start))
    here = np.empty(largest, np.int64)
    child, sibling, parent = np.empty((3, largest + 1), np.int64)  # one entry more, for the image
    for c in range(num_levels):
        size = start[c + 1] - start[c]
        here[:size] = rows[start[c] : start[c + 1]]
        child[: size + 1] = -1
        sibling[: size + 1] = -1
        parent[: size + 1] = size
        for k in range(size):
            n = here[k]
            if n < count:
                where[nodes[n, BRANCH]] = k
            else:
                where_hole[hole_nodes[n - count, BRANCH]] = k
        for k in range(size):
            n = here[k]
            if n >= count:
                b = label[found[n]]
                while joined[b] >= 0 and joined_at[b] > c:
                    b = joined[b]
                parent[k] = where[b]
            elif fill[found[n] - 1] > c:
                b = hole_label[found[n] - 1]
                while hole_joined[b] >= 0 and hole_joined_at[b] <= c:
                    b = hole_joined[b]
                parent[k] = where_hole[b]
            sibling[k] = child[parent[k]]
            child[parent[k]] = k
        k = child[size]
        for position in range(start[c], start[c + 1]):
            rows[position] = here[k]
            if child[k] >= 0:
                k = child[k]
            else:
                while k != size and sibling[k] < 0:
                    k = parent[k]
                k = sibling[k]
    return rows, start
