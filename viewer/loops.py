"""The loops of the search for extreme logits, compiled by numba."""

import numpy as np

from sae.kernels.cpu_loops import compiled

# columns looked at together; only a span that holds something new is looked at one by one
_SPAN = 128


@compiled
def keep_extremes(products, scale, first, values, ids, room):
    """Takes a tile of scores into each row's most extreme ones.

    score[r, c] = products[r, c] * scale[c], with products [row, column] int32 and scale [column] float32.
    `values` float32 and `ids` int64 [row, 2, count] hold the largest scores (side 0) and the largest of
    -score (side 1), best first, with -inf where there is none yet; `first` is the tile's first column.
    `room` is float32 [column] to work in.
    """
    last = values.shape[2] - 1
    for r in range(products.shape[0]):
        row = products[r]
        for c in range(len(room)):
            room[c] = np.float32(row[c]) * scale[c]
        for start in range(0, len(room), _SPAN):
            span = room[start : start + _SPAN]
            if len(span) == _SPAN and not _any_beyond(span, values[r, 0, last], -values[r, 1, last]):
                continue
            for c in range(len(span)):
                if span[c] > values[r, 0, last]:
                    _insert(values[r, 0], ids[r, 0], span[c], first + start + c)
                if -span[c] > values[r, 1, last]:
                    _insert(values[r, 1], ids[r, 1], -span[c], first + start + c)


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
