"""The loops of `nearest`, compiled by numba: the largest of each row and each column of a tile of products.

A score is a product times the scale of the other side, float32. One with its place is a key, an int64 that
orders first by the score and among equal ones has the smaller place ahead; no two are equal. So the largest
keys of a row are the same in whatever order its tiles come.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sae.kernels.compiled import compiled
from sae.kernels.cpu_loops import as_bits, as_float, lowest_bit

# products compared together, as many as a word has bits
_LANES = 64
_PLACE = np.int64(0x7FFFFFFF)
NO_KEY = (-0x7F800001 << 32) | 0x7FFFFFFF
"""The key of a score of minus infinity."""


@compiled
def keep_in_rows(products, scale, first, keys, bounds):
    """Takes each row's largest scores in a tile of products, int32 [row, column], into its keys.

    `keys` [row, count] are the largest so far, falling, `bounds` [row] the score of the last of them.
    `scale` [column] is the other side's, whose places begin at `first`.
    """
    whole = len(scale) // _LANES * _LANES
    for r in range(products.shape[0]):
        row = products[r]
        for start in range(0, whole, _LANES):
            bits = _reaching(row, start, scale, bounds[r])  # pyright: ignore[reportCallIssue]
            while bits:
                c = start + lowest_bit(bits)  # pyright: ignore[reportCallIssue]
                bits &= bits - np.uint64(1)
                bounds[r] = _keep(np.float32(row[c]) * scale[c], first + c, keys[r])
        for c in range(whole, len(scale)):
            score = np.float32(row[c]) * scale[c]
            if score >= bounds[r]:
                bounds[r] = _keep(score, first + c, keys[r])


@compiled
def keep_in_columns(products, scale, first, keys, bounds):
    """`keep_in_rows` for columns: `scale` is [row], the rows' places begin at `first`, `keys` [column]."""
    whole = len(bounds) // _LANES * _LANES
    for r in range(products.shape[0]):
        row = products[r]
        for start in range(0, whole, _LANES):
            bits = _reaching(row, start, scale[r], bounds)  # pyright: ignore[reportCallIssue]
            while bits:
                c = start + lowest_bit(bits)  # pyright: ignore[reportCallIssue]
                bits &= bits - np.uint64(1)
                bounds[c] = _keep(np.float32(row[c]) * scale[r], first + r, keys[c])
        for c in range(whole, len(bounds)):
            score = np.float32(row[c]) * scale[r]
            if score >= bounds[c]:
                bounds[c] = _keep(score, first + r, keys[c])


@compiled
def read_keys(keys, scores, places):
    """What keys stand for; all arrays have one shape [row, count]."""
    for r in range(keys.shape[0]):
        for k in range(keys.shape[1]):
            scores[r, k] = _score_of(keys[r, k])
            places[r, k] = _PLACE - (keys[r, k] & _PLACE)


@compiled
def _keep(score, place, keys):
    """Lets a score into falling keys if it is among the largest; returns the score of the last then."""
    bits = np.int32(as_bits(score))  # pyright: ignore[reportCallIssue]
    # as integers the bits order positive scores; negative ones once all but the sign are turned over
    ordered = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
    key = (np.int64(ordered) << np.int64(32)) | (_PLACE - np.int64(place))
    # every rank by the same rule: without a branch that depends on the key, which no processor foresees
    for rank in range(len(keys) - 1, 0, -1):
        keys[rank] = max(keys[rank], min(keys[rank - 1], key))
    keys[0] = max(keys[0], key)
    return _score_of(keys[len(keys) - 1])


@compiled
def _score_of(key):
    ordered = np.int32(key >> np.int64(32))
    bits = ordered ^ ((ordered >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return as_float(np.uint32(bits))  # pyright: ignore[reportCallIssue]


@intrinsic
def _reaching(_context, products, start, scale, bound):
    """A word whose bit k says whether products[start + k] * scale >= bound.

    `scale` and `bound` are float32, each a number or an array that goes with the products.
    """

    def build(context, builder, signature, arguments):
        floats = ir.VectorType(ir.FloatType(), _LANES)

        def lanes(at, kind):
            array = context.make_array(signature.args[at])(context, builder, arguments[at])
            there = builder.gep(array.data, [arguments[1]])
            return builder.load(builder.bitcast(there, ir.VectorType(kind, _LANES).as_pointer()), align=4)

        def factors(at):
            if isinstance(signature.args[at], types.Array):
                return lanes(at, ir.FloatType())
            first = ir.Constant(floats, ir.Undefined)
            first = builder.insert_element(first, arguments[at], ir.IntType(32)(0))
            everywhere = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
            return builder.shuffle_vector(first, first, everywhere)

        scores = builder.fmul(builder.sitofp(lanes(0, ir.IntType(32)), floats), factors(2))
        return builder.bitcast(builder.fcmp_ordered(">=", scores, factors(3)), ir.IntType(_LANES))

    return types.uint64(products, start, scale, bound), build
