"""Screening by few coordinates, for encoders that do not change.

Rows and encoder are turned into balanced coordinates (`balance`), of which some, the head, hold nearly all of
any product. The head's product is made for all pairs, norms bound what the tail holds, and only what this
cannot rule out gets the tail's products too, a block of coordinates at a time (`lanes`). All of it is in
integers (`cpu_int8`).
"""

import dataclasses
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int32
from torch import Tensor

from sae.kernels.balance import balancing, evened
from sae.kernels.compiled import compiled
from sae.kernels.cpu_forward import COLUMNS, Buffers, Forward, Scan, Screens, parts_of
from sae.kernels.cpu_int8 import lower_rows
from sae.kernels.cpu_loops import lowest_bit
from sae.kernels.lanes import BLOCK, LANES, Tails, list_over, narrow_over, packed
from sae.kernels.workers import Workers

# nanoseconds on one processor, as measured (Zen 4): a coordinate of a pair's product, a block of the tail's
# of sixteen that are left, and one of the d_in^2 products that turn a row
_PER_COORDINATE, _PER_BLOCK, _PER_TURN = 0.0053, 9.0, 0.02
# rows and latents on which the head is chosen, and about what integers lose of a product of norms
_SAMPLE, _LOST = 512, 0.016
# rows turned at once, and coordinates summed at once: the fewer, the less rounding can do
_TURNED, _SUMMED = 256, 128
# rows looked at together: what is left of them is listed
_ROWS = 64
# rows whose moments are enough: with fewer, more of other rows is left in the tail
_AFTER = 8192
# what balancing costs, in as many of those products as d_in^3 and d_in^2 d_sae are; it waits for so much of
# the rows that would pay for it
_DECOMPOSED, _LOWERED, _WAITS = 70, 2.5, 0.25


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
    """A block of latents as `lanes.list_over` and `lanes.narrow_over` read them; the last few may be none."""

    scale: Any
    norm: Any
    tail_scale: Any
    tail_norm: Any
    bound: Any
    """What a product must exceed, beside the row's."""
    packed: Any
    spread: Any
    """The norms of what comes from each block of the tail on, and behind the last [edge, latent]."""


