"""Sixteen products at a time: what is left of a head's products gets the coordinates behind it, a block of
them at a time, until none of the sixteen can matter.

Written in LLVM's own terms, since sixteen integers that stay in a register are nothing numba has. Sixteen
columns lie in memory as a processor multiplies them, four coordinates of each side by side (`packed`).
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int8, UInt8
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sae.kernels.compiled import compiled

LANES, BLOCK = 16, 64
"""Columns taken together, and coordinates."""
QUAD = 4
"""Coordinates of a column that lie side by side."""
OFFSET = 128
"""What columns are stored with: a processor multiplies numbers without a sign by those with one."""
# sums that are made side by side, since each waits for itself
_SUMS = 4
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_INTS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(ir.FloatType(), LANES)


def packed(columns: Int8[np.ndarray, "column d"]) -> UInt8[np.ndarray, "lanes block quad lane four"]:
    """Columns as loops read them; their number is a multiple of LANES, d one of BLOCK."""
    n, d = columns.shape
    shaped = columns.reshape(n // LANES, LANES, d // BLOCK, BLOCK // QUAD, QUAD)
    return np.ascontiguousarray(shaped.transpose(0, 2, 3, 1, 4)).view(np.uint8) + np.uint8(OFFSET)


class Tails(NamedTuple):
    """What is left of rows behind the head, in blocks of coordinates."""

    tail: Any
    """int8 [row, coordinate]"""
    start: Any
    """What takes away OFFSET of columns: int32 [row, block]."""
    reach: Any
    """Norms of what comes from each block on, and behind the last, times a scale: float32 [row, edge]."""

    @classmethod
    def of(cls, tail: Int8[np.ndarray, "row d"], scale: Float32[np.ndarray, " row"]) -> "Tails":
        """Of rows of whole numbers times scale."""
        n, blocks = len(tail), tail.shape[1] // BLOCK
        made = cls(tail, np.empty((n, blocks), np.int32), np.empty((n, blocks + 1), np.float32))
        made.measure(scale)
        return made

    def part(self, part: slice) -> "Tails":
        """Views of some."""
        return Tails(*(array[part] for array in self))

    def measure(self, scale: Float32[np.ndarray, " row"]) -> None:
        """Fills the rest in for the tails there are."""
        _measure(*self, scale)


@compiled
def _measure(tail, start, reach, scale):
    for r in range(len(tail)):
        square = np.float32(0)
        reach[r, start.shape[1]] = 0
        for b in range(start.shape[1] - 1, -1, -1):
            total, squares = np.int32(0), np.int32(0)
            for k in range(b * BLOCK, b * BLOCK + BLOCK):
                value = np.int32(tail[r, k])
                total, squares = np.int32(total + value), np.int32(squares + value * value)
            start[r, b] = -OFFSET * total
            square += np.float32(squares)
            # a hair more than they are, for what rounding takes away
            reach[r, b] = np.sqrt(square) * scale[r] * np.float32(1 + 1e-5)


@intrinsic
def list_beyond(_context, rows, begin, end, masks, products, first, tails, scale, spread, limits):
    """Lists rows of heads' products, of which one of sixteen columns may be beyond a limit, in `rows`.

    Of the rows [begin, end) and columns from `first` on: score = products[row, c] * scale[c], which the tail
    may change by rest = reach[row, 0] * spread[0, c], is beyond if score + rest > limits[0, 0, row] or if
    score - rest < limits[0, 1, row]. Leaves a bit a column in `masks`, and returns how many rows there are.
    """

    def build(context, builder, signature, arguments):
        *where, masks, products, first, tails, scale, spread, limits = _opened(
            context, builder, signature, arguments
        )
        passes = _two_sided(builder, first, _ZERO, scale, spread, tails[2], limits, _ZERO)
        return _listed(builder, where, masks, products, first, passes)

    given = (rows, begin, end, masks, products, first, tails, scale, spread, limits)
    return types.int64(*given), build


@intrinsic
def narrow_beyond(
    _context, rows, n, masks, products, block, tails, sums, first, packed, scale, spread,
    limits, exact,
):  # fmt: skip
    """Gives the first n of `rows`, int64, the products of a block of coordinates of sixteen columns.

    Those of tail[r], of `Tails`, with the columns from `first` on of `packed` are added to sums[r], int32, or
    at the first block to products[r, first : first + 16]. Leaves in `rows` those of which some column may
    still be beyond limits[exact], as in `list_beyond` with what comes behind the block, and the bits in
    `masks`. Returns how many are left.
    """

    def build(context, builder, signature, arguments):
        *lists, products, block, tails, sums, first, packed, scale, spread, limits, exact = _opened(
            context, builder, signature, arguments
        )
        after = builder.add(block, _i64(1))
        passes = _two_sided(builder, first, after, scale, spread, tails[2], limits, exact)

        begins = builder.icmp_unsigned("==", block, _ZERO)

        def begun(r):
            so_far = _vector(builder, _INTS, sums, r, _ZERO)
            return builder.select(begins, _vector(builder, _INTS, products, r, first), so_far)

        return _narrowed(context, builder, lists, begun, block, tails, sums, (packed, first), passes)

    given = (
        rows, n, masks, products, block, tails, sums, first, packed, scale, spread, limits,
        exact,
    )  # fmt: skip
    return types.int64(*given), build


@intrinsic
def list_over(_context, rows, begin, end, masks, products, first, tails, columns, of_rows):
    """As `list_beyond`, for rows and columns that have bounds, and a scale for the head and one for the tail.

    `columns` are (scale, norm, tail's scale, tail's norm, bound, packed, spread) and `of_rows` (scale,
    margin, tail's scale, tail's margin, bound). Over is what exceeds both bounds, less what may be missing:

        products[row, c] scale[row] scale[c] + the tail's
            + margin[row] norm[c] + tail's margin[row] tail's norm[c] + reach[row, edge] spread[edge, c]
    """

    def build(context, builder, signature, arguments):
        *where, masks, products, first, tails, columns, of_rows = _opened(
            context, builder, signature, arguments
        )
        passes = _one_sided(builder, first, _ZERO, tails, columns, of_rows)
        return _listed(builder, where, masks, products, first, lambda heads, r: passes(heads, None, r))

    given = (rows, begin, end, masks, products, first, tails, columns, of_rows)
    return types.int64(*given), build


@intrinsic
def narrow_over(_context, rows, n, masks, products, block, tails, sums, first, columns, of_rows):
    """As `narrow_beyond`, for what may still be over; sums are of the tail alone."""

    def build(context, builder, signature, arguments):
        *lists, products, block, tails, sums, first, columns, of_rows = _opened(
            context, builder, signature, arguments
        )
        one_sided = _one_sided(builder, first, builder.add(block, _i64(1)), tails, columns, of_rows)
        begins = builder.icmp_unsigned("==", block, _ZERO)

        def begun(r):
            so_far = _vector(builder, _INTS, sums, r, _ZERO)
            return builder.select(begins, ir.Constant(_INTS, [0] * LANES), so_far)

        def passes(total, r):
            return one_sided(_vector(builder, _INTS, products, r, first), total, r)

        return _narrowed(context, builder, lists, begun, block, tails, sums, (columns[5], first), passes)

    given = (rows, n, masks, products, block, tails, sums, first, columns, of_rows)
    return types.int64(*given), build


def _narrowed(context, builder, lists, begun, block, tails, sums, columns, passes):
    """Adds a block for all rows of a list to what `begun` gives, and keeps those that still pass."""
    rows, n, masks = lists
    tail, start, _ = tails
    packed, first = columns
    place = builder.udiv(first, _i64(LANES))
    # sixteen columns' block stays in registers for all rows
    quads = [
        _vector(builder, _INTS, packed, place, block, _i64(quad), _ZERO, _ZERO)
        for quad in range(BLOCK // QUAD)
    ]

    def mask_of(r):
        begin = builder.add(begun(r), _all(builder, _number(builder, start, r, block), _INTS))
        left = _pointer(builder, tail, r, builder.mul(block, _i64(BLOCK)))
        total = _with_block(context, builder, begin, left, quads)
        builder.store(total, builder.bitcast(_pointer(builder, sums, r, _ZERO), _INTS.as_pointer()), 1)
        return passes(total, r)

    return _kept(builder, rows, masks, n, lambda i: _number(builder, rows, i), mask_of)


def _listed(builder, where, masks, products, first, passes):
    """Of the rows [begin, end) those that pass."""
    rows, begin, end = where

    def mask_of(r):
        return passes(_vector(builder, _INTS, products, r, first), r)

    return _kept(builder, rows, masks, builder.sub(end, begin), lambda i: builder.add(begin, i), mask_of)


def _kept(builder, rows, masks, n, row_of, mask_of):
    """Of n rows those whose mask has a bit, in their order; how many they are."""
    kept = cgutils.alloca_once_value(builder, _ZERO)
    with cgutils.for_range(builder, n) as loop:
        r = row_of(loop.index)
        mask, behind = mask_of(r), builder.load(kept)
        # stored in any case: which are left cannot be foreseen
        builder.store(r, _pointer(builder, rows, behind))
        builder.store(mask, _pointer(builder, masks, behind))
        there = builder.icmp_unsigned("!=", mask, _ZERO)
        builder.store(builder.add(behind, builder.zext(there, _I64)), kept)
    return builder.load(kept)


def _two_sided(builder, first, edge, scale, spread, reach, limits, exact):
    """What gives the mask of `beyond` for sixteen sums of a row."""
    scales, spreads = _vector(builder, _FLOATS, scale, first), _vector(builder, _FLOATS, spread, edge, first)

    def passes(sums, r):
        score = builder.fmul(builder.sitofp(sums, _FLOATS), scales)
        rest = builder.fmul(spreads, _all(builder, _number(builder, reach, r, edge), _FLOATS))
        above, below = (
            _all(builder, _number(builder, limits, exact, side, r), _FLOATS) for side in (_ZERO, _i64(1))
        )
        high = builder.fcmp_ordered(">", builder.fadd(score, rest), above)
        low = builder.fcmp_ordered("<", builder.fsub(score, rest), below)
        return _bits(builder, builder.or_(high, low))

    return passes


def _one_sided(builder, first, edge, tails, columns, of_rows):
    """What gives the mask of `over` for sixteen products of a row, and those of its tail so far."""
    scales, norms, tail_scales, tail_norms, bounds = (
        _vector(builder, _FLOATS, array, first) for array in columns[:5]
    )
    spreads, reach = _vector(builder, _FLOATS, columns[6], edge, first), tails[2]

    def passes(products, sums, r):
        scale, margin, tail_scale, tail_margin, bound = (
            _all(builder, _number(builder, array, r), _FLOATS) for array in of_rows
        )
        value = builder.fmul(builder.fmul(builder.sitofp(products, _FLOATS), scales), scale)
        if sums is not None:
            value = _plus(
                builder, value, builder.fmul(builder.sitofp(sums, _FLOATS), tail_scales), tail_scale
            )
        value = _plus(builder, value, norms, margin)
        value = _plus(builder, value, tail_norms, tail_margin)
        value = _plus(builder, value, spreads, _all(builder, _number(builder, reach, r, edge), _FLOATS))
        return _bits(builder, builder.fcmp_ordered(">", value, builder.fadd(bounds, bound)))

    return passes


def _plus(builder, value, left, right):
    """value + left * right, rounded once where a processor can."""
    return builder.fadd(value, builder.fmul(left, right, flags=("contract",)), flags=("contract",))


def _bits(builder, lanes):
    return builder.zext(builder.bitcast(lanes, ir.IntType(LANES)), _I64)


def _i64(number):
    return ir.Constant(_I64, number)


_ZERO = _i64(0)


def _opened(context, builder, signature, arguments):
    """Arguments, with arrays as structures whose fields can be read; also those of a tuple of arrays."""

    def opened(kind, value):
        if isinstance(kind, types.BaseTuple):
            kinds: Any = kind
            parts = zip(kinds, cgutils.unpack_tuple(builder, value), strict=True)
            return [opened(*part) for part in parts]
        is_array = isinstance(kind, types.Array)
        return context.make_array(kind)(context, builder, value) if is_array else value

    return [opened(*part) for part in zip(signature.args, arguments, strict=True)]


def _pointer(builder, array, *indices):
    """To an element."""
    strides = cgutils.unpack_tuple(builder, array.strides, len(indices))
    places = (builder.mul(index, stride) for index, stride in zip(indices, strides, strict=True))
    place = functools.reduce(builder.add, places)
    start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(start, [place]), array.data.type)


def _number(builder, array, *indices):
    return builder.load(_pointer(builder, array, *indices))


def _vector(builder, kind, array, *indices):
    """Sixteen elements of the last axis."""
    return builder.load(builder.bitcast(_pointer(builder, array, *indices), kind.as_pointer()), align=1)


def _all(builder, value, kind):
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _with_block(context, builder, begun, left, quads):
    """Sixteen sums and the products of a row's coordinates from `left` on with columns'."""
    fours = builder.bitcast(left, _I32.as_pointer())
    total = [begun] + [ir.Constant(_INTS, [0] * LANES)] * (_SUMS - 1)
    multiply = _by_vnni if _has_vnni(context) else _by_parts
    for quad, columns in enumerate(quads):
        four = builder.load(builder.gep(fours, [_i64(quad)]), align=1)
        total[quad % _SUMS] = multiply(builder, total[quad % _SUMS], columns, _all(builder, four, _INTS))
    return functools.reduce(builder.add, total)


def _has_vnni(context):
    return "+avx512vnni" in str(context.codegen().magic_tuple())


def _by_vnni(builder, total, left, right):
    """total plus, for each lane, the sum of four products of bytes: those of `left` have no sign."""
    name, kind = "llvm.x86.avx512.vpdpbusd.512", ir.FunctionType(_INTS, [_INTS] * 3)
    known = builder.module.globals.get(name)
    return builder.call(known or ir.Function(builder.module, kind, name), [total, left, right])


def _by_parts(builder, total, left, right):
    """The same on other processors."""
    down = ir.Constant(_INTS, [24] * LANES)
    for byte in range(QUAD):
        up = ir.Constant(_INTS, [8 * (QUAD - 1 - byte)] * LANES)
        a, b = builder.lshr(builder.shl(left, up), down), builder.ashr(builder.shl(right, up), down)
        total = builder.add(total, builder.mul(a, b))
    return total
