"""A store that several ranks write together: the files of one, whatever their number and whoever fails."""

import dataclasses
import itertools

import pytest
from cli_fakes import make_inputs
from fake_ranks import on_ranks
from hypothesis import given
from hypothesis import strategies as some
from store_rows import FACTS, all_rows, assert_same, files, whole, write
from store_rows import source as whole_source

from activations.harvest import RowBatch
from activations.ranks import RankLost
from activations.spans import Spans
from activations.store import open_store
from sae.errors import UserError
from train.cli import work
from train.cli.options import HarvestOptions

# a batch of 17 rows is about half a shard of 30, and less than what the plan takes it for
SMALL = dataclasses.replace(FACTS, context=2, model_batch=1)


def source(n=100, size=17, made=None, fail_at=None):
    """The rows of `store_rows.source`, of the batches that are wanted alone; notes in `made` which."""

    def batches(start, wanted):
        for batch in whole_source(n, size)(start):
            if fail_at is not None and batch.begin.kept >= fail_at:
                raise UserError("the text must last", "it does not", "give more")
            if not wanted(batch.begin.kept, len(batch)):
                batch = RowBatch({}, batch.map, batch.begin)
            elif made is not None:
                made.append(batch.begin.kept)
            yield batch

    return batches


def write_by(world, folder, rows=400, facts=SMALL, **options):
    """What each of `world` ranks gets from writing a store together."""
    given = {"source": source(rows), "wanted_rows": rows} | options
    return on_ranks(world, lambda ranks: write(folder, rows, facts, ranks=ranks, **given))


@given(
    first=some.integers(0, 50),
    more=some.integers(1, 500),
    shard_rows=some.integers(1, 60),
    batch_rows=some.integers(1, 40),
    world=some.integers(1, 9),
)
def test_spans_divide_the_rows_at_the_ends_of_shards(first, more, shard_rows, batch_rows, world):
    wanted = first + more
    spans = Spans.plan(first, wanted, shard_rows=shard_rows, batch_rows=batch_rows, world=world)
    owner = [spans.span_of(row) % world for row in range(first, wanted)]
    for row in range(first, wanted):
        begin = first + (row - first) // shard_rows * shard_rows
        assert spans.end_of_shard(row) == min(wanted, begin + shard_rows)
        assert owner[row - first] == owner[begin - first]
        assert row < spans.end_of_span(spans.span_of(row)) <= wanted
    lengths = [end - begin for begin, end in itertools.pairwise(spans.bounds)]
    assert max(lengths) <= 1 + min(lengths) and owner[0] == 0
    for row in range(first, wanted, 7):
        count = min(13, wanted - row)
        here = set(owner[row - first : row - first + count])
        assert here == {rank for rank in range(world) if spans.touches(rank, row, count)}
    assert spans.turns_of(wanted) * world == len(spans.bounds) - 1 and spans.turns_of(first) == 0


@pytest.mark.parametrize("dtype", ["auto", "int8"])
@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_write_the_files_of_one(tmp_path, world, dtype):
    write(tmp_path / "one", 400, SMALL, dtype=dtype)
    stores = write_by(world, tmp_path / "many", dtype=dtype)
    write(tmp_path / "small", 20, SMALL, dtype=dtype)
    write_by(world, tmp_path / "small of many", 20, dtype=dtype)
    assert files(tmp_path / "small of many") == files(tmp_path / "small")
    assert all((store.rows, store.complete) == (400, True) for store in stores)
    assert files(tmp_path / "many") == files(tmp_path / "one")
    if dtype == "auto":
        assert_same(whole(stores[0].iter_rows()), all_rows(400))


def test_a_batch_is_made_twice_only_at_the_edge_of_spans(tmp_path):
    made = []
    write_by(2, tmp_path / "s", source=source(400, 7, made))
    spans = Spans.plan(0, 400, shard_rows=30, batch_rows=2, world=2)
    assert len(made) > len(set(made)) and len(made) - len(set(made)) <= len(spans.bounds) - 2


@pytest.mark.parametrize("rows", [3, 31, 61, 230, 390])
def test_a_text_that_ends_early_ends_it_for_all(tmp_path, rows):
    write(tmp_path / "one", rows, SMALL, wanted_rows=400, dtype="int8")
    for world in (2, 3):
        stores = write_by(world, tmp_path / str(world), rows, wanted_rows=400, dtype="int8")
        assert [(store.rows, store.manifest["corpus_ended"]) for store in stores] == [(rows, True)] * world
        assert files(tmp_path / str(world)) == files(tmp_path / "one")


