"""What the weights say, against all cosines computed at once and against sets."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sae
from sae import DictionaryConfig
from viewer.index import geometry
from viewer.index.firings import Firings
from viewer.index.geometry import Neighbours, duplicates, encoder_decoder, neighbours, neuron_alignment


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


def test_the_number_of_threads_changes_nothing(integers):
    a, before = rows(1500), torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(neighbours(a, rows(900, seed=4)))
    torch.set_num_threads(before)
    assert np.array_equal(found[0].ids, found[1].ids) and np.array_equal(found[0].cosine, found[1].cosine)


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
