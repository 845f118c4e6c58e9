"""The loops of the search for extreme logits, compiled by numba."""

import numpy as np

from sae.kernels.compiled import compiled
from sae.kernels.cpu_loops import lowest_bit
from sae.kernels.lanes import LANES, list_beyond, multiply, narrow_beyond, put_in_bins, room_for_lanes

# rows that are looked at together: those that are left are listed, so that a guess goes wrong once a list
# instead of once a row
_ROWS = 64
# columns that stay in a core's cache for all rows, and groups of sixteen of which cubes are summed in fp32
SPAN, _SUMMED = 128, 64
# what rounding may do to a score beside its limits, as a part of these
_ROUNDED = 2.0**-20
# spans whose bins are held until they are counted
_BINNED_SPANS = 64
# the bin of a column that is not there, above every other; so many bins a table of pairs has room for
_NO_BIN, _BINS = 63, 64


def no_extremes(rows, count):
    """What `keep_extremes` holds before the first tile: `values`, `ids`, `held` and `limits`."""
    # sixteen must always fit behind those that are kept; with more it is seldom that some must go
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
    blocks, head, tokens, ids_of, groups, counted, per_bin, histogram, values, ids, held, limits, count, cubes
):  # fmt: skip
    """Takes the scores of some columns into each row's most extreme ones, and into how each row's are spread.

    `blocks` are rows' `lanes.Blocks`, and `tokens` (scale float32 [column], `lanes.packed`, spread float32
    [block + 1, column]): the norms of what comes from each block on, times scale. Of the groups of sixteen
    columns, all from the first to the last of `groups` are taken in; score[r, c] = product[r, c] * scale[c],
    and `ids_of` int32 [column] says whose it is. There may be fewer ids than columns, which are none then.

    The first `head` blocks are multiplied for all, and those behind where a score may be extreme. The first
    `held` [row, 2] of `values` float32 and `ids` int32 [row, 2, room] are the `count` largest scores (side 0)
    and the largest of -score (side 1), and more, as they came: whatever was above `limits` float32 [row, 2].
    `cubes` float64 [row] takes the sum of all cubes, of heads' scores.

    Of the first `counted` columns `histogram` int32 [row, bin] takes the scores, whose heads must be whole.
    score * per_bin[r] is in one of its bins, with 0 in the middle of the middle one; the end bins also hold
    what lies beyond.
    """
    scale, packed, spread = tokens
    n_rows, n_blocks = blocks.start.shape
    sums, some_cubes = room_for_lanes(n_rows).view(np.int32), room_for_lanes(n_rows)
    some_cubes[:] = 0
    rows, masks = np.empty(_ROWS, np.int64), np.empty(_ROWS, np.uint64)
    bins, filled = np.empty((n_rows, _BINNED_SPANS if counted else 0, SPAN), np.uint8), 0
    # what scores must be beyond: loosely before the last block, since they are rounded; and exactly
    edges = np.empty((2, 2, n_rows), np.float32)
    for r in range(n_rows):
        _set_edges(limits, r, edges)
    for first in range(groups[0], groups[1], SPAN // LANES):
        last = min(first + SPAN // LANES, groups[1])
        is_counted = first * LANES < counted
        for begin in range(0, n_rows, _ROWS):
            end = min(begin + _ROWS, n_rows)
            for c in range(first * LANES, last * LANES, LANES):
                for b in range(head - 1):
                    multiply(begin, end, b, blocks, sums, packed, c)  # pyright: ignore[reportCallIssue]
                n = list_beyond(  # pyright: ignore[reportCallIssue]
                    rows, begin, end, masks, head - 1, blocks, sums, packed, c, scale, spread, edges,
                    some_cubes,
                )  # fmt: skip
                if is_counted:
                    _put_in_bins(sums, begin, end, scale, c, counted, per_bin, histogram, bins, filled)
                for b in range(head, n_blocks):
                    n = narrow_beyond(  # pyright: ignore[reportCallIssue]
                        rows, n, masks, b, blocks, sums, packed, c, scale, spread, edges,
                        np.int64(b + 1 == n_blocks),
                    )  # fmt: skip
                _keep(rows, n, masks, sums, scale, c, ids_of, values, ids, held, limits, count, edges)
        if is_counted:
            filled += 1
            if filled == _BINNED_SPANS or last * LANES >= counted:
                count_bins(bins, filled, histogram)
                filled = 0
        if last % _SUMMED == 0 or last == groups[1]:
            _empty_into(cubes, some_cubes)


@compiled
def _empty_into(total, some):
    for r in range(len(some)):
        for lane in range(LANES):
            total[r] += some[r, lane]
            some[r, lane] = 0


@compiled
def _keep(rows, n, masks, sums, scale, c, ids_of, values, ids, held, limits, count, edges):
    """Takes the marked scores of sixteen columns from c on into the extremes of each of `rows`."""
    there = np.uint64((1 << min(LANES, len(ids_of) - c)) - 1)
    for k in range(n):
        r, rest = rows[k], masks[k] & there
        most, least, above, below = held[r, 0], held[r, 1], edges[1, 0, r], edges[1, 1, r]
        while rest != 0:
            lane = lowest_bit(rest)  # pyright: ignore[reportCallIssue]
            rest &= rest - np.uint64(1)
            score = np.float32(sums[r, lane]) * scale[c + lane]
            # written to both sides: what a guess would get wrong costs more
            values[r, 0, most], values[r, 1, least] = score, -score
            ids[r, 0, most], ids[r, 1, least] = ids_of[c + lane], ids_of[c + lane]
            most += score > above
            least += score < below
        held[r, 0], held[r, 1] = most, least
        if max(most, least) > values.shape[2] - LANES:
            drop(values, ids, held, limits, r, r + 1, count)
            _set_edges(limits, r, edges)


@compiled
def _set_edges(limits, r, edges):
    above, below = limits[r, 0], -limits[r, 1]
    rounded = (abs(above) + abs(below)) * np.float32(_ROUNDED)
    edges[0, 0, r], edges[0, 1, r] = above - rounded, below + rounded
    edges[1, 0, r], edges[1, 1, r] = above, below


@compiled
def _put_in_bins(sums, begin, end, scale, c, counted, per_bin, histogram, bins, at):
    """The part of `keep_extremes` for the bins of sixteen columns from c on, the span of which is at `at`."""
    put_in_bins(  # pyright: ignore[reportCallIssue]
        begin, end, sums, c, scale, per_bin, histogram.shape[1], bins, at, c % SPAN
    )
    if c % SPAN + LANES < SPAN and c + LANES < counted:
        return
    for r in range(begin, end):
        for lane in range(max(counted - c, 0), SPAN - c % SPAN):
            bins[r, at, c % SPAN + lane] = _NO_BIN


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
