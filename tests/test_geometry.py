"""What the weights say, against all cosines computed at once and against sets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae
from sae import DictionaryConfig
from sae.kernels.int8 import quantised
from viewer.index import geometry, nearest
from viewer.index.adjacent import Between, adjacent_sites
from viewer.index.firings import Firings
from viewer.index.geometry import (
    Neighbours,
    duplicates,
    encoder_decoder,
    neighbours,
    neighbours_of_both,
    neuron_alignment,
)
from viewer.index.nearest import Integers, candidates_of_both


@pytest.fixture(params=[True, False], ids=["integers", "floats"])
def integers(request, monkeypatch):
    monkeypatch.setattr(geometry, "int8_is_fast", lambda device: request.param)


def rows(n, d=48, seed=0):
    """Rows in families, so that cosines are large and close, with a coordinate that dwarfs the others."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(9, d, generator=generator)
    made = centres[torch.arange(n) % 9] + 0.6 * torch.randn(n, d, generator=generator)
    made[:, 3] *= 8
    return made * torch.logspace(-6, 6, n)[torch.randperm(n, generator=generator), None]


def all_cosines(a, b):
    return torch.nn.functional.normalize(a.double()) @ torch.nn.functional.normalize(b.double()).T


def check_against_all(a, b, found, same=False):
    """Each place holds a cosine that is right and, but for rounding, the largest there is for it."""
    expected = all_cosines(a, b)
    if same:
        expected.fill_diagonal_(-2)
    best = expected.topk(found.ids.shape[1], dim=1).values.numpy()
    at = expected.gather(1, torch.from_numpy(found.ids).long()).numpy()
    np.testing.assert_allclose(found.cosine, best, atol=2e-6)
    np.testing.assert_allclose(at, best, atol=2e-6)
    assert all(len(set(ids)) == len(ids) for ids in found.ids.tolist())


@pytest.mark.parametrize(("n", "m"), [(700, 4500), (4500, 130), (5, 11)])
def test_neighbours_equal_all_cosines(n, m, integers):
    a, b = rows(n), rows(m, seed=1)
    check_against_all(a, b, neighbours(a, b))


def test_no_latent_is_its_own_neighbour(integers):
    a = rows(1300)
    found = neighbours(a, a, same=True)
    check_against_all(a, a, found, same=True)
    assert not (found.ids == np.arange(1300)[:, None]).any()
    # as another dictionary's, it is the nearest
    assert neighbours(a, a.clone()).ids[:, 0].tolist() == list(range(1300))


def test_copies_stand_in_the_order_of_their_numbers(integers):
    a = rows(600)
    # more copies than candidates: powers of two leave the direction as it is, to the bit
    a[100:200] = a[7] * 2.0 ** torch.arange(100)[:, None]
    found = neighbours(a, a, same=True)
    assert found.ids[7].tolist() == list(range(100, 110))
    assert found.ids[150].tolist() == [7, *range(100, 109)]
    assert found.ids[104].tolist() == [7, *range(100, 104), *range(105, 110)]
    np.testing.assert_allclose(found.cosine[150], 1, atol=1e-6)


def test_rows_of_zeros_and_too_few_others(integers):
    a, b = rows(6), rows(4)
    a[2] = 0
    b[1] = 0
    found = neighbours(a, b)
    assert found.ids[2].tolist() == [-1] * 10 and not found.cosine[2].any()
    for row in (0, 1, 3):
        assert sorted(found.ids[row, :3]) == [0, 2, 3] and (found.ids[row, 3:] == -1).all()
        assert not found.cosine[row, 3:].any()
    alone = neighbours(rows(1), rows(1), same=True)
    assert alone.ids.tolist() == [[-1] * 10]
    assert (neighbours(a, torch.zeros(3, 48)).ids == -1).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 3), st.integers(0, 2**31), st.booleans())
def test_neighbours_of_any_small_rows(n, m, count, seed, fast):
    # whole numbers in few dimensions: ties, zeros and copies all the time
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-2, 3, (k, 3), generator=generator).float() for k in (n, m))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "int8_is_fast", lambda device: fast)
        found = neighbours(a, b, count=count)
    expected, there = all_cosines(a, b), b.any(1)
    for row in range(n):
        ids = found.ids[row][found.ids[row] >= 0]
        assert len(ids) == (min(count, int(there.sum())) if a[row].any() else 0)
        best = expected[row][there].sort(descending=True).values[: len(ids)]
        np.testing.assert_allclose(found.cosine[row, : len(ids)], best, atol=1e-6)
        np.testing.assert_allclose(expected[row][ids.tolist()], best, atol=1e-6)
        assert len(set(ids.tolist())) == len(ids)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def small_tiles(monkeypatch):
    """Several tiles to a side, whose last lanes no word holds, at sizes that are quick."""
    monkeypatch.setattr(nearest, "_TILE", 100)


