"""What comes before the gradients on a CPU: the active latents of rows, exactly, by way of a screening
product; `cpu` says how it goes.
"""

import dataclasses
import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.kernels import cpu_loops as loops
from sae.kernels.cpu_int8 import lower_rows, scan_integers
from sae.kernels.cpu_update import screen_latents
from sae.kernels.dispatch import product_dtype
from sae.kernels.int8 import int8_products
from sae.kernels.step import StepWeights
from sae.kernels.workers import Workers

# columns of the product made at once: a block of pre-activations then fits a core's cache. Rows a part: few
# enough to share out evenly. Neither changes a result.
COLUMNS = 512
ROWS = 128
# rows of integer products made at once
_TILE = 256
# rows and latents that say how large the coordinates of integers are, and the batches for which that holds
_SAMPLE, _FIT_EVERY = 256, 64
# with fewer coordinates there is nothing to gain, and torch's product of one coordinate is wrong
_NARROW = 16
# one latent in so many may pass for nothing before another product is cheaper. bfloat16: as measured at
# widths of 2,048 and 4,096 (d_in 640; 150 and about 200 pairs a row), and 16,384 gains at 290 still. fp32:
# reckoned from its product, which takes three times as long
_WASTE = {torch.bfloat16: 24, None: 8}
UNIT_INT8 = 2.0**-10
"""Rounding to integers, beside what is measured of it: sums of squares in fp32."""
# bytes of a cache line
_LINE = 64
# candidates a row that buffers are made for at first, in multiples of the L0 aimed at
PLANNED = 4


