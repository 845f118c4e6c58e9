"""Triton kernels by rows: centring, screening, lists from bit masks, reconstruction.

A mask has one bit a pair, 32 to an int32 word, lowest first: `by_row` [batch, ceil(d_sae / 32)] and
`by_latent` [d_sae, ceil(batch / 32)]. Nothing is assumed of what an output held before. `no_type_check`
keeps the tests' shape checks off functions that Triton reads as source.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def popcount(word):
    """How many bits of each uint32 are set, as int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 63).to(tl.int32)


@triton.jit
@no_type_check
def centre_rows(
    rows_in, b_in, x, low, reach, batch, d_in, scale, ratio,
    TILE: tl.constexpr, WIDTH: tl.constexpr, HAS_LOW: tl.constexpr,
):  # fmt: skip
    """x = rows_in / scale - b_in, its copy `low` for the product, and the rows' reach.

    reach [batch] = hypot(||low - x|| / ratio, ||x||): see `screen`. Without `HAS_LOW` x itself is multiplied.
    """
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, WIDTH)
    there = (row < batch)[:, None] & (column < d_in)[None, :]
    at = row.to(tl.int64)[:, None] * d_in + column[None, :]
    raw = tl.load(rows_in + at, mask=there, other=0.0).to(tl.float32)
    centre = tl.load(b_in + column, mask=column < d_in, other=0.0)
    value = tl.where(there, tl.math.div_rn(raw, scale) - centre[None, :], 0.0)
    tl.store(x + at, value, mask=there)
    square = tl.sum(value * value, axis=1)
    if HAS_LOW:
        rounded = value.to(low.dtype.element_ty)
        tl.store(low + at, rounded, mask=there)
        error = (rounded.to(tl.float32) - value) / ratio
        square += tl.sum(error * error, axis=1)
    tl.store(reach + row, tl.sqrt(square), mask=row < batch)


