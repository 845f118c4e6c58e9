"""The loop over a tile of logits on a CPU, compiled by numba: a running sum of exponentials for each row."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sae.kernels.compiled import compiled

_LANES = 64
_LOG2_E = np.float32(1.4426950408889634)
# below this a float32 has no power of two
_LOWEST = np.float32(-126)
# 2^f for f in (-1, 0] by Chebyshev interpolation
_C0, _C1, _C2 = np.float32(0.99999994), np.float32(0.6931431), np.float32(0.24017896)
_C3, _C4, _C5 = np.float32(0.05529812), np.float32(0.00920918), np.float32(0.000946877)


@intrinsic
def _as_float(_context, bits):
    """The float32 with these 32 bits."""

    def build(_, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), build


@compiled
def exp2_of_negative(x):
    """2^x for x <= 0, float32: relative error below 1e-6, and 2^-126 for all that is smaller."""
    x = x if x > _LOWEST else _LOWEST
    whole = np.int32(x)
    f = x - np.float32(whole)
    power = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * _C5))))
    bits = (whole + np.int32(127)) << np.int32(23)
    return power * _as_float(bits)  # pyright: ignore[reportCallIssue]  # numba gives the context


@compiled
def largest(values):
    """The largest of some float32, none of them NaN."""
    # side by side, since a compiler keeps a single running maximum scalar
    lanes = np.full(_LANES, -np.inf, np.float32)
    whole = len(values) // _LANES * _LANES
    for start in range(0, whole, _LANES):
        for lane in range(_LANES):
            value = values[start + lane]
            lanes[lane] = value if value > lanes[lane] else lanes[lane]
    found = lanes[0]
    for lane in range(1, _LANES):
        found = max(found, lanes[lane])
    for place in range(whole, len(values)):
        found = max(found, values[place])
    return found


@compiled
def add_tile(products, row_scale, column_scale, offset, first, top, total, best, room):
    """Takes a tile of logits into each row's sum: after all tiles, log sum exp = top + log(total).

    logit[r, c] = products[r, c] * row_scale[r] * column_scale[c] + offset[c], with products [row, column]
    int32 and the rest float32. `top`, `total` and `best` [row] are the largest logit so far, sum of
    exp(logit - top), and where that largest logit is (int64; `first` is the tile's first column). `room` is
    float32 [column] to work in.
    """
    for r in range(products.shape[0]):
        scale, row = row_scale[r], products[r]
        for c in range(len(room)):
            room[c] = np.float32(row[c]) * scale * column_scale[c] + offset[c]
        highest = largest(room)
        if highest > top[r]:
            for c in range(len(room)):
                if room[c] == highest:
                    best[r] = first + c
                    break
            total[r] *= np.exp(top[r] - highest)
            top[r] = highest
        middle, here = top[r], np.float32(0)
        for c in range(len(room)):
            here += exp2_of_negative((room[c] - middle) * _LOG2_E)
        total[r] += here
