"""Screening by few coordinates, for encoders that do not change.

    <x, w> = <A x, A^-T w>

A makes the coordinates of rows and of encoder equally large and puts the largest first: the balanced
truncation of B. C. Moore (1981), of the rows' second moments and the encoder's. Some of them, the head, hold
nearly all of any product. The head's product is made for all pairs, norms bound what the tail holds, and
only pairs that this cannot rule out get the tail's product too. All of it is in integers (`cpu_int8`); head
and tail are each turned at random, since a row's integers lose least where its coordinates are even.
"""

import dataclasses
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from sae.kernels.balance import balancing, evened
from sae.kernels.compiled import compiled
from sae.kernels.cpu_forward import Buffers, Forward, Scan, Screens, parts_of
from sae.kernels.cpu_int8 import lower_rows
from sae.kernels.cpu_loops import MARKS, mark_pairs
from sae.kernels.workers import Workers

# a head is of so many coordinates or a multiple
_STEP = 64
# nanoseconds on one processor, as measured (Zen 4): a coordinate of a pair's product, the tail's product of a
# pair that is left, and one of the d_in^2 products that turn a row
_PER_COORDINATE, _PER_LEFT, _PER_TURN = 0.0053, 19.0, 0.02
# rows and latents on which the head is chosen, and about what integers lose of a product of norms
_SAMPLE, _LOST = 512, 0.016
# rows turned at once, and coordinates summed at once: the fewer, the less rounding can do
_TURNED, _SUMMED = 256, 128
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


@dataclasses.dataclass
class Balanced(Screens):
    """Screens of an encoder, balanced against some rows."""

    latents: Halves = dataclasses.field(kw_only=True)
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
        turn = evened(turn, [head, len(turn) - head])
        return cls.turned(encoder, turn.float(), head, workers)

    @classmethod
    @torch.inference_mode()
    def turned(
        cls,
        encoder: Float[Tensor, "d_sae d_in"],
        turn: Float32[Tensor, "d_in d_in"],
        head: int,
        workers: Workers,
    ) -> "Balanced":
        """By a matrix A and with a head of so many coordinates."""
        back = torch.linalg.inv(turn.double()).T
        # sums of so many products, those of the parts, and the inverse's own error
        rounded = 2.0**-24 * (_SUMMED + len(turn) // _SUMMED + 8)
        missed = (turn.double().T @ back - torch.eye(len(turn), dtype=torch.float64)).norm()
        inexact = np.float32(1.001 * float((rounded + missed) * turn.double().norm()))
        latents = Halves.empty(Buffers(), "latent", len(encoder), head, len(turn) - head)

        def lower(part: slice) -> None:
            latents.part(part).lower((encoder[part].double() @ back.T).float().numpy())

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
            turn=turn.T.contiguous(),
            inexact=inexact,
        )


