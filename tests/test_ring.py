"""The shuffle ring: how often each row is served, in which order, and what it costs."""

import json
import logging
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activations.blocks import Cursor
from activations.harvest import RowBatch, RowMap
from activations.positions import RingPosition
from activations.ring import RunningStatistics, ShuffleRing, ring_bytes, ring_rows, rows_for_memory
from sae.errors import UserError

WIDTHS = {"blocks.0.hook_resid_post": 3, "blocks.1.attn.hook_z": 5}
NARROW, WIDE = WIDTHS
START = Cursor()


def source(n, chunks=(7,), dtype=torch.float32, begin=START):
    """Row i holds i in every column (plus 1000 at the second site); batches have `chunks` rows in turn."""
    start, turn = begin.kept, begin.document
    while start < n:
        size = min(chunks[turn % len(chunks)], n - start)
        ids = torch.arange(start, start + size)
        yield RowBatch(
            rows={
                site: (ids[:, None] + 1000 * place).expand(-1, width).to(dtype)
                for place, (site, width) in enumerate(WIDTHS.items())
            },
            map=RowMap(*(ids.int(),) * 3),
            begin=Cursor(kept=start, document=turn),
        )
        start, turn = start + size, turn + 1


def ring(n, *, chunks=(7,), dtype=torch.float32, harvested=None, **options):
    def rows(begin):
        for batch in source(n, chunks, dtype, begin):
            if harvested is not None:
                harvested.append((batch.begin.kept, len(batch)))
            yield batch

    sizes = {"rows": 24, "batch": 4, "passes": 3, "seed": 0}
    return ShuffleRing(rows, WIDTHS, dtype=dtype, **{**sizes, **options})


def serve(it):
    return [{site: batch[site] for site in batch} for batch in it]


@settings(max_examples=60)
@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 4), st.integers(1, 60), st.integers(0, 9))
def test_each_row_is_served_exactly_passes_times_up_to_less_than_a_batch(n, batch, passes, rows, seed):
    if ring_rows(rows, batch=batch, passes=passes) == 0 or n < batch:
        with pytest.raises(UserError):
            serve(ring(n, rows=rows, batch=batch, passes=passes, seed=seed))
        return
    stock = ring(n, rows=rows, batch=batch, passes=passes, seed=seed)
    batches = serve(stock)
    counts = Counter(int(i) for b in batches for i in b[NARROW][:, 0])
    missing = n * passes - sum(counts.values())
    assert 0 <= missing == stock.rows_left_over < batch
    assert max(counts.values()) <= passes
    assert sum(passes - counts[i] for i in range(n)) == missing
    assert stock.rows_harvested == n
    assert stock.rows_served == len(batches) * batch == n * passes - missing


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_batches_do_not_depend_on_how_the_rows_arrive(chunks):
    one, other = ring(130, chunks=tuple(chunks), seed=5), ring(130, chunks=(130,), seed=5)
    first, second = serve(one), serve(other)
    assert len(first) == len(second)
    assert all(torch.equal(a[site], b[site]) for a, b in zip(first, second, strict=True) for site in WIDTHS)
    for site in WIDTHS:
        assert torch.equal(one.statistics[site].mean, other.statistics[site].mean)
        assert one.statistics[site].scale == other.statistics[site].scale


def test_the_order_follows_the_seed():
    same = zip(serve(ring(130, seed=1)), serve(ring(130, seed=1)), strict=True)
    assert all(torch.equal(a[NARROW], b[NARROW]) for a, b in same)
    assert not torch.equal(serve(ring(130, seed=1))[0][NARROW], serve(ring(130, seed=2))[0][NARROW])


def test_sites_stay_aligned_and_keep_their_widths():
    for batch in serve(ring(100)):
        assert batch[NARROW].shape == (4, 3)
        assert batch[WIDE].shape == (4, 5)
        assert torch.equal(batch[NARROW][:, 0] + 1000, batch[WIDE][:, 0])


