"""Triton kernels by latents: gradients, and all that a step changes.

Two float64 vectors carry what is not a tensor of the state:

    numbers [8]   1 or, where the step is refused, 0; Adam's step size for weights and for thresholds, with
                  the mean's bias correction; the root of the second moment's bias correction; both learning
                  rates; batchtopk's least activation, and the share by which thresholds follow it
    options [6]   bandwidth; 1 - beta1; beta2; 1 - beta2; epsilon; rows of silence before a latent is pulled
"""

from typing import no_type_check

import triton
import triton.language as tl

from sae.kernels.triton_loops import bounds_of, gather, members


@triton.jit
@no_type_check
def adam(weight, gradient, first, second, at, there, size, root_scale, options, HAS_FIRST: tl.constexpr):
    """The moved weight, with both moments written back; anything where not `there`."""
    beta2, left2 = tl.load(options + 2).to(tl.float32), tl.load(options + 3).to(tl.float32)
    epsilon = tl.load(options + 4).to(tl.float32)
    v = tl.load(second + at, mask=there, other=0.0, eviction_policy="evict_first")
    v = v * beta2 + gradient * gradient * left2
    tl.store(second + at, v, mask=there, eviction_policy="evict_first")
    mean = gradient
    if HAS_FIRST:
        mean = tl.load(first + at, mask=there, other=0.0, eviction_policy="evict_first")
        mean += (gradient - mean) * tl.load(options + 1).to(tl.float32)
        tl.store(first + at, mean, mask=there, eviction_policy="evict_first")
    root = tl.math.div_rn(tl.math.sqrt_rn(v), root_scale) + epsilon
    return weight - tl.math.div_rn(size * mean, root)


