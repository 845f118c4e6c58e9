"""Sums over a vocabulary in 8-bit integers, against their plain definitions in float64."""

import numpy as np
import pytest
import torch
from conftest import wrapped_model

from activations import losses
from activations.int8 import Int8Vocabulary
from activations.loss_loops import add_tile, exp2_of_negative, largest
from activations.losses import loss_vocabulary, next_token_ce, next_token_losses
from sae.kernels.int8 import quantised

SIZES = [(1, 1), (3, 63), (2, 64), (5, 129), (4, 300)]


class End:
    """The end of a language model: a vocabulary, and a norm that does nothing but weigh."""

    def __init__(self, d_model=24, d_vocab=333, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.W_U = torch.randn(d_model, d_vocab, generator=self.generator)
        self.weight = 0.2 + torch.rand(d_model, generator=self.generator)

    def final_norm(self, resid):
        return resid / resid.pow(2).mean(-1, keepdim=True).sqrt() * self.weight


def test_powers_of_two_are_right_to_six_digits():
    x = np.linspace(-125.9, 0, 100_001).astype(np.float32)
    found = np.array([exp2_of_negative(value) for value in x], np.float64)
    assert np.abs(found / np.exp2(x.astype(np.float64)) - 1).max() < 1e-6
    assert exp2_of_negative(np.float32(0)) == pytest.approx(1, abs=1e-6)
    for tiny in (-127, -1e4, -1e30, -np.inf):
        assert 0 <= exp2_of_negative(np.float32(tiny)) < 1e-37


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_the_largest_is_found_wherever_it_is(n):
    for place in range(0, n, 7):
        values = -np.arange(1, n + 1, dtype=np.float32)
        values[place] = 0.5
        assert largest(values) == np.float32(0.5)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_a_running_sum_over_tiles_is_the_log_of_the_sum_of_exponentials(rows, columns, size):
    rng = np.random.default_rng(columns)
    products = rng.integers(-9, 10, (rows, 2 * columns)).astype(np.int32)
    row_scale, column_scale = rng.random(rows).astype(np.float32), rng.random(2 * columns).astype(np.float32)
    offset = (size * rng.standard_normal(2 * columns)).astype(np.float32)
    top, total = np.full(rows, -np.inf, np.float32), np.zeros(rows, np.float32)
    best = np.zeros(rows, np.int64)
    for first in (0, columns):
        span = slice(first, first + columns)
        room = np.full(columns, np.nan, np.float32)
        tile = np.ascontiguousarray(products[:, span])
        add_tile(tile, row_scale, column_scale[span], offset[span], first, top, total, best, room)
    logits = products * row_scale[:, None].astype(float) * column_scale + offset
    expected = np.logaddexp.reduce(logits, axis=1)
    np.testing.assert_allclose(top + np.log(total.astype(float)), expected, rtol=2e-6, atol=2e-5)
    np.testing.assert_allclose(logits[np.arange(rows), best], logits.max(1), rtol=1e-6, atol=1e-6)


def test_equal_logits_count_every_one():
    rows, columns = 2, 150
    top, total, best = (
        np.full(rows, -np.inf, np.float32),
        np.zeros(rows, np.float32),
        np.zeros(rows, np.int64),
    )
    ones, nothing = np.ones(columns, np.float32), np.zeros(columns, np.float32)
    products = np.full((rows, columns), 7, np.int32)
    add_tile(products, ones[:rows], ones, nothing, 0, top, total, best, np.empty(columns, np.float32))
    assert top.tolist() == [7, 7] and best.tolist() == [0, 0]
    np.testing.assert_allclose(total, columns, rtol=1e-6)


def test_rounding_keeps_zeros_and_the_largest():
    rows = torch.tensor([[0.0, 0.0], [1.0, -2.0], [3e30, 1.0]])
    ints, scale = quantised(rows)
    assert ints[0].tolist() == [0, 0] and scale[0] == 0
    assert ints[1].tolist() == [64, -127]
    torch.testing.assert_close(ints[2] * scale[2], torch.tensor([3e30, 0.0]))


def test_integer_products_come_near_the_products():
    end = End()
    end.W_U[3] *= 50
    end.weight[5] *= 50
    before = end.W_U.clone()
    vocabulary = Int8Vocabulary.of(end)
    assert torch.equal(end.W_U, before)
    vectors = torch.randn(9, 24, generator=end.generator) * end.weight
    ints, scale, constant = vocabulary.left(vectors)
    found = (ints.int() @ vocabulary.rows.int().T) * scale[:, None] * vocabulary.scale + constant[:, None]
    expected = vectors @ end.W_U
    assert float((found - expected).std() / expected.std()) < 0.02


@pytest.fixture(scope="module")
def half_model():
    model = wrapped_model("gemma3")
    model._head.to(torch.bfloat16)
    model.dtype = torch.bfloat16
    return model


def truth(model, hidden, targets, scale=1.0):
    """Cross-entropies and divergences by full logits in float64."""
    logits = hidden.double() @ model.W_U.double()
    logits = (logits if model.b_U is None else logits + model.b_U.double()) * scale
    log_probs = logits.log_softmax(-1)
    ce = -log_probs.gather(-1, targets.expand(len(hidden), -1)[..., None])[..., 0]
    return ce, (log_probs[0].exp() * (log_probs[0] - log_probs)).sum(-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_losses_by_integers_are_those_of_full_logits(half_model, monkeypatch, bias, scale):
    generator = torch.Generator().manual_seed(5)
    monkeypatch.setattr(losses, "_INT8_ROWS", 4)
    monkeypatch.setattr(losses, "_INT8_COLUMNS", 77)
    monkeypatch.setattr(losses, "_CLEAN_ROWS", 3)
    monkeypatch.setattr(losses, "_CLEAN_COLUMNS", 90)
    monkeypatch.setattr(half_model, "_logit_scale", scale)
    if bias:
        half_model._head.bias = torch.nn.Parameter(torch.randn(300, generator=generator).bfloat16())
    try:
        hidden = torch.randn(3, 11, 32, generator=generator).bfloat16()
        hidden[2] = 0
        targets = torch.randint(0, 300, (11,), generator=generator)
        vocabulary = Int8Vocabulary.of(half_model)
        ce, kl = next_token_losses(half_model, hidden, targets, vocabulary=vocabulary)
        expected_ce, expected_kl = truth(half_model, hidden, targets, scale)
        torch.testing.assert_close(ce.double(), expected_ce, rtol=0, atol=0.03)
        torch.testing.assert_close(kl.double(), expected_kl, rtol=0, atol=0.03)
        assert float((ce - expected_ce).mean().abs()) < 5e-3
        assert torch.equal(kl[0], torch.zeros(11))
        # of variants in another order, without the clean one
        alone = next_token_ce(half_model, hidden[[2, 1]], targets, vocabulary=vocabulary)
        assert torch.equal(alone, ce[[2, 1]])
    finally:
        half_model._head.bias = None


def test_a_certain_token_costs_nothing_and_what_is_not_finite_stays_so(half_model):
    best = half_model.W_U.float().norm(dim=0).argmax()
    hidden = (60 * half_model.W_U[:, best]).expand(2, 3, 32).clone().bfloat16()
    hidden[1, 0, 0] = torch.nan
    hidden[1, 1, 0] = torch.inf
    targets = torch.full((3,), int(best))
    ce, kl = next_token_losses(half_model, hidden, targets, vocabulary=Int8Vocabulary.of(half_model))
    expected, _ = truth(half_model, hidden[:1], targets)
    torch.testing.assert_close(ce[0].double(), expected[0], rtol=1e-4, atol=1e-4)
    assert not ce[1, :2].isfinite().any() and not kl[1, :2].isfinite().any()
    assert ce[1, 2] == ce[0, 2]


def test_integers_serve_many_rows_of_models_without_a_soft_cap(half_model, tiny_model, monkeypatch):
    monkeypatch.setattr(losses, "int8_is_fast", lambda device: True)
    assert loss_vocabulary(half_model, 10**6) is not None
    assert loss_vocabulary(half_model, 10) is None
    assert loss_vocabulary(tiny_model, 10**6) is None
    monkeypatch.setattr(half_model, "_softcap", 30.0)
    assert loss_vocabulary(half_model, 10**6) is None
