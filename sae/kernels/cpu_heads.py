"""Rows and latents as heads and tails of integers, and the loop that screens pairs of them."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from sae.kernels.compiled import compiled
from sae.kernels.cpu_forward import UNIT_INT8, Buffers, rounded_sums
from sae.kernels.cpu_int8 import lower_rows
from sae.kernels.cpu_loops import lowest_bit
from sae.kernels.lanes import LANES, Blocks, list_over, multiply, narrow_over, packed, room_for_lanes

# rows looked at together: what is left of them is listed
_ROWS = 64


class Halves(NamedTuple):
    """Rows or latents as integers that are to be multiplied by a scale: head and tail."""

    head: Any
    scale: Any
    norm: Any
    error: Any
    """Norm of what rounding takes away."""
    tail: Any
    tail_scale: Any
    tail_norm: Any
    tail_error: Any

    @classmethod
    def empty(cls, buffers: Buffers, name: str, n: int, head: int, tail: int) -> "Halves":
        """Room for so many."""
        arrays = []
        for side, size in (("head", head), ("tail", tail)):
            arrays.append(buffers.take(f"{name} {side}", (n, size), np.int8))
            arrays.extend(
                buffers.take(f"{name} {side} {what}", (n,), np.float32) for what in ("scale", "norm", "error")
            )
        return cls(*arrays)

    def part(self, part: slice) -> "Halves":
        """Views of some."""
        return Halves(*(array[part] for array in self))

    def lower(self, turned: Float32[np.ndarray, "row d_in"]) -> None:
        """Takes in turned rows, as many as there is room for."""
        split, ones = self.head.shape[1], np.ones(turned.shape[1], np.float32)
        head, tail = (np.ascontiguousarray(side) for side in np.split(turned, [split], axis=1))
        lower_rows(head, ones, self.head, self.scale, self.norm, self.error)
        lower_rows(tail, ones, self.tail, self.tail_scale, self.tail_norm, self.tail_error)


class Columns(NamedTuple):
    """A block of latents as `lanes.list_over` and `lanes.narrow_over` read them, in whole sixteens of which
    the last few may be none.
    """

    scale: Any
    norm: Any
    tail_scale: Any
    tail_norm: Any
    bound: Any
    """What a product must exceed."""
    packed: Any
    """Their tails."""
    spread: Any
    """The norms of what comes from each block of the tail on, and behind the last [edge, latent]."""
    heads: Any
    slack: Any
    tail_slack: Any
    """What a row's norm counts in its margins."""
    order: Any
    """Which latent of the block each is. Those that are let by most often come first: sixteen that hardly
    ever are then cost nothing."""


def columns_of(
    turned: Float32[np.ndarray, "latent turned"],
    bound: Float32[np.ndarray, " latent"],
    order: Int32[np.ndarray, " latent"],
    sizes: tuple[int, int],
) -> Columns:
    """A block of turned latents with heads and tails of such sizes, of which each fires above its bound."""
    n = -(-len(turned) // LANES) * LANES
    halves = Halves.empty(Buffers(), "latent", n, *sizes)
    for array in halves.part(slice(len(turned), n)):
        array[:] = 0
    halves.part(slice(len(turned))).lower(turned)
    lost = [_lost(halves.error, halves.norm), _lost(halves.tail_error, halves.tail_norm)]
    # rounding is also of what the margin holds, and two errors multiply
    norms = [
        norm * np.float32(1 + 2 * UNIT_INT8 + worst)
        for norm, worst in zip((halves.norm, halves.tail_norm), lost, strict=True)
    ]
    none = (0, n - len(turned))
    return Columns(
        scale=halves.scale,
        norm=norms[0],
        tail_scale=halves.tail_scale,
        tail_norm=norms[1],
        bound=np.pad(bound, none, constant_values=np.inf),
        packed=packed(halves.tail),
        spread=np.ascontiguousarray(Blocks.of(halves.tail, halves.tail_scale).reach.T),
        heads=packed(halves.head),
        slack=np.float32(lost[0] + rounded_sums(turned.shape[1])),
        tail_slack=np.float32(lost[1] + rounded_sums(turned.shape[1])),
        order=np.pad(order, none),
    )


def _lost(error: np.ndarray, norm: np.ndarray) -> np.float32:
    """The largest share of a norm that rounding took away."""
    return np.divide(error, norm, out=np.zeros_like(norm), where=norm > 0).max()


@compiled
def scan_heads(heads, tails, halves, columns, rows, found_columns):
    """Lists the rows and columns of pairs that pass the screen by their heads, and then by the tails too.

    `heads` and `tails` are `lanes.Blocks` of the same rows as `halves`. Returns how many pairs there are, or
    -1 without room, and how many blocks of the tail were multiplied.
    """
    packed_heads, order = columns.heads, columns.order
    n_rows, groups, width = len(halves.head), len(packed_heads), len(order)
    n_heads, n_blocks = heads.start.shape[1], tails.start.shape[1]
    sums, tail_sums = room_for_lanes(n_rows).view(np.int32), room_for_lanes(n_rows).view(np.int32)
    values = room_for_lanes(n_rows)
    margin, tail_margin = np.empty(n_rows, np.float32), np.empty(n_rows, np.float32)
    for r in range(n_rows):
        margin[r] = halves.error[r] + columns.slack * halves.norm[r]
        tail_margin[r] = halves.tail_error[r] + columns.tail_slack * halves.tail_norm[r]
    of_rows = (halves.scale, margin, halves.tail_scale, tail_margin)
    listed, masks = np.empty(_ROWS, np.int64), np.empty(_ROWS, np.uint64)
    words = np.zeros((_ROWS, -(-width // 64)), np.uint64)
    multiplied = found = 0
    for begin in range(0, n_rows, _ROWS):
        end = min(begin + _ROWS, n_rows)
        words[:] = 0
        for g in range(groups):
            c = g * LANES
            for b in range(n_heads - 1):
                multiply(begin, end, b, heads, sums, packed_heads, c)  # pyright: ignore[reportCallIssue]
            n = list_over(  # pyright: ignore[reportCallIssue]
                listed, begin, end, masks, n_heads - 1, heads, sums, packed_heads, c, tails, columns,
                of_rows, values,
            )  # fmt: skip
            for b in range(n_blocks):
                if n == 0:
                    break
                multiplied += n
                n = narrow_over(  # pyright: ignore[reportCallIssue]
                    listed, n, masks, b, tails, tail_sums, c, columns, of_rows, values
                )
            for k in range(n):
                words[listed[k] - begin, c // 64] |= masks[k] << np.uint64(c % 64)
        for r in range(begin, end):
            if found + width > len(rows):
                return -1, multiplied
            for place in range(words.shape[1]):
                bits = words[r - begin, place]
                while bits:
                    rows[found] = r
                    column = place * 64 + lowest_bit(bits)  # pyright: ignore[reportCallIssue]
                    found_columns[found] = order[column]
                    found += 1
                    bits &= bits - np.uint64(1)
    return found, multiplied
