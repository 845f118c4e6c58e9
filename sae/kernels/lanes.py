"""Products of rows with sixteen columns at a time, a block of coordinates after the other: the first few, the
head, for all rows, and those behind for rows of which one of the sixteen may matter still.

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
from sae.kernels.vectors import (
    BYTES,
    FLOATS,
    I32,
    I64,
    INTS,
    LANES,
    NO_FLOATS,
    NO_INTS,
    ZERO,
    bits,
    everywhere,
    i64,
    number,
    opened,
    part,
    plus,
    pointer,
    store,
    vector,
)

BLOCK = 64
"""Coordinates taken together; so are sixteen columns."""
QUAD = 4
"""Coordinates of a column that lie side by side."""
OFFSET = 128
"""What columns are stored with: a processor multiplies numbers without a sign by those with one."""
# sums that are made side by side, since each waits for itself
_SUMS = 4


def packed(columns: Int8[np.ndarray, "column d"]) -> UInt8[np.ndarray, "lanes block quad lane four"]:
    """Columns as loops read them; their number is a multiple of LANES, d one of BLOCK."""
    n, d = columns.shape
    shaped = columns.reshape(n // LANES, LANES, d // BLOCK, BLOCK // QUAD, QUAD)
    return np.ascontiguousarray(shaped.transpose(0, 2, 3, 1, 4)).view(np.uint8) + np.uint8(OFFSET)


class Blocks(NamedTuple):
    """Rows in blocks of coordinates."""

    values: Any
    """int8 [row, coordinate]"""
    start: Any
    """What takes away OFFSET of columns: int32 [row, block]."""
    reach: Any
    """Norms of what comes from each block on, and behind the last, times a scale: float32 [row, edge]."""

    @classmethod
    def of(cls, values: Int8[np.ndarray, "row d"], scale: Float32[np.ndarray, " row"]) -> "Blocks":
        """Of rows of whole numbers times scale; d is a multiple of BLOCK."""
        n, blocks = len(values), values.shape[1] // BLOCK
        made = cls(values, np.empty((n, blocks), np.int32), np.empty((n, blocks + 1), np.float32))
        made.measure(scale)
        return made

    def part(self, part: slice) -> "Blocks":
        """Views of some."""
        return Blocks(*(array[part] for array in self))

    def measure(self, scale: Float32[np.ndarray, " row"]) -> None:
        """Fills the rest in for the values there are."""
        _measure(*self, scale)


@compiled
def room_for_lanes(rows):
    """Float32 [row, 16], each row in a line of the cache: a vector on two of them takes twice as long."""
    room = np.empty((rows + 1) * LANES, np.float32)
    skipped = (-room.ctypes.data % 64) // 4
    return room[skipped : skipped + rows * LANES].reshape(rows, LANES)


@compiled
def _measure(values, start, reach, scale):
    for r in range(len(values)):
        square = np.float32(0)
        reach[r, start.shape[1]] = 0
        for b in range(start.shape[1] - 1, -1, -1):
            total, squares = np.int32(0), np.int32(0)
            for k in range(b * BLOCK, b * BLOCK + BLOCK):
                value = np.int32(values[r, k])
                total, squares = np.int32(total + value), np.int32(squares + value * value)
            start[r, b] = -OFFSET * total
            square += np.float32(squares)
            # a hair more than they are, for what rounding takes away
            reach[r, b] = np.sqrt(square) * scale[r] * np.float32(1 + 1e-5)


@intrinsic
def multiply(_context, begin, end, block, blocks, sums, packed, first):
    """Adds the products of a block of coordinates to `sums` int32 [row, 16], which begin at block 0.

    Those of the rows [begin, end) of `blocks` with the sixteen columns from `first` on of `packed`.
    """

    def build(context, builder, signature, arguments):
        begin, end, *block = opened(context, builder, signature, arguments)
        total_of = _with_block(context, builder, *block)
        with cgutils.for_range(builder, builder.sub(end, begin)) as loop:
            total_of(builder.add(begin, loop.index))
        return context.get_dummy_value()

    return types.none(begin, end, block, blocks, sums, packed, first), build


@intrinsic
def list_beyond(
    _context, rows, begin, end, masks, block, blocks, sums, packed, first, scale, spread, limits, cubes
):  # fmt: skip
    """As `multiply`; and lists rows of which one of sixteen columns may be beyond a limit, in `rows` int64.

    score = sums[row] * scale[c], which the blocks behind may change by rest = reach[row, edge] *
    spread[edge, c], is beyond if score + rest > limits[0, 0, row] or if score - rest < limits[0, 1, row].
    Leaves a bit a column in `masks`, and returns how many rows there are. Adds score^3 to `cubes` float32
    [row, 16].
    """

    def build(context, builder, signature, arguments):
        rows, begin, end, masks, *block, scale, spread, limits, cubes = opened(
            context, builder, signature, arguments
        )
        this, *_, first = block
        total_of = _with_block(context, builder, *block)
        edge, blocks = builder.add(this, i64(1)), block[1]
        passes = _two_sided(builder, first, edge, scale, spread, blocks[2], limits, ZERO)
        scales = vector(builder, FLOATS, scale, first)

        def mask_of(r):
            total = total_of(r)
            _add_cube(builder, builder.fmul(builder.sitofp(total, FLOATS), scales), cubes, r)
            return passes(total, r)

        return _listed(builder, rows, begin, end, masks, mask_of)

    given = rows, begin, end, masks, block, blocks, sums, packed, first, scale, spread, limits, cubes
    return types.int64(*given), build


@intrinsic
def narrow_beyond(
    _context, rows, n, masks, block, blocks, sums, packed, first, scale, spread, limits, exact
):  # fmt: skip
    """As `list_beyond`, for the first n of `rows`: leaves those that may be beyond limits[exact] still."""

    def build(context, builder, signature, arguments):
        rows, n, masks, *block, scale, spread, limits, exact = opened(context, builder, signature, arguments)
        this, blocks, *_, first = block
        total_of = _with_block(context, builder, *block)
        edge = builder.add(this, i64(1))
        passes = _two_sided(builder, first, edge, scale, spread, blocks[2], limits, exact)
        return _narrowed(builder, rows, n, masks, lambda r: passes(total_of(r), r))

    given = rows, n, masks, block, blocks, sums, packed, first, scale, spread, limits, exact
    return types.int64(*given), build


@intrinsic
def put_in_bins(_context, begin, end, sums, first, scale, per_bin, n_bins, bins, place, column):
    """Fills bins[row, place, column : column + 16], uint8, for the rows [begin, end).

    A sum's is the whole part of sums[row] * scale[c] * per_bin[row] + n_bins / 2, or the nearest there is.
    """

    def build(context, builder, signature, arguments):
        begin, end, sums, first, scale, per_bin, n_bins, bins, place, column = opened(
            context, builder, signature, arguments
        )
        scales, last = vector(builder, FLOATS, scale, first), builder.sub(n_bins, i64(1))
        n, last = (
            everywhere(builder, builder.sitofp(count, ir.FloatType()), FLOATS) for count in (n_bins, last)
        )
        middle = builder.fmul(n, ir.Constant(FLOATS, [0.5] * LANES))
        with cgutils.for_range(builder, builder.sub(end, begin)) as loop:
            r = builder.add(begin, loop.index)
            score = builder.fmul(builder.sitofp(vector(builder, INTS, sums, r), FLOATS), scales)
            found = plus(builder, middle, score, everywhere(builder, number(builder, per_bin, r), FLOATS))
            found = builder.select(builder.fcmp_ordered(">", found, NO_FLOATS), found, NO_FLOATS)
            found = builder.select(builder.fcmp_ordered("<", found, last), found, last)
            store(builder, builder.trunc(builder.fptosi(found, INTS), BYTES), bins, r, place, column)
        return context.get_dummy_value()

    return types.none(begin, end, sums, first, scale, per_bin, n_bins, bins, place, column), build


@intrinsic
def list_over(
    _context, rows, begin, end, masks, block, heads, sums, packed, first, tails, columns, of_rows, values
):  # fmt: skip
    """As `list_beyond`, where columns have bounds, and the head a scale and the tail another.

    `columns` begin with (scale, norm, tail's scale, tail's norm, bound, packed tails, spread), and `of_rows`
    are (scale, margin, tail's scale, tail's margin). Over is

        sums[row] scale[row] scale[c] + margin[row] norm[c] + tail's margin[row] tail's norm[c] - bound[c],

    which `values` float32 [row, 16] are given, if with the tail's product and with what may still be missing,
    reach[row, edge] spread[edge, c], it is above 0.
    """

    def build(context, builder, signature, arguments):
        rows, begin, end, masks, *block, tails, columns, of_rows, values = opened(
            context, builder, signature, arguments
        )
        total_of = _with_block(context, builder, *block)
        first = block[-1]
        scale, norm, _, tail_norm, bound = (vector(builder, FLOATS, array, first) for array in columns[:5])
        less, passes = builder.fneg(bound), _one_sided(builder, first, ZERO, tails, columns)

        def mask_of(r):
            row_scale, margin, _, tail_margin = (
                everywhere(builder, number(builder, array, r), FLOATS) for array in of_rows
            )
            score = builder.fmul(builder.sitofp(total_of(r), FLOATS), scale)
            value = plus(builder, less, score, row_scale)
            value = plus(builder, plus(builder, value, norm, margin), tail_norm, tail_margin)
            store(builder, value, values, r)
            return passes(value, r)

        return _listed(builder, rows, begin, end, masks, mask_of)

    given = rows, begin, end, masks, block, heads, sums, packed, first, tails, columns, of_rows, values
    return types.int64(*given), build


@intrinsic
def narrow_over(_context, rows, n, masks, block, tails, sums, first, columns, of_rows, values):
    """As `narrow_beyond`, for what may still be over; sums are of the tail alone."""

    def build(context, builder, signature, arguments):
        rows, n, masks, block, tails, sums, first, columns, of_rows, values = opened(
            context, builder, signature, arguments
        )
        total_of = _with_block(context, builder, block, tails, sums, columns[5], first)
        scale = vector(builder, FLOATS, columns[2], first)
        passes = _one_sided(builder, first, builder.add(block, i64(1)), tails, columns)

        def mask_of(r):
            score = builder.fmul(builder.sitofp(total_of(r), FLOATS), scale)
            head, row_scale = vector(builder, FLOATS, values, r, ZERO), number(builder, of_rows[2], r)
            return passes(plus(builder, head, score, everywhere(builder, row_scale, FLOATS)), r)

        return _narrowed(builder, rows, n, masks, mask_of)

    given = rows, n, masks, block, tails, sums, first, columns, of_rows, values
    return types.int64(*given), build


def _with_block(context, builder, block, blocks, sums, packed, first):
    """What adds a block of sixteen columns to a row's sums, and gives them."""
    values, start, _ = blocks
    place, begins = builder.udiv(first, i64(LANES)), builder.icmp_unsigned("==", block, ZERO)
    # sixteen columns' block stays in registers for all rows
    quads = [
        vector(builder, INTS, packed, place, block, i64(quad), ZERO, ZERO) for quad in range(BLOCK // QUAD)
    ]

    def total_of(r):
        so_far = builder.select(begins, NO_INTS, vector(builder, INTS, sums, r, ZERO))
        begun = builder.add(so_far, everywhere(builder, number(builder, start, r, block), INTS))
        left = pointer(builder, values, r, builder.mul(block, i64(BLOCK)))
        total = _products(context, builder, begun, left, quads)
        store(builder, total, sums, r)
        return total

    return total_of


def _listed(builder, rows, begin, end, masks, mask_of):
    """Of the rows [begin, end) those whose mask has a bit."""
    return _kept(builder, rows, masks, builder.sub(end, begin), lambda i: builder.add(begin, i), mask_of)


def _narrowed(builder, rows, n, masks, mask_of):
    """Of n rows those whose mask has a bit."""
    return _kept(builder, rows, masks, n, lambda i: number(builder, rows, i), mask_of)


def _kept(builder, rows, masks, n, row_of, mask_of):
    """Of n rows those whose mask has a bit, in their order; how many they are."""
    kept = cgutils.alloca_once_value(builder, ZERO)
    with cgutils.for_range(builder, n) as loop:
        r = row_of(loop.index)
        mask, behind = mask_of(r), builder.load(kept)
        # stored in any case: which are left cannot be foreseen
        builder.store(r, pointer(builder, rows, behind))
        builder.store(mask, pointer(builder, masks, behind))
        there = builder.icmp_unsigned("!=", mask, ZERO)
        builder.store(builder.add(behind, builder.zext(there, I64)), kept)
    return builder.load(kept)


def _two_sided(builder, first, edge, scale, spread, reach, limits, exact):
    """What gives the mask of `beyond` for sixteen sums of a row."""
    scales, spreads = vector(builder, FLOATS, scale, first), vector(builder, FLOATS, spread, edge, first)
    sides = [part(builder, limits, exact, side) for side in (ZERO, i64(1))]

    def passes(sums, r):
        score = builder.fmul(builder.sitofp(sums, FLOATS), scales)
        rest = builder.fmul(spreads, everywhere(builder, number(builder, reach, r, edge), FLOATS))
        above, below = (everywhere(builder, number(builder, side, r), FLOATS) for side in sides)
        high = builder.fcmp_ordered(">", builder.fadd(score, rest), above)
        low = builder.fcmp_ordered("<", builder.fsub(score, rest), below)
        return bits(builder, builder.or_(high, low))

    return passes


def _one_sided(builder, first, edge, tails, columns):
    """What gives the mask of `over` for sixteen values of a row."""
    spreads, reach = vector(builder, FLOATS, columns[6], edge, first), tails[2]

    def passes(value, r):
        rest = everywhere(builder, number(builder, reach, r, edge), FLOATS)
        return bits(builder, builder.fcmp_ordered(">", plus(builder, value, spreads, rest), NO_FLOATS))

    return passes


def _add_cube(builder, value, cubes, r):
    so_far = vector(builder, FLOATS, cubes, r, ZERO)
    store(builder, plus(builder, so_far, builder.fmul(value, value), value), cubes, r)


def _products(context, builder, begun, left, quads):
    """Sixteen sums and the products of a row's coordinates from `left` on with columns'."""
    fours = builder.bitcast(left, I32.as_pointer())
    total = [begun] + [NO_INTS] * (_SUMS - 1)
    multiply = _by_vnni if _has_vnni(context) else _by_parts
    for quad, columns in enumerate(quads):
        four = builder.load(builder.gep(fours, [i64(quad)]), align=1)
        total[quad % _SUMS] = multiply(builder, total[quad % _SUMS], columns, everywhere(builder, four, INTS))
    return functools.reduce(builder.add, total)


def _has_vnni(context):
    return "+avx512vnni" in str(context.codegen().magic_tuple())


def _by_vnni(builder, total, left, right):
    """total plus, for each lane, the sum of four products of bytes: those of `left` have no sign."""
    name, kind = "llvm.x86.avx512.vpdpbusd.512", ir.FunctionType(INTS, [INTS] * 3)
    known = builder.module.globals.get(name)
    return builder.call(known or ir.Function(builder.module, kind, name), [total, left, right])


def _by_parts(builder, total, left, right):
    """The same on other processors."""
    down = ir.Constant(INTS, [24] * LANES)
    for byte in range(QUAD):
        up = ir.Constant(INTS, [8 * (QUAD - 1 - byte)] * LANES)
        a, b = builder.lshr(builder.shl(left, up), down), builder.ashr(builder.shl(right, up), down)
        total = builder.add(total, builder.mul(a, b))
    return total
