"""One step on a CPU in the making; `cpu` says how it goes."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.kernels import cpu_loops as loops
from sae.kernels.cpu_forward import ROWS, Buffers, Forward, Screens, parts_of
from sae.kernels.cpu_update import adam, update_block
from sae.kernels.largest import SAMPLE, first_bounds, keep_largest
from sae.kernels.shards import Shard
from sae.kernels.step import StepFigures, StepSettings, StepState
from sae.kernels.workers import Workers
from sae.losses import sparsity_gradient, sparsity_value


class Step(Forward):
    """One step in the making."""

    changing = True

    def __init__(
        self, state: StepState, screens: Screens, settings: StepSettings, buffers: Buffers, workers: Workers
    ) -> None:
        self.state, self.settings, self.shard = state, settings, state.shard
        self.jumprelu = settings.support == "jumprelu"
        threshold = state.weights.threshold.numpy()
        super().__init__(
            state.weights,
            screens,
            buffers,
            workers,
            # the threshold decides a pair; without one it is 0, since only positive latents are active
            gate=threshold if self.jumprelu else np.zeros_like(threshold),
            bandwidth=settings.bandwidth if self.jumprelu else 0.0,
            l0=settings.l0_wanted / (self.shard.count if self.shard else 1),
            scales=(state.scale_in, state.scale_out),
        )

    def run(self, rows_in: Tensor, rows_out: Tensor) -> StepFigures:
        """The whole step."""
        self.begin(rows_in, rows_out)
        if self.jumprelu:
            self.encode()
        else:
            self._encode_largest()
        self._decode()
        figures = self._figures()
        if figures.finite:
            self._update(figures)
        return figures

    def _encode_largest(self) -> None:
        """The same for topk and batchtopk: bounds guessed from a sample of latents, and again without where
        too few pairs passed; then all but the largest are dropped.
        """
        k, by_row = self.settings.k, self.settings.support == "topk"
        every = max(1, self.d_sae // SAMPLE)
        self.workers.run(lambda _: first_bounds(self.sample(every), every, k, by_row, self.row_bound), [0])
        while True:
            self.encode()
            passed = self.active.sum(0)
            short = passed < k if by_row else np.full(self.batch, passed.sum() < k * self.batch)
            if not (short & (self.row_bound > 0)).any():
                break
            self.row_bound[short] = 0
        keep_largest(self.pairs, k, by_row, self.active, self.shard)

    def _decode(self) -> None:
        """Lists by row, reconstructions, and g."""
        n = self.batch
        lists = self.lists()
        parts = parts_of(n, ROWS)
        self.squared_error, self.numbers = np.empty(n, self.dtype), self._numbers()
        self.g_sum = self._take("g sum", len(parts), self.d_out)
        if self.shard is not None:
            self._decode_together(self.shard, parts, *lists)
            return
        self.g, (offsets, latents, acts) = self._take("g", n, self.d_out), lists

        def decode(index: int) -> None:
            part = parts[index]
            loops.decode_rows(
                self.w["W_dec"], self.w["b_dec"], self.y[part], offsets[part.start : part.stop + 1],
                latents, acts, self.g[part], self.squared_error[part], self.g_sum[index], self.numbers,
            )  # fmt: skip

        self.workers.run(decode, range(len(parts)))

    def _decode_together(
        self, shard: Shard, parts: list[slice], offsets: np.ndarray, latents: np.ndarray, acts: np.ndarray
    ) -> None:
        """The same with the other shards, whose parts of the reconstructions and L0 are added to its own."""
        n, size = self.batch, self.batch * self.d_out
        both = self._take("g", size + n)
        self.g = both[:size].reshape(n, self.d_out)
        bias = self.w["b_dec"] if shard.index == 0 else np.zeros_like(self.w["b_dec"])

        def decode(index: int) -> None:
            part = parts[index]
            loops.decode_part(
                self.w["W_dec"], bias, offsets[part.start : part.stop + 1], latents, acts, self.g[part]
            )

        def miss(index: int) -> None:
            part = parts[index]
            loops.miss_rows(
                self.y[part], self.g[part], self.squared_error[part], self.g_sum[index], self.numbers
            )

        self.workers.run(decode, range(len(parts)))
        both[size:] = self.l0
        shard.add(torch.from_numpy(both))
        self.l0 = both[size:]
        self.workers.run(miss, range(len(parts)))

    def _figures(self) -> StepFigures:
        settings, l0 = self.settings, torch.from_numpy(self.l0.astype(self.dtype))
        dtype = l0.dtype
        rate = torch.from_numpy(self.fired).to(dtype) / self.batch
        target = settings.l0_wanted + float(self.state.l0_shift)
        value, rows = torch.zeros((), dtype=dtype), torch.zeros_like(l0)
        latents = torch.zeros_like(rate)
        if self.jumprelu:
            value = sparsity_value(settings.sparsity, l0, rate, target)
            rows, latents = sparsity_gradient(settings.sparsity, l0, rate, target)
        self.gamma_rows, self.gamma_latents = rows.numpy(), latents.numpy()
        if self.shard is not None and settings.sparsity.kind == "frequency":
            self.shard.add(value)
        total = self.squared_error.sum() + self.row_norm.sum() + self.y_square
        finite = torch.tensor(bool(np.isfinite(total)) and bool(torch.isfinite(value)))
        if self.shard is not None:
            finite = self.shard.all(finite)
        return StepFigures(
            squared_error=torch.from_numpy(self.squared_error),
            l0=l0,
            fired=torch.from_numpy(self.fired),
            sparsity=value,
            y_sum=torch.from_numpy(self.y_sum),
            y_square=torch.tensor(self.y_square),
            finite=finite,
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
        if self.shard is not None and self.shard.index > 0:
            # one shard's, so that b_dec stays the same on all, to the last bit, whatever their machines are
            gradient[:] = 0
        if state.weights.tied:
            gradient -= b_in_sum.sum(0)
        if self.shard is not None:
            self.shard.add(torch.from_numpy(gradient))
        mean = np.empty(0, self.dtype) if first is None else first["b_dec"]
        adam(self.w["b_dec"], gradient, mean, second["b_dec"], self.numbers.rate, self.numbers)
        if settings.support == "batchtopk":
            self._follow_least()
        wanted = settings.l0_wanted
        missed = min(max(wanted - float(figures.l0.mean()), -wanted / 4), wanted / 4)
        state.l0_shift.add_(settings.l0_gain * missed).clamp_(-wanted / 2, wanted / 2)

    def _follow_least(self) -> None:
        kept = [p.values[: p.starts[-1]] for p in self.pairs]
        least = min((float(v[v > 0].min()) for v in kept if (v > 0).any()), default=math.inf)
        if self.shard is not None:
            least = float(self.shard.gather(self.state.l0_shift.new_tensor(least)).amin())
        if math.isfinite(least):
            share = self.settings.threshold_lr if self.state.steps > 1 else 1.0
            threshold = self.state.weights.threshold
            threshold += share * (least - threshold)


def _latents(arrays: dict[str, np.ndarray] | None, part: slice, dtype: Any = None) -> loops.Latents:
    if arrays is None:
        return loops.Latents(
            np.empty((1, 0), dtype), np.empty(0, dtype), np.empty((1, 0), dtype), np.empty(0, dtype)
        )
    return loops.Latents(*(arrays[name][part] for name in loops.Latents._fields))
