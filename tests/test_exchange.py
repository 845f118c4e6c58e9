"""Rows traded between ranks: what an owner sees is what one rank alone makes, to the bit."""

import math
import threading
import time

import pytest
import torch
from fake_ranks import on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.blocks import Cursor, TokenBlocks
from activations.exchange import (
    Ahead,
    Ownership,
    RefusedByAll,
    SharedTokens,
    Spent,
    exchange_bytes,
    exchanged_rows,
    owners,
)
from activations.harvest import RowBatch, RowMap, harvest_rows
from sae.errors import UserError

WIDTHS = {"a": 3, "b": 8, "c": 3, "d": 5}
CONTEXT = 6


class Model:
    """Activations that depend on the tokens and the site; NaN where the token is `poison`."""

    def __init__(self, dtype=torch.float32, poison=-1):
        self.device, self.dtype, self.poison = torch.device("cpu"), dtype, poison
        self.seen = 0

    def activations(self, tokens, sites):
        self.seen += 1
        found = {}
        for place, (site, width) in enumerate(WIDTHS.items()):
            x = (tokens[..., None] * (place + 2) + torch.arange(width)).float().sin()
            found[site] = torch.where((tokens == self.poison)[..., None] & (site == "c"), math.nan, x).to(
                self.dtype
            )
        return {site: found[site] for site in sites}


def blocks(n):
    """`n` batches of two blocks; every fourth keeps nothing, the others from 1 token up."""
    for number in range(n):
        g = torch.Generator().manual_seed(number)
        tokens = (torch.arange(2 * CONTEXT) + 100 * number).view(2, CONTEXT).int()
        keep = (torch.rand(2, CONTEXT, generator=g) < 0.6) & (number % 4 != 3)
        keep[0, 0] = number % 4 != 3
        yield TokenBlocks(
            tokens=tokens, document=tokens // 7, position=tokens % 7, keep=keep, begin=Cursor(kept=number)
        )


def plan(world, dtype=torch.float32):
    return Ownership(
        owner=owners({site: float(w) for site, w in WIDTHS.items()}, world), widths=WIDTHS, dtype=dtype
    )


def assert_same(mine, alone, sites):
    assert len(mine) == len(alone)
    for one, other in zip(mine, alone, strict=True):
        assert list(one.rows) == list(sites) and one.begin == other.begin
        for column in ("document", "position", "token"):
            assert torch.equal(getattr(one.map, column), getattr(other.map, column))
        for site in sites:
            assert one.rows[site].dtype == other.rows[site].dtype
            assert torch.equal(one.rows[site], other.rows[site])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 8))
def test_sites_are_divided_by_cost(costs, world):
    named = {f"site{i}": float(cost) for i, cost in enumerate(costs)}
    found = owners(named, world)
    assert list(found) == list(named) and set(found.values()) <= set(range(world))
    load = [sum(named[site] for site in named if found[site] == rank) for rank in range(world)]
    assert max(load) - min(load) <= max(costs)
    assert sum(1 for n in load if n) == min(world, len(costs))
    # equal sites fall in turn
    assert owners(dict.fromkeys("abcde", 1.0), 2) == {"a": 0, "b": 1, "c": 0, "d": 1, "e": 0}


