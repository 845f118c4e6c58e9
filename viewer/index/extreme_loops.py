"""The loops of the search for extreme logits, compiled by numba."""

import numpy as np

from sae.kernels.compiled import compiled
from sae.kernels.cpu_loops import lowest_bit

# columns looked at together; only a span that holds something new is looked at one by one
SPAN = 128
# the bin of a column that is not there, above every other; so many bins a table of pairs has room for
_NO_BIN, _BINS = 63, 64


def no_extremes(rows, count):
    """What `keep_extremes` holds before the first tile: `values`, `ids`, `held` and `limits`."""
    # one span must always fit behind those that are kept; the second makes it seldom that some must go
    room = count + 2 * SPAN
    # ids of no token but 0 where nothing is found: they are looked up all the same
    values, ids = np.empty((rows, 2, room), np.float32), np.zeros((rows, 2, room), np.int32)
    return values, ids, np.zeros((rows, 2), np.int64), np.full((rows, 2), -np.inf, np.float32)


def extremes(values, ids, held, limits, count):
    """Scores float32 and ids int64 [row, 2, count] of what `keep_extremes` holds, best first; -inf for none.

    Of equal scores the first that came.
    """
    drop(values, ids, held, limits, 0, len(held), count)
    values = np.where(np.arange(count) < held[..., None], values[..., :count], -np.inf)
    order = np.argsort(-values, axis=2, kind="stable")
    ids = np.take_along_axis(ids, order, 2).astype(np.int64)
    return np.take_along_axis(values, order, 2), ids


