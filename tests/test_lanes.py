"""Sixteen products at a time, by both ways of multiplying, against plain numpy."""

import numba
import numpy as np
import pytest
import torch

from sae.kernels import lanes
from sae.kernels.int8 import int8_is_fast
from sae.kernels.lanes import BLOCK, LANES, OFFSET, beyond, narrow, packed

D, ROWS, COLUMNS = 3 * BLOCK, 40, 3 * LANES


def compiled():
    """`beyond` and `narrow` as a loop calls them, compiled anew."""

    @numba.njit
    def beyond_of(products, row, first, scale, spread, reach, limits):
        return beyond(products, row, first, scale, spread, reach, limits)

    @numba.njit
    def narrowed(
        rows, group, n, masks, products, begin, block, tails, columns, place, sums, scale, first, spread,
        limits, exact,
    ):  # fmt: skip
        return narrow(
            rows, group, n, masks, products, begin, block, tails, columns, place, sums, scale, first, spread,
            limits, exact,
        )  # fmt: skip

    return beyond_of, narrowed


@pytest.fixture(scope="module", params=["vnni", "parts"])
def loops(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "parts":
            patch.setattr(lanes, "_has_vnni", lambda context: False)
        made = compiled()
        Case().narrow(made[1])
        # the processor's own instruction or none
        there = "vpdpbusd" in "".join(made[1].inspect_llvm().values())
        # torch and numba ask the processor, each in its own way
        if request.param == "vnni" and not int8_is_fast(torch.device("cpu")):
            pytest.skip("this processor multiplies no bytes")
        assert there == (request.param == "vnni")
        yield made


class Case:
    """Numbers at random, and what `narrow` must make of them."""

    def __init__(self, seed=0, tail=None, columns=None):
        rng = np.random.default_rng(seed)
        tail = rng.integers(-127, 128, (ROWS, D)) if tail is None else tail
        columns = rng.integers(-127, 128, (COLUMNS, D)) if columns is None else columns
        self.tail, self.columns = tail.astype(np.int8), columns.astype(np.int8)
        self.start = -OFFSET * self.tail.reshape(ROWS, -1, BLOCK).sum(2, dtype=np.int32)
        self.products = rng.integers(-(10**5), 10**5, (ROWS, COLUMNS)).astype(np.int32)
        self.scale = (0.5 + rng.random(COLUMNS)).astype(np.float32)
        self.reach = (100 * rng.random((ROWS, 4))).astype(np.float32)
        self.spread = (100 * rng.random((4, COLUMNS))).astype(np.float32)
        # loose ones and exact ones; a few of sixteen columns are beyond them
        self.limits = (1.9e5 + 2e4 * rng.standard_normal((2, 2, ROWS))).astype(np.float32)
        self.limits[:, 1] *= -1
        self.limits[1] *= 0.85
        # two groups of rows, of which only one is narrowed
        self.rows = np.full((2, ROWS), -7)
        listed = np.sort(rng.permutation(ROWS)[: ROWS - 9])
        self.n, self.masks = len(listed), np.zeros(ROWS, np.uint64)
        self.rows[1, : self.n] = listed
        self.sums = np.full((ROWS, LANES), 77, np.int32)

    def narrow(self, narrowed, block=1, place=2, exact=0, begun=None):
        """How many rows are left of `rows`."""
        first = place * LANES
        products, begin = (self.products, first) if begun is None else (begun, 0)
        return narrowed(
            self.rows, 1, self.n, self.masks, products, begin, block,
            (self.tail, self.start, self.reach), packed(self.columns), place, self.sums, self.scale, first,
            self.spread, self.limits, exact,
        )  # fmt: skip

    def expected(self, block=1, place=2, exact=0):
        """Rows, masks, and the sums of all rows."""
        first, here = place * LANES, slice(place * LANES, (place + 1) * LANES)
        some = slice(block * BLOCK, (block + 1) * BLOCK)
        tails = self.tail[:, some].astype(np.int64) @ self.columns[here, some].T.astype(np.int64)
        sums = self.products[:, first : first + LANES] + tails
        bits = self.bits(sums, here, block + 1, exact)
        rows = [r for r in self.rows[1, : self.n] if bits[r]]
        return rows, bits[rows], sums

    def bits(self, sums, here, edge, exact):
        """A bit for each column beyond a limit."""
        scores = sums.astype(np.float32) * self.scale[here]
        rest = self.reach[:, edge, None] * self.spread[edge, here]
        above, below = self.limits[exact, :, :, None]
        marked = (scores + rest > above) | (scores - rest < below)
        return (marked * 2 ** np.arange(LANES)).sum(1).astype(np.uint64)


def test_packed_columns_lie_four_coordinates_of_sixteen_side_by_side():
    columns = Case().columns
    found = packed(columns)
    assert found.shape == (3, 3, BLOCK // 4, LANES, 4) and found.flags.c_contiguous
    for column, coordinate in np.ndindex(columns.shape):
        block, quad, four = coordinate // BLOCK, coordinate % BLOCK // 4, coordinate % 4
        at = column // LANES, block, quad, column % LANES, four
        assert int(found[at]) == int(columns[column, coordinate]) + OFFSET


@pytest.mark.parametrize("first", [0, 16, 32])
def test_what_may_be_beyond_a_limit_is_marked(loops, first):
    case, here = Case(), slice(first, first + LANES)
    case.limits[0] /= 1.6
    expected = case.bits(case.products[:, here], here, 0, 0)
    given = (case.scale, case.spread, case.reach, case.limits)
    found = [int(loops[0](case.products, r, first, *given)) for r in range(ROWS)]
    assert found == expected.tolist()
    assert np.count_nonzero(expected) > 5 and min(found) == 0


@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_block_leaves_the_rows_that_may_still_matter_in_their_order(loops, block, place, exact):
    case = Case(seed=block)
    rows, masks, sums = case.expected(block, place, exact)
    listed, others = case.rows[1, : case.n].copy(), case.rows[0].copy()
    left = case.narrow(loops[1], block, place, exact)
    assert left == len(rows) and 3 < left < case.n
    assert case.rows[1, :left].tolist() == rows and case.masks[:left].tolist() == masks.tolist()
    assert case.sums[listed].tolist() == sums[listed].tolist()
    # nothing else is touched
    untouched = np.setdiff1d(np.arange(ROWS), listed)
    assert (case.sums[untouched] == 77).all() and (case.rows[0] == others).all()
    assert (case.rows[1, case.n :] == -7).all()


def test_loose_limits_and_exact_ones_are_told_apart(loops):
    left = [Case().narrow(loops[1], exact=exact) for exact in (0, 1)]
    assert left[0] < left[1]


def test_limits_themselves_are_not_beyond(loops):
    case = Case()
    case.limits[:, 0], case.limits[:, 1] = np.inf, -np.inf
    case.reach[:], case.scale[:] = 0, 1
    _, _, sums = case.expected()
    row = case.rows[1, 3]
    case.limits[0, :, row] = sums[row].max(), sums[row].min()
    assert case.narrow(loops[1]) == 0
    case = Case()
    case.limits[:, 0], case.limits[:, 1] = np.inf, -np.inf
    case.reach[:], case.scale[:] = 0, 1
    case.limits[0, :, row] = sums[row].max() - 1, sums[row].min() + 1
    assert case.narrow(loops[1]) == 1 and case.rows[1, 0] == row
    assert case.masks[0] == 2 ** int(sums[row].argmax()) + 2 ** int(sums[row].argmin())


def test_no_rows_leave_none(loops):
    case = Case()
    case.n = 0
    assert case.narrow(loops[1]) == 0 and (case.sums == 77).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_block_after_block_gives_the_whole_product(loops, seed):
    case = Case(seed=seed)
    whole = case.products[:, 16:32] + case.tail.astype(np.int64) @ case.columns[16:32].T.astype(np.int64)
    case.limits[:, 0], case.limits[:, 1] = -np.inf, np.inf
    for block in range(3):
        begun = case.sums if block else None
        assert case.narrow(loops[1], block, 1, 0, begun) == case.n
    listed = case.rows[1, : case.n]
    assert case.sums[listed].tolist() == whole[listed].tolist()


@pytest.mark.parametrize("left", [-127, 127])
@pytest.mark.parametrize("right", [-128, -127, 127])
def test_the_largest_bytes_neither_overflow_nor_saturate(loops, left, right):
    case = Case(tail=np.full((ROWS, D), left), columns=np.full((COLUMNS, D), right))
    case.limits[:, 0], case.limits[:, 1] = -np.inf, np.inf
    _, _, sums = case.expected()
    assert case.narrow(loops[1]) == case.n
    listed = case.rows[1, : case.n]
    assert case.sums[listed].tolist() == sums[listed].tolist()
    tails = sums - case.products[:, 32:48]
    assert (tails == BLOCK * left * right).all()
