"""Sixteen products at a time, by both ways of multiplying, against plain numpy."""

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
    Tails,
    list_beyond,
    list_over,
    narrow_beyond,
    narrow_over,
    packed,
)  # fmt: skip

D, ROWS, COLUMNS = 3 * BLOCK, 40, 3 * LANES


def compiled():
    """The four as a loop calls them, compiled anew."""

    @numba.njit
    def lists_beyond(rows, begin, end, masks, products, first, tails, scale, spread, limits):
        return list_beyond(rows, begin, end, masks, products, first, tails, scale, spread, limits)

    @numba.njit
    def narrows_beyond(
        rows, n, masks, products, block, tails, sums, first, packed, scale, spread, limits, exact
    ):  # fmt: skip
        return narrow_beyond(
            rows, n, masks, products, block, tails, sums, first, packed, scale, spread, limits, exact
        )

    @numba.njit
    def lists_over(rows, begin, end, masks, products, first, tails, columns, of_rows):
        return list_over(rows, begin, end, masks, products, first, tails, columns, of_rows)

    @numba.njit
    def narrows_over(rows, n, masks, products, block, tails, sums, first, columns, of_rows):
        return narrow_over(rows, n, masks, products, block, tails, sums, first, columns, of_rows)

    return lists_beyond, narrows_beyond, lists_over, narrows_over