def _best_head(
    turn: Float64[Tensor, "d_in d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    rows: Float[Tensor, "row d_in"],
    bound: Float[Tensor, " d_sae"],
) -> int:
    """The size of head that costs least on a sample, in nanoseconds a pair; d_in where none is worth it."""
    every = max(1, len(encoder) // _SAMPLE)
    x = (rows[:: max(1, len(rows) // _SAMPLE)].double() @ turn.T).float()
    w = torch.linalg.solve(turn.T, encoder[::every].double().T).T.float()
    bound, d_in = bound[::every], len(turn)
    product = torch.zeros(len(x), len(w))
    costs = {d_in: _PER_COORDINATE * d_in}
    for head in range(_STEP, d_in, _STEP):
        new = slice(head - _STEP, head)
        product += x[:, new] @ w[:, new].T
        tail = x[:, head:].norm(dim=1)[:, None] * w[:, head:].norm(dim=1)
        lost = _LOST * x[:, :head].norm(dim=1)[:, None] * w[:, :head].norm(dim=1)
        left = (product + tail + lost > bound).double().mean()
        turning = _PER_TURN * d_in**2 / len(encoder)
        costs[head] = _PER_COORDINATE * head + _PER_LEFT * float(left) + turning
    return min(costs, key=lambda head: costs[head])


def _ratio(error: np.ndarray, norm: np.ndarray) -> np.ndarray:
    return np.divide(error, norm, out=np.zeros_like(norm), where=norm > 0)


class BalancedForward(Forward):
    """The active latents of one batch in the making, by balanced screens."""

    screens: Balanced

    def encode(self) -> None:
        self.looked_at: list[int] = []
        super().encode()
        d_tail = self.screens.latents.tail.shape[1]
        saved = _PER_COORDINATE * d_tail * self.d_sae * self.batch
        # other rows than it was balanced against
        self.screens.wasteful |= _PER_LEFT * sum(self.looked_at) > saved

    def _prepare_integers(self, parts: list[slice]) -> None:
        """The centred rows, turned, as integers."""
        screens, latents = self.screens, self.screens.latents
        tail = latents.tail.shape[1]
        self.halves = Halves.empty(self.buffers, "row", self.batch, self.d_in - tail, tail)
        self.product_in = torch.from_numpy(self.halves.head)

        def lower(part: slice) -> None:
            x, halves = torch.from_numpy(self.x[part]), self.halves.part(part)
            turned = self._take(f"turned {threading.get_ident()}", len(x), self.d_in)
            turned[:] = 0
            for some in parts_of(self.d_in, _SUMMED):
                torch.from_numpy(turned).addmm_(x[:, some], screens.turn[some])
            halves.lower(turned)
            inexact = screens.inexact * self.row_norm[part]
            for array in (halves.error, halves.tail_norm, halves.tail_error):
                array += inexact

        self.workers.run(lower, parts_of(self.batch, _TURNED))

    def _scanner(self, part: slice, bound: np.ndarray, norm: np.ndarray, slack: Any) -> Scan:
        latents, above = self.screens.latents.part(part), self._above()
        worst = _ratio(latents.tail_error, latents.tail_norm).max()
        latents = latents._replace(
            norm=norm, tail_norm=latents.tail_norm * np.float32(1 + 2 * self.unit + worst)
        )
        slacks = slack, np.float32(worst + self._summed)

        def scan(tile: slice, product: np.ndarray, rows: np.ndarray, columns: np.ndarray, found: int) -> int:
            found, looked_at = scan_halves(
                product, self.halves.part(tile), latents, above[tile], bound, *slacks, rows, columns,
                tile.start, found,
            )  # fmt: skip
            self.looked_at.append(looked_at)
            return found

        return scan


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
def scan_halves(
    product, halves, latents, row_bound, bound, slack, tail_slack, rows, columns, first, found
):  # fmt: skip
    """As `cpu_int8.scan_integers`, for a product of the heads; what passes it must pass with the tails' too.

    Returns with the number of pairs how many passed the heads'.
    """
    width, room, looked_at = product.shape[1], len(rows), 0
    marks = np.zeros((width + MARKS - 1) // MARKS * MARKS, np.uint8)
    for b in range(len(product)):
        if found + width > room:
            return -1, looked_at
        reach = halves.error[b] + slack * halves.norm[b]
        above, unit, rest = row_bound[b], halves.scale[b], halves.tail_norm[b]
        for j in range(width):
            value = np.float32(product[b, j]) * latents.scale[j] * unit
            marks[j] = value > bound[j] + above - reach * latents.norm[j] - rest * latents.tail_norm[j]
        kept, found = found, mark_pairs(marks, first + b, rows, columns, found)
        looked_at += found - kept
        tail_unit, tail_reach = halves.tail_scale[b], halves.tail_error[b] + tail_slack * rest
        for p in range(kept, found):
            j = columns[p]
            value = np.float32(product[b, j]) * latents.scale[j] * unit
            value += np.float32(_dot(halves.tail, b, latents.tail, j)) * latents.tail_scale[j] * tail_unit
            margin = reach * latents.norm[j] + tail_reach * latents.tail_norm[j]
            # stored in any case: which pairs are left cannot be foreseen
            columns[kept] = j
            kept += value > bound[j] + above - margin
        found = kept
    return found, looked_at


@compiled
def _dot(a, i, b, j):
    """<a[i], b[j]> of integers."""
    total = np.int32(0)
    for k in range(a.shape[1]):
        # a sum of 32 bits would else become one of 64, which has no instruction for pairs of products
        total = np.int32(total + np.int32(a[i, k]) * np.int32(b[j, k]))
    return total
