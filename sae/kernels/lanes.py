"""Sixteen products at a time: what is left of a head's products gets the coordinates behind it, a block of
them at a time, until none of the sixteen can matter.

Written in LLVM's own terms, since sixteen integers that stay in a register are nothing numba has. Sixteen
columns lie in memory as a processor multiplies them, four coordinates of each side by side (`packed`).
"""

import functools

import numpy as np
from jaxtyping import Int8, UInt8
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

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
    """Columns as `narrow` reads them; their number is a multiple of LANES, d one of BLOCK."""
    n, d = columns.shape
    shaped = columns.reshape(n // LANES, LANES, d // BLOCK, BLOCK // QUAD, QUAD)
    return np.ascontiguousarray(shaped.transpose(0, 2, 3, 1, 4)).view(np.uint8) + np.uint8(OFFSET)


@intrinsic
def beyond(_context, products, row, first, scale, spread, reach, limits):
    """A bit for each of sixteen columns of a row, of heads' products: whether they may be beyond a limit.

    With score = products[row, c] * scale[c], c from `first` on, and rest = reach[row, 0] * spread[0, c]:
    score + rest > limits[0, 0, row] or score - rest < limits[0, 1, row].
    """

    def build(context, builder, signature, arguments):
        products, row, first, scale, spread, reach, limits = _opened(context, builder, signature, arguments)
        columns = _vector(builder, _FLOATS, scale, first), _vector(builder, _FLOATS, spread, _ZERO, first)
        rest = _number(builder, reach, row, _ZERO)
        bounds = [_number(builder, limits, _ZERO, side, row) for side in (_ZERO, _i64(1))]
        return _beyond(builder, _vector(builder, _INTS, products, row, first), columns, rest, bounds)

    given = (products, row, first, scale, spread, reach, limits)
    return types.uint64(*given), build


@intrinsic
def narrow(
    _context, rows, group, n, masks, products, begin, block, tails, columns, place, sums, scale, first,
    spread, limits, exact,
):  # fmt: skip
    """Gives the first n of `rows`[group], int64, the products of a block of coordinates of sixteen columns.

    sums[r] = products[r, begin : begin + 16] + start[r, block] + the products of tail[r], int8, with
    `columns`[place, block] of `packed`; `tails` is (tail, start, reach), and start takes away what OFFSET
    adds. Leaves in `rows` those of which some column may still be beyond limits[exact], as in `beyond` with
    what comes behind the block, and the bits in `masks`. Returns how many are left.
    """

    def build(context, builder, signature, arguments):
        (
            rows, group, n, masks, products, begin, block, tails, columns, place, sums, scale, first, spread,
            limits, exact,
        ) = _opened(context, builder, signature, arguments)  # fmt: skip
        tail, start, reach = tails
        after = builder.add(block, _i64(1))
        # sixteen columns' block stays in registers for all rows
        quads = [
            _vector(builder, _INTS, columns, place, block, _i64(quad), _ZERO, _ZERO)
            for quad in range(BLOCK // QUAD)
        ]
        of_columns = _vector(builder, _FLOATS, scale, first), _vector(builder, _FLOATS, spread, after, first)
        kept = cgutils.alloca_once_value(builder, _ZERO)
        with cgutils.for_range(builder, n) as loop:
            r = _number(builder, rows, group, loop.index)
            begun = builder.add(
                _vector(builder, _INTS, products, r, begin),
                _all(builder, _number(builder, start, r, block), _INTS),
            )
            left = _pointer(builder, tail, r, builder.mul(block, _i64(BLOCK)))
            total = _with_block(context, builder, begun, left, quads)
            builder.store(total, builder.bitcast(_pointer(builder, sums, r, _ZERO), _INTS.as_pointer()), 1)
            rest = _number(builder, reach, r, after)
            bounds = [_number(builder, limits, exact, side, r) for side in (_ZERO, _i64(1))]
            mask = _beyond(builder, total, of_columns, rest, bounds)
            behind = builder.load(kept)
            # stored in any case: which are left cannot be foreseen
            builder.store(r, _pointer(builder, rows, group, behind))
            builder.store(mask, _pointer(builder, masks, behind))
            there = builder.icmp_unsigned("!=", mask, _ZERO)
            builder.store(builder.add(behind, builder.zext(there, _I64)), kept)
        return builder.load(kept)

    given = (
        rows, group, n, masks, products, begin, block, tails, columns, place, sums, scale, first, spread,
        limits, exact,
    )  # fmt: skip
    return types.int64(*given), build


def _i64(number):
    return ir.Constant(_I64, number)


_ZERO = _i64(0)


def _opened(context, builder, signature, arguments):
    """Arguments, with arrays as structures whose fields can be read; also those of a tuple of arrays."""

    def opened(kind, value):
        if isinstance(kind, types.Tuple | types.NamedTuple):
            return [
                opened(*part) for part in zip(kind.types, cgutils.unpack_tuple(builder, value), strict=True)
            ]
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


def _beyond(builder, sums, columns, rest, bounds):
    """The bits of sixteen scores."""
    scale, spread = columns
    score = builder.fmul(builder.sitofp(sums, _FLOATS), scale)
    rest = builder.fmul(spread, _all(builder, rest, _FLOATS))
    above, below = (_all(builder, bound, _FLOATS) for bound in bounds)
    high = builder.fcmp_ordered(">", builder.fadd(score, rest), above)
    low = builder.fcmp_ordered("<", builder.fsub(score, rest), below)
    return builder.zext(builder.bitcast(builder.or_(high, low), ir.IntType(LANES)), _I64)


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
