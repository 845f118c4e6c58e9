"""The search for extreme logits where a head of the coordinates was multiplied for all pairs; by numba."""

import numpy as np

from sae.kernels.compiled import compiled
from sae.kernels.cpu_loops import lowest_bit
from sae.kernels.lanes import LANES, list_beyond, narrow_beyond
from viewer.index.extreme_loops import SPAN, aligned, drop

# rows that are looked at together: those that are left are listed, so that a guess goes wrong once a list
# instead of once a row
_ROWS = 64
# what rounding may do to a score beside its limits, as a part of these
_ROUNDED = 2.0**-20


@compiled
def keep_extremes_of_heads(products, tails, tokens, ids_of, values, ids, held, limits, count, cubes):
    """As `keep_extremes`, for products [row, column] int32 that lack the coordinates of the tail.

    `tails` is `lanes.Tails` and `tokens` (scale float32 [column], `lanes.packed` tails, spread float32
    [block + 1, column]): the norms of what comes from each block on, times scale. `cubes` takes those of the
    heads' scores. The number of columns is a multiple of 128.
    """
    start = tails[1]
    scale, packed, spread = tokens
    n_rows, n_blocks = start.shape
    spans, scales = products.reshape(n_rows, -1, SPAN), scale.reshape(-1, SPAN)
    sums = aligned(n_rows * LANES).view(np.int32).reshape(n_rows, LANES)
    rows, masks = np.empty(_ROWS, np.int64), np.empty(_ROWS, np.uint64)
    # what scores must be beyond: loosely before the last block, since they are rounded; and exactly
    edges = np.empty((2, 2, n_rows), np.float32)
    for r in range(n_rows):
        _set_edges(limits, r, edges)
    for i in range(len(scales)):
        for begin in range(0, n_rows, _ROWS):
            end = min(begin + _ROWS, n_rows)
            for r in range(begin, end):
                total = np.float32(0)
                for c in range(SPAN):
                    score = np.float32(spans[r, i, c]) * scales[i, c]
                    total += score * score * score
                cubes[r] += np.float64(total)
            for c in range(i * SPAN, i * SPAN + SPAN, LANES):
                n = list_beyond(  # pyright: ignore[reportCallIssue]
                    rows, begin, end, masks, products, c, tails, scale, spread, edges
                )
                for b in range(n_blocks):
                    n = narrow_beyond(  # pyright: ignore[reportCallIssue]
                        rows, n, masks, products, b, tails, sums, c, packed, scale, spread, edges,
                        np.int64(b + 1 == n_blocks),
                    )  # fmt: skip
                _keep(rows, n, masks, sums, scale, c, ids_of, values, ids, held, limits, count, edges)


@compiled
def _keep(rows, n, masks, sums, scale, c, ids_of, values, ids, held, limits, count, edges):
    """Takes the marked scores of sixteen columns from c on into the extremes of each of `rows`."""
    for k in range(n):
        r, rest = rows[k], masks[k]
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
        if max(most, least) > values.shape[2] - SPAN:
            drop(values, ids, held, limits, r, r + 1, count)
            _set_edges(limits, r, edges)


@compiled
def _set_edges(limits, r, edges):
    above, below = limits[r, 0], -limits[r, 1]
    rounded = (abs(above) + abs(below)) * np.float32(_ROUNDED)
    edges[0, 0, r], edges[0, 1, r] = above - rounded, below + rounded
    edges[1, 0, r], edges[1, 1, r] = above, below
