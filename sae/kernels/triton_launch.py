"""One step of `sae.kernels.triton_step`: what is launched, in which order, and on which memory."""

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int32, Int64
from torch import Tensor

from sae.kernels.shards import Shard
from sae.kernels.step import StepFigures, StepSettings, StepState
from sae.kernels.triton_largest import mask_largest
from sae.losses import sparsity_gradient, sparsity_value

# latents a program of `move_latents`: more carry less of b_in's gradient through memory, but balance worse
_GROUP = 4


@dataclasses.dataclass
class Screens:
    """What the kernel keeps of one state: kept in step by `move_encoder`."""

    dtype: torch.dtype
    low: Float[Tensor, "d_sae d_in"]
    """W_enc_t in the product's dtype: in float32 W_enc_t itself."""
    reach: Float[Tensor, " d_sae"]
    """The latents' part of the bound on the product's error: see `triton_loops.screen`."""
    steps: Float64[Tensor, ""]
    """Steps made, without those refused."""
    ratio: float
    slack: float

    @classmethod
    def of(cls, state: StepState, dtype: torch.dtype) -> "Screens":
        """From the weights as they are."""
        weights = state.weights.W_enc_t
        low = weights.to(dtype)
        # about the norm of a vector's rounding error by its own, where the bound of `screen` is tightest
        ratio = 0.22 * torch.finfo(dtype).eps
        # a sum of d_in products in fp32, in any order, by the product and again by the exact kernels
        slack = (weights.shape[1] + 16) * 2.0**-22
        rounded = low.float()
        norm, error = rounded.norm(dim=1), (rounded - weights).norm(dim=1)
        reach = torch.hypot(ratio * norm, error) + slack * norm
        steps = torch.tensor(float(state.steps), dtype=torch.float64, device=weights.device)
        return cls(dtype, low, reach, steps, ratio, slack)


class Buffers:
    """Memory that is kept from step to step and grows when a step needs more."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A tensor of that shape on `like`'s device, of any content; the same memory for the same name."""
        key, size = (name, dtype, like.device), math.prod(shape)
        held = self._held.get(key)
        if held is None or len(held) < size:
            held = self._held[key] = torch.empty(size, dtype=dtype, device=like.device)
        return held[:size].view(shape)

    def held(self) -> list[Tensor]:
        """All that is held now."""
        return list(self._held.values())