@pytest.fixture(scope="module", params=["vnni", "parts"])
def loops(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "parts":
            patch.setattr(lanes, "_has_vnni", lambda context: False)
        made = compiled()
        Case().narrow(made)
        # the processor's own instruction or none
        there = "vpdpbusd" in "".join(made[1].inspect_llvm().values())
        # torch and numba ask the processor, each in its own way
        if request.param == "vnni" and not int8_is_fast(torch.device("cpu")):
            pytest.skip("this processor multiplies no bytes")
        assert there == (request.param == "vnni")
        yield made


class Case:
    """Numbers at random, and what must be made of them."""

    def __init__(self, seed=0, tail=None, columns=None):
        rng = np.random.default_rng(seed)
        tail = rng.integers(-127, 128, (ROWS, D)) if tail is None else tail
        columns = rng.integers(-127, 128, (COLUMNS, D)) if columns is None else columns
        self.tail, self.columns = tail.astype(np.int8), columns.astype(np.int8)
        start = -OFFSET * self.tail.reshape(ROWS, -1, BLOCK).sum(2, dtype=np.int32)
        reach = (100 * rng.random((ROWS, 4))).astype(np.float32)
        self.tails = Tails(self.tail, start, reach)
        self.products = rng.integers(-(10**5), 10**5, (ROWS, COLUMNS)).astype(np.int32)
        self.scale = (0.5 + rng.random(COLUMNS)).astype(np.float32)
        self.spread = (100 * rng.random((4, COLUMNS))).astype(np.float32)
        # loose ones and exact ones; a few of sixteen columns are beyond them
        self.limits = (1.9e5 + 2e4 * rng.standard_normal((2, 2, ROWS))).astype(np.float32)
        self.limits[:, 1] *= -1
        self.limits[1] *= 0.85
        self.listed = np.sort(rng.permutation(ROWS)[: ROWS - 9])
        self.rows = np.full(ROWS, -7)
        self.n, self.masks = len(self.listed), np.zeros(ROWS, np.uint64)
        self.rows[: self.n] = self.listed
        self.sums = rng.integers(-(10**5), 10**5, (ROWS, LANES)).astype(np.int32)
        self.before = self.sums.copy()
        some = lambda low, n: (low + rng.random(n)).astype(np.float32)  # noqa: E731
        # a scale, a norm or margin, the tail's, and a bound
        self.of_columns = [some(0.5, COLUMNS), some(0, COLUMNS) * 9, some(0.5, COLUMNS), some(0, COLUMNS) * 9]
        self.of_columns.append(some(-0.5, COLUMNS) * 10**4)
        self.of_rows = [some(0.5, ROWS), some(0, ROWS) * 1e3, some(0.5, ROWS), some(0, ROWS) * 1e3]
        self.of_rows.append((1.5e5 + 2e4 * rng.standard_normal(ROWS)).astype(np.float32))

    def narrow(self, loops, block=1, place=2, exact=0):
        """How many rows are left of `rows`."""
        return loops[1](
            self.rows, self.n, self.masks, self.products, block, self.tails, self.sums, place * LANES,
            packed(self.columns), self.scale, self.spread, self.limits, exact,
        )  # fmt: skip

    def narrow_over(self, loops, block=1, place=2):
        columns = (*self.of_columns, packed(self.columns), self.spread)
        return loops[3](
            self.rows, self.n, self.masks, self.products, block, self.tails, self.sums, place * LANES,
            columns, tuple(self.of_rows),
        )  # fmt: skip

    def tail_sums(self, block, here):
        some = slice(block * BLOCK, (block + 1) * BLOCK)
        return self.tail[:, some].astype(np.int64) @ self.columns[here, some].T.astype(np.int64)

    def expected(self, block=1, place=2, exact=0):
        """Rows, masks, and the sums of all rows."""
        here = slice(place * LANES, (place + 1) * LANES)
        begun = self.before if block else self.products[:, here]
        sums = begun + self.tail_sums(block, here)
        bits = self.bits(sums, here, block + 1, exact)
        rows = [r for r in self.listed if bits[r]]
        return rows, bits[rows], sums

    def expected_over(self, block=1, place=2):
        here = slice(place * LANES, (place + 1) * LANES)
        sums = (self.before if block else 0) + self.tail_sums(block, here)
        bits = self.bits_over(self.products[:, here], sums, here, block + 1)
        rows = [r for r in self.listed if bits[r]]
        return rows, bits[rows], sums

    def bits(self, sums, here, edge, exact):
        """A bit for each column beyond a limit."""
        scores = sums.astype(np.float32) * self.scale[here]
        rest = self.tails.reach[:, edge, None] * self.spread[edge, here]
        above, below = self.limits[exact, :, :, None]
        return as_bits((scores + rest > above) | (scores - rest < below))

    def bits_over(self, heads, sums, here, edge):
        scale, norm, tail_scale, tail_norm, bound = (array[here] for array in self.of_columns)
        row_scale, margin, row_tail_scale, tail_margin, row_bound = (a[:, None] for a in self.of_rows)
        value = heads.astype(np.float64) * scale * row_scale + sums * (tail_scale * row_tail_scale)
        value = value + margin * norm + tail_margin * tail_norm
        value += self.tails.reach[:, edge, None] * self.spread[edge, here]
        return as_bits(value > bound + row_bound)


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


@pytest.mark.parametrize(("begin", "end"), [(0, ROWS), (5, 31), (7, 7)])
@pytest.mark.parametrize("first", [0, 32])
def test_rows_that_may_be_beyond_a_limit_are_listed(loops, first, begin, end):
    case, here = Case(), slice(first, first + LANES)
    case.limits[0] /= 1.6
    expected = case.bits(case.products[:, here], here, 0, 0)
    given = case.tails, case.scale, case.spread, case.limits
    n = loops[0](case.rows, begin, end, case.masks, case.products, first, *given)
    rows = [r for r in range(begin, end) if expected[r]]
    assert case.rows[:n].tolist() == rows and case.masks[:n].tolist() == expected[rows].tolist()
    assert 0 < np.count_nonzero(expected) < ROWS


@pytest.mark.parametrize(("begin", "end"), [(0, ROWS), (5, 31)])
@pytest.mark.parametrize("first", [0, 32])
def test_rows_that_may_be_over_their_bounds_are_listed(loops, first, begin, end):
    case, here = Case(), slice(first, first + LANES)
    expected = case.bits_over(case.products[:, here], np.zeros((ROWS, LANES)), here, 0)
    columns = (*case.of_columns, packed(case.columns), case.spread)
    n = loops[2](
        case.rows, begin, end, case.masks, case.products, first, case.tails, columns, tuple(case.of_rows)
    )
    rows = [r for r in range(begin, end) if expected[r]]
    assert case.rows[:n].tolist() == rows and case.masks[:n].tolist() == expected[rows].tolist()
    assert 0 < np.count_nonzero(expected) < ROWS


@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_block_leaves_the_rows_that_may_still_matter_in_their_order(loops, block, place, exact):
    case = Case(seed=block)
    check(case, case.expected(block, place, exact), case.narrow(loops, block, place, exact))


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_block_leaves_the_rows_that_may_still_be_over(loops, block, place):
    case = Case(seed=block)
    check(case, case.expected_over(block, place), case.narrow_over(loops, block, place))


def check(case, expected, left):
    rows, masks, sums = expected
    assert left == len(rows) and 3 < left < case.n
    assert case.rows[:left].tolist() == rows and case.masks[:left].tolist() == masks.tolist()
    assert case.sums[case.listed].tolist() == sums[case.listed].tolist()
    # nothing else is touched
    untouched = np.setdiff1d(np.arange(ROWS), case.listed)
    assert (case.sums[untouched] == case.before[untouched]).all() and (case.rows[case.n :] == -7).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_tails_are_measured_from_each_block_on(seed):
    case = Case(seed=seed)
    scale = np.linspace(0.1, 2, ROWS, dtype=np.float32)
    found = Tails.of(case.tail, scale)
    assert found.start.tolist() == case.tails.start.tolist()
    squares = case.tail.astype(np.float64) ** 2
    for edge in range(4):
        exact = np.sqrt(squares[:, edge * BLOCK :].sum(1)) * scale
        np.testing.assert_allclose(found.reach[:, edge], exact, rtol=2e-5)
        assert (found.reach[:, edge] >= exact).all()


def test_loose_limits_and_exact_ones_are_told_apart(loops):
    left = [Case().narrow(loops, exact=exact) for exact in (0, 1)]
    assert left[0] < left[1]


def test_limits_themselves_are_not_beyond(loops):
    case = Case()
    case.limits[:, 0], case.limits[:, 1] = np.inf, -np.inf
    case.tails.reach[:], case.scale[:] = 0, 1
    _, _, sums = case.expected()
    row = case.rows[3]
    case.limits[0, :, row] = sums[row].max(), sums[row].min()
    assert case.narrow(loops) == 0
    case = Case()
    case.limits[:, 0], case.limits[:, 1] = np.inf, -np.inf
    case.tails.reach[:], case.scale[:] = 0, 1
    case.limits[0, :, row] = sums[row].max() - 1, sums[row].min() + 1
    assert case.narrow(loops) == 1 and case.rows[0] == row
    assert case.masks[0] == 2 ** int(sums[row].argmax()) + 2 ** int(sums[row].argmin())


def test_no_rows_leave_none(loops):
    case = Case()
    case.n = 0
    assert case.narrow(loops) == 0 and (case.sums == case.before).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_block_after_block_gives_the_whole_product(loops, seed):
    case = Case(seed=seed)
    whole = case.products[:, 16:32] + case.tail.astype(np.int64) @ case.columns[16:32].T.astype(np.int64)
    case.limits[:, 0], case.limits[:, 1] = -np.inf, np.inf
    for block in range(3):
        assert case.narrow(loops, block, 1) == case.n
    listed = case.listed
    assert case.sums[listed].tolist() == whole[listed].tolist()


@pytest.mark.parametrize("left", [-127, 127])
@pytest.mark.parametrize("right", [-128, -127, 127])
def test_the_largest_bytes_neither_overflow_nor_saturate(loops, left, right):
    case = Case(tail=np.full((ROWS, D), left), columns=np.full((COLUMNS, D), right))
    case.limits[:, 0], case.limits[:, 1] = -np.inf, np.inf
    _, _, sums = case.expected()
    assert case.narrow(loops) == case.n
    listed = case.listed
    assert case.sums[listed].tolist() == sums[listed].tolist()
    tails = sums - case.before
    assert (tails == BLOCK * left * right).all()
