"""The inner loops of the step on a CPU, compiled by numba. `cpu` calls them, several at a time, each on its
part; `cpu_update` has the last of them.

Arrays are of the weights' dtype unless said otherwise, and so are single numbers, since a Python float would
turn a loop into double precision. Every sum has a fixed order, so results do not depend on threads.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from sae.kernels.compiled import compiled

MARKS = 64
"""Marks looked at together, as many as a word has bits."""


class Numbers(NamedTuple):
    """What a step's loops read beside arrays, as numpy scalars of the weights' dtype."""

    per_row: Any
    """2 / batch."""
    bandwidth: Any
    half: Any
    """Half the bandwidth; 0 where there is no window."""
    lr: Any
    threshold_lr: Any
    rate: Any
    """lr over Adam's correction of the first moment."""
    threshold_rate: Any
    fall1: Any
    """1 - beta1."""
    beta2: Any
    fall2: Any
    """1 - beta2."""
    root: Any
    """1 / sqrt of Adam's correction of the second moment."""
    epsilon: Any


class Latents(NamedTuple):
    """One array a parameter, for a block of latents: the weights, or one of their moments."""

    W_enc_t: Any
    b_enc: Any
    W_dec: Any
    threshold: Any


class Pairs(NamedTuple):
    """A block's pairs of row and latent, in the order of latents and then of rows."""

    starts: Any
    rows: Any
    values: Any


class Screen(NamedTuple):
    """What the screening product reads of a block of latents, renewed with the weights."""

    low: Any
    """W_enc_t in bfloat16, as uint16, or in integers; empty where the product reads W_enc_t itself."""
    norm: Any
    error: Any
    """||w - low|| / ||w||."""
    scale: Any
    """Of integers, what they are to be multiplied by; then w is what it is times `divide`."""
    divide: Any
    """For each coordinate of integers (`cpu_int8`)."""


@intrinsic
def as_float(_context, bits):
    """The float32 with these 32 bits."""

    def build(_, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), build


@intrinsic
def as_bits(_context, value):
    """The 32 bits of a float32."""

    def build(_, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), build


def widened(value):
    """A bfloat16, given by its 16 bits, as a float32; a float as it is."""


@overload(widened, inline="always")
def _widened_for(value):
    if value == types.uint16:
        return lambda value: as_float(types.uint32(value) << types.uint32(16))  # pyright: ignore[reportCallIssue]
    return lambda value: value


@compiled
def bfloat16_bits(value):
    # to nearest, ties to even; finite values only
    bits = as_bits(value)  # pyright: ignore[reportCallIssue]
    return types.uint16(
        (bits + types.uint32(0x7FFF) + ((bits >> types.uint32(16)) & types.uint32(1))) >> types.uint32(16)
    )


@compiled
def prepare_rows(rows_in, rows_out, scale_in, scale_out, b_in, x, y, low, norm, error, y_sum):
    """Scaled targets, scaled and centred inputs and their norms; the inputs in bfloat16 where `low` has rows,
    and the norms of what that rounds away.

    Raw rows may be bfloat16 as uint16. `y_sum` gets the targets' sum; their sum of squares is returned.
    """
    y_sum[:] = 0
    squares = y.dtype.type(0)
    for b in range(len(x)):
        for k in range(y.shape[1]):
            value = y.dtype.type(widened(rows_out[b, k])) / scale_out
            y[b, k] = value
            y_sum[k] += value
            squares += value * value
        square, lost = x.dtype.type(0), x.dtype.type(0)
        for k in range(x.shape[1]):
            value = x.dtype.type(widened(rows_in[b, k])) / scale_in - b_in[k]
            x[b, k] = value
            square += value * value
        norm[b] = np.sqrt(square)
        error[b] = 0
        if len(low):
            for k in range(x.shape[1]):
                bits = bfloat16_bits(np.float32(x[b, k]))
                low[b, k] = bits
                rest = x[b, k] - widened(bits)
                lost += rest * rest
            error[b] = np.sqrt(lost)
    return squares


@compiled
def dot(a, i, b, j):
    """<a[i], b[j]>, without making views of the rows."""
    total = a.dtype.type(0)
    for k in range(a.shape[1]):
        total += a[i, k] * b[j, k]
    return total


