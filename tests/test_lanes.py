"""Sixteen products at a time, by both ways of multiplying, against plain numpy."""

import types

import numba
import numpy as np
import pytest
import torch

from sae.kernels import lanes
from sae.kernels.int8 import int8_is_fast
from sae.kernels.lanes import (
    BLOCK,
    LANES,
    OFFSET,
    Blocks,
    list_beyond,
    list_over,
    multiply,
    narrow_beyond,
    narrow_over,
    packed,
    put_in_bins,
    room_for_lanes,
)  # fmt: skip

D, ROWS, COLUMNS = 3 * BLOCK, 40, 3 * LANES


def compiled():
    """All of them as a loop calls them, compiled anew."""

    @numba.njit
    def multiplies(begin, end, block, blocks, sums, packed, first):
        multiply(begin, end, block, blocks, sums, packed, first)

    @numba.njit
    def lists_beyond(
        rows, begin, end, masks, block, blocks, sums, packed, first, scale, spread, limits, cubes
    ):  # fmt: skip
        return list_beyond(
            rows, begin, end, masks, block, blocks, sums, packed, first, scale, spread, limits, cubes
        )

    @numba.njit
    def narrows_beyond(rows, n, masks, block, blocks, sums, packed, first, scale, spread, limits, exact):
        return narrow_beyond(rows, n, masks, block, blocks, sums, packed, first, scale, spread, limits, exact)

    @numba.njit
    def lists_over(
        rows, begin, end, masks, block, heads, sums, packed, first, tails, columns, of_rows, values
    ):  # fmt: skip
        return list_over(
            rows, begin, end, masks, block, heads, sums, packed, first, tails, columns, of_rows, values
        )

    @numba.njit
    def narrows_over(rows, n, masks, block, tails, sums, first, columns, of_rows, values):
        return narrow_over(rows, n, masks, block, tails, sums, first, columns, of_rows, values)

    @numba.njit
    def puts_in_bins(begin, end, sums, first, scale, per_bin, n_bins, bins, place, column):
        put_in_bins(begin, end, sums, first, scale, per_bin, n_bins, bins, place, column)

    return types.SimpleNamespace(
        multiply=multiplies,
        list_beyond=lists_beyond,
        narrow_beyond=narrows_beyond,
        list_over=lists_over,
        narrow_over=narrows_over,
        put_in_bins=puts_in_bins,
    )


