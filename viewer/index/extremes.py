"""The search of a whole vocabulary for extreme logits, in 8-bit integers."""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int, Int8, Int32, UInt8
from torch import Tensor

from sae.kernels.balance import balancing, evened
from sae.kernels.int8 import quantised
from sae.kernels.workers import workers_for

# directions searched for by one thread at a time, which stay in its core's cache
_ROWS = 512
# tokens turned and made integers at once, in whole sixteens
_TURNED = 4096
# what a head holds of a logit's variance; one of more than so many coordinates is not worth it
_HELD, _LARGEST = 0.993, 0.8
# where a head misses so much of a direction's, its logits' cubes say too little
_MISSING = 0.1
# what is let by may be so many times what is wanted, so that there is enough of it
_MARGIN = 1.5


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SearchedVocabulary:
    """An unembedding's centred columns in balanced coordinates (`sae.kernels.balance`), as integers.

    Tokens that a histogram counts are multiplied whole, and say what a token must exceed to be among the
    most extreme. Of the others the heads are, and only where the tail could carry it beyond that the tail is.
    Behind the last there are zeros up to whole sixteens.
    """

    turn: Float[Tensor, "d_model turned"]
    """What directions are multiplied with."""
    ids: Int32[np.ndarray, " token"]
    """In the order of the search."""
    counted: int
    """The first so many are in the histograms."""
    scale: Float32[np.ndarray, " column"]
    packed: UInt8[np.ndarray, "lanes block quad lane four"]
    spread: Float32[np.ndarray, "edge column"]
    """The norms of what comes from each block on, and behind the last, times scale."""
    head: int
    """How many blocks it has; all where tokens have no main directions."""

    @classmethod
    @torch.inference_mode()
    def of(
        cls,
        unembed: Float[Tensor, "d_model d_vocab"],
        mean: Float[Tensor, " d_model"],
        directions: Float64[Tensor, "d_model d_model"],
        covariance: Float64[Tensor, "d_model d_model"],
        counted: Int[Tensor, " counted"],
    ) -> "SearchedVocabulary":
        """For directions of such second moments; `counted` are the ids that histograms count, rising."""
        from sae.kernels.lanes import BLOCK, LANES, Blocks, packed  # late: numba takes a second to import

        workers = workers_for(torch.get_num_threads())
        turns: list[tuple[Tensor, Tensor, int]] = []
        # by one thread, so that the bits do not depend on how many there are
        workers.run(lambda moments: turns.append(_turned(*moments, BLOCK)), [(directions, covariance)])
        turn, back, head = turns[0]
        other = torch.ones(unembed.shape[1], dtype=torch.bool)
        other[counted] = False
        ids, tokens = torch.cat([counted, other.nonzero()[:, 0]]), unembed.T
        n_blocks, n = turn.shape[1] // BLOCK, -(-len(ids) // LANES) * LANES
        scale, spread = np.zeros(n, np.float32), np.zeros((n_blocks + 1, n), np.float32)
        all_packed = np.empty((n // LANES, n_blocks, BLOCK // 4, LANES, 4), np.uint8)

        def fill(start: int) -> None:
            some = ids[start : start + _TURNED]
            ints, scales = quantised((tokens[some].float() - mean) @ back)
            here, zeros = slice(start, start + len(some)), (0, 0, 0, -len(some) % LANES)
            scale[here] = scales.numpy()
            spread[:, here] = Blocks.of(ints.numpy(), scale[here]).reach.T
            sixteens = slice(start // LANES, -(-here.stop // LANES))
            all_packed[sixteens] = packed(F.pad(ints, zeros).numpy())

        workers.run(fill, range(0, len(ids), _TURNED))
        return cls(
            turn=turn,
            ids=ids.int().numpy(),
            counted=len(counted),
            scale=scale,
            packed=all_packed,
            spread=spread,
            head=head,
        )

    def search(
        self,
        ints: Int8[Tensor, "latent turned"],
        count: int,
        per_std: Float[Tensor, " latent"],
        bins_per_std: int,
        n_bins: int,
    ) -> "Found":
        """The extremes of integer products with the vocabulary, times scale, and how such are spread.

        `ints` are directions, turned; `per_std` makes such products standard deviations.
        """
        # late: numba takes a second to import
        from sae.kernels.lanes import LANES, Blocks
        from viewer.index.extreme_loops import drop, extremes, keep_extremes, no_extremes

        found = Found.empty(len(ints), count, n_bins)
        blocks = Blocks.of(ints.numpy(), np.ones(len(ints), np.float32))
        tokens = self.scale, self.packed, self.spread
        cubes, per_bin = np.zeros((2, len(ints))), (per_std * bins_per_std).numpy()
        whole, end, n_blocks = -(-self.counted // LANES), len(self.packed), len(self.spread) - 1
        # so many of those seen first are expected among the `count` of all
        at_first = min(count, int(np.ceil(_MARGIN * count * whole / end)))

        def search(start: int) -> None:
            part = slice(start, start + _ROWS)
            kept, rows = no_extremes(len(ints[part]), count), blocks.part(part)
            histogram = per_bin[part], found.histogram[part].numpy()

            def take_in(head: int, groups: tuple[int, int], counted: int, cubes: np.ndarray) -> None:
                keep_extremes(
                    rows, head, tokens, self.ids, groups, counted, *histogram, *kept, count, cubes[part]
                )

            take_in(n_blocks, (0, whole), self.counted, cubes[0])
            if self.head < n_blocks:
                drop(*kept, 0, len(kept[2]), at_first)
            take_in(self.head, (whole, end), 0, cubes[1])
            found.scores[part], found.ids[part] = map(torch.from_numpy, extremes(*kept, count))
            found.limits[part] = torch.from_numpy(kept[3])

        workers_for(torch.get_num_threads()).run(search, range(0, len(ints), _ROWS))
        of_whole, rest = torch.from_numpy(cubes) * per_std.double() ** 3
        # a head that holds too little says less than a share of the tokens does
        missing = self._tail_variance(blocks.reach) * per_std**2
        found.cubes[:] = of_whole + torch.where(
            missing < _MISSING, rest, of_whole * (end / max(1, whole) - 1)
        )
        return found

    def _tail_variance(self, reach: Float32[np.ndarray, "latent edge"]) -> Float[Tensor, " latent"]:
        """About the variance of the tails' products, as if the coordinates of a block were even."""
        if self.head == len(self.spread) - 1:
            return torch.zeros(len(reach))
        sides = torch.from_numpy(reach).square(), torch.from_numpy(self.spread).square().mean(1)
        latents, tokens = (side[..., self.head :].diff().neg() for side in sides)
        return latents @ tokens * ((len(self.spread) - 1) / self.turn.shape[1])


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What a search found."""

    scores: Float[Tensor, "latent 2 count"]
    """About the `count` largest products, and the largest negated; -inf where fewer were found."""
    ids: Int[Tensor, "latent 2 count"]
    limits: Float[Tensor, "latent 2"]
    """What the score of no other token exceeds."""
    histogram: Int32[Tensor, "latent bin"]
    """Of the counted tokens, 0 in the middle of the middle bin; the end bins also hold what lies beyond."""
    cubes: Float64[Tensor, " latent"]
    """About the sum of all cubes, in standard deviations: most are of heads alone."""

    @classmethod
    def empty(cls, n: int, count: int, n_bins: int) -> "Found":
        """Room for so many directions."""
        scores, histogram = torch.empty(n, 2, count), torch.zeros(n, n_bins, dtype=torch.int32)
        ids = torch.empty(scores.shape, dtype=torch.int64)
        return cls(scores, ids, torch.empty(n, 2), histogram, torch.empty(n, dtype=torch.float64))


def _turned(
    directions: Float64[Tensor, "d_model d_model"], covariance: Float64[Tensor, "d_model d_model"], block: int
) -> tuple[Float[Tensor, "d_model turned"], Float[Tensor, "d_model turned"], int]:
    """A^T and A^-1 for products of these moments, behind zeros that make the coordinates whole blocks; and
    how many blocks the head has, all if in doubt.
    """
    d_model = len(covariance)
    zeros = -d_model % block
    turn, head = balancing(directions, covariance), (zeros + d_model) // block
    if turn is None:
        turn = torch.eye(d_model, dtype=torch.float64)
    else:
        variance = (turn @ directions @ turn.T).diagonal() ** 2
        missing = 1 - variance.cumsum(0) / variance.sum()
        least = int((missing > 1 - _HELD).sum()) + 1
        head = -(-(zeros + least) // block) if least <= _LARGEST * d_model else head
        first = head * block - zeros
        turn = evened(turn, [first] + [block] * ((d_model - first) // block))
    sides = turn.T, torch.linalg.inv(turn)
    turned, back = (F.pad(side.float(), (zeros, 0)) for side in sides)
    return turned, back, head