def same_bits(found, expected):
    assert np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.cosine.view(np.int32), expected.cosine.view(np.int32))


def first_of_all(left, right, count):
    """The candidates as they are defined: of all products, those that come first when sorted."""
    scores = (left.values.double() @ right.values.double().T).float() * right.scale
    scores, places = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :count] * left.scale[:, None], places[:, :count]


def some_integers(n, seed, few):
    """Vectors with few values, where products tie all the time, or with many."""
    generator = torch.Generator().manual_seed(seed)
    if few:
        return Integers(*quantised(torch.randint(-1, 2, (n, 4), generator=generator).float()))
    return Integers(*quantised(rows(n, seed=seed)))


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 63), (63, 1), (64, 200), (1000, 257), (230, 1000)])
def test_candidates_are_the_first_of_all_products(n, m, few, threads, monkeypatch):
    small_tiles(monkeypatch)
    left, right = some_integers(n, 0, few), some_integers(m, 1, few)
    of_left, of_right = min(30, m), min(30, n)
    found = candidates_of_both(left, right, of_left=of_left, of_right=of_right)
    expected = first_of_all(left, right, of_left), first_of_all(right, left, of_right)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.places, other[1]) and torch.equal(one.scores, other[0])
    alone, none = candidates_of_both(left, right, of_left=of_left)
    assert torch.equal(alone.places, found[0].places) and none.places.shape == (m, 0)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("n", [1, 63, 100, 101, 400, 777])
def test_half_of_the_products_of_one_side_say_all(n, few, threads, monkeypatch):
    small_tiles(monkeypatch)
    side = some_integers(n, 2, few)
    found, again = candidates_of_both(side, side, of_left=min(30, n))
    scores, places = first_of_all(side, side, min(30, n))
    assert again is found and torch.equal(found.places, places) and torch.equal(found.scores, scores)


def test_each_pair_of_strips_makes_one_tile():
    for n in range(9):
        tiles = nearest._tiles(n, None)
        assert sorted(tuple(sorted(tile)) for tile in tiles) == [
            (i, j) for i in range(n) for j in range(i, n)
        ]
        for m in range(4):
            assert sorted(nearest._tiles(n, m)) == [(i, j) for i in range(n) for j in range(m)]