@pytest.fixture(scope="module", params=["vnni", "parts"])
def loops(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "parts":
            patch.setattr(lanes, "_has_vnni", lambda context: False)
        made = compiled()
        Case().narrow(made)
        # the processor's own instruction or none
        there = "vpdpbusd" in "".join(made.narrow_beyond.inspect_llvm().values())
        # torch and numba ask the processor, each in its own way
        if request.param == "vnni" and not int8_is_fast(torch.device("cpu")):
            pytest.skip("this processor multiplies no bytes")
        assert there == (request.param == "vnni")
        yield made


class Case:
    """Numbers at random, and what must be made of them."""

    def __init__(self, seed=0, values=None, columns=None):
        rng = np.random.default_rng(seed)
        values = rng.integers(-127, 128, (ROWS, D)) if values is None else values
        columns = rng.integers(-127, 128, (COLUMNS, D)) if columns is None else columns
        self.values, self.columns = values.astype(np.int8), columns.astype(np.int8)
        start = -OFFSET * self.values.reshape(ROWS, -1, BLOCK).sum(2, dtype=np.int32)
        reach = (100 * rng.random((ROWS, 4))).astype(np.float32)
        self.blocks, self.packed = Blocks(self.values, start, reach), packed(self.columns)
        self.scale = (0.5 + rng.random(COLUMNS)).astype(np.float32)
        self.spread = (100 * rng.random((4, COLUMNS))).astype(np.float32)
        self.limits = np.zeros((2, 2, ROWS), np.float32)
        self.listed = np.sort(rng.permutation(ROWS)[: ROWS - 9])
        self.rows = np.full(ROWS, -7)
        self.n, self.masks = len(self.listed), np.zeros(ROWS, np.uint64)
        self.rows[: self.n] = self.listed
        self.sums = rng.integers(-(10**5), 10**5, (ROWS, LANES)).astype(np.int32)
        self.before = self.sums.copy()
        # what a head and its margin came to, for the tails behind it
        self.head = (1e5 * rng.standard_normal((ROWS, LANES))).astype(np.float32)
        some = lambda low, n: (low + rng.random(n)).astype(np.float32)  # noqa: E731
        # a scale, a norm or margin, the tail's, and a bound
        self.of_columns = [some(0.5, COLUMNS), some(0, COLUMNS) * 9, some(0.5, COLUMNS), some(0, COLUMNS) * 9]
        self.of_columns.append((2e4 * rng.standard_normal(COLUMNS)).astype(np.float32))
        self.of_rows = [some(0.5, ROWS), some(0, ROWS) * 1e3, some(0.5, ROWS), some(0, ROWS) * 1e3]

    def limit(self, block=1, place=2):
        """Some rows are beyond their limits, some beyond the exact ones alone, and some are not."""
        sums, here = self.sums_with(block, place)
        rest = self.blocks.reach[:, block + 1, None] * self.spread[block + 1, here]
        scores, rng = sums * self.scale[here], np.random.default_rng(block)
        ends = np.stack([(scores + rest).max(1), (scores - rest).min(1)])
        self.limits[0] = ends * rng.choice([0.9, 1.1, 1.3, 1.3], ends.shape)
        self.limits[1] = 0.85 * self.limits[0]
        return self

    def multiply(self, loops, begin, end, block=1, place=2):
        loops.multiply(begin, end, block, self.blocks, self.sums, self.packed, place * LANES)

    def list(self, loops, begin, end, cubes, block=1, place=2):
        """How many rows may be beyond a limit."""
        return loops.list_beyond(
            self.rows, begin, end, self.masks, block, self.blocks, self.sums, self.packed, place * LANES,
            self.scale, self.spread, self.limits, cubes,
        )  # fmt: skip

    def narrow(self, loops, block=1, place=2, exact=0):
        """How many rows are left of `rows`."""
        return loops.narrow_beyond(
            self.rows, self.n, self.masks, block, self.blocks, self.sums, self.packed, place * LANES,
            self.scale, self.spread, self.limits, exact,
        )  # fmt: skip

    def list_over(self, loops, begin, end, tails, block=1, place=2):
        return loops.list_over(
            self.rows, begin, end, self.masks, block, self.blocks, self.sums, self.packed, place * LANES,
            tails, self.given(), tuple(self.of_rows), self.head,
        )  # fmt: skip

    def narrow_over(self, loops, block=1, place=2):
        return loops.narrow_over(
            self.rows, self.n, self.masks, block, self.blocks, self.sums, place * LANES, self.given(),
            tuple(self.of_rows), self.head,
        )  # fmt: skip

    def given(self):
        return (*self.of_columns, self.packed, self.spread)

    def sums_with(self, block, place):
        """With a block, and where it is the first without what was there."""
        some, here = slice(block * BLOCK, (block + 1) * BLOCK), slice(place * LANES, (place + 1) * LANES)
        products = self.values[:, some].astype(np.int64) @ self.columns[here, some].T.astype(np.int64)
        return (self.before if block else 0) + products, here

    def expected(self, listed, block=1, place=2, exact=0):
        """Rows, masks, and the sums of all rows."""
        sums, here = self.sums_with(block, place)
        return *self.left(self.bits(sums, here, block + 1, exact), listed), sums

    def expected_over(self, block=1, place=2):
        sums, here = self.sums_with(block, place)
        tail_scale, row_tail_scale = self.of_columns[2][here], self.of_rows[2][:, None]
        value = self.head + sums * (tail_scale * row_tail_scale).astype(np.float64)
        return *self.left(self.over(value, self.blocks.reach, here, block + 1), self.listed), sums

    def left(self, bits, listed):
        rows = [r for r in listed if bits[r]]
        return rows, bits[rows]

    def bits(self, sums, here, edge, exact):
        """A bit for each column beyond a limit."""
        scores = sums.astype(np.float32) * self.scale[here]
        rest = self.blocks.reach[:, edge, None] * self.spread[edge, here]
        above, below = self.limits[exact, :, :, None]
        return as_bits((scores + rest > above) | (scores - rest < below))

    def over(self, value, reach, here, edge):
        return as_bits(value + reach[:, edge, None] * self.spread[edge, here] > 0)


def as_bits(marked):
    return (marked * 2 ** np.arange(LANES)).sum(1).astype(np.uint64)


def test_packed_columns_lie_four_coordinates_of_sixteen_side_by_side():
    columns = Case().columns
    found = packed(columns)
    assert found.shape == (3, 3, BLOCK // 4, LANES, 4) and found.flags.c_contiguous
    for column, coordinate in np.ndindex(columns.shape):
        block, quad, four = coordinate // BLOCK, coordinate % BLOCK // 4, coordinate % 4
        at = column // LANES, block, quad, column % LANES, four
        assert int(found[at]) == int(columns[column, coordinate]) + OFFSET


SPANS = pytest.mark.parametrize(("begin", "end"), [(0, ROWS), (5, 31), (7, 7)])
BLOCKS = pytest.mark.parametrize("block", [0, 1, 2])
PLACES = pytest.mark.parametrize("place", [0, 2])


@PLACES
@BLOCKS
@SPANS
def test_a_block_is_added_to_the_sums_of_a_span_of_rows(loops, begin, end, block, place):
    case = Case(seed=block)
    case.multiply(loops, begin, end, block, place)
    check_sums(case, case.sums_with(block, place)[0], np.arange(begin, end))


@PLACES
@BLOCKS
@SPANS
def test_rows_that_may_be_beyond_a_limit_are_listed(loops, begin, end, block, place):
    case, before = (
        Case(seed=block).limit(block, place),
        np.linspace(-1, 1, ROWS * LANES, dtype=np.float32).reshape(ROWS, LANES),
    )
    cubes, span = before * 1e15, range(begin, end)
    begun = cubes.copy()
    rows, masks, sums = case.expected(span, block, place)
    n = case.list(loops, begin, end, cubes, block, place)
    assert case.rows[:n].tolist() == rows and case.masks[:n].tolist() == masks.tolist()
    assert n == end - begin == 0 or 3 < n < end - begin
    check_sums(case, sums, np.array(span, int))
    here = slice(place * LANES, (place + 1) * LANES)
    begun[begin:end] += (sums.astype(np.float64) * case.scale[here])[begin:end] ** 3
    np.testing.assert_allclose(cubes, begun, rtol=1e-5, atol=1e9)


@PLACES
@BLOCKS
@SPANS
def test_rows_that_may_be_over_their_bounds_are_listed(loops, begin, end, block, place):
    case, tails, span = Case(seed=block), Case(seed=9).blocks, range(begin, end)
    before, (sums, here) = case.head.copy(), case.sums_with(block, place)
    scale, norm, _, tail_norm, bound = (array[here] for array in case.of_columns)
    row_scale, margin, _, tail_margin = (array[:, None] for array in case.of_rows)
    value = sums * scale.astype(np.float64) * row_scale + margin * norm + tail_margin * tail_norm
    bound += np.float32(np.median((value - bound).max(1)))
    value -= bound
    rows, masks = case.left(case.over(value, tails.reach, here, 0), span)
    n = case.list_over(loops, begin, end, tails, block, place)
    assert case.rows[:n].tolist() == rows and case.masks[:n].tolist() == masks.tolist()
    assert n == end - begin == 0 or 3 < n < end - begin
    check_sums(case, sums, np.array(span, int))
    before[begin:end] = value[begin:end]
    np.testing.assert_allclose(case.head, before, rtol=1e-5, atol=0.1)


@pytest.mark.parametrize("exact", [0, 1])
@PLACES
@BLOCKS
def test_a_block_leaves_the_rows_that_may_still_matter_in_their_order(loops, block, place, exact):
    case = Case(seed=block)
    expected = case.limit(block, place).expected(case.listed, block, place, exact)
    check(case, expected, case.narrow(loops, block, place, exact))


@PLACES
@BLOCKS
def test_a_block_leaves_the_rows_that_may_still_be_over(loops, block, place):
    case = Case(seed=block)
    tails = case.sums_with(block, place)[0] * (case.of_columns[2].mean() * case.of_rows[2][:, None])
    case.head -= np.float32(np.median((case.head + tails).max(1)))
    head = case.head.copy()
    check(case, case.expected_over(block, place), case.narrow_over(loops, block, place))
    assert (case.head == head).all()


def check(case, expected, left):
    rows, masks, sums = expected
    assert left == len(rows) and 3 < left < case.n
    assert case.rows[:left].tolist() == rows and case.masks[:left].tolist() == masks.tolist()
    check_sums(case, sums, case.listed)
    assert (case.rows[case.n :] == -7).all()


def check_sums(case, sums, rows):
    """Those of some rows are new, and nothing else is touched."""
    assert case.sums[rows].tolist() == sums[rows].tolist()
    untouched = np.setdiff1d(np.arange(ROWS), rows)
    assert (case.sums[untouched] == case.before[untouched]).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_blocks_are_measured_from_each_on(seed):
    case = Case(seed=seed)
    scale = np.linspace(0.1, 2, ROWS, dtype=np.float32)
    found = Blocks.of(case.values, scale)
    assert found.start.tolist() == case.blocks.start.tolist()
    squares = case.values.astype(np.float64) ** 2
    for edge in range(4):
        exact = np.sqrt(squares[:, edge * BLOCK :].sum(1)) * scale
        np.testing.assert_allclose(found.reach[:, edge], exact, rtol=2e-5)
        assert (found.reach[:, edge] >= exact).all()


def test_loose_limits_and_exact_ones_are_told_apart(loops):
    left = [Case().limit().narrow(loops, exact=exact) for exact in (0, 1)]
    assert left[0] < left[1]


def test_limits_themselves_are_not_beyond(loops):
    case = Case()
    case.limits[:, 0], case.limits[:, 1] = np.inf, -np.inf
    case.blocks.reach[:], case.scale[:] = 0, 1
    _, _, sums = case.expected(case.listed)
    row = case.rows[3]
    case.limits[0, :, row] = sums[row].max(), sums[row].min()
    assert case.narrow(loops) == 0
    case = Case()
    case.limits[:, 0], case.limits[:, 1] = np.inf, -np.inf
    case.blocks.reach[:], case.scale[:] = 0, 1
    case.limits[0, :, row] = sums[row].max() - 1, sums[row].min() + 1
    assert case.narrow(loops) == 1 and case.rows[0] == row
    assert case.masks[0] == 2 ** int(sums[row].argmax()) + 2 ** int(sums[row].argmin())


def test_no_rows_leave_none(loops):
    case = Case()
    case.n = 0
    assert case.narrow(loops) == 0 and (case.sums == case.before).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_block_after_block_gives_the_whole_product(loops, seed):
    case, cubes = Case(seed=seed), np.zeros((ROWS, LANES), np.float32)
    whole = case.values.astype(np.int64) @ case.columns[16:32].T.astype(np.int64)
    case.limits[:, 0], case.limits[:, 1] = -np.inf, np.inf
    case.multiply(loops, 0, ROWS, 0, 1)
    assert case.list(loops, 0, ROWS, cubes, 1, 1) == case.narrow(loops, 2, 1) + ROWS - case.n == ROWS
    listed = case.rows[: case.n]
    assert case.sums[listed].tolist() == whole[listed].tolist()


@pytest.mark.parametrize("left", [-127, 127])
@pytest.mark.parametrize("right", [-128, -127, 127])
def test_the_largest_bytes_neither_overflow_nor_saturate(loops, left, right):
    case = Case(values=np.full((ROWS, D), left), columns=np.full((COLUMNS, D), right))
    case.multiply(loops, 0, ROWS)
    assert (case.sums - case.before == BLOCK * left * right).all()


@pytest.mark.parametrize("n_bins", [5, 41])
@pytest.mark.parametrize(("begin", "end"), [(0, ROWS), (5, 31)])
def test_sums_are_put_in_bins_and_what_lies_beyond_in_the_last(loops, begin, end, n_bins):
    case, first, bins = Case(), 32, np.full((ROWS, 3, 64), 77, np.uint8)
    # powers of two, by which products are exact
    case.scale[:] = np.exp2(np.arange(COLUMNS) % 3 - 1)
    per_bin = np.exp2(-15 + np.arange(ROWS) % 4).astype(np.float32)
    loops.put_in_bins(begin, end, case.sums, first, case.scale, per_bin, n_bins, bins, 1, 16)
    exact = case.sums * case.scale[first : first + LANES] * per_bin[:, None] + np.float32(n_bins / 2)
    expected = np.full(bins.shape, 77)
    expected[begin:end, 1, 16:32] = np.clip(np.floor(exact), 0, n_bins - 1)[begin:end]
    assert bins.tolist() == expected.tolist()
    assert len(np.unique(expected)) > 0.9 * n_bins and {0, n_bins - 1, 77} < set(expected.flat)


def test_room_begins_where_a_line_of_the_cache_does():
    rooms = [room_for_lanes(rows) for rows in (1, 64, 129) for _ in range(8)]
    assert {room.ctypes.data % 64 for room in rooms} == {0}
    assert [room.shape for room in rooms[::8]] == [(1, LANES), (64, LANES), (129, LANES)]