@triton.jit
@no_type_check
def product(
    low_x, low_w, row, latent, batch, d_in, d_sae,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """<low_x[row], low_w[latent]> in fp32, for a block of both.

    Rows and latents beyond the last are read as others, so that the masks of the loads depend on d_in alone.
    `WIDEN` is for Triton's interpreter, which takes the bits of a bfloat16 for an integer in a product.
    """
    step = tl.arange(0, BK)
    left = low_x + (row % batch).to(tl.int64)[:, None] * d_in + step[None, :]
    right = low_w + (latent % d_sae).to(tl.int64)[None, :] * d_in + step[:, None]
    total = tl.full((BM, BN), 0.0, tl.float32)
    for start in range(0, d_in, BK):
        inside = step < d_in - start
        a = tl.load(left, mask=inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += BK
        right += BK
    return total


@triton.jit
@no_type_check
def screen(
    low_x, low_w, row_reach, latent_reach, b_enc, threshold, by_row, by_latent,
    batch, d_in, d_sae, half_window,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Sets the bit of every pair whose pre-activation may exceed threshold - half_window, in both masks.

    With x^ and w^ the rounded vectors, <x^, w^> - <x, w> = <x^ - x, w^> + <x, w^ - w>. So by Cauchy and
    Schwarz the product is off by at most ||x^ - x|| ||w^|| + ||x|| ||w^ - w||, and by them again this is at
    most hypot(||x^ - x|| / ratio, ||x||) hypot(ratio ||w^||, ||w^ - w||) whatever the ratio: one number a
    row and one a latent, the second with `slack` ||w^|| on top, for sums in fp32 both here and in the exact
    kernels.
    """
    # programs go down GROUP blocks of rows before they go to the next latents, so that both stay in cache
    m_blocks, n_blocks = tl.cdiv(batch, BM), tl.cdiv(d_sae, BN)
    program = tl.program_id(0)
    first = program // (GROUP * n_blocks) * GROUP
    high = tl.minimum(m_blocks - first, GROUP)
    m = first + program % (GROUP * n_blocks) % high
    n = program % (GROUP * n_blocks) // high
    row, latent = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    total = product(low_x, low_w, row, latent, batch, d_in, d_sae, BM, BN, BK, WIDEN)

    is_row, is_latent = row < batch, latent < d_sae
    x_reach = tl.load(row_reach + row, mask=is_row, other=0.0)
    w_reach = tl.load(latent_reach + latent, mask=is_latent, other=0.0)
    bias = tl.load(b_enc + latent, mask=is_latent, other=0.0)
    level = tl.load(threshold + latent, mask=is_latent, other=0.0)
    # 2^-20: what adding the bias and the window in fp32 may round away; 1.001: the rounding of the reaches
    bound = level - half_window - bias - (tl.abs(bias) + tl.abs(level) + half_window) * 9.5367431640625e-7
    margin = x_reach[:, None] * (w_reach * 1.001)[None, :]
    # asked this way, what is not a number is let through, and then seen for what it is
    kept = (total + margin <= bound[None, :]) == 0
    bit = (kept & is_row[:, None] & is_latent[None, :]).to(tl.int32)
    lane = tl.arange(0, 32)
    words = tl.sum(tl.reshape(bit, (BM, BN // 32, 32)) << lane[None, None, :], axis=2)
    word = n * (BN // 32) + tl.arange(0, BN // 32)
    n_words = (d_sae + 31) // 32
    tl.store(
        by_row + row[:, None] * n_words + word[None, :],
        words,
        mask=is_row[:, None] & (word < n_words)[None, :],
    )
    words = tl.sum(tl.reshape(bit, (BM // 32, 32, BN)) << lane[None, :, None], axis=1)
    word = m * (BM // 32) + tl.arange(0, BM // 32)
    n_words = (batch + 31) // 32
    at = latent[None, :] * n_words + word[:, None]
    tl.store(by_latent + at, words, mask=is_latent[None, :] & (word < n_words)[:, None])


@triton.jit
@no_type_check
def count_bits(mask, counts, n_rows, n_words, TILE: tl.constexpr, WORDS: tl.constexpr):
    """counts [n_rows]: the bits set in each row of a mask."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.full((TILE,), 0, tl.int32)
    for start in range(0, n_words, WORDS):
        word = start + tl.arange(0, WORDS)
        there = (row < n_rows)[:, None] & (word < n_words)[None, :]
        bits = tl.load(mask + row.to(tl.int64)[:, None] * n_words + word[None, :], mask=there, other=0)
        total += tl.sum(popcount(bits.to(tl.uint32, bitcast=True)), axis=1)
    tl.store(counts + row, total, mask=row < n_rows)


@triton.jit
@no_type_check
def list_bits(mask, ends, index, n_rows, n_words, capacity, TILE: tl.constexpr, WORDS: tl.constexpr):
    """index[ends[row - 1] : ends[row]]: where each row's set bits are, in order.

    A row whose list would end beyond `capacity` gets none.
    """
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    listed = (row < n_rows) & (tl.load(ends + row, mask=row < n_rows, other=0) <= capacity)
    begin = tl.load(ends + row - 1, mask=listed & (row > 0), other=0)
    for start in range(0, n_words, WORDS):
        word = start + tl.arange(0, WORDS)
        there = listed[:, None] & (word < n_words)[None, :]
        at = mask + row.to(tl.int64)[:, None] * n_words + word[None, :]
        bits = tl.load(at, mask=there, other=0).to(tl.uint32, bitcast=True)
        count = popcount(bits)
        slot = begin[:, None] + tl.cumsum(count, axis=1) - count
        begin += tl.sum(count, axis=1)
        # takes the lowest bit off every word until all are empty: most words are from the start
        for _ in range(tl.max(tl.max(count, axis=1), axis=0)):
            rest = bits & (bits - 1)
            bit = popcount((bits ^ rest) - 1)
            tl.store(index + slot, word[None, :] * 32 + bit, mask=bits != 0)
            slot += 1
            bits = rest


@triton.jit
@no_type_check
def bounds_of(ends, row, n, capacity):
    """Where a row's list begins, its length, and the places of its mask to walk: all n if it has no list."""
    end = tl.load(ends + row)
    begin = tl.load(ends + row - 1, mask=row > 0, other=0)
    length = tl.where(end <= capacity, end - begin, 0).to(tl.int32)
    return begin, length, tl.where(end <= capacity, 0, n)


@triton.jit
@no_type_check
def members(mask, index, row, n, begin, length, places, start, TILE: tl.constexpr):
    """The next TILE entries of a row, and which of them are there: from its list, or else from its mask."""
    lane = start + tl.arange(0, TILE)
    entry = tl.load(index + begin + lane, mask=lane < length, other=0)
    word = mask + row.to(tl.int64) * ((n + 31) // 32) + lane // 32
    bit = (tl.load(word, mask=lane < places, other=0) >> (lane % 32)) & 1
    return tl.where(lane < length, entry, lane), (lane < length) | (bit != 0)


@triton.jit
@no_type_check
def gather(table, index, there, width, WIDTH: tl.constexpr):
    """Rows `index` of a table [any, width] as a tile [TILE, WIDTH]; zeros where not `there`."""
    column = tl.arange(0, WIDTH)
    at = table + index.to(tl.int64)[:, None] * width + column[None, :]
    return tl.load(
        at, mask=there[:, None] & (column < width)[None, :], other=0.0, eviction_policy="evict_last"
    )


@triton.jit
@no_type_check
def decode(
    x, W_enc, b_enc, W_dec, threshold, by_row, active_by_row, index, ends, row, d_in, d_out, d_sae, capacity,
    JUMP: tl.constexpr, TILE: tl.constexpr, WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr,
):  # fmt: skip
    """acts W_dec of a row from its candidates, how many are active, and the least of those.

    Active pairs get their bit in `active_by_row`, which held zeros. So one kernel alone decides what is
    active, and the next cannot come to see it differently by a rounding.
    """
    column = tl.arange(0, WIDTH_IN)
    here = tl.load(x + row.to(tl.int64) * d_in + column, mask=column < d_in, other=0.0)
    total = tl.full((WIDTH_OUT,), 0.0, tl.float32)
    l0 = 0.0
    least = float("inf")
    begin, length, places = bounds_of(ends, row, d_sae, capacity)
    for start in range(0, length + places, TILE):
        latent, there = members(by_row, index, row, d_sae, begin, length, places, start, TILE)
        if tl.sum(there.to(tl.int32), axis=0) > 0:
            w = gather(W_enc, latent, there, d_in, WIDTH_IN)
            pre = tl.sum(w * here[None, :], axis=1) + tl.load(b_enc + latent, mask=there, other=0.0)
            level = tl.full((TILE,), 0.0, tl.float32)
            if JUMP:
                level = tl.load(threshold + latent, mask=there, other=0.0)
            active = there & (pre > level)
            word = active_by_row + row.to(tl.int64) * ((d_sae + 31) // 32) + latent // 32
            tl.atomic_or(word, 1 << (latent % 32), mask=active, sem="relaxed")
            acts = tl.where(active, pre, 0.0)
            total += tl.sum(gather(W_dec, latent, active, d_out, WIDTH_OUT) * acts[:, None], axis=0)
            l0 += tl.sum(active.to(tl.float32), axis=0)
            least = tl.minimum(least, tl.min(tl.where(active, pre, float("inf")), axis=0))
    return total, l0, least, here


@triton.jit
@no_type_check
def code_rows(
    x, rows_out, W_enc, b_enc, W_dec, b_dec, threshold, by_row, active_by_row, index, ends, g, figures,
    batch, d_in, d_out, d_sae, capacity, scale,
    JUMP: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, WIDTH_IN: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
):  # fmt: skip
    """g = 2 / batch (reconstruction - y) [batch, d_out], and the rows' figures.

    figures [5, batch]: squared error, L0, least activation (or infinity), ||y||^2, and sum(x) + sum(y),
    which is not finite if any of them is not. With `PART`, for a shard, which needs what the others have to
    go on: g = acts W_dec, L0, least activation, and in the last line sum(x).
    """
    row = tl.program_id(0)
    total, l0, least, here = decode(
        x, W_enc, b_enc, W_dec, threshold, by_row, active_by_row, index, ends, row,
        d_in, d_out, d_sae, capacity, JUMP, TILE, WIDTH_IN, WIDTH_OUT,
    )  # fmt: skip
    column = tl.arange(0, WIDTH_OUT)
    inside = column < d_out
    at = row.to(tl.int64) * d_out + column
    tl.store(figures + batch + row, l0)
    tl.store(figures + 2 * batch + row, least)
    if PART:
        tl.store(g + at, total, mask=inside)
        tl.store(figures + 4 * batch + row, tl.sum(here, axis=0))
    else:
        y = tl.math.div_rn(tl.load(rows_out + at, mask=inside, other=0.0).to(tl.float32), scale)
        y = tl.where(inside, y, 0.0)
        error = total + tl.load(b_dec + column, mask=inside, other=0.0) - y
        tl.store(g + at, error * (2.0 / batch), mask=inside)
        tl.store(figures + row, tl.sum(error * error, axis=0))
        tl.store(figures + 3 * batch + row, tl.sum(y * y, axis=0))
        tl.store(figures + 4 * batch + row, tl.sum(here, axis=0) + tl.sum(y, axis=0))