@compiled
def keep_extremes(
    products, scale, ids_of, values, ids, held, limits, count, cubes, counted, per_bin, n_bins, bins, filled
):  # fmt: skip
    """Takes a tile of scores into each row's most extreme ones, and into how each row's are spread.

    score[r, c] = products[r, c] * scale[c], with products [row, column] int32 and scale [column] float32;
    `ids_of` int32 [column] says whose it is. The first `held` [row, 2] of `values` float32 and `ids` int32
    [row, 2, room] are the `count` largest scores (side 0) and the largest of -score (side 1), and more, as
    they came: whatever was above `limits` float32 [row, 2]. `cubes` float64 [row] takes the sum of all cubes.

    Where the tile is `counted`, scores' bins are put into `bins` uint8 [row, span, column], spans of 128
    columns behind the first `filled`; returns how many are filled then. score * per_bin[r] is in one of
    `n_bins`, with 0 in the middle of the middle one, and the end bins hold what lies beyond.
    """
    # slices and calls in these loops would cost as much as a span; behind the last column NaN beats nothing
    room = aligned(-(-len(scale) // SPAN) * SPAN)
    room[:] = np.nan
    spans = room.reshape(-1, SPAN)
    beyond = np.empty(SPAN, np.bool_)
    any_of_eight = beyond.view(np.uint64)
    at = filled
    for r in range(len(products)):
        total = np.float32(0)
        for c in range(len(scale)):
            score = np.float32(products[r, c]) * scale[c]
            room[c] = score
            total += score * score * score
        cubes[r] += np.float64(total)
        for i in range(len(spans)):
            above, below = limits[r, 0], -limits[r, 1]
            # counted, since a loop that stops early is not made of vectors; in 32 bits, as the scores are
            number = np.int32(0)
            for c in range(SPAN):
                number = np.int32(number + np.int32((spans[i, c] > above) | (spans[i, c] < below)))
            if number == 0:
                continue
            for c in range(SPAN):
                beyond[c] = (spans[i, c] > above) | (spans[i, c] < below)
            most, least = held[r, 0], held[r, 1]
            for e in range(len(any_of_eight)):
                rest = any_of_eight[e]
                while rest != 0:
                    # a flag is the lowest bit of its byte
                    c = i * SPAN + e * 8 + lowest_bit(rest) // 8  # pyright: ignore[reportCallIssue]
                    rest &= rest - np.uint64(1)
                    # written to both sides: what a guess would get wrong costs more
                    values[r, 0, most], values[r, 1, least] = room[c], -room[c]
                    ids[r, 0, most], ids[r, 1, least] = ids_of[c], ids_of[c]
                    most += room[c] > above
                    least += room[c] < below
            held[r, 0], held[r, 1] = most, least
            if max(most, least) > values.shape[2] - SPAN:
                drop(values, ids, held, limits, r, r + 1, count)
        if counted:
            at = _put_in_bins(spans, len(scale), per_bin[r], n_bins, bins, r, filled)
    return at


@compiled
def aligned(size):
    """Room for float32 where a vector never lies on two lines of the cache."""
    room = np.empty(size + 16, np.float32)
    skipped = (-room.ctypes.data % 64) // 4
    return room[skipped : skipped + size]


@compiled
def _put_in_bins(spans, n_columns, per_bin, n_bins, bins, r, at):
    """The part of `keep_extremes` for the bins of a row, whose scores are `spans` [span, column]."""
    middle, last_bin = np.float32(n_bins) / np.float32(2), np.int32(n_bins - 1)
    for i in range(len(spans)):
        for c in range(SPAN):
            place = np.int32(spans[i, c] * per_bin + middle)
            bins[r, at, c] = np.uint8(min(max(place, np.int32(0)), last_bin))
        for c in range(n_columns - i * SPAN, SPAN):
            bins[r, at, c] = _NO_BIN
        at += 1
    return at


@compiled
def drop(values, ids, held, limits, begin, end, count):
    """Leaves the `count` largest of rows' sides, of equal ones the first, and sets what is to be beaten."""
    bits = np.empty(values.shape[2], np.int32)
    for r in range(begin, end):
        for side in range(2):
            n = held[r, side]
            if n < count:
                continue
            for k in range(n):
                bits[k] = np.int32(_in_order(np.float32(values[r, side, k]).view(np.int32)))
            # the largest number that `count` are not below, by halves: a sort takes ten times as long
            low, high = np.int64(-(2**31)), np.int64(2**31 - 1)
            while low < high:
                middle = (low + high + 1) >> 1
                there, edge = np.int32(0), np.int32(middle)
                for k in range(n):
                    there = np.int32(there + np.int32(bits[k] >= edge))
                low, high = (middle, high) if there >= count else (low, middle - 1)
            equal, kept = count, 0
            for k in range(n):
                equal -= bits[k] > low
            for k in range(n):
                values[r, side, kept], ids[r, side, kept] = values[r, side, k], ids[r, side, k]
                kept += bits[k] > low or (bits[k] == low and equal > 0)
                equal -= bits[k] == low
            held[r, side] = kept
            limits[r, side] = np.int32(_in_order(low)).view(np.float32)


@compiled
def _in_order(bits):
    """A float32's bits as a whole number that is larger where the float is; and the bits of such a number."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@compiled
def count_bins(bins, filled, histogram):
    """Adds the first `filled` spans of `bins`, of `keep_extremes`, to `histogram` int32 [row, bin].

    There may be a thousand spans, and 63 bins. Counted are pairs of neighbours: they are half as many, and
    seldom is one met again before it is written, which would take its time.
    """
    pairs = bins.reshape(len(bins), -1).view(np.uint16)
    table = np.zeros((_BINS, 256), np.uint16)
    flat = table.reshape(-1)
    for r in range(len(bins)):
        for p in range(filled * (SPAN // 2)):
            flat[pairs[r, p]] += np.uint16(1)
        for i in range(_BINS):
            total = np.int32(0)
            for j in range(_BINS):
                total = np.int32(total + np.int32(table[i, j]))
            if total == 0:
                continue
            if i < histogram.shape[1]:
                histogram[r, i] += total
            for j in range(histogram.shape[1]):
                histogram[r, j] += np.int32(table[i, j])
            table[i, :_BINS] = 0