def test_batches_mix_the_generations_and_the_stock_is_bounded():
    rows, batch, passes = 1200, 100, 3
    batches = serve(ring(4000, rows=rows, batch=batch, passes=passes, chunks=(64,)))
    generations = [set((b[NARROW][:, 0] // 400).int().tolist()) for b in batches]
    # round r serves generations r-2 to r: 4 batches, then 8, then 12 in each full round
    assert generations[:4] == [{0}] * 4
    assert generations[4:12] == [{0, 1}] * 8
    for round_ in range(8):
        assert generations[12 + 12 * round_ : 24 + 12 * round_] == [{round_, round_ + 1, round_ + 2}] * 12
    assert generations[-4:] == [{9}] * 4


def test_rows_are_harvested_only_as_they_are_needed():
    stock = ring(1000, rows=24, batch=4, passes=3, chunks=(8,))
    batches = iter(stock)
    next(batches)
    assert stock.rows_harvested == 8
    for _ in range(2):
        next(batches)
    assert stock.rows_harvested == 16


def test_memory_is_what_was_planned():
    stock = ring(100, rows=30, dtype=torch.bfloat16)
    planned = ring_bytes(WIDTHS, dtype=torch.bfloat16, rows=30, batch=4, passes=3)
    assert stock.rows == 24
    assert stock.bytes == planned == 24 * (3 + 5) * 2
    fitting = rows_for_memory(planned + 191, WIDTHS, dtype=torch.bfloat16, batch=4, passes=3)
    assert fitting == 24
    pointers = [buffer.data_ptr() for buffer in stock._buffers.values()]
    serve(stock)
    assert [buffer.data_ptr() for buffer in stock._buffers.values()] == pointers


def test_batches_keep_the_dtype_and_are_fresh():
    stock = iter(ring(100, dtype=torch.bfloat16))
    batch = next(stock)
    before = batch[WIDE]
    assert before.dtype == torch.bfloat16
    before.zero_()
    assert batch[WIDE].any()


def test_a_batch_read_too_late_is_refused():
    batches = iter(ring(100))
    stale = next(batches)
    for _ in range(4):
        next(batches)
    with pytest.raises(RuntimeError, match="replaced"):
        stale[WIDE]


def test_statistics_are_those_of_the_first_generation_and_come_before_the_batches():
    torch.manual_seed(0)
    rows = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor(
        [400.0, -3, 0]
    )
    batch = RowBatch(rows={"a": rows.float()}, map=RowMap(*(torch.zeros(200, dtype=torch.int32),) * 3))
    stock = ShuffleRing(
        lambda _: iter([batch]), {"a": 3}, dtype=torch.float32, rows=120, batch=10, passes=2, seed=0
    )
    got = stock.statistics["a"]
    first = rows.float().double()[:60]
    assert got.n == 60
    torch.testing.assert_close(got.mean.double(), first.mean(0), rtol=1e-6, atol=1e-6)
    expected = (first - first.mean(0)).square().sum(1).mean().sqrt()
    assert got.scale == pytest.approx(float(expected), rel=1e-6)
    assert len(serve(stock)) == 40


def test_running_statistics_are_careful():
    torch.manual_seed(0)
    # mean 3,000 times the spread, as in the residual streams of some models
    rows = (torch.randn(30_000, 8, dtype=torch.float64) + 3000).float()
    running = RunningStatistics(8)
    for chunk in rows.split(777):
        running.update(chunk)
    got, exact = running.result(), rows.double()
    torch.testing.assert_close(got.mean.double(), exact.mean(0), rtol=1e-7, atol=0)
    assert got.scale == pytest.approx(float((exact - exact.mean(0)).square().sum(1).mean().sqrt()), rel=1e-4)
    assert got.n == 30_000


def test_left_over_rows_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="activations.ring"):
        serve(ring(9, rows=4, batch=4, passes=1))
    assert "1 of 9 servings left over" in caplog.text


def test_too_little_of_anything_is_an_error_with_numbers():
    with pytest.raises(UserError, match=r"batch of 4 rows.*3 rows in all"):
        serve(ring(3))
    with pytest.raises(UserError, match=r"batch of 4 rows.*0 rows in all"):
        _ = ring(0).statistics
    with pytest.raises(UserError, match=r"3 x 4 = 12 rows.*11 rows"):
        ring(100, rows=11)
    with pytest.raises(UserError, match=r"192 B.*191 B"):
        rows_for_memory(191, WIDTHS, dtype=torch.bfloat16, batch=4, passes=3)
    with pytest.raises(UserError, match="passes"):
        ring(100, passes=0)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 60),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.lists(st.integers(0, 60), min_size=1, max_size=3),
)
def test_a_ring_resumed_after_any_batch_serves_what_would_have_come(n, batch, passes, rows, chunks, stops):
    options = {"batch": batch, "passes": passes, "rows": rows, "chunks": tuple(chunks)}
    if ring_rows(rows, batch=batch, passes=passes) == 0 or n < batch:
        return
    whole = serve(ring(n, **options))
    got, position, harvested = [], None, []
    for stop in [*stops, None]:
        harvested = []
        stock = ring(n, resume=position, harvested=harvested, **options)
        for served, made in enumerate(stock, 1):
            got.append({site: made[site] for site in made})
            if served == 1 and position is not None:
                # what was read before the stop and again: the stock, in whole batches of the source
                again = sum(size for first, size in harvested if first < position_row(position))
                assert again < stock.rows + 2 * max(chunks)
            if served == stop:
                break
        position = RingPosition.from_dict(json.loads(json.dumps(stock.position().to_dict())))
    assert len(got) == len(whole)
    assert all(torch.equal(a[site], b[site]) for a, b in zip(got, whole, strict=True) for site in WIDTHS)
    assert stock.rows_served == len(whole) * batch
    assert stock.rows_harvested == n