@given(st.lists(st.text(max_size=9), max_size=30), st.integers(1, 4))
@settings(max_examples=20)
def test_texts_are_tokenised_once_by_one_rank_each(texts, world):
    asked = [[] for _ in range(world)]

    def work(ranks):
        def encode(text):
            asked[ranks.rank].append(text)
            return [ord(letter) for letter in text]

        many = SharedTokens(ranks, encode)
        assert many.at_once == 16 * world
        return [tokens.tolist() for tokens in many.encode_all(texts)]

    assert on_ranks(world, work) == [[[ord(letter) for letter in text] for text in texts]] * world
    assert asked == [texts[rank::world] for rank in range(world)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_an_owner_sees_the_rows_of_one_rank_alone(world, dtype):
    alone = list(harvest_rows(Model(dtype), blocks(11), list(WIDTHS)))
    models = [Model(dtype) for _ in range(world)]
    found = on_ranks(
        world,
        lambda ranks: list(exchanged_rows(ranks, models[ranks.rank], blocks(11), plan(world, dtype))),
    )
    for rank in range(world):
        assert_same(found[rank], alone, plan(world).sites(rank))
    # each batch went through the model once, on one rank, and no rank had more than a batch above another
    seen = [model.seen for model in models]
    assert sum(seen) == 9 and max(seen) <= 11 // world + 1
    assert sum(len(plan(world).sites(rank)) for rank in range(world)) == len(WIDTHS)


def test_rows_that_are_not_finite_are_refused_by_all_behind_the_same_row():
    def work(ranks):
        got, model = [], Model(poison=500)  # in batch 5, which is rank 2's
        try:
            got.extend(batch.begin.kept for batch in exchanged_rows(ranks, model, blocks(9), plan(3)))
        except UserError as error:
            return got, type(error), str(error)

    got, kind, said = on_ranks(3, work)[0]
    assert on_ranks(3, work) == [(got, kind, said)] * 3
    assert got == [0, 1, 2] and kind is RefusedByAll
    assert "the activations at c must be finite" in said and "on rank 2" in said


def test_all_stop_behind_the_same_row_when_one_stops():
    turns = [0, 0, 0]

    def work(ranks):
        def stopped():
            turns[ranks.rank] += 1
            return ranks.rank == 1 and turns[1] > 2

        return [
            batch.begin.kept for batch in exchanged_rows(ranks, Model(), blocks(40), plan(3), stopped=stopped)
        ]

    assert on_ranks(3, work) == [[0, 1, 2, 4, 5]] * 3


def batches(n, rows=10):
    for number in range(n):
        yield RowBatch({}, RowMap(*(torch.zeros(rows, dtype=torch.int32),) * 3), Cursor(kept=number * rows))


def test_rows_are_made_ahead_and_no_further():
    made = []

    def make(stopped):
        for batch in batches(30):
            made.append(batch.begin.kept)
            yield batch

    spent = Spent()
    ahead = Ahead(make, 40, spent=spent)
    deadline = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 5  # four in store, the fifth at the door
    assert [batch.begin.kept for batch in ahead] == [10 * n for n in range(30)]
    assert next(ahead, None) is None
    assert spent.take()["wait"] >= 0 and spent.take() == {}


def test_the_thread_has_the_threads_of_who_made_it():
    found, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(Ahead(lambda stopped: found.append(torch.get_num_threads()) or batches(0), 1))
    finally:
        torch.set_num_threads(before)
    assert found == [2]


def test_closing_ends_the_thread_and_failures_come_at_once_or_in_their_place():
    def endless(stopped):
        while not stopped():
            yield from batches(1)

    ahead = Ahead(endless, 20)
    next(ahead)
    ahead.close()
    assert threading.active_count() == len([t for t in threading.enumerate() if "harvest" not in t.name])

    def failing(error):
        def make(stopped):
            yield from batches(2)
            raise error

        ahead = Ahead(make, 1000)
        ahead._thread.join()
        return ahead

    with pytest.raises(MemoryError):
        failing(MemoryError()).check()
    together = failing(RefusedByAll("a", "b", "c"))
    together.check()
    assert [next(together).begin.kept, next(together).begin.kept] == [0, 10]
    with pytest.raises(RefusedByAll):
        next(together)


def test_who_waits_gives_signs_of_life():
    class Lost(Exception):
        pass

    beats, spent, release = [], Spent(), threading.Event()

    def beat(moving):
        beats.append(moving)
        spent.waiting = len(beats) == 2
        if len(beats) == 4:
            raise Lost

    def make(stopped):
        spent.add("model", 0.0)
        release.wait()
        yield from batches(1)

    ahead = Ahead(make, 10, beat=beat, spent=spent)
    with pytest.raises(Lost):
        next(ahead)
    # made something, does not get on, waits for others, does not get on
    assert beats == [True, False, True, False]
    release.set()


def test_the_bytes_planned_are_those_that_cross():
    """Per token: every site's row but those that stay where they were made."""
    crossed = []

    def work(ranks):
        class Counting:
            rank, world = ranks.rank, ranks.world

            def swap(self, parts):
                crossed.append(sum(part.nbytes for other, part in enumerate(parts) if other != ranks.rank))
                return ranks.swap(parts)

        return list(exchanged_rows(Counting(), Model(), blocks(9), plan(3)))

    rows = sum(len(batch) for batch in on_ranks(3, work)[0])
    own = [sum(plan(3).sites(rank).values()) for rank in range(3)]
    per_row = sum(WIDTHS.values()) * 4 * 2 / 3
    assert sum(own) == sum(WIDTHS.values())
    # heads and paddings aside, of which there are 9 batches to two ranks each
    assert sum(crossed) == pytest.approx(rows * per_row, rel=0.25, abs=9 * 2 * 32)
    most = exchange_bytes(plan(3), 0, world=3, model_batch=2, context=CONTEXT, ahead=100)
    assert most > 100 * own[0] * 4
