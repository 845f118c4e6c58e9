"""Sums and searches over a vocabulary in 8-bit integers, against their plain definitions in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import wrapped_model

from activations import losses
from activations.int8 import Int8Vocabulary
from activations.loss_loops import add_tile, exp2_of_negative, largest
from activations.losses import loss_vocabulary, next_token_ce, next_token_losses
from sae.kernels.int8 import quantised
from viewer.index import lens
from viewer.index.lens import top_logits
from viewer.index.loops import _aligned, count_bins, extremes, keep_extremes, no_extremes

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


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("size", [3, 1000, 10**7])
def test_the_most_extreme_are_kept_and_the_first_of_equal_ones(rows, columns, size):
    rng = np.random.default_rng(columns)
    n_columns, count = 4 * columns, 5
    products = rng.integers(-size, size + 1, (rows, n_columns)).astype(np.int32)
    scale = rng.choice(np.array([0.5, 1, 2], np.float32), n_columns)
    cubes, histogram = np.zeros(rows), np.zeros((rows, 5), np.int32)
    per_bin = np.full(rows, 2.0 ** (1 - size.bit_length()), np.float32)  # exact, however it is rounded
    found, filled = no_extremes(rows, count), 0
    # what is there before must not matter
    bins = np.full((rows, 4 * (columns // 128 + 1), 128), 255, np.uint8)
    for first in range(0, n_columns, columns):
        span = slice(first, first + columns)
        tile = np.ascontiguousarray(products[:, span])
        filled = keep_extremes(
            tile, scale[span], first, *found, count, cubes, 1, 3, per_bin, 5, bins, filled
        )  # fmt: skip
        if first == columns:
            count_bins(bins, filled, histogram)
            filled = 0
    count_bins(bins, filled, histogram)
    scores = products * scale
    np.testing.assert_allclose(cubes, (scores.astype(np.float64) ** 3).sum(1), rtol=1e-3, atol=1e-3 * size**3)
    is_counted = np.arange(n_columns) % columns // 128 % 3 == 1
    binned = np.clip((scores[:, is_counted] * per_bin[:, None] + np.float32(2.5)).astype(np.int32), 0, 4)
    assert histogram.tolist() == [np.bincount(row, minlength=5).tolist() for row in binned]
    values, ids = extremes(*found, count)
    n = min(count, n_columns)
    for side, signed in enumerate((scores, -scores)):
        order = np.argsort(-signed, axis=1, kind="stable")[:, :n]
        assert ids[:, side, :n].tolist() == order.tolist()
        assert values[:, side, :n].tolist() == np.take_along_axis(signed, order, 1).tolist()
        assert (values[:, side, n:] == -np.inf).all()


@pytest.mark.parametrize("downhill", [False, True])
def test_extremes_are_kept_where_every_score_is_one_for_a_while(downhill):
    columns, count = 4 * 512, 3
    rising = np.arange(columns, dtype=np.int32)[None] - 700
    products, cubes = (-rising if downhill else rising), np.zeros(1)
    found, ones = no_extremes(1, count), np.ones(columns, np.float32)
    bins = np.empty((1, 0, 128), np.uint8)
    for first in range(0, columns, 512):
        span = slice(first, first + 512)
        tile = np.ascontiguousarray(products[:, span])
        keep_extremes(tile, ones[span], first, *found, count, cubes, 4, 4, ones, 5, bins, 0)
    values, ids = extremes(*found, count)
    rise, fall = (1347, 1346, 1345), (700, 699, 698)
    assert values[0].tolist() == ([list(fall), list(rise)] if downhill else [list(rise), list(fall)])
    ends = [[0, 1, 2], [2047, 2046, 2045]]
    assert ids[0].tolist() == (ends if downhill else ends[::-1])


def test_a_score_a_hair_above_many_equal_ones_is_kept():
    # next to one another in float32
    products = np.full((1, 1024), 2**23, np.int32)
    products[0, 900] += 1
    found, ones, bins = no_extremes(1, 2), np.ones(1024, np.float32), np.empty((1, 0, 128), np.uint8)
    keep_extremes(products, ones, 0, *found, 2, np.zeros(1), 8, 8, ones, 5, bins, 0)
    values, ids = extremes(*found, 2)
    assert ids[0].tolist() == [[900, 0], [0, 1]]
    assert values[0].tolist() == [[2**23 + 1, 2**23], [-(2**23)] * 2]


def test_room_begins_where_a_line_of_the_cache_does():
    rooms = [_aligned(size) for size in (128, 1024, 1152) for _ in range(8)]
    assert {room.ctypes.data % 64 for room in rooms} == {0}
    assert [len(room) for room in rooms[::8]] == [128, 1024, 1152]


@pytest.mark.parametrize("crowded", [False, True])
def test_a_search_in_integers_finds_what_a_search_in_floats_finds(monkeypatch, crowded):
    monkeypatch.setattr(lens, "_INT8_TILE_ROWS", 3)
    monkeypatch.setattr(lens, "_INT8_TILE_COLUMNS", 500)
    end = End(d_vocab=4001)
    if crowded:
        # more tokens a hair apart than there are candidates: integers cannot tell them from one another
        end.W_U[:, 100:400] = 3 * end.W_U[:, :1] + 1e-4 * torch.randn(24, 300, generator=end.generator)
    directions = torch.randn(8, 24, generator=end.generator)
    again = []
    plain = lens._top
    monkeypatch.setattr(lens, "_top", lambda read, *rest: again.append(len(read)) or plain(read, *rest))
    expected = top_logits(end, directions)
    again.clear()
    by_int8 = dataclasses.replace(lens.Vocabulary.of(end), int8=Int8Vocabulary.of(end))
    found = top_logits(end, directions, vocabulary=by_int8)
    assert found.ids.tolist() == expected.ids.tolist()
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-6, atol=1e-6)
    assert bool(again) == crowded


def test_a_search_in_integers_is_for_many_directions_and_a_large_vocabulary(monkeypatch):
    monkeypatch.setattr(lens, "int8_is_fast", lambda device: True)
    assert lens.Vocabulary.of(End(), 10**6).int8 is None
    assert lens.Vocabulary.of(End(d_vocab=40_000), 10).int8 is None
    assert lens.Vocabulary.of(End(d_vocab=40_000), 10**6).int8 is not None
    monkeypatch.setattr(lens, "int8_is_fast", lambda device: False)
    assert lens.Vocabulary.of(End(d_vocab=40_000), 10**6).int8 is None