@dataclasses.dataclass
class Screens:
    """What screening reads of one state's encoder."""

    low_dtype: torch.dtype | None
    product: Tensor
    """What the product multiplies: W_enc_t in bfloat16 or in integers, or itself."""
    low: np.ndarray
    norm: np.ndarray
    error: np.ndarray
    scale: np.ndarray
    divide: np.ndarray
    """As in `loops.Screen`; empty where the product is not of integers."""
    batches: int = 0
    """Seen so far."""
    wasteful: bool = False
    """Whether so many pairs passed the last time that a wider product would have cost less."""

    @classmethod
    def of(cls, weights: Tensor, low_dtype: torch.dtype | None, workers: Workers) -> "Screens":
        """Of W_enc_t [d_sae, d_in]. Integers wait for the first rows (`fit`)."""
        product = torch.empty_like(weights, dtype=low_dtype) if low_dtype else weights
        norm, nothing = np.zeros(len(weights), weights.numpy().dtype), np.empty(0, np.float32)
        if low_dtype == torch.int8:
            scale, divide = np.zeros(len(weights), np.float32), np.ones(weights.shape[1], np.float32)
            return cls(low_dtype, product, product.numpy(), norm, np.zeros_like(norm), scale, divide)
        low = product.view(torch.uint16).numpy() if low_dtype else np.empty((0, 0), np.uint16)
        screens = cls(low_dtype, product, low, norm, np.zeros_like(norm), nothing, nothing)
        screens.renew(weights.numpy(), workers)
        return screens

    def fit(self, weights: np.ndarray, rows: np.ndarray, workers: Workers) -> None:
        """Balances the coordinates of such rows and of the encoder, and turns it into integers anew."""
        every = max(1, len(weights) // _SAMPLE)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            sizes = [np.sqrt(np.mean(np.square(part), axis=0)) for part in (rows[:_SAMPLE], weights[::every])]
            ratio = np.sqrt(sizes[0] / sizes[1])
        self.divide[:] = np.where((ratio > 0) & np.isfinite(ratio), ratio, 1)
        self.renew(weights, workers)

    def renew(self, weights: np.ndarray, workers: Workers) -> None:
        """Screens all latents anew."""
        workers.run(
            lambda part: screen_latents(weights[part], self.block(part)), parts_of(len(weights), COLUMNS)
        )

    def block(self, part: slice) -> loops.Screen:
        """Views of a block's share."""
        return loops.Screen(self.low[part], self.norm[part], self.error[part], self.scale[part], self.divide)


def screens_for(held: Screens | None, weights: Tensor, dtype: torch.dtype, workers: Workers) -> Screens:
    """Those held, if they serve for a product in `dtype`; else new ones of W_enc_t [d_sae, d_in].

    Where integers let too many pairs pass, the next best product stands in for some batches: they all find
    the same pairs.
    """
    low = dtype if dtype in (torch.int8, torch.bfloat16) else None
    if low == torch.int8:
        stands_in = held is not None and held.low_dtype != low and held.batches < _FIT_EVERY
        narrow = weights.dtype != torch.float32 or weights.shape[1] < _NARROW
        if narrow or stands_in or (held is not None and held.wasteful):
            low = _fallback()
    if held is None or held.low_dtype != low:
        return Screens.of(weights, low, workers)
    return held


def _fallback() -> torch.dtype | None:
    low = product_dtype(torch.device("cpu"))
    return low if low == torch.bfloat16 else None


class Buffers:
    """Memory that is kept from step to step and grows when a step needs more."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of that shape with anything in it; the same memory for the same name."""
        size = math.prod(shape)
        return self.at_least(name, size, dtype)[:size].reshape(shape)

    def at_least(self, name: str, size: int, dtype: Any) -> np.ndarray:
        """All that is held under a name: an array of that length or more."""
        held = self._held.get(name)
        if held is None or len(held) < size or held.dtype != dtype:
            # whole vectors that straddle two cache lines load at half the rate, and numpy begins anywhere
            memory = np.empty(size * np.dtype(dtype).itemsize + _LINE, np.uint8)
            begin = -memory.ctypes.data % _LINE
            held = self._held[name] = memory[begin : len(memory) - _LINE + begin].view(dtype)
        return held


class Forward:
    """The active latents of one batch in the making."""

    changing = False
    """Whether the weights change from batch to batch."""

    def __init__(
        self,
        weights: StepWeights,
        screens: Screens,
        buffers: Buffers,
        workers: Workers,
        *,
        gate: np.ndarray,
        bandwidth: float = 0.0,
        l0: float,
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """`gate` [d_sae] is what active pre-activations exceed; pairs within half a `bandwidth` of it are
        found too. `l0` is how many latents a row may be expected to have.
        """
        self.screens, self.buffers, self.workers = screens, buffers, workers
        self.w = {name: tensor.numpy() for name, tensor in vars(weights).items()}
        self.dtype = self.w["threshold"].dtype
        self.d_sae, self.d_in = self.w["W_enc_t"].shape
        self.d_out = self.w["W_dec"].shape[1]
        self.blocks = parts_of(self.d_sae, COLUMNS)
        self.pairs: list[loops.Pairs] = [loops.Pairs(None, None, None)] * len(self.blocks)
        self.gate, self.half, self.l0_planned, self.scales = gate, self.dtype.type(bandwidth / 2), l0, scales
        self.integers = screens.low_dtype == torch.int8
        self.unit = UNIT_INT8 if self.integers else torch.finfo(screens.product.dtype).eps
        self.grown = False
        self.candidates = np.zeros(len(self.blocks), np.int64)

    def begin(self, rows_in: Tensor, rows_out: Tensor) -> None:
        """Takes in a batch of raw rows."""
        self.batch = len(rows_in)
        self._prepare(rows_in, rows_out)
        self.active = self._take("active", len(self.blocks), self.batch, dtype=np.int32)
        self.row_bound = np.zeros(self.batch, self.dtype)

    def encode(self) -> None:
        """Finds the pairs."""
        self.workers.run(self._encode, range(len(self.blocks)))
        kept = sum(int(pairs.starts[-1]) for pairs in self.pairs)
        wasted = (int(self.candidates.sum()) - kept) / max(self.batch, 1)
        self.screens.wasteful = self.integers and wasted > self.d_sae / _WASTE[_fallback()]

    def lists(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The active pairs by row: where each row's begin [batch + 1], latents (rising) and activations, in
        buffers that may be longer. Leaves each row's number in `l0` and each latent's in `fired`.
        """
        offsets = self._take("offsets", self.batch + 1, dtype=np.int64)
        self.l0 = self._take("l0", self.batch, dtype=np.int64)
        total = loops.row_offsets(self.active, offsets, self.l0)
        latents = self.buffers.at_least("latents", total, np.int32)
        acts = self.buffers.at_least("acts", total, self.dtype)
        self.fired = np.empty(self.d_sae, np.int64)

        def fill(block: int) -> None:
            part = self.blocks[block]
            loops.fill_rows(
                part.start, self.pairs[block], self.active[block], self.fired[part], latents, acts
            )

        self.workers.run(fill, range(len(self.blocks)))
        return offsets, latents, acts

    def _take(self, name: str, *shape: int, dtype: Any = None) -> np.ndarray:
        return self.buffers.take(name, shape, dtype or self.dtype)

    def _prepare(self, rows_in: Tensor, rows_out: Tensor) -> None:
        """Scaled and centred rows, their norms, and in bfloat16 what the product reads."""
        n, low = self.batch, None if self.integers else self.screens.low_dtype
        # who only encodes has no targets, and gives rows of no width
        width = rows_out.shape[1]
        self.x, self.y = self._take("x", n, self.d_in), self._take("y", n, width)
        self.row_norm, self.row_error = self._take("row norm", n), self._take("row error", n)
        x_low = self._take("x low", n if low else 0, self.d_in, dtype=np.uint16)
        self.product_in = torch.from_numpy(x_low).view(low) if low else torch.from_numpy(self.x)
        parts = parts_of(n, ROWS)
        y_sum, y_square = self._take("y sum", len(parts), width), np.empty(len(parts), self.dtype)
        scales = self.dtype.type(self.scales[0]), self.dtype.type(self.scales[1])
        raw_in, raw_out = _raw(rows_in), _raw(rows_out)

        def prepare(index: int) -> None:
            part = parts[index]
            y_square[index] = loops.prepare_rows(
                raw_in[part], raw_out[part], *scales, self.w["b_in"], self.x[part], self.y[part],
                x_low[part], self.row_norm[part], self.row_error[part], y_sum[index],
            )  # fmt: skip

        self.workers.run(prepare, range(len(parts)))
        self.y_sum, self.y_square = y_sum.sum(0), y_square.sum()
        if self.integers:
            self._prepare_integers(parts)
        self.screens.batches += self.batch > 0

    def _prepare_integers(self, parts: list[slice]) -> None:
        """The centred rows as integers, and the norms that go with them."""
        screens = self.screens
        due = screens.batches % _FIT_EVERY == 0 and (self.changing or screens.batches == 0)
        if due and self.batch:
            screens.fit(self.w["W_enc_t"], self.x, self.workers)
        low = self._take("x int8", self.batch, self.d_in, dtype=np.int8)
        self.row_scale, factor = self._take("row scale", self.batch), 1 / screens.divide
        self.product_in = torch.from_numpy(low)

        def lower(part: slice) -> None:
            lower_rows(
                self.x[part], factor, low[part], self.row_scale[part], self.row_norm[part],
                self.row_error[part],
            )  # fmt: skip

        self.workers.run(lower, parts)

    def _encode(self, block: int) -> None:
        """Product, screen and exact pre-activations of one block of latents."""
        part, thread = self.blocks[block], threading.get_ident()
        width = part.stop - part.start
        room = int(PLANNED * self.l0_planned * self.batch * width / self.d_sae) + 4096
        product, found = None if self.integers else self._product(part), -1
        while found < 0:
            rows = self.buffers.at_least(f"rows {thread}", room, np.int32)
            columns = self.buffers.at_least(f"columns {thread}", room, np.int32)
            if product is None:
                found = self._scan_integers(block, rows, columns)
            else:
                found = loops.scan_block(
                    product, self._above(), self.row_norm, self.row_error, *self._bounds(part), rows, columns
                )
            if found < 0:
                self.grown, room = True, 2 * len(rows)
        self.candidates[block] = found
        self._exact(block, rows, columns, found)

    def sample(self, every: int) -> Tensor:
        """About the pre-activations of every so many-th latent, [batch, some] in fp32."""
        encoder, bias = self.screens.product[::every], self.w["b_enc"][::every].astype(np.float32)
        if not self.integers:
            return (self.product_in @ encoder.T).float() + torch.from_numpy(bias)
        product = torch.empty(self.batch * len(encoder), dtype=torch.int32)
        values = int8_products(self.product_in, encoder.contiguous(), product).float()
        scales = self.row_scale[:, None], self.screens.scale[::every]
        return values * torch.from_numpy(scales[0]) * torch.from_numpy(scales[1]) + torch.from_numpy(bias)

    def _scan_integers(self, block: int, rows: np.ndarray, columns: np.ndarray) -> int:
        """Product and screen of a block in integers, twice as long as bfloat16: some rows at a time, so that
        they fit a core's cache. The pairs found, or -1 if there is no room.
        """
        part, found = self.blocks[block], 0
        scale, above, bounds = self.screens.scale[part], self._above(), self._bounds(part)
        for tile in parts_of(self.batch, _TILE):
            found = scan_integers(
                self._integers(tile, part), self.row_scale[tile], scale, above[tile], self.row_norm[tile],
                self.row_error[tile], *bounds, rows, columns, tile.start, found,
            )  # fmt: skip
            if found < 0:
                break
        return found

    def _integers(self, tile: slice, part: slice) -> np.ndarray:
        """The integer product of some rows and a block."""
        low, encoder = self.product_in[tile], self.screens.product[part]
        product = self.buffers.take(f"product {threading.get_ident()}", (len(low), len(encoder)), np.int32)
        int8_products(low, encoder, torch.from_numpy(product.reshape(-1)))
        return product

    def _above(self) -> np.ndarray:
        """The rows' own bounds, less what the product's rounding may hide."""
        return self.row_bound * self.dtype.type(1 - self.unit)

    def _product(self, part: slice) -> np.ndarray:
        """The screening product of a block; bfloat16 as uint16."""
        low, encoder = self.screens.low_dtype, self.screens.product[part]
        shape, name = (self.batch, len(encoder)), f"product {threading.get_ident()}"
        product = self.buffers.take(name, shape, np.uint16 if low else self.dtype)
        out = torch.from_numpy(product)
        torch.mm(self.product_in, encoder.T, out=out.view(low) if low else out)
        return product

    def _bounds(self, part: slice) -> tuple[np.ndarray, np.ndarray, Any]:
        """What a latent's product must exceed if its pre-activation is to matter, but for the margin of its
        pair; and of that margin the latents' norms and the part which is the same for the block.
        """
        # two errors multiply: of half a unit, or measured
        worst = self.screens.error[part].max()
        bound = least_products(self.gate[part], self.w["b_enc"][part], self.unit, self.half)
        # rounding is also of what the margin holds
        norm = self.screens.norm[part] * self.dtype.type(1 + 2 * self.unit + (worst if self.integers else 0))
        return bound, norm, self.dtype.type(worst + rounded_sums(self.d_in, self.dtype))

    def _exact(self, block: int, rows: np.ndarray, columns: np.ndarray, found: int) -> None:
        part = self.blocks[block]
        width = part.stop - part.start
        values = self.buffers.at_least(f"values {threading.get_ident()}", found, self.dtype)
        pairs = loops.Pairs(
            self._take(f"starts {block}", 2 * width + 1, dtype=np.int64),
            self.buffers.at_least(f"pair rows {block}", found, np.int32),
            self.buffers.at_least(f"pair values {block}", found, self.dtype),
        )
        loops.exact_block(
            self.x, self.w["W_enc_t"][part], self.w["b_enc"][part], self.gate[part], self.row_bound,
            self.half, rows, columns, found, values, *pairs, self.active[block],
        )  # fmt: skip
        self.pairs[block] = pairs


def least_products(gate: np.ndarray, bias: np.ndarray, unit: float, half: Any = 0) -> np.ndarray:
    """What products must exceed, but for their margin, if they and their bias are to come within `half` of
    gates. They are rounded when they are stored, by half a unit at most, and the bound is rounded too.
    """
    return gate - half - bias - unit * (np.abs(gate) + half + np.abs(bias))


def rounded_sums(d_in: int, dtype: Any = np.float32) -> float:
    """What sums in fp32 at best may be off by, beside norms: (1 + eps)^d is below 1 + 2 d eps."""
    return 2 * (d_in + 8) * (2.0**-24 if dtype == np.float32 else 2.0**-52)


def parts_of(length: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _raw(rows: Tensor) -> np.ndarray:
    """Rows as the loops read them: float32, float64, or bfloat16 as uint16."""
    if rows.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        rows = rows.float()
    rows = rows.contiguous()
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
