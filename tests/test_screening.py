"""What the CPU's screening product promises: it loses no pair, whatever it rounds to, and wastes little."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from step_problems import as_weights, assert_identical, copied, options, problem, run

from sae.kernels import cpu_forward, cpu_loops, cpu_step
from sae.kernels.cpu import CpuKernel
from sae.kernels.step import StepState

LOW, FULL = torch.bfloat16, torch.float32


def begin(weights) -> StepState:
    return StepState.begin(weights, beta1=0.9)


def plain_rows():
    return problem(300, 64, 700, dtype=FULL)


def heavy_rows():
    """One coordinate 50 times as large as the others, one row in 600 with 20 times the norm."""
    weights, x, _ = problem(1200, 64, 520, dtype=FULL, level=2.0)
    x[:, 7] *= 50
    x[::600] *= 20
    weights.threshold *= 1 + 10 * weights.W_enc_t[:, 7].abs()
    return weights, x, x


def at_the_edges(x, encoder, g):
    """Thresholds that put one row's pre-activation within 1e-6 of the gate or of an end of the window."""
    (d_sae, d_in), half = encoder.shape, options().bandwidth / 2
    picked = (x @ encoder.T)[torch.randint(0, len(x), (d_sae,), generator=g), torch.arange(d_sae)]
    edge = torch.tensor([-half, 0.0, half])[torch.arange(d_sae) % 3]
    side = 1e-6 * (torch.randint(0, 2, (d_sae,), generator=g) * 2 - 1)
    weights = as_weights(
        W_enc_t=encoder,
        b_enc=torch.zeros(d_sae),
        W_dec=F.normalize(torch.randn(d_sae, d_in, generator=g), dim=1),
        b_in=torch.zeros(d_in),
        b_dec=torch.zeros(d_in),
        threshold=(picked + edge + side).clamp(min=0),
        dtype=FULL,
    )
    return weights, x, x


def rows_that_round_badly():
    """Half the coordinates lose most in bfloat16, half gain most, and products nearly cancel."""
    g = torch.Generator().manual_seed(3)
    d_in, batch, d_sae = 64, 200, 600
    sign = torch.randint(0, 2, (d_in,), generator=g) * 2.0 - 1
    falls, rises = 1 + 2**-8, 1 + 2**-8 + 2**-15  # the first is rounded to 1, the second to 1 + 2^-7
    first = torch.arange(d_in) < d_in // 2
    x = (sign * torch.where(first, falls, rises)).repeat(batch, 1)
    encoder = (sign * torch.where(first, falls, -rises)).repeat(d_sae, 1)
    for matrix in (x, encoder):
        at = torch.randint(0, d_in, (len(matrix), 6), generator=g)
        change = 1 + 2**-4 * torch.randint(-8, 9, at.shape, generator=g)
        matrix.scatter_(1, at, change * matrix.gather(1, at))
    return at_the_edges(x, encoder, g)


def rows_that_round_to_nothing(of_encoder: bool = False):
    """Rows with one large coordinate, beside which integers hold nothing of the others, and encoders that
    integers hold exactly; or the other way round. All coordinates are equally large on average.
    """
    g = torch.Generator().manual_seed(5)
    d_in, batch, d_sae = 64, 192, 256
    sign = torch.randint(0, 2, (d_in,), generator=g) * 2.0 - 1
    sizes = 1 + torch.rand(batch, 1, generator=g) / 10, 1 + torch.rand(d_sae, 1, generator=g) / 10
    x, encoder = (
        size * sign * (0.0035 + torch.eye(d_in)[torch.arange(len(size)) % d_in]) if lossy else size * sign
        for size, lossy in zip(sizes, (not of_encoder, of_encoder), strict=True)
    )
    return at_the_edges(x, encoder, g)


def encoders_that_round_to_nothing():
    return rows_that_round_to_nothing(of_encoder=True)


@pytest.mark.parametrize("variant", ["quadratic", "frequency", "topk", "batchtopk"])
@pytest.mark.parametrize(
    "make",
    [
        plain_rows,
        heavy_rows,
        rows_that_round_badly,
        rows_that_round_to_nothing,
        encoders_that_round_to_nothing,
    ],
)
@pytest.mark.parametrize("low", [LOW, torch.int8], ids=["bfloat16", "int8"])
def test_screening_loses_nothing(make, variant, low, monkeypatch):
    """What a narrow product lets through, and fp32 arithmetic on it, are the fp32 step to the last bit."""
    # integers stay in use however many pairs they let through
    monkeypatch.setattr(cpu_forward, "_WASTE", dict.fromkeys((LOW, None), 1e-9))
    weights, x, y = make()
    states = [begin(weights), copied(begin(weights))]
    for state, product in zip(states, (low, FULL), strict=True):
        kernel = CpuKernel()
        _, figures = run(kernel, state, x, y, options(variant, product_dtype=product), 3)
        assert 0 < figures.l0.sum() < x.shape[0] * len(weights.threshold)
        assert kernel._screens[state].low_dtype == (None if product == FULL else product)
    assert_identical(*states)


def test_integers_that_let_too_many_pass_are_replaced_for_a_while(monkeypatch):
    weights, x, y = plain_rows()
    kernel, state = CpuKernel(), begin(weights)
    monkeypatch.setattr(cpu_forward, "_FIT_EVERY", 4)
    used = []
    for waste in (1e9, 1e9, 1e9, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9):
        # the rule: none may pass in vain, then any number
        monkeypatch.setattr(cpu_forward, "_WASTE", dict.fromkeys((LOW, None), waste))
        run(kernel, state, x, y, options(product_dtype=torch.int8))
        used.append(kernel._screens[state].low_dtype)
    stand_in = cpu_forward._fallback()
    assert used == [torch.int8, *[stand_in] * 4, *[torch.int8] * 3]


