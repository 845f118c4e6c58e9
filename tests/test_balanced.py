"""Screening by few coordinates finds what the product of all of them in fp32 finds, to the last bit."""

import pytest
import torch

from sae import DictionaryConfig, JumpReLU
from sae.kernels import cpu_balanced, cpu_forward
from sae.kernels.int8 import int8_is_fast
from sae.kernels.step import StepWeights
from sae.kernels.workers import workers_for
from sae.sparse import SparseEncoder

D_IN, D_SAE, N = 200, 700, 600
# behind a head there are whole blocks
HEAD, TAIL = 72, 128
WORKERS = workers_for(2)
PLAIN, BALANCED = cpu_forward.Forward, cpu_balanced.BalancedForward

balances = pytest.mark.skipif(
    not int8_is_fast(torch.device("cpu")), reason="encoders are balanced where a processor multiplies bytes"
)


def rows_like_a_residual_stream(g):
    """A few directions hold most, one coordinate is far larger than the others, and all share a mean."""
    mixed = torch.randn(D_IN, D_IN, generator=g) * torch.logspace(1, -2, D_IN)[:, None]
    rows = torch.randn(N, D_IN, generator=g) @ mixed + torch.randn(D_IN, generator=g)
    rows[:, 17] += 300 + 30 * torch.randn(N, generator=g)
    return rows


def rows_of_noise(g):
    """Nothing to balance: the tail holds as much as the head."""
    return torch.randn(N, D_IN, generator=g)


def rows_in_few_directions(g):
    """Second moments without an inverse."""
    return torch.randn(N, 5, generator=g) @ torch.randn(5, D_IN, generator=g)


def rows_with_zeros(g):
    rows = rows_like_a_residual_stream(g)
    rows[::7] = 0
    rows[1::7] *= 1e-30
    return rows


def rows_in_the_tail(g):
    """Most are as the first, a few point where those never do."""
    rows = torch.randn(N, D_IN, generator=g) * torch.logspace(1, -3, D_IN)
    rows[3::50] = rows[3::50].flip(1)
    return rows


def dictionary_for(rows, g, *, at_the_edge=False, fires=0.25, d_sae=D_SAE):
    """Latents that fire on so many of the rows, or with thresholds that are what one row gives them, or a
    rounding away."""
    made = JumpReLU(DictionaryConfig(d_in=D_IN, d_sae=d_sae, site_in="a", site_out="a")).requires_grad_(False)
    chosen = rows[torch.randint(len(rows), (d_sae,), generator=g)]
    made.W_enc.copy_((chosen / (chosen.norm(dim=1, keepdim=True) + 1e-3) + 0.1 * torch.randn(
        d_sae, D_IN, generator=g)).T)  # fmt: skip
    made.W_enc[:, 3] = 0
    made.b_dec.copy_(rows.mean(0))
    made.b_enc.copy_(torch.randn(d_sae, generator=g))
    pre = made.pre_activations(rows)
    made.threshold.copy_(pre.quantile(1 - fires, dim=0).clamp(min=1e-3))
    if at_the_edge:
        places = torch.randint(len(rows), (d_sae,), generator=g)
        exact = pre[places, torch.arange(d_sae)].clamp(min=1e-3)
        away = 1 + 2.0**-22 * torch.randint(-4, 5, (d_sae,), generator=g)
        made.threshold.copy_(exact * away)
    return made


def encoded(dictionary, batches):
    """The lists of the last batch, and which way each went."""
    encoder, used, begin = SparseEncoder(dictionary), [], cpu_forward.Forward.begin

    def watched(step, *rows):
        used.append(type(step))
        begin(step, *rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_forward.Forward, "begin", watched)
        lists = [encoder.encode(x) for x in batches]
    return lists[-1], used


@pytest.fixture
def small_heads(monkeypatch):
    """Balanced at once, with the smallest head."""
    monkeypatch.setattr(cpu_balanced, "_AFTER", 1)
    monkeypatch.setattr(cpu_balanced, "_PER_TURN", 0)
    monkeypatch.setattr(cpu_balanced, "_PER_BLOCK", 0)
    # bfloat16 never stands in
    monkeypatch.setattr(cpu_forward, "_WASTE", dict.fromkeys((torch.bfloat16, None), 1e-9))