@triton.jit
@no_type_check
def latent_gradients(
    x, g, gate_rows, w_enc, w_dec, bias, level, half, active_by_row, by_latent, index, ends, latent,
    batch, d_in, d_out, d_sae, capacity,
    JUMP: tl.constexpr, TILE: tl.constexpr, WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr,
):  # fmt: skip
    """d W_enc and d W_dec; and sums over rows: of active, of d b_enc, and in the window of s, gamma and 1."""
    d_enc, d_dec = tl.full((WIDTH_IN,), 0.0, tl.float32), tl.full((WIDTH_OUT,), 0.0, tl.float32)
    fired, d_bias, window_s, window_gamma, window = 0.0, 0.0, 0.0, 0.0, 0.0
    begin, length, places = bounds_of(ends, latent, batch, capacity)
    for start in range(0, length + places, TILE):
        row, there = members(by_latent, index, latent, batch, begin, length, places, start, TILE)
        if tl.sum(there.to(tl.int32), axis=0) > 0:
            word = row.to(tl.int64) * ((d_sae + 31) // 32) + latent // 32
            active = ((tl.load(active_by_row + word, mask=there, other=0) >> (latent % 32)) & 1) != 0
            here = gather(x, row, there, d_in, WIDTH_IN)
            pre = tl.sum(here * w_enc[None, :], axis=1) + bias
            near = there & (tl.abs(pre - level) < half) & JUMP
            error = gather(g, row, active | near, d_out, WIDTH_OUT)
            s = tl.sum(error * w_dec[None, :], axis=1)
            d_pre = tl.where(active, s, 0.0)
            d_enc += tl.sum(here * d_pre[:, None], axis=0)
            d_dec += tl.sum(error * tl.where(active, pre, 0.0)[:, None], axis=0)
            fired += tl.sum(active.to(tl.float32), axis=0)
            d_bias += tl.sum(d_pre, axis=0)
            if JUMP:
                window_s += tl.sum(tl.where(near, s, 0.0), axis=0)
                window_gamma += tl.sum(tl.load(gate_rows + row, mask=near, other=0.0), axis=0)
                window += tl.sum(near.to(tl.float32), axis=0)
    return d_enc, d_dec, fired, d_bias, window_s, window_gamma, window


@triton.jit
@no_type_check
def move_encoder(
    W_enc, first, second, low, reach, weight, gradient, latent, d_in, size, root_scale, options, ratio, slack,
    HAS_FIRST: tl.constexpr, HAS_LOW: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adam's step of one latent's encoder, then its copy for the product and its reach for screening."""
    column = tl.arange(0, WIDTH)
    inside = column < d_in
    at = latent.to(tl.int64) * d_in + column
    moved = adam(weight, gradient, first, second, at, inside, size, root_scale, options, HAS_FIRST)
    moved = tl.where(inside, moved, 0.0)
    tl.store(W_enc + at, moved, mask=inside)
    rounded = moved
    error = 0.0
    if HAS_LOW:
        copy = moved.to(low.dtype.element_ty)
        tl.store(low + at, copy, mask=inside)
        rounded = copy.to(tl.float32)
        error = tl.sum((rounded - moved) * (rounded - moved), axis=0)
    square = tl.sum(rounded * rounded, axis=0)
    tl.store(reach + latent, tl.sqrt(ratio * ratio * square + error) + slack * tl.sqrt(square))


@triton.jit
@no_type_check
def move_decoder(
    W_dec, first, second, weight, gradient, latent, d_out, size, root_scale, options,
    HAS_FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adam's step of one latent's decoder by the gradient across it, brought back to norm 1."""
    column = tl.arange(0, WIDTH)
    inside = column < d_out
    at = latent.to(tl.int64) * d_out + column
    across = gradient - tl.sum(gradient * weight, axis=0) * weight
    moved = adam(weight, across, first, second, at, inside, size, root_scale, options, HAS_FIRST)
    moved = tl.where(inside, moved, 0.0)
    norm = tl.math.sqrt_rn(tl.sum(moved * moved, axis=0))
    tl.store(W_dec + at, tl.math.div_rn(moved, norm), mask=inside)


@triton.jit
@no_type_check
def move_latents(
    x, g, gate_rows, W_enc, W_dec, first_enc, first_dec, second_enc, second_dec, b_enc, threshold, low, reach,
    active_by_row, by_latent, index, ends, sums, carried, numbers, options,
    batch, d_in, d_out, d_sae, capacity, ratio, slack,
    JUMP: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LOW: tl.constexpr, GROUP: tl.constexpr,
    TILE: tl.constexpr, WIDTH_IN: tl.constexpr, WIDTH_OUT: tl.constexpr,
):  # fmt: skip
    """Both matrices by one step, with no gradient ever stored, for GROUP latents a program.

    sums [5, d_sae] is for `move_vectors`: see `latent_gradients`. carried [programs, d_in]: the group's sum
    of d b_enc W_enc, with the weights as they were.
    """
    if tl.load(numbers) == 0:
        return
    size, root_scale = tl.load(numbers + 1).to(tl.float32), tl.load(numbers + 3).to(tl.float32)
    half = (tl.load(options) / 2).to(tl.float32)
    column, column_out = tl.arange(0, WIDTH_IN), tl.arange(0, WIDTH_OUT)
    total = tl.full((WIDTH_IN,), 0.0, tl.float32)
    for one in range(GROUP):
        latent = tl.program_id(0) * GROUP + one
        if latent < d_sae:
            at = latent.to(tl.int64)
            w_enc = tl.load(W_enc + at * d_in + column, mask=column < d_in, other=0.0)
            w_dec = tl.load(W_dec + at * d_out + column_out, mask=column_out < d_out, other=0.0)
            d_enc, d_dec, fired, d_bias, window_s, window_gamma, window = latent_gradients(
                x, g, gate_rows, w_enc, w_dec, tl.load(b_enc + latent), tl.load(threshold + latent), half,
                active_by_row, by_latent, index, ends, latent, batch, d_in, d_out, d_sae, capacity,
                JUMP, TILE, WIDTH_IN, WIDTH_OUT,
            )  # fmt: skip
            total += d_bias * w_enc
            move_encoder(
                W_enc, first_enc, second_enc, low, reach, w_enc, d_enc, latent, d_in, size, root_scale,
                options, ratio, slack, HAS_FIRST, HAS_LOW, WIDTH_IN,
            )  # fmt: skip
            move_decoder(
                W_dec, first_dec, second_dec, w_dec, d_dec, latent, d_out, size, root_scale, options,
                HAS_FIRST, WIDTH_OUT,
            )  # fmt: skip
            tl.store(sums + latent, fired)
            tl.store(sums + d_sae + latent, d_bias)
            tl.store(sums + 2 * d_sae + latent, window_s)
            tl.store(sums + 3 * d_sae + latent, window_gamma)
            tl.store(sums + 4 * d_sae + latent, window)
    tl.store(carried + tl.program_id(0) * d_in + column, total, mask=column < d_in)


@triton.jit
@no_type_check
def move_vectors(
    b_enc, threshold, silent_for, first_bias, first_level, second_bias, second_level, sums, gate_latents,
    numbers, options, batch, d_sae,
    JUMP: tl.constexpr, FOLLOW: tl.constexpr, PULL: tl.constexpr, HAS_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """What is one number a latent: bias, threshold, rows of silence.

    With `FOLLOW` thresholds follow batchtopk's least activation.
    """
    if tl.load(numbers) == 0:
        return
    latent = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = latent < d_sae
    root_scale = tl.load(numbers + 3).to(tl.float32)
    bias, level = tl.load(b_enc + latent, mask=inside), tl.load(threshold + latent, mask=inside)
    gradient = tl.load(sums + d_sae + latent, mask=inside)
    size = tl.load(numbers + 1).to(tl.float32)
    bias = adam(bias, gradient, first_bias, second_bias, latent, inside, size, root_scale, options, HAS_FIRST)
    if JUMP:
        gradient = level * tl.load(sums + 2 * d_sae + latent, mask=inside)
        gradient += tl.load(sums + 3 * d_sae + latent, mask=inside)
        gate = tl.load(gate_latents + latent, mask=inside)
        gradient += gate * tl.load(sums + 4 * d_sae + latent, mask=inside)
        gradient = tl.math.div_rn(-gradient, tl.load(options).to(tl.float32))
        size = tl.load(numbers + 2).to(tl.float32)
        level = adam(
            level, gradient, first_level, second_level, latent, inside, size, root_scale, options, HAS_FIRST
        )
    silence = tl.load(silent_for + latent, mask=inside)
    if PULL:
        silent = silence >= tl.load(options + 5).to(tl.int64)
        bias += tl.where(silent, tl.load(numbers + 4).to(tl.float32), 0.0)
        if JUMP:
            level -= tl.where(silent, tl.load(numbers + 5).to(tl.float32), 0.0)
    least = tl.load(numbers + 6).to(tl.float32)
    if FOLLOW:
        share = tl.load(numbers + 7).to(tl.float32)
        level = tl.where(least < float("inf"), level + share * (least - level), level)
    fired = tl.load(sums + latent, mask=inside) > 0
    tl.store(b_enc + latent, bias, mask=inside)
    # not tl.maximum: a NaN is to stay one
    tl.store(threshold + latent, tl.where(level < 0, 0.0, level), mask=inside)
    tl.store(silent_for + latent, tl.where(fired, 0, silence + batch), mask=inside)


@triton.jit
@no_type_check
def move_bias(
    b_dec, gradient, first, second, numbers, options, d_out, HAS_FIRST: tl.constexpr, WIDTH: tl.constexpr
):
    """Adam's step of b_dec."""
    if tl.load(numbers) == 0:
        return
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < d_out
    size, root_scale = tl.load(numbers + 1).to(tl.float32), tl.load(numbers + 3).to(tl.float32)
    bias, slope = tl.load(b_dec + column, mask=inside), tl.load(gradient + column, mask=inside)
    bias = adam(bias, slope, first, second, column, inside, size, root_scale, options, HAS_FIRST)
    tl.store(b_dec + column, bias, mask=inside)