def test_integers_are_not_used_for_rows_of_few_coordinates():
    """torch multiplies single coordinates wrongly (2.13)."""
    weights, x, y = problem(40, 3, 30, dtype=FULL)
    kernel, state = CpuKernel(), begin(weights)
    run(kernel, state, x, y, options(product_dtype=torch.int8))
    assert kernel._screens[state].low_dtype == cpu_forward._fallback()


def test_screening_allows_for_the_rounding_of_what_the_margin_holds():
    """A pair whose product in bfloat16 is as wrong as can be, and rounded down again when it is stored."""
    rise = 1 + 2**-8 + 2**-18
    # the true pre-activation lies just inside the window, which is narrow and reaches from below zero
    pre, half = -(2**-15) + 2**-20, 2**-15
    last = (pre - (1 + 2**-8) ** 2 + rise**2) / 2**-7
    x = torch.tensor([[1 + 2**-8, rise, 2**-7]])
    weights = as_weights(
        W_enc_t=torch.tensor([[1 + 2**-8, -rise, last]]),
        b_enc=torch.zeros(1),
        W_dec=torch.tensor([[1.0, 0.0, 0.0]]),
        b_in=torch.zeros(3),
        b_dec=torch.zeros(3),
        threshold=torch.zeros(1),
        dtype=FULL,
    )
    states = [begin(weights), copied(begin(weights))]
    for state, product in zip(states, (LOW, FULL), strict=True):
        run(CpuKernel(), state, x, x, options("linear", bandwidth=2 * half, product_dtype=product))
        assert state.second.threshold > 0
    assert_identical(*states)


def test_screening_allows_for_the_rounding_of_what_is_stored():
    """A product of 257 is stored as 256 in bfloat16, below the threshold; its factors are exact."""
    weights = as_weights(
        W_enc_t=torch.ones(1, 257),
        b_enc=torch.zeros(1),
        W_dec=F.normalize(torch.ones(1, 257), dim=1),
        b_in=torch.zeros(257),
        b_dec=torch.zeros(257),
        threshold=torch.tensor([256.5]),
        dtype=FULL,
    )
    x = torch.ones(1, 257)
    _, figures = run(CpuKernel(), begin(weights), x, x, options(bandwidth=1e-3, product_dtype=LOW))
    assert figures.l0.tolist() == [1]


def test_topk_is_right_whatever_the_first_bound_was(monkeypatch):
    """Also where bfloat16 rounds the best pre-activation, 259.01, to 256, and another passes at 259.00."""
    x = torch.full((1, 257), 1 + 2**-8)
    encoder = torch.zeros(2, 257)
    encoder[0], encoder[1, 0] = 1 + 2**-8, 258.0
    weights = as_weights(
        W_enc_t=encoder,
        b_enc=torch.zeros(2),
        W_dec=F.normalize(torch.ones(2, 257), dim=1),
        b_in=torch.zeros(257),
        b_dec=torch.zeros(257),
        threshold=torch.zeros(2),
        dtype=FULL,
    )
    best, second = (x @ encoder.T)[0].tolist()
    assert best > second > 259
    for bound in (0.0, 259.0, second, best, 300.0):
        monkeypatch.setattr(cpu_step, "first_bounds", lambda *_, bound=bound: _[-1].fill(bound))
        for product in (LOW, FULL):
            for variant in ("topk", "batchtopk"):
                told = options(variant, k=1, product_dtype=product)
                _, figures = run(CpuKernel(), copied(begin(weights)), x, x, told)
                assert figures.fired.tolist() == [1, 0], (bound, product, variant)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("d_in", [1, 7, 17, 64, 163, 640])
def test_a_pairs_value_has_the_same_bits_whatever_pairs_come_with_it(d_in, dtype):
    g, batch, width = np.random.default_rng(d_in), 40, 11
    x, encoder = (
        g.standard_normal((batch, d_in)).astype(dtype),
        g.standard_normal((width, d_in)).astype(dtype),
    )
    bias = g.standard_normal(width).astype(dtype)

    def values_of(pairs):
        rows, columns = (np.ascontiguousarray(part, np.int32) for part in np.nonzero(pairs))
        values = np.empty(len(rows), dtype)
        cpu_loops.exact_values(x, encoder, bias, rows, columns, len(rows), values)
        return values

    every = np.ones((batch, width), bool)
    places = np.arange(every.size).reshape(every.shape)
    alone = np.concatenate([values_of(places == p) for p in range(every.size)]).reshape(every.shape)
    true = x.astype(np.longdouble) @ encoder.T.astype(np.longdouble) + bias
    size = np.abs(x).astype(float) @ np.abs(encoder).T + np.abs(bias)
    assert (np.abs(alone - true) <= (d_in + 1) * np.finfo(dtype).eps * size).all()
    for share in (0.1, 0.3, 0.6, 1.0):
        pairs = g.random(every.shape) < share
        assert (values_of(pairs) == alone[pairs]).all()


def test_buffers_begin_at_a_cache_line():
    buffers = cpu_forward.Buffers()
    for size, dtype in [(3, np.int32), (1000, np.float32), (10**6, np.float64)]:
        held = buffers.at_least("one", size, dtype)
        assert (len(held), held.dtype, held.ctypes.data % 64) == (size, dtype, 0)
