"""Find the connected components above every threshold of a map at once, and the holes in them.

The pixels above a threshold c are {levels > c}. As c falls, their 8-connected components appear, grow and join, and
never part. One pass over the pixels from the highest level down, with a union-find, therefore meets every component of
every threshold (the max-tree; Najman and Couprie, "Building the component tree in quasi-linear time", 2006). A *node*
is a component that stays the same over a range of thresholds. Holes are 4-connected components of {levels <= c} that do
not touch the border. In the inverted map, they are components too.

numba compiles this code to run without Python's lock, so threads run it beside the network's forward pass. Maps are
padded by one pixel of level 0 all around (`pad`). p is a pixel's index in the padded map, y · (W + 2) + x.

A table of nodes has a row for each node: x0, y0, x1, y1 (first and last pixel inside, unpadded), low and high (the node
exists at the thresholds low <= c < high), rank (the sum of its pixels' gains), first (its first pixel in raster order),
and branch. A *branch* begins with a pixel without earlier neighbours, and goes on until it joins a larger branch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from wsolkit.system.compiled import compiled

LOW, HIGH, RANK, FIRST, BRANCH = range(4, 9)  # These are the columns of a table of nodes, after its box.


def _joins(diagonals: bool) -> npt.NDArray[np.int32]:
    """Tabulate what a pixel does to the components around it, for each set of neighbours that came before it.

    The set is a byte (bit 0: north, then clockwise). The answer [256] is packed. Bits 0 to 2: the number of neighbours
    to join. Neighbours that touch one another around the pixel are in one component already, so one of them stands for
    all. Bits 3 to 14: their positions around the pixel, three bits each. Bit 15: whether the pixel may be beyond that
    component's box, or before its first pixel.
    """
    packed = np.zeros(256, np.int32)
    for present in range(256):
        inside = [k for k in range(8) if present >> k & 1 and (diagonals or k % 2 == 0)]
        groups: list[set[int]] = []
        for k in inside:
            # These are next to each other around the pixel. The straight neighbours also touch across a corner.
            near = {(k + d) % 8 for d in ((1, -1) if diagonals else ())}
            if k % 2 == 0:
                corners = ((k + 1) % 8, (k + 2) % 8), ((k - 1) % 8, (k - 2) % 8)
                near |= {end for corner, end in corners if diagonals or present >> corner & 1}
            joined = [group for group in groups if group & near]
            groups = [group for group in groups if not group & near] + [{k}.union(*joined)]
        # It cannot if some neighbour is not west of it, some not east, not south, not north, and one comes before it.
        within = [{0, 1, 2, 3, 4}, {0, 4, 5, 6, 7}, {0, 1, 2, 6, 7}, {2, 3, 4, 5, 6}, {0, 1, 6, 7}]
        outermost = not all(side & set(inside) for side in within)
        packed[present] = len(groups) | outermost << 15
        for number, group in enumerate(groups):
            packed[present] |= min(group) << (3 + 3 * number)
    return packed


def _area_gain() -> npt.NDArray[np.int8]:
    """Tabulate by how much a pixel raises twice the area inside its component's outline, for each set of neighbours.

    The outline runs through the centres of pixels. A 2×2 cell adds half a unit when its third pixel joins, and half a
    unit when its fourth does. So this counts the cells around the pixel that had two or three pixels before.
    """
    gain = np.zeros(256, np.int8)
    for present in range(256):
        for k in (1, 3, 5, 7):  # Each corner makes a cell with the two straight neighbours beside it.
            cell = (k - 1, k, (k + 1) % 8)
            gain[present] += sum(present >> j & 1 for j in cell) >= 2
    return gain


_JOINS_8, _JOINS_4 = _joins(diagonals=True), _joins(diagonals=False)
AREA_GAIN = _area_gain()
"""This gain makes the rank of a component without holes twice the `cv2.contourArea` of its outline."""
PIXEL_GAIN = np.ones(256, np.int8)
"""This gain makes the rank of a component its number of pixels."""


@compiled
def pad(levels: Any) -> Any:
    """Pad levels [H, W] with zeros to uint16 [H + 2, W + 2]."""
    height, width = levels.shape
    padded = np.zeros((height + 2, width + 2), np.uint16)
    for y in range(height):
        for x in range(width):
            padded[y + 1, x + 1] = levels[y, x]
    return padded


@compiled
def fill_holes(padded: Any) -> Any:
    """Raise every hole to the level at which it opens to the border: min over 4-connected paths of their maximum.

    A pixel is in a hole at the thresholds from its own level to its filled one, exclusive. This is morphological
    reconstruction by erosion, in sweeps until nothing changes.
    """
    height, width = padded.shape
    level = padded.ravel()
    fill = np.zeros(level.size, np.uint16)
    for y in range(1, height - 1):
        lower = np.uint16(0)
        for p in range(y * width + 1, (y + 1) * width - 1):
            lower = max(min(lower, fill[p - width]), level[p])
            fill[p] = lower
    # This sweep comes from below and from the right. It remembers pixels that could still lower an earlier neighbour.
    waiting = np.zeros(level.size, np.bool_)
    queue = np.empty(level.size, np.int32)  # The queue is a ring, and each pixel is in it once at most.
    pending = 0
    for y in range(height - 2, 0, -1):
        lower = np.uint16(0)
        for p in range((y + 1) * width - 2, y * width, -1):
            if fill[p] > level[p]:
                lower = max(min(fill[p], lower, fill[p + width]), level[p])
                fill[p] = lower
            else:
                lower = fill[p]
            if (fill[p + 1] > lower and fill[p + 1] > level[p + 1]) or (
                fill[p + width] > lower and fill[p + width] > level[p + width]
            ):
                waiting[p] = True
                queue[pending] = p
                pending += 1
    head, tail = 0, pending
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
    return fill.reshape(height, width)


@compiled
def _higher_neighbours(padded: Any) -> Any:
    """Return the neighbours that join before each pixel, as a byte: higher ones, and earlier ones of the same level."""
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
    """Sort pixels with levels > base, highest first, then in raster order. Also return where each level ends."""
    end = np.zeros(num_levels + 2, np.int64)
    for p in range(levels.size):
        if levels[p] > base[p]:
            end[levels[p]] += 1
    for level in range(num_levels - 1, -1, -1):
        end[level] += end[level + 1]
    place = end.copy()
    order = np.empty(end[0], np.int32)
    for p in range(levels.size - 1, -1, -1):
        if levels[p] > base[p]:
            place[levels[p]] -= 1
            order[place[levels[p]]] = p
    return order, end


@compiled
def _tree(levels: Any, base: Any, num_levels: int, joins: Any, gain: Any) -> Any:
    """Find every component of {levels > c}, base <= c < num_levels.

    levels, base: [H + 2, W + 2] with a frame of zeros. base is the same all over a component, and ends it.

    Returns:
        nodes [n, 9]; label [pixels]: the branch that each pixel joined; joined, joined_at [branches]: the branch that
        each branch joined, or -1, and the level of the join. At lower thresholds, the two are one component.
    """
    width = levels.shape[1]
    around = np.array([-width, 1 - width, 1, 1 + width, width, width - 1, -1, -1 - width], np.int64)
    present = _higher_neighbours(levels).ravel()
    base = base.ravel()
    order, end = _sort(levels.ravel(), base, num_levels)
    size = len(order)
    label = np.empty(levels.size, np.int32)
    # A component that no longer changes becomes a node. Each pixel makes one change at most.
    nodes = np.empty((2 * size, 9), np.int32)
    num_nodes = 0
    # Each branch has its box (0 to 3), the level of its last change (4), its rank (5) and its first pixel (6).
    state = np.empty((size, 8), np.int32)
    root = np.empty(size, np.int32)
    joined = np.empty(size, np.int32)
    joined_at = np.empty(size, np.int32)
    branches = 0
    position = 0
    for level in range(num_levels, 0, -1):
        while position < end[level]:
            p = order[position]
            position += 1
            join = joins[present[p]]
            if join & 7 == 0:
                r = branches
                branches += 1
                root[r] = r
                joined[r] = -1
                y = p // width
                state[r, 0] = state[r, 2] = p - y * width
                state[r, 1] = state[r, 3] = y
                state[r, 4], state[r, 5], state[r, 6] = level, gain[present[p]], p
                label[p] = r
                continue
            r = label[p + around[join >> 3 & 7]]
            while root[r] != r:
                root[r] = root[root[r]]
                r = root[r]
            if state[r, 4] != level:
                _write(nodes, num_nodes, state, level, r)
                num_nodes += 1
                state[r, 4] = level
            for k in range(1, join & 7):
                s = label[p + around[join >> (3 + 3 * k) & 7]]
                while root[s] != s:
                    root[s] = root[root[s]]
                    s = root[s]
                if s == r:
                    continue
                if state[s, 4] != level:
                    _write(nodes, num_nodes, state, level, s)
                    num_nodes += 1
                if state[s, 5] > state[r, 5]:
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
            label[p] = r
            state[r, 5] += gain[present[p]]
            if join >> 15:
                y = p // width
                x = p - y * width
                state[r, 0] = min(state[r, 0], x)
                state[r, 1] = min(state[r, 1], y)
                state[r, 2] = max(state[r, 2], x)
                state[r, 3] = max(state[r, 3], y)
                state[r, 6] = min(state[r, 6], p)
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
    """Find the 8-connected components of {padded > c} for 0 <= c < num_levels. It returns the same as `_tree`.

    gain: what the rank counts: `PIXEL_GAIN`, or, for a map without holes, `AREA_GAIN`.
    """
    return _tree(padded, np.zeros(padded.shape, np.uint16), num_levels, _JOINS_8, gain)


@compiled
def holes(padded: Any, filled: Any, num_levels: int) -> Any:
    """Find the holes in the components of {padded > c}, with the boxes of their outlines, which run around the hole.

    filled: the result of `fill_holes`. It returns the same as `_tree`, but here two branches are one from joined_at
    upwards.
    """
    depth = np.zeros(padded.shape, np.uint16)  # In the inverted map, a hole is a component.
    base = np.zeros(padded.shape, np.uint16)
    for y in range(1, padded.shape[0] - 1):
        for x in range(1, padded.shape[1] - 1):
            depth[y, x] = num_levels - padded[y, x]
            base[y, x] = num_levels - filled[y, x]
    nodes, label, joined, joined_at = _tree(depth, base, num_levels, _JOINS_4, PIXEL_GAIN)
    for node in nodes:
        node[0] -= 1
        node[1] -= 1
        node[2] += 1
        node[3] += 1
        node[LOW], node[HIGH] = num_levels - node[HIGH], num_levels - node[LOW]
    return nodes, label, joined, num_levels - joined_at


@compiled
def highest(nodes: Any, values: Any, num_levels: int) -> Any:
    """Find the node with the highest of `values` [n] at each threshold, or the first of them if several are equal.

    Returns:
        the row in the table for 0 <= c < num_levels, or -1 if there is none.
    """
    best = np.full(num_levels, -1, np.int64)
    for n in range(len(nodes)):
        for c in range(nodes[n, LOW], nodes[n, HIGH]):
            if best[c] < 0 or values[n] > values[best[c]]:
                best[c] = n
    return best


@compiled
def around_all_pixels(padded: Any, num_levels: int) -> Any:
    """Return a box [num_levels, 4] around {padded > c} for each c, first and last pixel. x1 is -1 if it is empty."""
    height, width = padded.shape
    boxes = np.empty((num_levels, 4), np.int32)
    boxes[:] = np.array([width, height, -1, -1], np.int32)
    for y in range(height):
        for x in range(width):
            if padded[y, x] > 0:
                box = boxes[padded[y, x] - 1]
                box[0] = min(box[0], x - 1)
                box[1] = min(box[1], y - 1)
                box[2] = max(box[2], x - 1)
                box[3] = max(box[3], y - 1)
    for c in range(num_levels - 2, -1, -1):
        boxes[c, :2] = np.minimum(boxes[c, :2], boxes[c + 1, :2])
        boxes[c, 2:] = np.maximum(boxes[c, 2:], boxes[c + 1, 2:])
    return boxes


@compiled
def opencv_order(outer: Any, inner: Any, filled: Any, num_levels: int) -> Any:
    """Return the outlines at each threshold in the order of cv2.findContours with RETR_TREE.

    OpenCV scans for outlines in raster order. Among those with the same parent, the last one found comes first, and its
    children follow it. An outer outline is found at its first pixel, and the outline of a hole at the pixel left of the
    hole's first. The pixel left of an outer outline's first one belongs to its parent. A hole's outline is found at a
    pixel of its parent.

    Args:
        outer, inner: the results of `components` and `holes`.
        filled: the result of `fill_holes`.

    Returns:
        rows by threshold, with the rows of `inner` numbered after those of `outer`, and the start of each threshold.
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
    where = np.empty(len(joined), np.int64)  # The place at this threshold of each branch that exists there.
    where_hole = np.empty(len(hole_joined), np.int64)
    largest = max(np.diff(start))
    here = np.empty(largest, np.int64)
    child, sibling, parent = np.empty((3, largest + 1), np.int64)  # There is one more entry, for the image.
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
