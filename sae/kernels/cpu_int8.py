"""Rows and encoders in 8-bit integers, for a screening product of twice bfloat16's rate; loops by numba.

    <x, w> = <x / divide, w * divide>

One coordinate that is large in one of the two would set the scale of a whole row; `divide` gives both the
same spread. What rounding takes away is measured row by row, so whatever `divide` is, it costs time at worst.
"""

import inspect

import numpy as np
from numba import types
from numba.extending import overload

from sae.kernels.compiled import compiled
from sae.kernels.cpu_loops import MARKS, as_bits, as_float, bfloat16_bits, mark_pairs, widened

# a row of smaller numbers counts as rounded to nothing: their scale would have no inverse
_TINY = 1e-30


@compiled
def lower_rows(x, factor, low, scale, norm, error):
    """Rows times a factor for each coordinate, as integers times `scale`; the norms of what they stand for
    and of what is lost.
    """
    for b in range(len(x)):
        scale[b], norm[b], error[b] = _lower(x[b], factor, low[b])


@compiled
def scan_integers(
    product, row_scale, scale, row_bound, row_norm, row_error, bound, norm, slack, rows, columns, first, found
):  # fmt: skip
    """As `scan_block`, for a product of integers that stand for themselves times `row_scale` and `scale`.

    The rows are those from `first` on, and `found` pairs are in the lists already.
    """
    width, room = product.shape[1], len(rows)
    marks = np.zeros((width + MARKS - 1) // MARKS * MARKS, np.uint8)
    for b in range(len(product)):
        if found + width > room:
            return -1
        reach, above, unit = row_error[b] + slack * row_norm[b], row_bound[b], row_scale[b]
        for j in range(width):
            value = np.float32(product[b, j]) * scale[j] * unit
            marks[j] = value > bound[j] + above - reach * norm[j]
        found = mark_pairs(marks, first + b, rows, columns, found)
    return found


def renew_screen(w, low, screen, j):
    """Screens a latent's encoder row anew; `low` is the screen's, whose dtype decides how."""


@overload(renew_screen)
def _renew_for(w, low, screen, j):
    # tests wrap every function to check its arguments; numba wants the function itself
    return inspect.unwrap(_renew_integers if low.dtype == types.int8 else _renew_floats)


def _renew_integers(w, low, screen, j):
    scale, norm, lost = _lower(w, screen.divide, low[j])
    screen.scale[j] = scale
    screen.norm[j] = norm
    screen.error[j] = lost / norm if norm > 0 else 0


def _renew_floats(w, low, screen, j):
    square = w.dtype.type(0)
    for k in range(len(w)):
        square += w[k] * w[k]
    screen.norm[j] = np.sqrt(square)
    if len(low):
        lost = w.dtype.type(0)
        line = low[j]
        for k in range(len(w)):
            bits = bfloat16_bits(np.float32(w[k]))
            line[k] = bits
            rest = w[k] - widened(bits)
            lost += rest * rest
        screen.error[j] = np.sqrt(lost / square) if square > 0 else 0


@compiled
def _lower(values, factor, low):
    """One row: its scale, and the norms of what it stands for and of what is lost."""
    bits = np.uint32(0)
    for k in range(len(values)):
        # positive floats are in the order of their bits, and only a maximum of integers becomes vectors
        bits = max(bits, as_bits(np.float32(abs(values[k] * factor[k]))))  # pyright: ignore[reportCallIssue]
    largest = as_float(bits)  # pyright: ignore[reportCallIssue]
    if not (_TINY < largest < np.inf):
        low[:] = 0
        size = largest * np.sqrt(np.float32(len(values)))
        return np.float32(0), size, size
    scale, per_unit = largest / np.float32(127), np.float32(127) / largest
    square, lost = np.float32(0), np.float32(0)
    for k in range(len(values)):
        exact = values[k] * factor[k] * per_unit
        whole = np.rint(exact)
        low[k] = np.int8(whole)
        rest = exact - whole
        square += exact * exact
        lost += rest * rest
    return scale, scale * np.sqrt(square), scale * np.sqrt(lost)
