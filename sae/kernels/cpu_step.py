"""One step on a CPU in the making; `cpu` says how it goes."""

import dataclasses
import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.kernels import cpu_loops as loops
from sae.kernels.cpu_update import adam, screen_latents, update_block
from sae.kernels.largest import first_bounds, keep_largest
from sae.kernels.step import StepFigures, StepSettings, StepState
from sae.kernels.workers import Workers
from sae.losses import sparsity_gradient, sparsity_value

# columns of the product made at once: a block of pre-activations then fits a core's cache. Rows a part: few
# enough to share out evenly. Neither changes a result.
_BLOCK = 512
_ROWS = 128
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
    def of(cls, state: StepState, low_dtype: torch.dtype | None, workers: Workers) -> "Screens":
        weights = state.weights.W_enc_t
        product = torch.empty_like(weights, dtype=low_dtype) if low_dtype else weights
        low = product.view(torch.uint16).numpy() if low_dtype else np.empty((0, 0), np.uint16)
        norm = np.empty(len(weights), weights.numpy().dtype)
        screens = cls(low_dtype, product, low, norm, np.zeros_like(norm))
        encoder = weights.numpy()
        workers.run(
            lambda part: screen_latents(encoder[part], screens.block(part)),
            _parts(len(weights), _BLOCK),
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


class Step:
    """One step in the making."""

    def __init__(
        self, state: StepState, screens: Screens, settings: StepSettings, buffers: Buffers, workers: Workers
    ) -> None:
        self.state, self.screens, self.settings = state, screens, settings
        self.buffers, self.workers = buffers, workers
        self.w = {name: tensor.numpy() for name, tensor in vars(state.weights).items()}
        self.dtype = self.w["threshold"].dtype
        self.d_sae, self.d_in = self.w["W_enc_t"].shape
        self.d_out = self.w["W_dec"].shape[1]
        self.blocks = _parts(self.d_sae, _BLOCK)
        self.pairs: list[loops.Pairs] = [loops.Pairs(None, None, None)] * len(self.blocks)
        self.jumprelu = settings.support == "jumprelu"
        # the threshold that decides a pair; without one it is 0, since only positive latents are active
        self.gate = self.w["threshold"] if self.jumprelu else np.zeros_like(self.w["threshold"])
        self.half = self.dtype.type(settings.bandwidth / 2 if self.jumprelu else 0)
        self.unit = torch.finfo(screens.product.dtype).eps
        self.grown = False
        self.candidates = np.zeros(len(self.blocks), np.int64)

    def run(self, rows_in: Tensor, rows_out: Tensor) -> StepFigures:
        """The whole step."""
        self.batch = len(rows_in)
        self._prepare(rows_in, rows_out)
        self.active = self._take("active", len(self.blocks), self.batch, dtype=np.int32)
        self.row_bound = np.zeros(self.batch, self.dtype)
        if self.jumprelu:
            self.workers.run(self._encode, range(len(self.blocks)))
        else:
            self._encode_largest()
        self._decode()
        figures = self._figures()
        if figures.finite:
            self._update(figures)
        return figures

    def _take(self, name: str, *shape: int, dtype: Any = None) -> np.ndarray:
        return self.buffers.take(name, shape, dtype or self.dtype)

    def _prepare(self, rows_in: Tensor, rows_out: Tensor) -> None:
        """Scaled and centred rows, their norms, and in bfloat16 what the product reads."""
        n, low = self.batch, self.screens.low_dtype
        self.x, self.y = self._take("x", n, self.d_in), self._take("y", n, self.d_out)
        self.row_norm, self.row_error = self._take("row norm", n), self._take("row error", n)
        x_low = self._take("x low", n if low else 0, self.d_in, dtype=np.uint16)
        self.product_in = torch.from_numpy(x_low).view(low) if low else torch.from_numpy(self.x)
        parts = _parts(n, _ROWS)
        y_sum, y_square = self._take("y sum", len(parts), self.d_out), np.empty(len(parts), self.dtype)
        scales = self.dtype.type(self.state.scale_in), self.dtype.type(self.state.scale_out)
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
        room = int(PLANNED * self.settings.l0_wanted * self.batch * width / self.d_sae) + 4096
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

    def _encode_largest(self) -> None:
        """The same for topk and batchtopk: bounds guessed from a sample of latents, and again without where
        too few pairs passed; then all but the largest are dropped.
        """
        k, by_row = self.settings.k, self.settings.support == "topk"
        self.workers.run(
            lambda _: first_bounds(
                self.product_in, self.screens.product, self.w["b_enc"], k, by_row, self.row_bound
            ),
            [0],
        )
        while True:
            self.workers.run(self._encode, range(len(self.blocks)))
            passed = self.active.sum(0)
            short = passed < k if by_row else np.full(self.batch, passed.sum() < k * self.batch)
            if not (short & (self.row_bound > 0)).any():
                break
            self.row_bound[short] = 0
        keep_largest(self.pairs, k, by_row, self.active)

    def _decode(self) -> None:
        """Lists by row, reconstructions, and g."""
        n = self.batch
        offsets, l0 = self._take("offsets", n + 1, dtype=np.int64), self._take("l0", n, dtype=np.int64)
        total = loops.row_offsets(self.active, offsets, l0)
        latents = self.buffers.at_least("latents", total, np.int32)
        acts = self.buffers.at_least("acts", total, self.dtype)
        self.fired = np.empty(self.d_sae, np.int64)

        def fill(block: int) -> None:
            part = self.blocks[block]
            loops.fill_rows(
                part.start, self.pairs[block], self.active[block], self.fired[part], latents, acts
            )

        self.workers.run(fill, range(len(self.blocks)))
        parts = _parts(n, _ROWS)
        self.g, self.g_sum = self._take("g", n, self.d_out), self._take("g sum", len(parts), self.d_out)
        self.squared_error, self.numbers = np.empty(n, self.dtype), self._numbers()

        def decode(index: int) -> None:
            part = parts[index]
            loops.decode_rows(
                self.w["W_dec"], self.w["b_dec"], self.y[part], offsets[part.start : part.stop + 1],
                latents, acts, self.g[part], self.squared_error[part], self.g_sum[index], self.numbers,
            )  # fmt: skip

        self.workers.run(decode, range(len(parts)))
        self.l0 = torch.from_numpy(l0.astype(self.dtype))

    def _figures(self) -> StepFigures:
        settings, dtype = self.settings, self.l0.dtype
        rate = torch.from_numpy(self.fired).to(dtype) / self.batch
        target = settings.l0_wanted + float(self.state.l0_shift)
        value, rows = torch.zeros((), dtype=dtype), torch.zeros_like(self.l0)
        latents = torch.zeros_like(rate)
        if self.jumprelu:
            value = sparsity_value(settings.sparsity, self.l0, rate, target)
            rows, latents = sparsity_gradient(settings.sparsity, self.l0, rate, target)
        self.gamma_rows, self.gamma_latents = rows.numpy(), latents.numpy()
        total = self.squared_error.sum() + self.row_norm.sum() + self.y_square
        return StepFigures(
            squared_error=torch.from_numpy(self.squared_error),
            l0=self.l0,
            fired=torch.from_numpy(self.fired),
            sparsity=value,
            y_sum=torch.from_numpy(self.y_sum),
            y_square=torch.tensor(self.y_square),
            finite=torch.tensor(bool(np.isfinite(total)) and bool(torch.isfinite(value))),
        )

    def _numbers(self) -> loops.Numbers:
        s, step = self.settings, self.state.steps + 1
        moved = 1 - s.beta1**step
        values = {
            "per_row": 2 / self.batch,
            "bandwidth": s.bandwidth,
            "half": self.half,
            "lr": s.lr,
            "threshold_lr": s.threshold_lr,
            "rate": s.lr / moved,
            "threshold_rate": s.threshold_lr / moved,
            "fall1": 1 - s.beta1,
            "beta2": s.beta2,
            "fall2": 1 - s.beta2,
            "root": (1 - s.beta2**step) ** -0.5,
            "epsilon": s.epsilon,
        }
        return loops.Numbers(**{name: self.dtype.type(value) for name, value in values.items()})

    def _update(self, figures: StepFigures) -> None:
        state, settings = self.state, self.settings
        state.steps += 1
        first = None if state.first is None else {k: v.numpy() for k, v in vars(state.first).items()}
        second = {name: tensor.numpy() for name, tensor in vars(state.second).items()}
        silent_for = state.silent_for.numpy()
        pull = (-1 if settings.pull_after is None else settings.pull_after, self.batch, self.jumprelu)
        b_in_sum = self._take("b_in sum", len(self.blocks), self.d_in)

        def update(block: int) -> None:
            part = self.blocks[block]
            update_block(
                _latents(self.w, part), _latents(first, part, self.dtype), _latents(second, part),
                self.pairs[block], self.gate[part], self.x, self.g, self.gamma_rows,
                self.gamma_latents[part], self.screens.block(part), self.fired[part], silent_for[part],
                pull, b_in_sum[block], self.numbers,
            )  # fmt: skip

        self.workers.run(update, range(len(self.blocks)))
        gradient = self.g_sum.sum(0)
        if state.weights.tied:
            gradient -= b_in_sum.sum(0)
        mean = np.empty(0, self.dtype) if first is None else first["b_dec"]
        adam(self.w["b_dec"], gradient, mean, second["b_dec"], self.numbers.rate, self.numbers)
        if settings.support == "batchtopk":
            self._follow_least()
        wanted = settings.l0_wanted
        missed = min(max(wanted - float(figures.l0.mean()), -wanted / 4), wanted / 4)
        state.l0_shift.add_(settings.l0_gain * missed).clamp_(-wanted / 2, wanted / 2)

    def _follow_least(self) -> None:
        kept = [p.values[: p.starts[-1]] for p in self.pairs]
        least = min((float(v[v > 0].min()) for v in kept if (v > 0).any()), default=None)
        if least is not None:
            share = self.settings.threshold_lr if self.state.steps > 1 else 1.0
            threshold = self.state.weights.threshold
            threshold += share * (least - threshold)


def _parts(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _raw(rows: Tensor) -> np.ndarray:
    """Rows as the loops read them: float32, float64, or bfloat16 as uint16."""
    if rows.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        rows = rows.float()
    rows = rows.contiguous()
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def _latents(arrays: dict[str, np.ndarray] | None, part: slice, dtype: Any = None) -> loops.Latents:
    if arrays is None:
        return loops.Latents(
            np.empty((1, 0), dtype), np.empty(0, dtype), np.empty((1, 0), dtype), np.empty(0, dtype)
        )
    return loops.Latents(*(arrays[name][part] for name in loops.Latents._fields))