@compiled
def dot4(a, i0, i1, i2, i3, b, j):
    """`dot` of four rows of `a` with b[j], which is read once."""
    zero = a.dtype.type(0)
    s0, s1, s2, s3 = zero, zero, zero, zero
    for k in range(a.shape[1]):
        w = b[j, k]
        s0 += a[i0, k] * w
        s1 += a[i1, k] * w
        s2 += a[i2, k] * w
        s3 += a[i3, k] * w
    return s0, s1, s2, s3


@compiled
def add(total, i, table, row, weight):
    """total[i] += weight table[row]."""
    for k in range(table.shape[1]):
        total[i, k] += weight * table[row, k]


@compiled
def add4(total, i, table, rows, p, w0, w1, w2, w3):
    """`add` of rows[p] to rows[p + 3], which reads and writes the total once."""
    r0, r1, r2, r3 = rows[p], rows[p + 1], rows[p + 2], rows[p + 3]
    for k in range(table.shape[1]):
        total[i, k] += (w0 * table[r0, k] + w1 * table[r1, k]) + (w2 * table[r2, k] + w3 * table[r3, k])


@intrinsic
def _marked(_context, marks, start):
    """A word whose bit k says whether marks[start + k], uint8, is set."""

    def build(context, builder, signature, arguments):
        lanes = ir.VectorType(ir.IntType(8), MARKS)
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        there = builder.bitcast(builder.gep(array.data, [arguments[1]]), lanes.as_pointer())
        none = ir.Constant(lanes, [0] * MARKS)
        set_ones = builder.icmp_unsigned("!=", builder.load(there, align=1), none)
        return builder.bitcast(set_ones, ir.IntType(MARKS))

    return types.uint64(marks, start), build


@intrinsic
def lowest_bit(_context, bits):
    """The place of the lowest bit that is set, of a uint64 that is not 0."""

    def build(_, builder, _signature, arguments):
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(bits), build


@compiled
def mark_pairs(marks, b, rows, columns, found):
    """Adds row b's marked columns to the pairs found; returns how many there are now."""
    # comparisons become vectors when they only store; of their marks a word is made, of which set bits alone
    # cost time
    for start in range(0, len(marks), MARKS):
        bits = _marked(marks, start)  # pyright: ignore[reportCallIssue]
        while bits:
            rows[found] = b
            columns[found] = start + lowest_bit(bits)  # pyright: ignore[reportCallIssue]
            found += 1
            bits &= bits - np.uint64(1)
    return found