@pytest.mark.parametrize("at", [40, 200, 390])
def test_a_harvest_that_failed_goes_on_with_another_number_of_ranks(tmp_path, at):
    write(tmp_path / "one", 400, SMALL, dtype="int8")
    failed = write_by(3, tmp_path / "s", source=source(400, fail_at=at), dtype="int8")
    assert all(isinstance(error, UserError) for error in failed)
    before = open_store(tmp_path / "s")
    assert before.verify() == {} and not before.complete
    write_by(2, tmp_path / "s", source=source(400, fail_at=380), dtype="int8")
    write_by(4, tmp_path / "s", dtype="int8")
    assert files(tmp_path / "s") == files(tmp_path / "one")


def test_rows_are_added_to_a_store_and_enough_are_left_alone(tmp_path):
    for world, folder in ((1, "one"), (3, "many")):
        for rows in (100, 333):
            write_by(world, tmp_path / folder, rows, source=source(400))
    assert files(tmp_path / "many") == files(tmp_path / "one")
    before = open_store(tmp_path / "many").manifest["writer"]
    again = write_by(2, tmp_path / "many", 333, source=lambda start, wanted: pytest.fail("harvested"))
    assert [store.rows for store in again] == [333, 333]
    assert open_store(tmp_path / "many").manifest["writer"] == before


def test_one_rank_that_fails_stops_all_and_the_manifest_lists_whole_shards(tmp_path):
    def work(ranks):
        at = 250 if ranks.rank == 1 else None
        return write(tmp_path / "s", 400, SMALL, source=source(400, fail_at=at), wanted_rows=400, ranks=ranks)

    failed = on_ranks(2, work)
    assert "it does not" in str(failed[1]) and isinstance(failed[0], RankLost), failed
    assert open_store(tmp_path / "s").verify() == {}
    write(tmp_path / "one", 400, SMALL)
    write_by(2, tmp_path / "s")
    assert files(tmp_path / "s") == files(tmp_path / "one")


def test_ranks_with_other_flags_or_places_are_refused(tmp_path):
    def differ(ranks, folder, **facts):
        facts = dataclasses.replace(SMALL, **facts)
        return write(folder, 400, facts, source=source(400), wanted_rows=400, ranks=ranks)

    found = on_ranks(2, lambda ranks: differ(ranks, tmp_path / "s", seed=ranks.rank))
    assert all("seed" in str(error) and "rank" in str(error) for error in found)
    found = on_ranks(2, lambda ranks: differ(ranks, tmp_path / str(ranks.rank)))
    assert all(isinstance(error, UserError) and "store" in str(error) for error in found)
    assert not list(tmp_path.iterdir())


def test_a_rank_that_sees_another_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("activations.committer._SEEN_SECONDS", 0.3)

    def work(ranks):
        # the same words, and another place behind them
        url = f"memory://{ranks.rank}"
        monkeypatch.setattr(type(ranks), "agree", lambda *_: None)
        return write(url, 400, SMALL, source=source(400), wanted_rows=400, ranks=ranks)

    found = on_ranks(2, work)
    assert "every rank must reach the same store" in str(found[1])


def test_no_rows_make_no_store(tmp_path):
    found = write_by(2, tmp_path / "s", 400, source=source(0))
    assert all("hold rows" in str(error) for error in found)


def test_ranks_that_a_machine_cannot_hold_are_refused_before_one_loads(tmp_path, monkeypatch):
    inputs = make_inputs(tmp_path)
    options = HarvestOptions(
        model=inputs[1], corpus=inputs[3], context=16, tokens=1000, device="cpu", out=str(tmp_path / "s")
    )
    monkeypatch.setattr(work, "load_model", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("train.room.own_private_memory", lambda: 0)
    # room for one and a half
    monkeypatch.setattr("train.room.free_memory", lambda: 2**30)
    found = on_ranks(2, lambda ranks: work.harvest(options, ranks))
    for error in found:
        assert "memory planned for the 2 ranks on" in str(error) and "--model-batch" in str(error), error
        assert "--buffer" not in str(error)
