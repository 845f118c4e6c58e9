"""The search for extreme logits in 8-bit integers, against all products in 64 bits."""

import numpy as np
import pytest
import torch

from sae.kernels.int8 import quantised
from sae.kernels.lanes import BLOCK, LANES, OFFSET, Blocks, packed
from viewer.index import extremes, lens
from viewer.index.extreme_loops import extremes as kept
from viewer.index.extreme_loops import keep_extremes, no_extremes
from viewer.index.extremes import SearchedVocabulary
from viewer.index.lens import Vocabulary, top_logits

SIZES = [(1, 1), (3, 63), (2, 64), (70, 129), (5, 300), (4, 9000)]
COUNT, BINS = 12, 41


class End:
    """The end of a language model: a vocabulary, and a norm that does nothing but weigh.

    Each of the vocabulary's main directions holds less than the one before, the last 10**-falls of the first.
    """

    def __init__(self, d_model=192, d_vocab=3001, falls=3.0, crowded=False):
        self.generator = torch.Generator().manual_seed(0)
        turn = torch.linalg.qr(torch.randn(d_model, d_model, generator=self.generator))[0]
        main = torch.logspace(0, -falls, d_model)
        columns = (turn * main) @ torch.randn(d_model, d_vocab, generator=self.generator)
        self.W_U = columns + torch.randn(d_model, 1, generator=self.generator)
        self.weight = 0.2 + torch.rand(d_model, generator=self.generator)
        if crowded:
            # more tokens a hair apart than there are candidates: integers cannot tell them from one another
            noise = torch.randn(d_model, 300, generator=self.generator)
            self.W_U[:, 100:400] = 3 * self.W_U[:, :1] + 1e-5 * noise

    def final_norm(self, resid):
        return resid / resid.pow(2).mean(-1, keepdim=True).sqrt() * self.weight

    def directions(self, n):
        return torch.randn(n, len(self.W_U), generator=self.generator)


class Tokens:
    """Columns with scores that are all products of one block, or nearly all."""

    def __init__(self, columns, scale, ids=None):
        self.columns, self.scale = columns.astype(np.int8), scale.astype(np.float32)
        self.ids = numbers(len(columns)) if ids is None else ids
        self.n_groups = -(-len(columns) // LANES)
        padding = self.n_groups * LANES - len(columns)
        whole = np.pad(self.columns, ((0, padding), (0, 0)))
        factors = np.pad(self.scale, (0, padding))
        spread = Blocks.of(whole, factors).reach.T
        self.given = factors, packed(whole), np.ascontiguousarray(spread)

    def take_in(self, rows, found, count, *, head=1, groups=None, counted=0, per_bin=None, bins=5):
        """Cubes and histogram of such rows, and what is found in `found`."""
        cubes, histogram = np.zeros(len(rows)), np.zeros((len(rows), bins), np.int32)
        per_bin = np.ones(len(rows), np.float32) if per_bin is None else per_bin
        keep_extremes(
            Blocks.of(rows.astype(np.int8), np.ones(len(rows), np.float32)), head, self.given, self.ids,
            groups or (0, self.n_groups), counted, per_bin, histogram, *found, count, cubes,
        )  # fmt: skip
        return cubes, histogram


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("size", [1, 11, 127])
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_the_most_extreme_are_kept_and_the_first_of_equal_ones(rows, columns, size, share):
    rng, count, counted = np.random.default_rng(columns), 5, int(np.ceil(share * columns))
    left, right = (rng.integers(-size, size + 1, (n, BLOCK)) for n in (rows, columns))
    tokens = Tokens(
        right, rng.choice(np.array([0.5, 1, 2]), columns), rng.permutation(columns).astype(np.int32)
    )
    per_bin = np.full(rows, 2.0 ** -np.ceil(np.log2(8 * size**2)), np.float32)  # exact, however it is rounded
    found, whole = no_extremes(rows, count), -(-counted // LANES)
    given = {"per_bin": per_bin, "counted": counted}
    cubes, histogram = tokens.take_in(left, found, count, groups=(0, whole), **given)
    others, empty = tokens.take_in(left, found, count, groups=(whole, tokens.n_groups))
    scores = (left @ right.T) * tokens.scale
    cubes += others
    np.testing.assert_allclose(
        cubes, (scores.astype(np.float64) ** 3).sum(1), rtol=1e-3, atol=1e-4 * np.abs(scores).max() ** 3
    )
    binned = np.clip(np.floor(scores[:, :counted] * per_bin[:, None] + np.float32(2.5)), 0, 4).astype(int)
    assert histogram.tolist() == [np.bincount(row, minlength=5).tolist() for row in binned]
    assert not empty.any()
    values, ids = kept(*found, count)
    n = min(count, columns)
    for side, signed in enumerate((scores, -scores)):
        order = np.argsort(-signed, axis=1, kind="stable")[:, :n]
        assert ids[:, side, :n].tolist() == tokens.ids[order].tolist()
        assert values[:, side, :n].tolist() == np.take_along_axis(signed, order, 1).tolist()
        assert (values[:, side, n:] == -np.inf).all()


def numbers(n):
    return np.arange(n, dtype=np.int32)


def ones(n):
    """Vectors of which every product is 1."""
    return np.repeat(np.eye(1, BLOCK, dtype=np.int8), n, axis=0)


@pytest.mark.parametrize("downhill", [False, True])
def test_extremes_are_kept_where_every_score_is_one_for_a_while(downhill):
    rising, count = np.arange(2048) - 700.0, 3
    found = no_extremes(1, count)
    Tokens(ones(2048), -rising if downhill else rising).take_in(ones(1), found, count)
    values, ids = kept(*found, count)
    rise, fall = (1347, 1346, 1345), (700, 699, 698)
    assert values[0].tolist() == ([list(fall), list(rise)] if downhill else [list(rise), list(fall)])
    ends = [[0, 1, 2], [2047, 2046, 2045]]
    assert ids[0].tolist() == (ends if downhill else ends[::-1])


def test_a_score_a_hair_above_many_equal_ones_is_kept():
    # next to one another in float32
    scores = np.full(1024, 2.0**23)
    scores[900] += 1
    found = no_extremes(1, 2)
    Tokens(ones(1024), scores).take_in(ones(1), found, 2)
    values, ids = kept(*found, 2)
    assert ids[0].tolist() == [[900, 0], [0, 1]]
    assert values[0].tolist() == [[2**23 + 1, 2**23], [-(2**23)] * 2]


def test_where_nothing_is_found_there_are_ids_all_the_same(monkeypatch):
    """They are looked up before it is asked which were found."""
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, 77, dtype))
    found = no_extremes(2, 9)
    monkeypatch.undo()
    Tokens(ones(5), np.full(5, np.nan)).take_in(ones(2), found, 9)
    values, ids = kept(*found, 9)
    assert (values == -np.inf).all() and ids.min() >= 0 and ids.max() < 5


