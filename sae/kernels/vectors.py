"""Vectors of sixteen and arrays in LLVM's own terms, for `lanes`."""

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils

LANES = 16
"""Numbers of 32 bits in a vector."""
I32, I64 = ir.IntType(32), ir.IntType(64)
INTS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(ir.FloatType(), LANES)
BYTES = ir.VectorType(ir.IntType(8), LANES)
NO_INTS, NO_FLOATS = ir.Constant(INTS, [0] * LANES), ir.Constant(FLOATS, [0.0] * LANES)


def store(builder, values, array, *indices):
    """Sixteen of the last axis."""
    place = pointer(builder, array, *indices)
    builder.store(values, builder.bitcast(place, values.type.as_pointer()), align=1)


def plus(builder, value, left, right):
    """value + left * right, rounded once where a processor can."""
    return builder.fadd(value, builder.fmul(left, right, flags=("contract",)), flags=("contract",))


def bits(builder, lanes):
    """Sixteen truths as the bits of a number."""
    return builder.zext(builder.bitcast(lanes, ir.IntType(LANES)), I64)


def i64(number):
    """A constant."""
    return ir.Constant(I64, number)


ZERO = i64(0)


class Array(NamedTuple):
    """As LLVM knows it: where it begins, and how many bytes lie between neighbours of each axis."""

    data: Any
    strides: list[Any]


def opened(context, builder, signature, arguments) -> list[Any]:
    """Arguments, with arrays as `Array`; also those of a tuple of arrays."""

    def open_one(kind, value):
        if isinstance(kind, types.BaseTuple):
            kinds: Any = kind
            parts = zip(kinds, cgutils.unpack_tuple(builder, value), strict=True)
            return [open_one(*part) for part in parts]
        if not isinstance(kind, types.Array):
            return value
        array = context.make_array(kind)(context, builder, value)
        strides = cgutils.unpack_tuple(builder, array.strides, kind.ndim)
        if kind.layout == "C":
            # known when it is compiled, so that a processor adds it as it loads
            strides[-1] = i64(context.get_abi_sizeof(array.data.type.pointee))
        return Array(array.data, strides)

    return [open_one(*part) for part in zip(signature.args, arguments, strict=True)]


def part(builder, array, *indices):
    """An array of what lies at the first indices."""
    return Array(pointer(builder, array, *indices), array.strides[len(indices) :])


def pointer(builder, array, *indices):
    """To an element, or the first of what lies at the first indices."""
    place = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    # the last first: it is the same for all rows more often than not
    for index, stride in reversed(list(zip(indices, array.strides, strict=False))):
        place = builder.gep(place, [builder.mul(index, stride)])
    return builder.bitcast(place, array.data.type)


def number(builder, array, *indices):
    """An element."""
    return builder.load(pointer(builder, array, *indices))


def vector(builder, kind, array, *indices):
    """Sixteen elements of the last axis."""
    return builder.load(builder.bitcast(pointer(builder, array, *indices), kind.as_pointer()), align=1)


def everywhere(builder, value, kind):
    """Sixteen times the same."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(INTS, [0] * LANES))
