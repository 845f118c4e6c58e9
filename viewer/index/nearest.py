"""The search for the largest products of many vectors with many, in 8-bit integers, a tile at a time."""

import threading
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from sae.kernels.int8 import int8_products
from sae.kernels.workers import workers_for

# rows and columns of a tile of products: the product is busy, and what it gives is near when it is searched
_TILE = 1024


class Integers(NamedTuple):
    """Vectors as `quantised` gives them."""

    values: Int8[Tensor, "row d_model"]
    scale: Float[Tensor, " row"]


class Candidates(NamedTuple):
    """For each of some vectors those of the other side that have the largest products with it, falling."""

    scores: Float[Tensor, "row candidate"]
    """The products in integers, times both scales; of equal ones the smaller place comes first."""
    places: Int[Tensor, "row candidate"]


def candidates_of_both(
    left: Integers, right: Integers, *, of_left: int, of_right: int = 0
) -> tuple[Candidates, Candidates]:
    """The `of_left` candidates of each vector on the left among those on the right, and the other way round.

    Where both are one object each side has the same, and half of the products are not computed: what a tile
    above the diagonal says of its columns, the one below would say of its rows. Threads take tiles as they
    come, and nothing depends on which comes first (`nearest_loops`). With `of_right` 0 one side is searched.
    """
    same = left is right
    ahead = _Largest(left, of_left)
    behind = ahead if same else _Largest(right, of_right)
    workers = workers_for(torch.get_num_threads())
    rooms = [torch.empty(_TILE * _TILE, dtype=torch.int32) for _ in range(workers.threads)]

    def search(tile: tuple[int, int]) -> None:
        i, j = tile
        room = rooms.pop()  # a thread works on one tile at a time, so there is one left
        products = int8_products(left.values[_strip(i)], right.values[_strip(j)], room).numpy()
        ahead.take(i, products, right.scale, j, by_row=True)
        if not same or i != j:
            behind.take(j, products, left.scale, i, by_row=False)
        rooms.append(room)

    tiles = _tiles(ahead.n_strips, None if same else behind.n_strips)
    workers.run(search, tiles)
    found = ahead.candidates()
    return found, found if same else behind.candidates()


class _Largest:
    """The largest products of each vector of one side, while tiles come in, from several threads."""

    def __init__(self, side: Integers, count: int) -> None:
        from viewer.index.nearest_loops import NO_KEY  # late: numba takes a second to import

        self._scale = side.scale
        self._keys = np.full((len(side.scale), count), NO_KEY)
        self._bounds = np.full(len(side.scale), -np.inf, np.float32)
        self.n_strips = -(-len(side.scale) // _TILE)
        self._locks = [threading.Lock() for _ in range(self.n_strips)]

    def take(
        self,
        strip: int,
        products: Int[np.ndarray, "row column"],
        scale: Float[Tensor, " other"],
        other: int,
        *,
        by_row: bool,
    ) -> None:
        """Takes in the products of a strip with strip `other` of the other side.

        The strip's own vectors are the rows of the tile, or its columns.
        """
        from viewer.index.nearest_loops import keep_in_columns, keep_in_rows

        if self._keys.shape[1] == 0:
            return
        keep, own = keep_in_rows if by_row else keep_in_columns, _strip(strip)
        scales = scale[_strip(other)].numpy()
        with self._locks[strip]:
            keep(products, scales, other * _TILE, self._keys[own], self._bounds[own])

    def candidates(self) -> Candidates:
        from viewer.index.nearest_loops import read_keys

        scores, places = torch.empty(self._keys.shape), torch.empty(self._keys.shape, dtype=torch.int64)
        read_keys(self._keys, scores.numpy(), places.numpy())
        return Candidates(scores * self._scale[:, None], places)


def _strip(number: int) -> slice:
    return slice(number * _TILE, (number + 1) * _TILE)


def _tiles(rows: int, columns: int | None) -> list[tuple[int, int]]:
    """The tiles of so many strips; without `columns` of one side with itself, of (i, j) and (j, i) only one.

    Along diagonals, so that threads seldom meet in a strip.
    """
    if columns is not None:
        return [(i, (i + shift) % columns) for shift in range(columns) for i in range(rows)]
    around = [(i, (i + shift) % rows) for shift in range(rows // 2 + 1) for i in range(rows)]
    return [(i, j) for i, j in around if 2 * abs(i - j) != rows or i < j]