@compiled
def scan_block(product, row_bound, row_norm, row_error, bound, norm, slack, rows, columns):
    """Pairs that the screening product [batch, block] cannot rule out, in row order. Their number, or -1 if
    there is no room.

    A pair passes when product > bound + row_bound - margin with margin = (row_error + slack row_norm) norm,
    which bounds the product's own error. The product may be bfloat16 as uint16.
    """
    batch, width = product.shape
    found, room = 0, len(rows)
    marks = np.zeros((width + MARKS - 1) // MARKS * MARKS, np.uint8)
    for b in range(batch):
        if found + width > room:
            return -1
        reach, above = row_error[b] + slack * row_norm[b], row_bound[b]
        for j in range(width):
            marks[j] = widened(product[b, j]) > bound[j] + above - reach * norm[j]
        found = mark_pairs(marks, b, rows, columns, found)
    return found


@compiled
def exact_values(x, W_enc_t, b_enc, rows, columns, found, values):
    """The pairs' true pre-activations. A pair's value does not depend on which others there are."""
    p = 0
    while p < found:
        b, last = rows[p], p
        while last < p + 3 and last + 1 < found and rows[last + 1] == b:
            last += 1
        # up to four of one row; fewer repeat the last, since a loop for fewer could sum in another order
        p1, p2 = min(p + 1, last), min(p + 2, last)
        j0, j1, j2, j3 = columns[p], columns[p1], columns[p2], columns[last]
        s0, s1, s2, s3 = dot4(W_enc_t, j0, j1, j2, j3, x, b)
        values[p], values[p1], values[p2], values[last] = (
            s0 + b_enc[j0], s1 + b_enc[j1], s2 + b_enc[j2], s3 + b_enc[j3],
        )  # fmt: skip
        p = last + 1


@compiled
def exact_block(
    x,
    W_enc_t,
    b_enc,
    gate,
    row_bound,
    half,
    rows,
    columns,
    found,
    values,
    starts,
    pair_rows,
    pair_values,
    active,
):
    """The pairs' true pre-activations; those that matter, in order. Returns how many.

    Kept are pre > gate + row_bound, the active ones, and |pre - gate| < half. In `pair_rows` and
    `pair_values` a latent's active pairs come first, then the others: `starts` [2 block + 1] says where.
    `active` [batch] gets the number of a row's active pairs.
    """
    width = len(gate)
    starts[:] = 0
    active[:] = 0
    kept = 0
    exact_values(x, W_enc_t, b_enc, rows, columns, found, values)
    for p in range(found):
        # no branches: about one pair in six is kept, which none could foresee
        b, j, value = rows[p], columns[p], values[p]
        above = value > gate[j] + row_bound[b]
        keep = above | (abs(value - gate[j]) < half)
        key = 2 * j + (not above)
        rows[kept] = b
        columns[kept] = key
        values[kept] = value
        active[b] += above
        starts[key + 1] += keep
        kept += keep
    for key in range(2 * width):
        starts[key + 1] += starts[key]
    for p in range(kept):
        at = starts[columns[p]]
        pair_rows[at] = rows[p]
        pair_values[at] = values[p]
        starts[columns[p]] = at + 1
    for key in range(2 * width, 0, -1):
        starts[key] = starts[key - 1]
    starts[0] = 0
    return kept


@compiled
def row_offsets(active, offsets, l0):
    """Turns counts of active pairs [block, batch] into where each block's share of a row's list begins."""
    blocks, batch = active.shape
    total = 0
    for b in range(batch):
        offsets[b] = total
        for block in range(blocks):
            count = active[block, b]
            active[block, b] = total
            total += count
        l0[b] = total - offsets[b]
    offsets[batch] = total
    return total


@compiled
def fill_rows(first, pairs, cursor, fired, latents, acts):
    """Adds a block's active pairs to the rows' lists, where a row's latents end up in rising order.

    `fired` gets the number of each latent's.
    """
    for j in range(len(fired)):
        begin, end = pairs.starts[2 * j], pairs.starts[2 * j + 1]
        for p in range(begin, end):
            b = pairs.rows[p]
            at = cursor[b]
            latents[at] = first + j
            acts[at] = pairs.values[p]
            cursor[b] = at + 1
        fired[j] = end - begin


@compiled
def decode_row(W_dec, bias, offsets, latents, acts, b, out):
    """out[b] = bias + the row's activations times their rows of W_dec."""
    for k in range(len(bias)):
        out[b, k] = bias[k]
    p, end = offsets[b], offsets[b + 1]
    while p + 4 <= end:
        add4(out, b, W_dec, latents, p, acts[p], acts[p + 1], acts[p + 2], acts[p + 3])
        p += 4
    while p < end:
        add(out, b, W_dec, latents[p], acts[p])
        p += 1


@compiled
def miss_row(y, b, g, g_sum, numbers):
    """Turns a reconstruction in `g` into (2 / batch) (reconstruction - y), which `g_sum` adds up, and returns
    the row's squared error.
    """
    total = y.dtype.type(0)
    for k in range(len(g_sum)):
        error = g[b, k] - y[b, k]
        total += error * error
        g[b, k] = error * numbers.per_row
        g_sum[k] += g[b, k]
    return total


@compiled
def decode_rows(W_dec, b_dec, y, offsets, latents, acts, g, squared_error, g_sum, numbers):
    """Reconstructs rows; leaves g = (2 / batch) (reconstruction - y), each row's error, and the sum of g."""
    g_sum[:] = 0
    for b in range(len(y)):
        decode_row(W_dec, b_dec, offsets, latents, acts, b, g)
        squared_error[b] = miss_row(y, b, g, g_sum, numbers)


@compiled
def decode_part(W_dec, bias, offsets, latents, acts, out):
    """What a shard's latents add to the rows' reconstructions, and `bias`."""
    for b in range(len(out)):
        decode_row(W_dec, bias, offsets, latents, acts, b, out)


@compiled
def miss_rows(y, g, squared_error, g_sum, numbers):
    """What `decode_rows` leaves, from whole reconstructions in `g`."""
    g_sum[:] = 0
    for b in range(len(y)):
        squared_error[b] = miss_row(y, b, g, g_sum, numbers)
