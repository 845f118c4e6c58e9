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
from sae.kernels.cpu_update import screen_latents
from sae.kernels.step import StepWeights
from sae.kernels.workers import Workers

# columns of the product made at once: a block of pre-activations then fits a core's cache. Rows a part: few
# enough to share out evenly. Neither changes a result.
_BLOCK = 512
ROWS = 128
# candidates a row that buffers are made for at first, in multiples of the L0 aimed at
PLANNED = 4


@dataclasses.dataclass
class Screens:
    """What screening reads of one state's encoder."""

    low_dtype: torch.dtype | None
    product: Tensor
    """What the product multiplies: W_enc_t in bfloat16, or itself."""
    low: np.ndarray
    norm: np.ndarray
    error: np.ndarray

    @classmethod
    def of(cls, weights: Tensor, low_dtype: torch.dtype | None, workers: Workers) -> "Screens":
        """Of W_enc_t [d_sae, d_in]."""
        product = torch.empty_like(weights, dtype=low_dtype) if low_dtype else weights
        low = product.view(torch.uint16).numpy() if low_dtype else np.empty((0, 0), np.uint16)
        norm = np.empty(len(weights), weights.numpy().dtype)
        screens = cls(low_dtype, product, low, norm, np.zeros_like(norm))
        encoder = weights.numpy()
        workers.run(
            lambda part: screen_latents(encoder[part], screens.block(part)),
            parts_of(len(weights), _BLOCK),
        )
        return screens

    def block(self, part: slice) -> loops.Screen:
        """Views of a block's share."""
        return loops.Screen(self.low[part], self.norm[part], self.error[part])


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
            held = self._held[name] = np.empty(size, dtype)
        return held


class Forward:
    """The active latents of one batch in the making."""

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
        self.blocks = parts_of(self.d_sae, _BLOCK)
        self.pairs: list[loops.Pairs] = [loops.Pairs(None, None, None)] * len(self.blocks)
        self.gate, self.half, self.l0_planned, self.scales = gate, self.dtype.type(bandwidth / 2), l0, scales
        self.unit = torch.finfo(screens.product.dtype).eps
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
        n, low = self.batch, self.screens.low_dtype
        self.x, self.y = self._take("x", n, self.d_in), self._take("y", n, self.d_out)
        self.row_norm, self.row_error = self._take("row norm", n), self._take("row error", n)
        x_low = self._take("x low", n if low else 0, self.d_in, dtype=np.uint16)
        self.product_in = torch.from_numpy(x_low).view(low) if low else torch.from_numpy(self.x)
        parts = parts_of(n, ROWS)
        y_sum, y_square = self._take("y sum", len(parts), self.d_out), np.empty(len(parts), self.dtype)
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

    def _encode(self, block: int) -> None:
        """Product, screen and exact pre-activations of one block of latents."""
        part, thread = self.blocks[block], threading.get_ident()
        width = part.stop - part.start
        low = self.screens.low_dtype
        product = self.buffers.take(
            f"product {thread}", (self.batch, width), np.uint16 if low else self.dtype
        )
        out = torch.from_numpy(product)
        torch.mm(self.product_in, self.screens.product[part].T, out=out.view(low) if low else out)
        bound, norm, slack = self._bounds(part)
        row_bound = self.row_bound * self.dtype.type(1 - self.unit)
        room = int(PLANNED * self.l0_planned * self.batch * width / self.d_sae) + 4096
        found = -1
        while found < 0:
            rows = self.buffers.at_least(f"rows {thread}", room, np.int32)
            columns = self.buffers.at_least(f"columns {thread}", room, np.int32)
            found = loops.scan_block(
                product, row_bound, self.row_norm, self.row_error, bound, norm, slack, rows, columns,
            )  # fmt: skip
            if found < 0:
                self.grown, room = True, 2 * len(rows)
        self.candidates[block] = found
        self._exact(block, rows, columns, found)

    def _bounds(self, part: slice) -> tuple[np.ndarray, np.ndarray, Any]:
        """What a latent's product must exceed if its pre-activation is to matter, but for the margin of its
        pair; and of that margin the latents' norms and the part which is the same for the block.
        """
        gate, bias = self.gate[part], self.w["b_enc"][part]
        # the product is rounded when it is stored, by half a unit at most; the bound is rounded too
        bound = gate - self.half - bias - self.unit * (np.abs(gate) + self.half + np.abs(bias))
        # that rounding is also of what the margin holds, and two errors of half a unit multiply
        norm = self.screens.norm[part] * self.dtype.type(1 + 2 * self.unit)
        # products are summed in fp32 at best: (1 + eps)^d is below 1 + 2 d eps
        summed = 2 * (self.d_in + 8) * (2.0**-24 if self.dtype == np.float32 else 2.0**-52)
        slack = self.screens.error[part].max() + summed
        return bound, norm, self.dtype.type(slack)

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


def parts_of(length: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _raw(rows: Tensor) -> np.ndarray:
    """Rows as the loops read them: float32, float64, or bfloat16 as uint16."""
    if rows.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        rows = rows.float()
    rows = rows.contiguous()
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
