"""The last pass of the step on a CPU: latent by latent, everything that changes."""

import numpy as np

from sae.kernels.compiled import compiled
from sae.kernels.cpu_int8 import renew_screen
from sae.kernels.cpu_loops import add, add4, dot, dot4


@compiled
def adam(w, gradient, first, second, rate, numbers):
    """One vector of parameters, as torch.optim.Adam moves it. `first` is empty where beta1 is 0."""
    if len(first):
        for k in range(len(w)):
            mean = first[k] + numbers.fall1 * (gradient[k] - first[k])
            square = numbers.beta2 * second[k] + numbers.fall2 * (gradient[k] * gradient[k])
            first[k] = mean
            second[k] = square
            w[k] -= rate * mean / (np.sqrt(square) * numbers.root + numbers.epsilon)
    else:
        for k in range(len(w)):
            square = numbers.beta2 * second[k] + numbers.fall2 * (gradient[k] * gradient[k])
            second[k] = square
            w[k] -= rate * gradient[k] / (np.sqrt(square) * numbers.root + numbers.epsilon)


@compiled
def update_block(
    weights,
    first,
    second,
    pairs,
    gate,
    x,
    g,
    gamma_rows,
    gamma_latents,
    screen,
    fired,
    silent_for,
    pull,
    b_in_sum,
    numbers,
):
    """One pass over a block's latents: gradients, projection, Adam, norm, threshold, bias, counters.

    `gate` is the threshold that decided the pairs. `pull` is (rows of silence, or -1; the batch's rows;
    whether thresholds are trained). `b_in_sum` [d_in] gets sum_i db_enc_i W_enc_i, the encoder as it was.
    """
    d_in, d_out = x.shape[1], g.shape[1]
    enc_gradient, dec_gradient = np.empty((1, d_in), x.dtype), np.empty((1, d_out), x.dtype)
    bias_gradient, level_gradient = np.empty(len(gate), x.dtype), np.empty(len(gate), x.dtype)
    b_in_sum[:] = 0
    moving = len(first.b_enc) > 0
    for j in range(len(gate)):
        bias, slope = _sum_gradients(
            j, gate[j], weights.W_dec, pairs, x, g, gamma_rows, gamma_latents[j], numbers.half,
            enc_gradient, dec_gradient,
        )  # fmt: skip
        bias_gradient[j], level_gradient[j] = bias, -slope / numbers.bandwidth
        w_enc, w_dec = weights.W_enc_t[j], weights.W_dec[j]
        along = dot(dec_gradient, 0, weights.W_dec, j)
        for k in range(d_out):
            dec_gradient[0, k] -= along * w_dec[k]
        for k in range(d_in):
            b_in_sum[k] += bias * w_enc[k]
        of = j if moving else 0
        adam(w_enc, enc_gradient[0], first.W_enc_t[of], second.W_enc_t[j], numbers.rate, numbers)
        adam(w_dec, dec_gradient[0], first.W_dec[of], second.W_dec[j], numbers.rate, numbers)
        scale = 1 / np.sqrt(dot(weights.W_dec, j, weights.W_dec, j))
        for k in range(d_out):
            w_dec[k] *= scale
        renew_screen(w_enc, screen.low, screen, j)
    adam(weights.b_enc, bias_gradient, first.b_enc, second.b_enc, numbers.rate, numbers)
    if pull[2]:
        rate = numbers.threshold_rate
        adam(weights.threshold, level_gradient, first.threshold, second.threshold, rate, numbers)
    _count_silence(weights, fired, silent_for, pull, numbers)


@compiled
def _sum_gradients(j, level, W_dec, pairs, x, g, gamma_rows, gamma, half, enc_gradient, dec_gradient):
    """A latent's gradients over its pairs: of its rows into the arrays; returns those of its bias and, times
    -eps, of its threshold.
    """
    bias, slope = x.dtype.type(0), x.dtype.type(0)
    enc_gradient[:] = 0
    dec_gradient[:] = 0
    rows, values = pairs.rows, pairs.values
    p, middle, end = pairs.starts[2 * j], pairs.starts[2 * j + 1], pairs.starts[2 * j + 2]
    while p < end:
        if p + 4 <= middle:
            s0, s1, s2, s3 = dot4(g, rows[p], rows[p + 1], rows[p + 2], rows[p + 3], W_dec, j)
            add4(dec_gradient, 0, g, rows, p, values[p], values[p + 1], values[p + 2], values[p + 3])
            add4(enc_gradient, 0, x, rows, p, s0, s1, s2, s3)
            bias += (s0 + s1) + (s2 + s3)
            for q, s in enumerate((s0, s1, s2, s3)):
                if abs(values[p + q] - level) < half:
                    slope += level * s + gamma_rows[rows[p + q]] + gamma
            p += 4
            continue
        s = dot(g, rows[p], W_dec, j)
        if p < middle:
            add(dec_gradient, 0, g, rows[p], values[p])
            add(enc_gradient, 0, x, rows[p], s)
            bias += s
        if abs(values[p] - level) < half:
            slope += level * s + gamma_rows[rows[p]] + gamma
        p += 1
    return bias, slope


@compiled
def _count_silence(weights, fired, silent_for, pull, numbers):
    for j in range(len(fired)):
        if pull[0] >= 0 and silent_for[j] >= pull[0]:
            weights.b_enc[j] += numbers.lr
            if pull[2]:
                weights.threshold[j] -= numbers.threshold_lr
        weights.threshold[j] = max(weights.threshold[j], 0)
        silent_for[j] = 0 if fired[j] else silent_for[j] + pull[1]


@compiled
def screen_latents(W_enc_t, screen):
    """Makes a block's screen from its weights."""
    for j in range(len(W_enc_t)):
        renew_screen(W_enc_t[j], screen.low, screen, j)