def position_row(position):
    """Number of the first row that the ring had not taken in."""
    last = position.generations[-1]
    return last.first + last.rows


def test_a_resume_harvests_only_what_is_still_to_be_served():
    stock = ring(1000, chunks=(8,))
    batches = iter(stock)
    for _ in range(2 + 4 + 6 + 6 + 3):
        next(batches)
    harvested = []
    next(iter(ring(1000, chunks=(8,), resume=stock.position(), harvested=harvested)))
    # the fifth round serves rows 16 to 39
    assert harvested == [(16, 8), (24, 8), (32, 8)]


def test_a_failed_harvest_leaves_the_position_behind_the_last_batch():
    """The source ends in an error in the middle of a generation; the rows that it gave are not counted."""
    whole = serve(ring(200, rows=60, batch=4, passes=3, chunks=(3,)))

    def breaking(begin):
        for rows in source(200, (3,), begin=begin):
            if rows.begin.kept > 70:
                raise OSError("gone")
            yield rows

    stock = ShuffleRing(breaking, WIDTHS, dtype=torch.float32, rows=60, batch=4, passes=3, seed=0)
    got = []
    with pytest.raises(OSError, match="gone"):
        got.extend({site: batch[site] for site in batch} for batch in stock)
    got += serve(ring(200, rows=60, batch=4, passes=3, chunks=(3,), resume=stock.position()))
    assert len(got) == len(whole)
    assert all(torch.equal(a[NARROW], b[NARROW]) for a, b in zip(got, whole, strict=True))


def test_a_source_that_changed_is_noticed(caplog):
    stock = ring(100)
    next(iter(stock))
    position = stock.position()
    with pytest.raises(UserError, match=r"rows 0 to 8 again.*5 of 8 rows"):
        serve(ring(5, resume=position))

    def other(begin, tokens=0, values=0.0):
        for rows in source(100, begin=begin):
            changed = RowMap(rows.map.document, rows.map.position, rows.map.token + tokens)
            parts = {site: part + values for site, part in rows.rows.items()}
            yield RowBatch(rows=parts, map=changed, begin=rows.begin)

    sizes = {"dtype": torch.float32, "rows": 24, "batch": 4, "passes": 3, "seed": 0, "resume": position}
    with pytest.raises(UserError, match="other tokens"):
        serve(ShuffleRing(lambda begin: other(begin, tokens=1), WIDTHS, **sizes))
    assert not caplog.records
    serve(ShuffleRing(lambda begin: other(begin, values=1e-6), WIDTHS, **sizes))
    assert "not bit for bit" in caplog.text


def test_another_shape_is_not_resumed():
    stock = ring(100)
    next(iter(stock))
    with pytest.raises(UserError, match=r"\(24, 4, 3, 0\).*\(12, 4, 3, 0\)"):
        ring(100, rows=12, resume=stock.position())
