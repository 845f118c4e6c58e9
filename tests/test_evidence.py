"""What the index says of a site's firings, against plain searches and dense products."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from viewer.index import evidence
from viewer.index.ahead import OneAhead
from viewer.index.evidence import BANDS, EXAMPLES_PER_BAND, TextRows, band_edges, gather_evidence
from viewer.index.evidence_loops import scramble
from viewer.index.firings import RowLists, Texts
from viewer.index.histogram import N_BINS, histogram_bin, histogram_edges

WORD = 2**64 - 1


def plain_scramble(*words):
    x = 0
    for word in words:
        x = ((x ^ word) + 0x9E3779B97F4A7C15) & WORD
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
        x ^= x >> 31
    return x


@st.composite
def problems(draw):
    """Texts of few words, so that many windows are alike, and the activations [row, latent] on them."""
    blocks, context = draw(st.integers(1, 4)), draw(st.integers(2, 24))
    d_sae, vocabulary = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 5, 1000]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (blocks, context)
    document = np.full(shape, -1, np.int64)
    position = np.full(shape, -1, np.int32)
    number, place = int(random.integers(0, 10**9)), 0
    for block in range(blocks):
        for pos in range(1, context):
            if random.random() < 0.15:
                number, place = int(random.integers(0, 10**9)), 0
            document[block, pos], position[block, pos] = number, place
            place += 1
    keep = (position >= 0) & (random.random(shape) > 0.1)
    keep[0, 1] = True
    tokens = random.integers(0, vocabulary, shape).astype(np.int32)
    density = draw(st.sampled_from([0.02, 0.2, 1.0]))
    # few values, so that equal activations have to be told apart
    values = random.integers(1, 9 if draw(st.booleans()) else 10**6, (int(keep.sum()), d_sae)) / 8
    acts = np.where(random.random(values.shape) < density, values, 0).astype(np.float32)
    if draw(st.booleans()):
        acts[:, 0] = 0
    return Texts(tokens, document, np.where(keep, position, -1).astype(np.int32), keep), acts


def gather(texts, acts, lowest=0.0, examples=4):
    row, latent = acts.nonzero()
    starts = np.searchsorted(row, np.arange(len(acts) + 1))
    lists = RowLists(starts.astype(np.int64), latent.astype(np.int32), acts[row, latent])
    bounds = np.full(acts.shape[1], lowest, np.float32)
    with OneAhead(
        lambda rows: gather_evidence(lists, rows, lowest=bounds, examples=examples), [TextRows(texts)], 1
    ) as made:
        return made.take()


def rows_of(columns, latent):
    mine = np.flatnonzero(columns["latent"] == latent)
    plain = {name: np.asarray(column) for name, column in columns.items()}
    return [{name: column[i] for name, column in plain.items()} for i in mine]


def window(texts, block, at):
    document = texts.document[block, at]
    inside = range(len(texts.tokens[block]))
    return tuple(
        int(texts.tokens[block, p]) if p in inside and texts.document[block, p] == document else None
        for p in range(at - 5, at + 6)
    )


def peaks(texts, acts, latent):
    """The best firing of each document within each block: activation, document, position, row, block, at."""
    best = {}
    for row, place in enumerate(np.flatnonzero(texts.keep)):
        block, at = divmod(int(place), texts.keep.shape[1])
        value = float(acts[row, latent])
        unit = (block, int(texts.document[block, at]))
        if value > 0 and (unit not in best or value > best[unit][0]):
            best[unit] = (value, unit[1], int(texts.position[block, at]), row, block, at)
    return list(best.values())


def without_twins(texts, ordered, count):
    seen, chosen = set(), []
    for peak in ordered:
        text = window(texts, peak[4], peak[5])
        if text not in seen:
            seen.add(text)
            chosen.append((peak[4], peak[5], peak[0]))
    return chosen[:count]


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.1]), st.integers(1, 6))
def test_examples_equal_a_search_of_all_peaks(problem, lowest, examples):
    texts, acts = problem
    found = gather(texts, acts, lowest, examples)
    edges = found.latents["quantiles"]
    for latent in range(acts.shape[1]):
        all_peaks = peaks(texts, acts, latent)
        by_band = {0: without_twins(texts, sorted(all_peaks, key=lambda p: (-p[0], *p[1:4])), examples)}
        for band in range(1, BANDS + 1):
            upper = math.inf if band == 1 else edges[latent, band - 2]
            lower = -math.inf if band == BANDS else edges[latent, band - 1]
            inside = [p for p in all_peaks if lower < p[0] <= upper]
            inside.sort(key=lambda p: (plain_scramble(latent, p[1], p[2]), *p[1:4]))
            by_band[band] = without_twins(texts, inside, EXAMPLES_PER_BAND)
        wanted = [(band, rank, *chosen) for band, rows in by_band.items() for rank, chosen in enumerate(rows)]
        names = ("band", "rank", "block", "peak", "activation")
        assert [tuple(row[n] for n in names) for row in rows_of(found.examples, latent)] == wanted
        for row in rows_of(found.examples, latent):
            assert row["token"] == texts.tokens[row["block"], row["peak"]]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_counts_equal_dense_sums(problem):
    texts, acts = problem
    latents = gather(texts, acts).latents
    number = (acts > 0).sum(0)
    assert latents["firings"].tolist() == number.tolist()
    assert np.array_equal(latents["density"], number / len(acts))
    assert np.array_equal(latents["max"], acts.max(0))
    assert latents["mean"] == pytest.approx(acts.sum(0, dtype=np.float64) / np.maximum(number, 1), rel=1e-6)
    states = np.where(number == 0, "silent", np.where(number / len(acts) > 0.1, "dense", "live"))
    assert latents["state"].tolist() == states.tolist()
    for latent, counts in enumerate(latents["histogram"].to_pylist()):
        whole = np.zeros(N_BINS, int)
        first = latents["histogram_first"][latent]
        whole[first : first + len(counts)] = counts
        values = acts[acts[:, latent] > 0, latent]
        assert whole.tolist() == np.histogram(values, histogram_edges())[0].tolist()


@settings(max_examples=60, deadline=None)
@given(problems())
def test_drivers_equal_dense_sums(problem):
    texts, acts = problem
    found = gather(texts, acts)
    tokens = texts.tokens[texts.keep]
    ids = np.unique(tokens)
    on = (tokens[:, None] == ids).astype(np.float64)
    count, total = on.T @ (acts > 0), on.T @ acts.astype(np.float64)
    for latent in range(acts.shape[1]):
        rows = rows_of(found.drivers, latent)
        n = max(1, int((acts[:, latent] > 0).sum()))
        lift = (count[:, latent] / n) / (on.sum(0) / len(tokens))
        share = total[:, latent] / max(total[:, latent].sum(), 1e-30)
        for order, value, allowed in (
            ("activation", share, count[:, latent] >= 1),
            ("lift", lift, count[:, latent] >= 2),
        ):
            mine = [row for row in rows if row["order"] == order]
            assert [row["rank"] for row in mine] == list(range(min(10, int(allowed.sum()))))
            places = np.searchsorted(ids, [row["token"] for row in mine])
            assert len(set(places)) == len(places) and allowed[places].all()
            best = np.sort(value[allowed])[::-1][: len(mine)]
            assert value[places] == pytest.approx(best, rel=1e-9)
            for row, place in zip(mine, places, strict=True):
                assert row["count"] == count[place, latent]
                assert row["mean"] == pytest.approx(total[place, latent] / row["count"], rel=1e-6)
                assert row["share"] == pytest.approx(share[place], rel=1e-6)
                assert row["lift"] == pytest.approx(lift[place], rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0, 0.4, 1]))
def test_cofiring_equals_the_correlation_of_firing_with_firing(problem, crowded):
    texts, acts = problem
    # crowded rows are counted as bits, the others as lists: all, some, none
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "_CROWDED", crowded)
        found = gather(texts, acts)
    fires = (acts > 0).astype(np.float64)
    together = fires.T @ fires
    for latent in range(acts.shape[1]):
        phi = np.array([_correlation(fires[:, latent], other) for other in fires.T])
        phi[latent] = 0
        allowed = (together[latent] >= 3) & (phi > 1e-12)
        rows = rows_of(found.cofiring, latent)
        # a phi of zero may come out on either side of it
        assert len(rows) == min(10, int(allowed.sum()))
        others = [row["other"] for row in rows]
        assert len(set(others)) == len(others) and latent not in others
        assert phi[others] == pytest.approx(np.sort(phi[allowed])[::-1][: len(rows)], abs=1e-9)
        for row in rows:
            assert row["value"] == pytest.approx(phi[row["other"]], abs=1e-6)
            assert row["count"] == together[latent, row["other"]]


def test_cofiring_of_many_latents_equals_products():
    # more crowded rows than a group of words has bits, and latents in several blocks
    random = np.random.default_rng(0)
    crowd = np.where(np.arange(400) % 2, 0.2, 0.005)[:, None]
    acts = (random.random((400, 2500)) < crowd).astype(np.float32)
    number = np.arange(400)
    texts = Texts(
        np.zeros((1, 400), np.int32), number[None], np.zeros((1, 400), np.int32), np.ones((1, 400), bool)
    )
    found = gather(texts, acts).cofiring
    together = acts.T @ acts
    assert np.array_equal(found["count"], together[found["latent"], found["other"]])
    assert len(found["count"]) > 20_000


def _correlation(a, b):
    return (
        0.0
        if a.std() == 0 or b.std() == 0
        else float(np.mean((a - a.mean()) * (b - b.mean())) / a.std() / b.std())
    )


def test_firings_are_in_the_order_of_latents_and_rows():
    acts = np.array([[0, 2, 0], [1, 3, 0], [0, 4, 0]], np.float32)
    keep = np.ones((1, 3), bool)
    texts = Texts(
        np.zeros((1, 3), np.int32), np.zeros((1, 3), np.int64), np.arange(3, dtype=np.int32)[None], keep
    )
    firings = gather(texts, acts).firings
    assert firings.starts.tolist() == [0, 1, 4, 4]
    assert firings.latent(1)[0].tolist() == [0, 1, 2] and firings.latent(1)[1].tolist() == [2, 3, 4]
    assert len(firings.latent(2)[0]) == 0


@given(st.integers(0, 2**20), st.integers(0, 2**62), st.integers(-1, 2**30))
@settings(max_examples=50, deadline=None)
def test_the_scrambler_gives_the_same_numbers_in_machine_code(latent, document, position):
    # as 64 bits, a position of -1 is the largest word
    assert int(scramble(latent, document, position)) == plain_scramble(latent, document, position & WORD)


def test_bands_are_fifths_of_the_range_above_the_threshold():
    edges = band_edges(np.array([6.0, 5.0, 0.0], np.float32), np.array([1.0, 0.0, 7.0], np.float32))
    assert edges[0].tolist() == [5, 4, 3, 2, 1] and edges[1].tolist() == [4, 3, 2, 1, 0]
    assert edges[2].tolist() == [0] * 5


@pytest.mark.parametrize(
    "value", [1e-9, 2.0**-16, 0.75, 1.0, math.nextafter(1.125, 0), 1.125, 583.2, 2.0**24, 3e38]
)
def test_bins_hold_what_lies_between_their_edges(value):
    edges, place = histogram_edges(), int(histogram_bin(np.array([value], np.float32))[0])
    clipped = min(max(float(np.float32(value)), edges[0]), np.nextafter(edges[-1], 0))
    assert edges[place] <= clipped < edges[place + 1]