def moments(end):
    """The mean token, and the second moments of directions and tokens."""
    mean = end.W_U.mean(1)
    centred = (end.W_U - mean[:, None]).double()
    return mean, end.weight.double().square().diag(), centred @ centred.T / centred.shape[1]


def searched(end, every=8):
    """One span of tokens in so many is counted."""
    counted = (torch.arange(end.W_U.shape[1]) // 128 % every == 0).nonzero()[:, 0]
    return SearchedVocabulary.of(end.W_U, *moments(end), counted)


def scores_of(vocabulary, ints):
    """All of them, in the order of the search."""
    tokens = vocabulary.packed.astype(np.int64).transpose(0, 3, 1, 2, 4).reshape(len(vocabulary.scale), -1)
    n = len(vocabulary.ids)
    products = ints.numpy().astype(np.int64) @ (tokens - OFFSET)[:n].T
    return products.astype(np.float32) * vocabulary.scale[:n]


def integers(end, vocabulary, n=70):
    """Of directions of many kinds, one of them all zeros."""
    ints, _ = quantised(end.directions(n) * end.weight @ vocabulary.turn)
    head = vocabulary.head * BLOCK
    ints[1] = 0
    ints[2, head:] = 0
    ints[3:6, :head] = 0
    ints[4, head:] = 127
    ints[6] = torch.where(ints[6] > 0, 127, -127)
    # all in the last coordinates
    ints[7, :-20] = 0
    return ints


def check(vocabulary, ints, count=COUNT):
    """What a search finds are the most extreme of all scores; returns it and how many each side has."""
    scores = scores_of(vocabulary, ints)
    # powers of two, by which products are exact
    per_std = torch.from_numpy(2.0 ** -np.ceil(np.log2(scores.std(1) + 1))).float()
    found = vocabulary.search(ints, count, per_std, 2, BINS)
    places = np.empty(len(vocabulary.ids), np.int64)
    places[vocabulary.ids] = np.arange(len(places))
    assert sorted(vocabulary.ids) == list(range(len(places)))
    n_found = found.scores.isfinite().sum(2).numpy()
    for r, row in enumerate(scores):
        for side, signed in enumerate((row, -row)):
            n, limit = n_found[r, side], float(found.limits[r, side])
            values, here = found.scores[r, side].numpy(), places[found.ids[r, side, :n].numpy()]
            assert values[:n].tolist() == np.sort(signed)[::-1][:n].tolist() == signed[here].tolist()
            assert len(set(here)) == n and (values[n:] == -np.inf).all()
            assert (np.delete(signed, here) <= limit).all() and (values[:n] >= limit).all()
    binned = (scores[:, : vocabulary.counted] * 2 * per_std.numpy()[:, None] + np.float32(BINS / 2)).clip(
        0, BINS - 1
    )
    expected = [np.bincount(row, minlength=BINS).tolist() for row in binned.astype(np.int64)]
    assert found.histogram.tolist() == expected
    return found, n_found


def has_head(vocabulary):
    return 0 < vocabulary.head < len(vocabulary.spread) - 1


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize(
    ("d_model", "falls", "head", "every"), [(192, 2, 2, 8), (192, 3, 2, 23), (256, 6, 1, 8), (200, 3, 2, 23)]
)
def test_a_search_by_heads_finds_the_most_extreme_of_all_products(d_model, falls, head, every, crowded):
    end = End(d_model, falls=falls, crowded=crowded)
    vocabulary = searched(end, every)
    assert has_head(vocabulary) and (crowded or vocabulary.head == head)
    # the last sixteen are not all tokens, and of those that are counted in one of two cases
    assert len(vocabulary.ids) % LANES and bool(vocabulary.counted % LANES) == (every == 23)
    _, n_found = check(vocabulary, integers(end, vocabulary))
    # what is let by is seldom less than what is wanted, and never much less
    assert crowded or ((n_found[8:] == COUNT).mean() > 0.7 and n_found[8:].mean() > 0.9 * COUNT)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("last", [128, 64, 0])
def test_tails_that_are_parallel_reach_as_far_as_their_norms(sign, last):
    """Each direction's is that of one token, which is a hair beyond the limit: nothing may rule it out."""
    rng = np.random.default_rng(last)
    rows = rng.integers(-127, 128, (128, 4 * BLOCK)).astype(np.int8)
    rows[:, : BLOCK + last] = 0
    tokens = Tokens(sign * rows, 0.5 + rng.random(128))
    best = (rows.astype(np.int64) ** 2).sum(1).astype(np.float32) * tokens.scale
    values, ids, held, limits = no_extremes(128, 3)
    limits[:] = np.nextafter(best, np.float32(0))[:, None]
    tokens.take_in(rows, (values, ids, held, limits), 3)
    side = 0 if sign > 0 else 1
    for r in range(128):
        found = ids[r, side, : held[r, side]].tolist()
        assert r in found and values[r, side, found.index(r)] == best[r]


@pytest.mark.parametrize("n", [1, 69, 150])
def test_a_search_by_heads_takes_any_number_of_directions_and_small_tiles(n, monkeypatch):
    end = End()
    vocabulary = searched(end)
    ints = integers(end, vocabulary, 150)[-n:]
    whole, _ = check(vocabulary, ints)
    monkeypatch.setattr(extremes, "_ROWS", 3)
    tiled, _ = check(vocabulary, ints)
    # with other tiles another of two equal tokens may come first
    assert torch.equal(tiled.scores, whole.scores) and torch.equal(tiled.limits, whole.limits)
    torch.testing.assert_close(tiled.cubes, whole.cubes, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("count", [1, 60, 700, 2000])
def test_more_may_be_wanted_than_the_first_tokens_hold(count):
    end = End(d_vocab=2100)
    vocabulary = searched(end)
    assert has_head(vocabulary) and vocabulary.counted < 500
    _, n_found = check(vocabulary, integers(end, vocabulary), count)
    assert n_found.max() == count


def test_the_variance_of_what_heads_lack_is_known_well_enough():
    end = End()
    vocabulary = searched(end)
    assert has_head(vocabulary)
    ints, _ = quantised(end.directions(70) * end.weight @ vocabulary.turn)
    ones = np.ones(len(ints), np.float32)
    found = vocabulary._tail_variance(Blocks.of(ints.numpy(), ones).reach)
    ints[:, : vocabulary.head * BLOCK] = 0
    exact = torch.from_numpy(scores_of(vocabulary, ints)).square().mean(1)
    # within a block both sides fall alike, by which it is more
    assert 0.5 < (found / exact).min() < (found / exact).max() < 1.5


def test_tokens_that_are_the_more_extreme_the_later_they_come_are_found():
    """What is held overflows again and again."""
    end = End()
    mean = end.W_U.mean(1, keepdim=True)
    end.W_U = (end.W_U - mean) * torch.linspace(0.01, 3, 3001) ** 2
    vocabulary = searched(end, every=100)
    assert has_head(vocabulary)
    _, n_found = check(vocabulary, integers(end, vocabulary))
    assert (n_found[8:] == COUNT).all()


def test_a_vocabulary_without_main_directions_is_multiplied_whole():
    end = End(falls=0)
    vocabulary = searched(end)
    assert vocabulary.head == 3 == len(vocabulary.spread) - 1
    ints = integers(end, vocabulary)
    found, n_found = check(vocabulary, ints)
    assert (n_found == COUNT).all()
    scores = scores_of(vocabulary, ints).astype(np.float64)
    per_std = torch.from_numpy(2.0 ** -np.ceil(np.log2(scores.std(1) + 1)))
    cubes = torch.from_numpy((scores**3).sum(1)) * per_std**3
    torch.testing.assert_close(found.cubes, cubes, rtol=1e-3, atol=0.1)


def test_a_search_in_integers_gives_the_same_bits_on_one_thread_and_on_two(monkeypatch):
    monkeypatch.setattr(extremes, "_ROWS", 16)
    end, threads, results = End(), torch.get_num_threads(), []
    rows, given, counted = end.directions(70) * end.weight, moments(end), torch.arange(400)
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            vocabulary = SearchedVocabulary.of(end.W_U, *given, counted)
            ints, _ = quantised(rows @ vocabulary.turn)
            found = vocabulary.search(ints, COUNT, torch.full((70,), 1e-4), 2, BINS)
            arrays = vocabulary.scale, vocabulary.packed, vocabulary.spread
            made = [vocabulary.turn, *map(torch.from_numpy, arrays)]
            results.append([*made, found.scores, found.ids, found.limits, found.histogram, found.cubes])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.fixture
def in_integers(monkeypatch):
    """Vocabularies of any size are made integers, for any number of directions."""
    monkeypatch.setattr(lens, "int8_is_fast", lambda device: True)
    monkeypatch.setattr(lens, "_MIN_DIRECTIONS", 1)
    monkeypatch.setattr(lens, "_VOCAB_CHUNK", 1000)
    monkeypatch.setattr(lens, "_COUNTED", 500)


@pytest.mark.parametrize("falls", [0, 3])
@pytest.mark.parametrize("crowded", [False, True])
def test_a_search_in_integers_finds_what_a_search_in_floats_finds(monkeypatch, in_integers, crowded, falls):
    monkeypatch.setattr(extremes, "_ROWS", 3)
    end = End(d_vocab=4001, falls=falls, crowded=crowded)
    directions = end.directions(20)
    directions[5] = 0
    again = []
    plain = lens._top
    monkeypatch.setattr(lens, "_top", lambda read, *rest: again.append(len(read)) or plain(read, *rest))
    expected = top_logits(end, directions)
    again.clear()
    vocabulary = Vocabulary.of(end, 20)
    assert vocabulary.int8 and has_head(vocabulary.int8) == bool(falls)
    found = top_logits(end, directions, vocabulary=vocabulary)
    others = np.arange(20) != 5
    assert found.ids[others].tolist() == expected.ids[others].tolist()
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    # beside the direction of zeros, of whose logits all are equal
    assert again and (sum(again) > 10) == crowded
    moved = np.abs(np.cumsum(found.histogram - expected.histogram, axis=1)).max(1)
    assert (moved <= 0.02 * expected.histogram.sum(1)).all()


def test_skewness_is_near_that_of_all_logits(in_integers, monkeypatch):
    monkeypatch.setattr(lens, "_COUNTED", 30_000)
    end = End(d_model=128, d_vocab=60_000, falls=0)
    # few coordinates hold nearly all; of the others each is skewed
    main = torch.logspace(0, -1, 48)
    end.W_U[:48] *= main[:, None]
    end.W_U[48:] = 0.01 * torch.empty(80, 60_000).exponential_(generator=end.generator)
    end.W_U[0] += end.W_U[0].square() / 4
    vocabulary = Vocabulary.of(end, 40)
    assert vocabulary.int8 and has_head(vocabulary.int8)
    directions = end.directions(40)
    directions[:8, :48] = 0
    directions[:8, 48:].abs_()
    found = top_logits(end, directions, vocabulary=vocabulary)
    logits = (directions * end.weight) @ end.W_U
    z = (logits - logits.mean(1, keepdim=True)).double()
    exact = ((z**3).mean(1) / (z**2).mean(1) ** 1.5).numpy()
    assert exact[:8].min() > 0.15 and np.abs(exact[8:]).max() > 0.15
    np.testing.assert_allclose(found.skew, exact, atol=0.05)


def test_a_search_in_integers_is_for_many_directions_and_a_large_vocabulary(monkeypatch):
    monkeypatch.setattr(lens, "int8_is_fast", lambda device: True)
    few, many = End(24, 333), End(24, 40_000)
    assert Vocabulary.of(few, 10**6).int8 is None
    assert Vocabulary.of(many, 10).int8 is None
    assert Vocabulary.of(many, 10**6).int8 is not None
    monkeypatch.setattr(lens, "int8_is_fast", lambda device: False)
    assert Vocabulary.of(many, 10**6).int8 is None