@balances
@pytest.mark.parametrize("at_the_edge", [False, True])
@pytest.mark.parametrize(
    "make",
    [rows_like_a_residual_stream, rows_of_noise, rows_in_few_directions, rows_with_zeros, rows_in_the_tail],
)
def test_balanced_screens_lose_nothing(make, at_the_edge, small_heads, monkeypatch):
    g = torch.Generator().manual_seed(1)
    x = make(g)
    dictionary = dictionary_for(x, g, at_the_edge=at_the_edge)
    found, used = encoded(dictionary, [x] * 2)
    assert used == [PLAIN, BALANCED]
    monkeypatch.setattr("sae.sparse.screen_dtype", lambda device: torch.float32)
    expected, used = encoded(dictionary, [x])
    assert used == [PLAIN]
    assert len(expected.latent) > N
    assert torch.equal(found.starts, expected.starts)
    assert torch.equal(found.latent, expected.latent)
    assert torch.equal(found.activation, expected.activation)


def gate_of(encoder, x):
    """A rounding less than what each latent makes of the row of its own number."""
    exact = (x[: len(encoder)].double() * encoder.double()).sum(1)
    return (exact - 2.0**-20 * exact.abs()).float()


def lists(encoder, x, screens, forward):
    """The pairs above their gates."""
    d_sae, d_in = encoder.shape
    zeros = torch.zeros
    weights = StepWeights(encoder, zeros(d_sae), zeros(d_sae, 0), zeros(d_in), zeros(0), zeros(d_sae))
    gate = gate_of(encoder, x).numpy()
    step = forward(weights, screens, cpu_forward.Buffers(), WORKERS, gate=gate, l0=64.0)
    step.begin(x, x[:, :0])
    step.encode()
    starts, latents, _ = step.lists()
    return [latents[starts[r] : starts[r + 1]].tolist() for r in range(len(x))]


def one_large(n, size, sign):
    """Rows with one large coordinate, beside which integers hold nothing of the others."""
    return sign * (0.0035 + torch.eye(size)[torch.arange(n) % size])


def halves_that_round_to_nothing(of_rows, of_tail):
    g = torch.Generator().manual_seed(2)
    sides = []
    for lossy in (of_rows, not of_rows):
        head, tail = (torch.ones(64, HEAD), torch.ones(64, TAIL))
        if lossy and of_tail:
            tail = one_large(64, TAIL, 1)
        elif lossy:
            head = one_large(64, HEAD, 1)
        # what the sound half holds must not hide what the other loses
        sides.append(torch.cat([head * (1e-3 if of_tail else 1), tail * (1 if of_tail else 1e-3)], 1))
    sign = torch.randint(0, 2, (D_IN,), generator=g) * 2.0 - 1
    return sides[0] * sign, sides[1] * sign


def tails_that_are_parallel():
    g = torch.Generator().manual_seed(3)
    tail = torch.randn(64, TAIL, generator=g)
    head = torch.randn(64, HEAD, generator=g)
    return torch.cat([head / 100, tail], 1), torch.cat([head.flip(0) / 100, 3 * tail], 1)


def whole_numbers():
    """Integers hold these exactly."""
    g = torch.Generator().manual_seed(4)
    sides = [torch.randint(-127, 128, (64, D_IN), generator=g) for _ in range(2)]
    for side in sides:
        side[:, [0, HEAD]] = 127
    return sides[0].float(), sides[1].float()


@pytest.mark.parametrize("of_tail", [False, True])
@pytest.mark.parametrize("of_rows", [False, True])
def test_what_integers_lose_of_a_half_is_allowed_for(of_rows, of_tail):
    check(*halves_that_round_to_nothing(of_rows, of_tail), torch.eye(D_IN))


def test_what_tails_may_hold_is_allowed_for():
    check(*tails_that_are_parallel(), torch.eye(D_IN))


@pytest.mark.parametrize("missed", [0.03, -0.03])
def test_what_turning_may_miss_is_allowed_for(missed, monkeypatch):
    inv = torch.linalg.inv
    monkeypatch.setattr(torch.linalg, "inv", lambda matrix: inv(matrix) * (1 + missed))
    check(*whole_numbers(), torch.eye(D_IN))


