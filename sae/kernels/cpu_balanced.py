"""Screening by few coordinates, for encoders that do not change.

Rows and encoder are turned into balanced coordinates (`balance`), of which some, the head, hold nearly all of
any product. The head's product is made for all pairs, norms bound what the tail holds, and only what this
cannot rule out gets the tail's products too, a block of coordinates at a time (`lanes`). All of it is in
integers (`cpu_int8`).
"""

import dataclasses
import threading

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from sae.kernels.balance import balancing, evened
from sae.kernels.cpu_forward import (
    COLUMNS,
    UNIT_INT8,
    Forward,
    Screens,
    least_products,
    parts_of,
)
from sae.kernels.cpu_heads import Columns, Halves, columns_of, scan_heads
from sae.kernels.lanes import BLOCK, LANES, Blocks
from sae.kernels.workers import Workers

# nanoseconds on one processor, as measured (Zen 4): a coordinate of a pair's product, a block of the tail's
# of sixteen that are left, and one of the d_in^2 products that turn a row
_PER_COORDINATE, _PER_BLOCK, _PER_TURN = 0.0053, 8.5, 0.02
# rows and latents on which the head is chosen, and about what integers lose of a product of norms
_SAMPLE, _LOST = 512, 0.016
# rows turned at once, and coordinates summed at once: the fewer, the less rounding can do
_TURNED, _SUMMED = 256, 128
# about the share of a product that need not be made
_SAVED = 0.75
# rows whose moments are enough: with fewer, more of other rows is left in the tail
_AFTER = 4096
# what balancing costs, in as many of those products as d_in^3 and d_in^2 d_sae are; it waits for so much of
# the rows that would pay for it
_DECOMPOSED, _LOWERED, _WAITS = 70, 2.5, 0.2


@dataclasses.dataclass
class Balanced(Screens):
    """Screens of an encoder, balanced against some rows."""

    columns: list[Columns] = dataclasses.field(kw_only=True)
    """Of each block of latents."""
    head: int = dataclasses.field(kw_only=True)
    """Coordinates; the others are the tail."""
    turn: Float32[Tensor, "d_in turned"] = dataclasses.field(kw_only=True)
    """A^T, behind zeros that make the head whole blocks."""
    inexact: np.float32 = dataclasses.field(kw_only=True)
    """What turning may do to a product, as a part of the row's norm times the turned latent's."""

    @classmethod
    @torch.inference_mode()
    def against(
        cls,
        encoder: Float[Tensor, "d_sae d_in"],
        rows: Float[Tensor, "row d_in"],
        moments: Float64[Tensor, "d_in d_in"],
        gate: Float[Tensor, " d_sae"],
        bias: Float[Tensor, " d_sae"],
        workers: Workers,
    ) -> "Balanced | None":
        """Against rows of such second moments, of which `rows` are some; None where it would save nothing.

        A latent fires where the product and its bias exceed its gate.
        """
        turn = balancing(moments, (encoder.T @ encoder).double() / len(encoder))
        if turn is None:
            return None
        bound = gate - bias
        head = _best_head(turn, encoder, rows, bound)
        if head == len(turn):
            return None
        turn = evened(turn, [head] + [BLOCK] * ((len(turn) - head) // BLOCK))
        rates = _let_by(turn.float(), encoder, rows, bound, head, workers)
        order = torch.cat(
            [part.start + (-rates[part]).argsort(stable=True) for part in parts_of(len(rates), COLUMNS)]
        )
        return cls.turned(encoder, gate, bias, turn.float(), head, workers, order)

    @classmethod
    @torch.inference_mode()
    def turned(
        cls,
        encoder: Float[Tensor, "d_sae d_in"],
        gate: Float[Tensor, " d_sae"],
        bias: Float[Tensor, " d_sae"],
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
        zeros, sizes = -head % BLOCK, (head - head % -BLOCK, len(turn) - head)
        turned, back = F.pad(turn.T, (zeros, 0)), F.pad(back.T, (zeros, 0))
        bounds = least_products(gate.numpy(), bias.numpy(), UNIT_INT8)
        parts = parts_of(len(encoder), COLUMNS)
        columns: dict[int, Columns] = {}

        def lower(part: slice) -> None:
            some = order[part]
            w, place = (encoder[some].double() @ back).float().numpy(), (some - part.start).int().numpy()
            columns[part.start] = columns_of(w, bounds[some.numpy()], place, sizes)

        workers.run(lower, parts)
        nothing = np.empty(0, np.float32)
        return cls(
            low_dtype=torch.int8,
            product=torch.empty(0, dtype=torch.int8),
            low=np.empty(0, np.int8),
            norm=nothing,
            error=nothing,
            scale=nothing,
            divide=nothing,
            columns=[columns[part.start] for part in parts],
            head=sizes[0],
            turn=turned,
            inexact=inexact,
        )


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

    def encode(self) -> None:
        self.multiplied: list[int] = []
        super().encode()
        tail = self.halves.tail.shape[1]
        saved = _PER_COORDINATE * tail * self.d_sae * self.batch
        # other rows than it was balanced against
        self.screens.wasteful |= _PER_BLOCK * sum(self.multiplied) > saved

    def _prepare_integers(self, parts: list[slice]) -> None:
        """The centred rows, turned, as integers."""
        screens, n = self.screens, self.batch
        turned_size = screens.turn.shape[1]
        self.halves = Halves.empty(self.buffers, "row", n, screens.head, turned_size - screens.head)
        self.heads, self.tails = (
            Blocks(
                side,
                self._take(f"row {name} start", n, side.shape[1] // BLOCK, dtype=np.int32),
                self._take(f"row {name} reach", n, side.shape[1] // BLOCK + 1),
            )
            for name, side in (("head", self.halves.head), ("tail", self.halves.tail))
        )

        def lower(part: slice) -> None:
            x, halves = torch.from_numpy(self.x[part]), self.halves.part(part)
            turned = self._take(f"turned {threading.get_ident()}", len(x), turned_size)
            turned[:] = 0
            for some in parts_of(self.d_in, _SUMMED):
                torch.from_numpy(turned).addmm_(x[:, some], screens.turn[some])
            halves.lower(turned)
            self.heads.part(part).measure(halves.scale)
            self.tails.part(part).measure(halves.tail_scale)
            inexact = screens.inexact * self.row_norm[part]
            for array in (halves.error, halves.tail_norm, halves.tail_error):
                array += inexact

        self.workers.run(lower, parts_of(n, _TURNED))

    def _scan_integers(self, block: int, rows: np.ndarray, columns: np.ndarray) -> int:
        found, multiplied = scan_heads(
            self.heads, self.tails, self.halves, self.screens.columns[block], rows, columns
        )
        self.multiplied.append(multiplied)
        return found


class Balancing:
    """Balances an encoder once it has seen rows enough, if that saves anything."""

    def __init__(self, d_sae: int, d_in: int) -> None:
        self.screens: Balanced | None = None
        self._moments, self._rows = torch.zeros(1, dtype=torch.float64), 0
        turning = _PER_TURN * d_in**2
        saved = _SAVED * _PER_COORDINATE * d_in * d_sae - turning
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
        moments, weights = self._moments / self._rows, torch.from_numpy(step.w["W_enc_t"])
        gate, bias = torch.from_numpy(step.gate), torch.from_numpy(step.w["b_enc"])
        self.screens = Balanced.against(weights, x, moments, gate, bias, step.workers)
        self._moments = torch.empty(0)