@dataclasses.dataclass
class Balanced(Screens):
    """Screens of an encoder, balanced against some rows; in whole sixteens of latents, of which the last few
    may be none.
    """

    latents: Halves = dataclasses.field(kw_only=True)
    packed: np.ndarray = dataclasses.field(kw_only=True)
    spread: np.ndarray = dataclasses.field(kw_only=True)
    """As in `Columns`."""
    order: Int32[np.ndarray, " latent"] = dataclasses.field(kw_only=True)
    """Which latent each is. Those that are let by most often come first in each block: sixteen that hardly
    ever are then cost nothing."""
    turn: Float32[Tensor, "d_in d_in"] = dataclasses.field(kw_only=True)
    """A^T."""
    inexact: np.float32 = dataclasses.field(kw_only=True)
    """What turning may do to a product, as a part of the row's norm times the turned latent's."""

    @classmethod
    @torch.inference_mode()
    def against(
        cls,
        encoder: Float[Tensor, "d_sae d_in"],
        rows: Float[Tensor, "row d_in"],
        moments: Float64[Tensor, "d_in d_in"],
        bound: Float[Tensor, " d_sae"],
        workers: Workers,
    ) -> "Balanced | None":
        """Against rows of such second moments, of which `rows` are some; None where it would save nothing.

        `bound` is what a product must exceed if the latent is to fire.
        """
        turn = balancing(moments, (encoder.T @ encoder).double() / len(encoder))
        if turn is None:
            return None
        head = _best_head(turn, encoder, rows, bound)
        if head == len(turn):
            return None
        turn = evened(turn, [head] + [BLOCK] * ((len(turn) - head) // BLOCK))
        rates = _let_by(turn.float(), encoder, rows, bound, head, workers)
        order = torch.cat(
            [part.start + (-rates[part]).argsort(stable=True) for part in parts_of(len(rates), COLUMNS)]
        )
        return cls.turned(encoder, turn.float(), head, workers, order)

    @classmethod
    @torch.inference_mode()
    def turned(
        cls,
        encoder: Float[Tensor, "d_sae d_in"],
        turn: Float32[Tensor, "d_in d_in"],
        head: int,
        workers: Workers,
        order: Int[Tensor, " d_sae"] | None = None,
    ) -> "Balanced":
        """By a matrix A and with a head of so many coordinates, behind which there are whole blocks."""
        back = torch.linalg.inv(turn.double()).T
        # sums of so many products, those of the parts, and the inverse's own error
        rounded = 2.0**-24 * (_SUMMED + len(turn) // _SUMMED + 8)
        missed = (turn.double().T @ back - torch.eye(len(turn), dtype=torch.float64)).norm()
        inexact = np.float32(1.001 * float((rounded + missed) * turn.double().norm()))
        order = torch.arange(len(encoder)) if order is None else order
        n = -(-len(encoder) // LANES) * LANES
        latents = Halves.empty(Buffers(), "latent", n, head, len(turn) - head)
        for array in latents.part(slice(len(encoder), n)):
            array[:] = 0

        def lower(part: slice) -> None:
            latents.part(part).lower((encoder[order[part]].double() @ back.T).float().numpy())

        workers.run(lower, parts_of(len(encoder), _TURNED))
        return cls(
            low_dtype=torch.int8,
            product=torch.from_numpy(latents.head),
            low=latents.head,
            norm=latents.norm,
            error=_ratio(latents.error, latents.norm),
            scale=latents.scale,
            divide=np.ones(head, np.float32),
            latents=latents,
            packed=packed(latents.tail),
            spread=np.ascontiguousarray(Tails.of(latents.tail, latents.tail_scale).reach.T),
            order=np.pad(order.int().numpy(), (0, n - len(encoder))),
            turn=turn.T.contiguous(),
            inexact=inexact,
        )


def _ratio(error: np.ndarray, norm: np.ndarray) -> np.ndarray:
    return np.divide(error, norm, out=np.zeros_like(norm), where=norm > 0)


def _let_by(
    turn: Float32[Tensor, "d_in d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    rows: Float[Tensor, "row d_in"],
    bound: Float[Tensor, " d_sae"],
    head: int,
    workers: Workers,
) -> Float[Tensor, " d_sae"]:
    """On which share of a sample of rows the head cannot rule each latent out."""
    x = rows[:: max(1, len(rows) // _SAMPLE)] @ turn.T
    back, share = torch.linalg.inv(turn), torch.empty(len(encoder))
    rest, lost = x[:, head:].norm(dim=1)[:, None], _LOST * x[:, :head].norm(dim=1)[:, None]

    def count(part: slice) -> None:
        w = encoder[part] @ back
        reach = rest * w[:, head:].norm(dim=1) + lost * w[:, :head].norm(dim=1)
        share[part] = (x[:, :head] @ w[:, :head].T + reach > bound[part]).float().mean(0)

    workers.run(count, parts_of(len(encoder), COLUMNS))
    return share


def _best_head(
    turn: Float64[Tensor, "d_in d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    rows: Float[Tensor, "row d_in"],
    bound: Float[Tensor, " d_sae"],
) -> int:
    """The size of head that costs least on a sample, in nanoseconds a pair; d_in where none is worth it."""
    every = max(1, len(encoder) // _SAMPLE)
    some = slice(0, len(encoder) // every // LANES * LANES * every, every)
    x = (rows[:: max(1, len(rows) // _SAMPLE)].double() @ turn.T).float()
    w = torch.linalg.solve(turn.T, encoder[some].double().T).T.float()
    bound, d_in = bound[some], len(turn)
    product, left, costs = torch.zeros(len(x), len(w)), {}, {d_in: _PER_COORDINATE * d_in}
    sizes = range(d_in % BLOCK or BLOCK, d_in, BLOCK)
    for head in sizes:
        new = slice(max(0, head - BLOCK), head)
        product += x[:, new] @ w[:, new].T
        tail = x[:, head:].norm(dim=1)[:, None] * w[:, head:].norm(dim=1)
        lost = _LOST * x[:, :head].norm(dim=1)[:, None] * w[:, :head].norm(dim=1)
        beyond = product + tail + lost > bound
        # in sixteens of which one is let by as often as another
        beyond = beyond[:, beyond.float().mean(0).argsort(descending=True)].view(len(x), -1, LANES)
        left[head] = float(beyond.any(2).double().mean()) / LANES
    for head in sizes:
        blocks = sum(left[size] for size in sizes if size >= head)
        turning = _PER_TURN * d_in**2 / len(encoder)
        costs[head] = _PER_COORDINATE * head + _PER_BLOCK * blocks + turning
    return min(costs, key=lambda head: costs[head])


class BalancedForward(Forward):
    """The active latents of one batch in the making, by balanced screens."""

    screens: Balanced
    # products of few coordinates: what a tile costs beside them counts
    tile = 512

    def encode(self) -> None:
        self.multiplied: list[int] = []
        super().encode()
        saved = _PER_COORDINATE * self.screens.latents.tail.shape[1] * self.d_sae * self.batch
        # other rows than it was balanced against
        self.screens.wasteful |= _PER_BLOCK * sum(self.multiplied) > saved

    def _prepare_integers(self, parts: list[slice]) -> None:
        """The centred rows, turned, as integers."""
        screens, n, tail = self.screens, self.batch, self.screens.latents.tail.shape[1]
        self.halves = Halves.empty(self.buffers, "row", n, self.d_in - tail, tail)
        self.product_in, blocks = torch.from_numpy(self.halves.head), tail // BLOCK
        start = self._take("row start", n, blocks, dtype=np.int32)
        self.tails = Tails(self.halves.tail, start, self._take("row reach", n, blocks + 1))

        def lower(part: slice) -> None:
            x, halves = torch.from_numpy(self.x[part]), self.halves.part(part)
            turned = self._take(f"turned {threading.get_ident()}", len(x), self.d_in)
            turned[:] = 0
            for some in parts_of(self.d_in, _SUMMED):
                torch.from_numpy(turned).addmm_(x[:, some], screens.turn[some])
            halves.lower(turned)
            self.tails.part(part).measure(halves.tail_scale)
            inexact = screens.inexact * self.row_norm[part]
            for array in (halves.error, halves.tail_norm, halves.tail_error):
                array += inexact

        self.workers.run(lower, parts_of(n, _TURNED))

    def _integers(self, tile: slice, part: slice) -> np.ndarray:
        return super()._integers(tile, _whole_sixteens(part))

    def _scanner(self, part: slice, bound: np.ndarray, norm: np.ndarray, slack: Any) -> Scan:
        screens, above, whole = self.screens, self._above(), _whole_sixteens(part)
        latents, order = screens.latents.part(whole), np.maximum(screens.order[whole] - part.start, 0)
        worst = _ratio(latents.tail_error, latents.tail_norm).max()
        columns = Columns(
            latents.scale,
            np.pad(norm, (0, len(order) - len(norm))),
            latents.tail_scale,
            latents.tail_norm * np.float32(1 + 2 * self.unit + worst),
            np.where(np.arange(len(order)) < len(bound), bound[order], np.float32(np.inf)),
            screens.packed[whole.start // LANES : whole.stop // LANES],
            np.ascontiguousarray(screens.spread[:, whole]),
        )
        halves, tail_slack = self.halves, np.float32(worst + self._summed)
        margin = halves.error + slack * halves.norm
        tail_margin = halves.tail_error + tail_slack * halves.tail_norm
        of_all = halves.scale, margin, halves.tail_scale, tail_margin, above

        def scan(
            tile: slice, product: np.ndarray, rows: np.ndarray, found_columns: np.ndarray, found: int
        ) -> int:
            of_rows = tuple(array[tile] for array in of_all)
            found, multiplied = scan_heads(
                product, self.tails.part(tile), columns, of_rows, order, rows, found_columns, tile.start,
                found,
            )  # fmt: skip
            self.multiplied.append(multiplied)
            return found

        return scan


def _whole_sixteens(part: slice) -> slice:
    """Blocks begin at one; the last may end within one."""
    return slice(part.start, -(-part.stop // LANES) * LANES)


class Balancing:
    """Balances an encoder once it has seen rows enough, if that saves anything."""

    def __init__(self, d_sae: int, d_in: int) -> None:
        self.screens: Balanced | None = None
        self._moments, self._rows = torch.zeros(1, dtype=torch.float64), 0
        turning = _PER_TURN * d_in**2
        saved = _PER_COORDINATE * d_in / 2 * d_sae - turning
        # what saves little of a row is hardly worth it
        self._over = saved < turning
        cost = turning * (_DECOMPOSED * d_in + _LOWERED * d_sae)
        self._after = max(_AFTER, _WAITS * cost / saved) if not self._over else 0

    def learn(self, step: Forward) -> None:
        """Takes in a batch that was encoded."""
        if self.screens is not None and self.screens.wasteful:
            self.screens = None
        if self._over or not step.integers:
            return
        x = torch.from_numpy(step.x)
        # not in place: it may have been made in inference mode, and this may be outside of it
        self._moments = self._moments + x.T @ x
        self._rows += len(x)
        # a few rows are no sample to choose the head on
        if self._rows < self._after or len(x) < _SAMPLE:
            return
        self._over = True
        bound = torch.from_numpy(step.gate - step.w["b_enc"])
        moments, weights = self._moments / self._rows, torch.from_numpy(step.w["W_enc_t"])
        self.screens = Balanced.against(weights, x, moments, bound, step.workers)
        self._moments = torch.empty(0)


@compiled
def scan_heads(product, tails, columns, of_rows, order, rows, found_columns, first, found):
    """As `cpu_int8.scan_integers`, for a product of the heads; what passes it must pass with the tails' too.

    Returns with the number of pairs how many blocks of the tail were multiplied.
    """
    n_rows, width = product.shape
    n_blocks, groups = tails.start.shape[1], width // LANES
    sums = np.empty((n_rows, LANES), np.int32)
    listed, masks = np.empty(_ROWS, np.int64), np.empty(_ROWS, np.uint64)
    words = np.zeros((_ROWS, -(-width // 64)), np.uint64)
    multiplied = 0
    for begin in range(0, n_rows, _ROWS):
        end = min(begin + _ROWS, n_rows)
        words[:] = 0
        for g in range(groups):
            c = g * LANES
            n = list_over(  # pyright: ignore[reportCallIssue]
                listed, begin, end, masks, product, c, tails, columns, of_rows
            )
            for b in range(n_blocks):
                if n == 0:
                    break
                multiplied += n
                n = narrow_over(  # pyright: ignore[reportCallIssue]
                    listed, n, masks, product, b, tails, sums, c, columns, of_rows
                )
            for k in range(n):
                words[listed[k] - begin, c // 64] |= masks[k] << np.uint64(c % 64)
        for r in range(begin, end):
            if found + width > len(rows):
                return -1, multiplied
            for place in range(words.shape[1]):
                bits = words[r - begin, place]
                while bits:
                    rows[found] = first + r
                    column = place * 64 + lowest_bit(bits)  # pyright: ignore[reportCallIssue]
                    found_columns[found] = order[column]
                    found += 1
                    bits &= bits - np.uint64(1)
    return found, multiplied