def crowded(n, seed):
    """`rows` with some of zeros and more copies than there are candidates."""
    made = rows(n, seed=seed)
    made[5::11] = 0
    made[n // 2 : n // 2 + 60] = made[0]
    return made


@pytest.mark.parametrize(("n", "m"), [(1, 63), (63, 1000), (1000, 4097), (4097, 1)])
def test_both_sides_at_once_are_as_each_alone(n, m, integers, threads):
    a, b = crowded(n, 0), crowded(m, 1)
    a_in_b, b_in_a = neighbours_of_both(a, b)
    same_bits(a_in_b, neighbours(a, b))
    same_bits(b_in_a, neighbours(b, a))
    for own, others, found in ((a, b, a_in_b), (b, a, b_in_a)):
        some, there = own.any(1), others.any(1)
        full = min(10, int(there.sum()))
        ids, cosine = found.ids[some.numpy()], found.cosine[some.numpy()]
        assert (ids[:, full:] == -1).all() and there[torch.from_numpy(ids[:, :full]).long()].all()
        among = (there.cumsum(0) - 1).numpy()[ids[:, :full]]
        check_against_all(own[some], others[there], Neighbours(among, cosine[:, :full]))
        assert (found.ids[~some.numpy()] == -1).all() and not found.cosine[~some.numpy()].any()


def test_the_number_of_threads_changes_nothing(integers, monkeypatch):
    small_tiles(monkeypatch)
    a, b, before = crowded(1500, 0), crowded(900, 4), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([neighbours(a, b), neighbours(a, a, same=True), *neighbours_of_both(a, b)])
    torch.set_num_threads(before)
    for one, two, three in zip(*found, strict=True):
        same_bits(one, two)
        same_bits(one, three)


def dictionary(site, seed, d=48):
    cfg = DictionaryConfig(d_in=d, d_sae=70, architecture="relu", site_in=site)
    tensors = {"W_enc": torch.zeros(d, 70), "b_enc": torch.zeros(70), "b_dec": torch.zeros(d)}
    return sae.build(cfg, {"W_dec": rows(70, d, seed), **tensors})


@pytest.mark.parametrize("order", [[0, 1, 2, 10], [0, 10, 1, 2], [2, 1], [1], []])
def test_a_pair_of_sites_is_searched_once(order, monkeypatch):
    site = "blocks.{}.hook_resid_post".format
    dictionaries = {site(layer): dictionary(site(layer), layer) for layer in (0, 1, 2, 10)}
    searched = []

    def count(search):
        def counted(rows, others):
            searched.append(search)
            return search(rows, others)

        return counted

    for search in (neighbours, neighbours_of_both):
        monkeypatch.setattr(f"viewer.index.adjacent.{search.__name__}", count(search))
    made = list(map(site, order))
    between = Between(dictionaries, made)
    pairs = set()
    for one in made:
        for other in adjacent_sites(dictionaries, one).values():
            pairs.add(frozenset((one, other)))
            found = between.neighbours(one, other)
            same_bits(found, neighbours(dictionaries[one].W_dec, dictionaries[other].W_dec))
    assert len(searched) == len(pairs) and not between._kept
    # sites that are made elsewhere, or were before, get nothing
    both = [pair for pair in pairs if pair <= set(made)]
    assert searched.count(neighbours_of_both) == len(both)


def firings_of(sets):
    starts = np.cumsum([0, *map(len, sets)]).astype(np.int64)
    row = np.array([r for s in sets for r in sorted(s)], np.int32)
    return Firings(starts=starts, row=row, activation=np.ones(len(row), np.float32))


def test_duplicates_are_near_and_fire_together():
    everywhere = set(range(40))
    sets = [everywhere, everywhere - {3}, set(range(30, 60)), everywhere, set(), set()]
    near = Neighbours(
        np.array([[1, 2], [0, 3], [0, -1], [1, -1], [5, -1], [4, -1]], np.int32),
        np.array([[0.99, 0.96], [0.99, 0.94], [0.96, 0], [0.94, 0], [0.99, 0], [0.99, 0]], np.float32),
    )
    found = duplicates(near, firings_of(sets))
    # 0 and 2 overlap in ten of sixty, 1 and 3 are not near enough, 4 and 5 never fire
    assert list(zip(found.latent.tolist(), found.other.tolist(), strict=True)) == [(0, 1)]
    assert found.cosine[0] == np.float32(0.99) and found.jaccard[0] == np.float32(39 / 40)


def test_duplicates_equal_sets_on_random_firings():
    generator = np.random.default_rng(0)
    base = [set(generator.choice(200, 60, replace=False).tolist()) for _ in range(5)]
    sets = [base[i % 5] ^ set(generator.choice(200, 12).tolist()) for i in range(30)]
    a = rows(5)[torch.arange(30) % 5] + 1e-7 * rows(30)
    near = neighbours(a, a, count=10, same=True)
    found = duplicates(near, firings_of(sets))
    pairs = {}
    for i, row in enumerate(near.ids.tolist()):
        for j, cosine in zip(row, near.cosine[i], strict=True):
            union = sets[i] | sets[j]
            jaccard = len(sets[i] & sets[j]) / len(union)
            if j >= 0 and cosine >= 0.95 and jaccard >= 0.5:
                pairs[min(i, j), max(i, j)] = jaccard
    assert len(pairs) > 20
    assert list(zip(found.latent.tolist(), found.other.tolist(), strict=True)) == sorted(pairs)
    np.testing.assert_allclose(found.jaccard, [pairs[pair] for pair in sorted(pairs)], rtol=1e-6)


def test_alignment_names_the_largest_coordinates_and_their_share():
    found = neuron_alignment(
        torch.tensor([[1.0, -4.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0], [2.0, 2.0, -2.0, 2.0]])
    )
    assert found.ids.tolist() == [[1, 3, 0], [0, 1, 2], [0, 1, 2]]
    assert found.values.tolist() == [[-4, 3, 1], [0, 0, 0], [2, 2, -2]]
    np.testing.assert_allclose(found.share, [[0.5, 0.375, 0.125], [0, 0, 0], [0.25] * 3])
    heads = neuron_alignment(torch.tensor([[3.0, 4.0, 0.0, 0.0, -6.0, 8.0]]), head_width=2)
    assert heads.ids.tolist() == [[2, 0, 1]] and heads.values.tolist() == [[10, 5, 0]]
    np.testing.assert_allclose(heads.share, [[2 / 3, 1 / 3, 0]])
    assert neuron_alignment(torch.ones(1, 2)).ids.shape == (1, 2)


def test_encoder_and_decoder():
    cfg = DictionaryConfig(d_in=2, d_sae=3, architecture="relu", site_in="blocks.0.hook_resid_post")
    tensors = {
        "W_enc": torch.tensor([[3.0, 0.0, 0.0], [4.0, 1.0, 0.0]]),
        "W_dec": torch.tensor([[6.0, 8.0], [2.0, 0.0], [0.0, 1.0]]),
        "b_enc": torch.zeros(3),
        "b_dec": torch.zeros(2),
    }
    norm, cosine = encoder_decoder(sae.build(cfg, tensors))
    assert norm.tolist() == [10, 2, 1]
    np.testing.assert_allclose(cosine, [1, 0, 0], atol=1e-7)
    other = DictionaryConfig(**{**cfg.to_dict(), "site_out": "blocks.0.hook_mlp_out"})
    assert encoder_decoder(sae.build(other, tensors))[1] is None