class Step:
    """One step in the making."""

    def __init__(
        self,
        kernels: tuple[Any, Any],
        buffers: Buffers,
        pairs_per_row: int,
        state: StepState,
        screens: Screens,
        settings: StepSettings,
        given: Float64[Tensor, "12"],
    ) -> None:
        self.loops, self.update = kernels
        self.buffers, self.pairs_per_row = buffers, pairs_per_row
        self.state, self.screens, self.settings, self.shard = state, screens, settings, state.shard
        self.options, self.rates, self.betas = given[:6], given[6:8], given[10:]
        self.wanted, self.gain = given[8].float(), given[9].float()
        self.d_sae, self.d_in = state.weights.W_enc_t.shape
        self.d_out = state.weights.W_dec.shape[1]
        widths = [max(16, _power_of_2(width)) for width in (self.d_in, self.d_out)]
        # 8192 numbers a tile are 64 registers a thread
        tile = min(32, max(1, 8192 // max(widths)))
        self.pair_shape = {"TILE": tile, "WIDTH_IN": widths[0], "WIDTH_OUT": widths[1]}
        self.pair_shape["num_warps"] = 4 if max(widths) <= 2048 else 8
        self.jump = settings.support == "jumprelu"
        self.has_low = settings.product_dtype != torch.float32
        # where beta1 is 0 nothing reads or writes the first moments: any tensor may stand there
        self.first = state.second if state.first is None else state.first
        self.has_first = state.first is not None

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """As `Buffers.take`, on the state's device."""
        return self.buffers.take(name, shape, self.state.weights.W_enc_t, dtype)

    def run(
        self, rows_in: Float[Tensor, "batch d_in"], rows_out: Float[Tensor, "batch d_out"]
    ) -> StepFigures:
        """The whole step."""
        batch = len(rows_in)
        x, low, reach = self.centre(rows_in)
        by_row = self.take("by_row", batch, _words(self.d_sae), dtype=torch.int32)
        by_latent = self.take("by_latent", self.d_sae, _words(batch), dtype=torch.int32)
        if self.jump:
            self.screen(low, reach, by_row, by_latent)
        else:
            weights = self.state.weights
            by_batch = self.settings.support == "batchtopk"
            product = x, weights.W_enc_t, weights.b_enc
            mask_largest(*product, self.settings.k, by_batch, by_row, by_latent, self.shard)
        g, active, rows = self.code(x, rows_out, by_row)
        gate_rows, finite, numbers = self.decide(rows)
        sums, carried = self.move_latents(x, g, gate_rows, active, by_latent, numbers)
        rate = sums[0] / batch
        l0 = rows[1]
        sparsity, gate_latents = l0.new_zeros(()), rate
        if self.jump:
            target = self.wanted + self.state.l0_shift
            sparsity = sparsity_value(self.settings.sparsity, l0, rate, target)
            gate_latents = sparsity_gradient(self.settings.sparsity, l0, rate, target)[1]
        if self.shard is not None and self.settings.sparsity.kind == "frequency":
            self.shard.add(sparsity)
        self.move_vectors(sums, gate_latents, numbers, batch)
        self.move_bias(g, carried, numbers)
        self.steer(l0, finite)
        return StepFigures(
            squared_error=rows[0],
            l0=l0,
            fired=torch.where(finite, sums[0], 0.0).long(),
            sparsity=sparsity,
            y_sum=rows_out.sum(0, dtype=torch.float32) / self.state.scale_out,
            y_square=rows[3].sum(),
            finite=finite,
        )

    def centre(
        self, rows_in: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_in"], Float[Tensor, " batch"]]:
        """x, what the product multiplies, and the rows' reach."""
        batch, width = len(rows_in), self.pair_shape["WIDTH_IN"]
        x, reach = self.take("x", batch, self.d_in), self.take("reach", batch)
        low = self.take("low_x", batch, self.d_in, dtype=self.settings.product_dtype) if self.has_low else x
        tile = min(16, max(1, 4096 // width))
        self.loops.centre_rows[(_blocks(batch, tile),)](
            rows_in, self.state.weights.b_in, x, low, reach, batch, self.d_in, float(self.state.scale_in),
            self.screens.ratio, TILE=tile, WIDTH=width, HAS_LOW=self.has_low, num_warps=4,
        )  # fmt: skip
        return x, low, reach

    def screen(
        self,
        low: Float[Tensor, "batch d_in"],
        reach: Float[Tensor, " batch"],
        by_row: Int32[Tensor, "batch words"],
        by_latent: Int32[Tensor, "d_sae row_words"],
    ) -> None:
        """Both masks of the pairs that the product cannot rule out."""
        w, batch = self.state.weights, len(low)
        rows, latents, depth = (128, 256, 64) if self.has_low else (64, 64, 32)
        grid = _blocks(batch, rows) * _blocks(self.d_sae, latents)
        self.loops.screen[(grid,)](
            low, self.screens.low, reach, self.screens.reach, w.b_enc, w.threshold, by_row, by_latent,
            batch, self.d_in, self.d_sae, self.settings.bandwidth / 2,
            BM=rows, BN=latents, BK=depth, GROUP=8, WIDEN=not low.is_cuda, num_warps=8, num_stages=3,
        )  # fmt: skip

    def entries(
        self, mask: Int32[Tensor, "row words"], capacity: int
    ) -> tuple[Int64[Tensor, " row"], Int32[Tensor, " capacity"]]:
        """A mask as lists: where each row's ends, and the lists one after the other."""
        n_rows, n_words = mask.shape
        words = min(512, _power_of_2(n_words))
        shape = {"TILE": max(1, 1024 // words), "WORDS": words, "num_warps": 4}
        grid = (_blocks(n_rows, shape["TILE"]),)
        counts = self.take("counts", n_rows, dtype=torch.int32)
        ends = self.take("ends", n_rows, dtype=torch.int64)
        index = self.take("index", capacity, dtype=torch.int32)
        self.loops.count_bits[grid](mask, counts, n_rows, n_words, **shape)
        torch.cumsum(counts, 0, out=ends)
        self.loops.list_bits[grid](mask, ends, index, n_rows, n_words, capacity, **shape)
        return ends, index

    def code(
        self,
        x: Float[Tensor, "batch d_in"],
        rows_out: Float[Tensor, "batch d_out"],
        by_row: Int32[Tensor, "batch words"],
    ) -> tuple[Float[Tensor, "batch d_out"], Int32[Tensor, "batch words"], Float[Tensor, "5 batch"]]:
        """g, the mask of active pairs by rows, and the rows' figures as `code_rows` has them."""
        w, batch = self.state.weights, len(x)
        capacity = batch * self.pairs_per_row
        ends, index = self.entries(by_row, capacity)
        both = self.take("g", batch * (self.d_out + 1))
        g = both[: batch * self.d_out].view(batch, self.d_out)
        active = self.take("active", *by_row.shape, dtype=torch.int32).zero_()
        # not from the buffers: the figures are given away
        rows = torch.empty(5, batch, device=x.device)
        self.loops.code_rows[(batch,)](
            x, rows_out, w.W_enc_t, w.b_enc, w.W_dec, w.b_dec, w.threshold, by_row, active, index, ends,
            g, rows, batch, self.d_in, self.d_out, self.d_sae, capacity, float(self.state.scale_out),
            JUMP=self.jump, PART=self.shard is not None, **self.pair_shape,
        )  # fmt: skip
        if self.shard is not None:
            self.join(self.shard, both, g, rows, rows_out)
        return g, active, rows

    def join(
        self,
        shard: Shard,
        both: Float[Tensor, " numbers"],
        g: Float[Tensor, "batch d_out"],
        rows: Float[Tensor, "5 batch"],
        rows_out: Float[Tensor, "batch d_out"],
    ) -> None:
        """Makes of a shard's part what `code_rows` leaves of a whole dictionary. `both` is the memory that g
        begins, with room for the rows' L0 behind it.
        """
        both[g.numel() :] = rows[1]
        shard.add(both)
        y = rows_out.float() / self.state.scale_out
        error = g + self.state.weights.b_dec - y
        rows[0], rows[1] = error.square().sum(1), both[g.numel() :]
        rows[3] = y.square().sum(1)
        rows[4] += y.sum(1)
        torch.mul(error, 2 / len(error), out=g)

    def decide(
        self, rows: Float[Tensor, "5 batch"]
    ) -> tuple[Float[Tensor, " batch"], Bool[Tensor, ""], Float64[Tensor, "8"]]:
        """The sparsity term's derivative by row, whether the step is to be made, and `numbers`."""
        squared_error, l0, least, _, checks = rows
        # a pre-activation that is not a number is not active: it shows in the weights it comes of
        check = squared_error.mean() + checks.sum()
        check = check + self.screens.reach.sum() + self.state.weights.b_enc.sum()
        gate_rows = l0
        if self.jump:
            target = self.wanted + self.state.l0_shift
            # the latents' rates are not known yet; whether the value is finite does not depend on them
            rate = l0.new_ones(1)
            check = check + sparsity_value(self.settings.sparsity, l0, rate, target)
            gate_rows = sparsity_gradient(self.settings.sparsity, l0, rate, target)[0]
        finite, least = torch.isfinite(check), least.amin()
        if self.shard is not None:
            finite = self.shard.all(finite)
            if self.settings.support == "batchtopk":
                least = self.shard.gather(least).amin()
        steps = self.screens.steps + 1
        left = 1 - self.betas**steps
        share = torch.where(steps > 1, self.rates[1], 1.0)
        parts = (finite, self.rates / left[0], left[1].sqrt(), self.rates, least, share)
        numbers = torch.cat([part.double().view(-1) for part in parts])
        self.screens.steps += finite
        return gate_rows, finite, numbers

    def move_latents(
        self,
        x: Float[Tensor, "batch d_in"],
        g: Float[Tensor, "batch d_out"],
        gate_rows: Float[Tensor, " batch"],
        active: Int32[Tensor, "batch words"],
        by_latent: Int32[Tensor, "d_sae row_words"],
        numbers: Float64[Tensor, "8"],
    ) -> tuple[Float[Tensor, "5 d_sae"], Float[Tensor, "group d_in"]]:
        """Moves both matrices; gives the sums that the vectors need."""
        w, first, second, screens = self.state.weights, self.first, self.state.second, self.screens
        batch = len(x)
        capacity = batch * self.pairs_per_row
        ends, index = self.entries(by_latent, capacity)
        groups = _blocks(self.d_sae, _GROUP)
        sums, carried = self.take("sums", 5, self.d_sae), self.take("carried", groups, self.d_in)
        self.update.move_latents[(groups,)](
            x, g, gate_rows, w.W_enc_t, w.W_dec, first.W_enc_t, first.W_dec, second.W_enc_t, second.W_dec,
            w.b_enc, w.threshold, screens.low, screens.reach, active, by_latent, index, ends, sums, carried,
            numbers, self.options, batch, self.d_in, self.d_out, self.d_sae, capacity,
            screens.ratio, screens.slack, JUMP=self.jump, HAS_FIRST=self.has_first, HAS_LOW=self.has_low,
            GROUP=_GROUP, **self.pair_shape,
        )  # fmt: skip
        return sums, carried

    def move_vectors(
        self,
        sums: Float[Tensor, "5 d_sae"],
        gate_latents: Float[Tensor, " d_sae"],
        numbers: Float64[Tensor, "8"],
        batch: int,
    ) -> None:
        """Moves what is one number a latent."""
        w, first, second = self.state.weights, self.first, self.state.second
        pull, follow = self.settings.pull_after is not None, self.settings.support == "batchtopk"
        self.update.move_vectors[(_blocks(self.d_sae, 256),)](
            w.b_enc, w.threshold, self.state.silent_for, first.b_enc, first.threshold, second.b_enc,
            second.threshold, sums, gate_latents, numbers, self.options, batch, self.d_sae,
            JUMP=self.jump, FOLLOW=follow, PULL=pull, HAS_FIRST=self.has_first, WIDTH=256, num_warps=4,
        )  # fmt: skip

    def move_bias(
        self,
        g: Float[Tensor, "batch d_out"],
        carried: Float[Tensor, "group d_in"],
        numbers: Float64[Tensor, "8"],
    ) -> None:
        """Moves b_dec, by the input's share too where it is b_in."""
        w, gradient = self.state.weights, g.sum(0)
        if self.shard is not None and self.shard.index > 0:
            # one shard's, so that b_dec stays the same on all, to the last bit, whatever their machines are
            gradient.zero_()
        if w.tied:
            gradient -= carried.sum(0)
        if self.shard is not None:
            self.shard.add(gradient)
        self.update.move_bias[(_blocks(self.d_out, 256),)](
            w.b_dec, gradient, self.first.b_dec, self.state.second.b_dec, numbers, self.options, self.d_out,
            HAS_FIRST=self.has_first, WIDTH=256, num_warps=4,
        )  # fmt: skip

    def steer(self, l0: Float[Tensor, " batch"], finite: Bool[Tensor, ""]) -> None:
        """Moves l0_shift."""
        wanted, shift = self.wanted, self.state.l0_shift
        missed = (wanted - l0.mean()).clamp(-wanted / 4, wanted / 4)
        moved = (shift + self.gain * missed).clamp(-wanted / 2, wanted / 2)
        shift.copy_(torch.where(finite, moved, shift))


def _blocks(size: int, block: int) -> int:
    """Blocks that cover a size."""
    return -(-size // block)


def _words(bits: int) -> int:
    """int32 words that hold so many bits."""
    return _blocks(bits, 32)


def _power_of_2(size: int) -> int:
    """The least power of two that is no less."""
    return 1 << (size - 1).bit_length()
