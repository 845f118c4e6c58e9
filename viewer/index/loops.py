"""The loops of the search for extreme logits, compiled by numba."""

import numpy as np

from sae.kernels.compiled import compiled
from sae.kernels.cpu_loops import widened

# columns looked at together; only a span that holds something new is looked at one by one
_SPAN = 128


@compiled
def keep_extremes(
    products, scale, first, values, ids, room, counted, step, span, per_bin, cubes, histogram
):  # fmt: skip
    """Takes a tile of scores into each row's most extreme ones, and into how each row's are spread.

    score[r, c] = products[r, c] * scale[c], with products [row, column] int32 and scale [column] float32.
    `values` float32 and `ids` int64 [row, 2, count] hold the largest scores (side 0) and the largest of
    -score (side 1), best first, with -inf where there is none yet; `first` is the tile's first column.
    `cubes` float64 [row] takes the sum of all cubes, and `histogram` int32 [row, bin] counts the scores of
    `span` columns from `counted` and from every `step` columns on: score * per_bin[r] is in bins, with 0 in
    the middle of the middle one. `room` is float32 [column] to work in.
    """
    last = values.shape[2] - 1
    # the count just added to is slow to add to again: eight tables take turns
    tables = np.empty((8, histogram.shape[1]), np.int32)
    for r in range(products.shape[0]):
        row = products[r]
        total = np.float32(0)
        for c in range(len(room)):
            score = np.float32(row[c]) * scale[c]
            room[c] = score
            total += score * score * score
        cubes[r] += np.float64(total)
        for start in range(0, len(room), _SPAN):
            part = room[start : start + _SPAN]
            if len(part) == _SPAN and not _any_beyond(part, values[r, 0, last], -values[r, 1, last]):
                continue
            for c in range(len(part)):
                if part[c] > values[r, 0, last]:
                    _insert(values[r, 0], ids[r, 0], part[c], first + start + c)
                if -part[c] > values[r, 1, last]:
                    _insert(values[r, 1], ids[r, 1], -part[c], first + start + c)
        tables[:] = 0
        for start in range(counted, len(room), step):
            _count(room[start : start + span], per_bin[r], tables)
        for k in range(8):
            for b in range(histogram.shape[1]):
                histogram[r, b] += tables[k, b]


@compiled
def multiply_at(left, right, places, products):
    """`products[r, c]` is that of row r of `left` and row `places[r, c]` of `right`, summed in fp32.

    `right` may be bfloat16 as uint16.
    """
    for r in range(places.shape[0]):
        for c in range(places.shape[1]):
            other = right[places[r, c]]
            total = np.float32(0)
            for d in range(len(other)):
                total += left[r, d] * widened(other[d])
            products[r, c] = total


@compiled
def count_common(starts, row, pairs, common):
    """How many rows both latents of each pair fire on; `row` rises within a latent."""
    for p in range(len(pairs)):
        i, end = starts[pairs[p, 0]], starts[pairs[p, 0] + 1]
        j, other_end = starts[pairs[p, 1]], starts[pairs[p, 1] + 1]
        while i < end and j < other_end:
            if row[i] == row[j]:
                common[p] += 1
                i += 1
                j += 1
            elif row[i] < row[j]:
                i += 1
            else:
                j += 1


@compiled
def _any_beyond(span, above, below):
    """Whether any of _SPAN values may be larger than `above` or smaller than `below`."""
    if np.isinf(above) or np.isinf(below):
        return True
    # one comparison for both sides, a little wide for its rounding; counted, since a loop that stops early
    # is not made of vectors
    middle, half = (above + below) / np.float32(2), (above - below) * np.float32(0.499999)
    count = np.int32(0)
    for c in range(_SPAN):
        count += np.int32(abs(span[c] - middle) > half)
    return count > 0


@compiled
def _insert(values, ids, value, place):
    rank = len(values) - 1
    while rank > 0 and values[rank - 1] < value:
        values[rank], ids[rank] = values[rank - 1], ids[rank - 1]
        rank -= 1
    values[rank], ids[rank] = value, place


@compiled
def _count(scores, per_bin, tables):
    """Counts scores by bin, in eight tables that are to be added up."""
    n_bins = tables.shape[1]
    middle, last = np.float32(n_bins) / np.float32(2), np.int32(n_bins - 1)
    bins = np.empty(len(scores), np.uint8)
    for c in range(len(scores)):
        bins[c] = np.uint8(min(max(np.int32(scores[c] * per_bin + middle), np.int32(0)), last))
    whole = len(scores) - len(scores) % 8
    for c in range(0, whole, 8):
        for k in range(8):
            tables[k, bins[c + k]] += 1
    for c in range(whole, len(scores)):
        tables[0, bins[c]] += 1