def check(x, encoder, turn):
    """The same pairs as by the full product, the row of each latent's own number among them."""
    gate, none = gate_of(encoder, x), torch.zeros(len(encoder))
    screens = cpu_balanced.Balanced.turned(encoder, gate, none, turn, HEAD, WORKERS)
    found = lists(encoder, x, screens, BALANCED)
    full = cpu_forward.screens_for(None, encoder, torch.float32, WORKERS)
    assert found == lists(encoder, x, full, PLAIN)
    assert all(row in found[row] for row in range(len(encoder)))


@balances
def test_an_encoder_is_balanced_once_it_has_seen_rows_enough(monkeypatch):
    g = torch.Generator().manual_seed(1)
    x = rows_like_a_residual_stream(g)
    monkeypatch.setattr(cpu_balanced, "_AFTER", 2 * N)
    monkeypatch.setattr(cpu_balanced, "_PER_TURN", 0)
    assert ways(dictionary_for(x, g, fires=0.01), [x] * 4) == [PLAIN] * 2 + [BALANCED] * 2


@balances
def test_a_few_rows_are_no_sample_to_choose_a_head_on(monkeypatch):
    g = torch.Generator().manual_seed(1)
    x = rows_like_a_residual_stream(g)
    monkeypatch.setattr(cpu_balanced, "_AFTER", N + 5)
    monkeypatch.setattr(cpu_balanced, "_PER_TURN", 0)
    assert ways(dictionary_for(x, g, fires=0.01), [x, x[:10], x, x]) == [PLAIN] * 3 + [BALANCED]


def test_what_costs_much_to_balance_waits_for_more_rows():
    """At 2,304 coordinates and 65,536 latents it takes half a minute of a processor."""
    waits = [cpu_balanced.Balancing(d_sae, d_in) for d_sae, d_in in ((16_384, 640), (65_536, 2304))]
    assert [balancing._after // 1000 for balancing in waits] == [4, 13]
    assert [balancing._over for balancing in waits] == [False, False]
    assert cpu_balanced.Balancing(4096, 640)._over and cpu_balanced.Balancing(16_384, 2304)._over


@balances
@pytest.mark.parametrize("made_in", [False, True])
def test_an_encoder_may_be_made_in_inference_mode_and_used_outside(made_in, monkeypatch):
    g = torch.Generator().manual_seed(1)
    x = rows_like_a_residual_stream(g)
    monkeypatch.setattr(cpu_balanced, "_AFTER", 2 * N)
    monkeypatch.setattr(cpu_balanced, "_PER_TURN", 0)
    dictionary = dictionary_for(x, g, fires=0.01)
    with torch.inference_mode(made_in):
        encoder = SparseEncoder(dictionary)
        found = [encoder.encode(x)]
    with torch.inference_mode(not made_in):
        found += [encoder.encode(x) for _ in range(3)]
    assert encoder._screened and encoder._screened._balance.screens
    assert all(torch.equal(lists.activation, found[0].activation) for lists in found)


@balances
def test_what_saves_nothing_is_left_alone(monkeypatch):
    g = torch.Generator().manual_seed(1)
    noise, stream = rows_of_noise(g), rows_like_a_residual_stream(g)
    monkeypatch.setattr(cpu_balanced, "_AFTER", 1)
    # turning rows costs more than the product of so few latents
    assert ways(dictionary_for(stream, g, fires=0.01, d_sae=60), [stream] * 3) == [PLAIN] * 3
    monkeypatch.setattr(cpu_balanced, "_PER_TURN", 0)
    assert ways(dictionary_for(noise, g, fires=0.25), [noise] * 3) == [PLAIN] * 3
    # rows without second moments: all are the centre
    dictionary = dictionary_for(stream, g, fires=0.01)
    assert ways(dictionary, [dictionary.b_dec.expand(N, -1)] * 3) == [PLAIN] * 3


@balances
def test_balanced_screens_are_given_up_for_rows_of_another_kind(monkeypatch):
    g = torch.Generator().manual_seed(1)
    x = rows_like_a_residual_stream(g)
    monkeypatch.setattr(cpu_balanced, "_AFTER", 1)
    monkeypatch.setattr(cpu_balanced, "_PER_TURN", 0)
    dictionary = dictionary_for(x, g, fires=0.01)
    other = 100 * torch.randn(N, D_IN, generator=g)
    assert ways(dictionary, [x, x, other, x]) == [PLAIN, BALANCED, BALANCED, PLAIN]


def ways(dictionary, batches):
    """Which way each batch goes."""
    return encoded(dictionary, batches)[1]
