"""The search of a whole vocabulary for extreme logits, in 8-bit integers."""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int8, Int32, UInt8
from torch import Tensor

from sae.kernels.balance import balancing, evened
from sae.kernels.int8 import int8_products, quantised
from sae.kernels.workers import workers_for

# a tile of products that is still in the cache when it is read, and the product is busy
_TILE_ROWS, _TILE_COLUMNS = 512, 1024
# spans whose bins are held until they are counted
_BINNED_SPANS = 64
# tokens turned and made integers at once
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
    """

    turn: Float[Tensor, "d_model d_model"]
    """What directions are multiplied with."""
    ids: Int32[np.ndarray, " token"]
    """In the order of the search."""
    counted: int
    """The first so many are in the histograms."""
    scale: Float[Tensor, " token"]
    whole: Int8[Tensor, "some d_model"]
    """The first tokens; the others are cut in two."""
    heads: Int8[Tensor, "rest head"]
    tails: UInt8[np.ndarray, "lanes block quad lane four"]
    spread: Float32[np.ndarray, "edge rest"]
    """The norms of what comes from each block on, and behind the last, times scale."""

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
        from sae.kernels.lanes import BLOCK, LANES, Tails, packed  # late: numba takes a second to import
        from viewer.index.extreme_loops import SPAN

        workers = workers_for(torch.get_num_threads())
        turns: list[tuple[Tensor, Tensor, int]] = []
        # by one thread, so that the bits do not depend on how many there are
        workers.run(lambda moments: turns.append(_turned(*moments, BLOCK)), [(directions, covariance)])
        turn, back, head = turns[0]
        other = torch.ones(unembed.shape[1], dtype=torch.bool)
        other[counted] = False
        n_rest = int(other.sum()) // SPAN * SPAN if head < len(turn) else 0
        ids = torch.cat([counted, other.nonzero()[:, 0]])
        n_whole = len(ids) - n_rest
        tokens, scale = unembed.T, torch.empty(len(ids))
        whole = torch.empty(n_whole, len(turn), dtype=torch.int8)
        heads = torch.empty(n_rest, head, dtype=torch.int8)
        n_blocks = (len(turn) - head) // BLOCK
        tails = np.empty((n_rest // LANES, n_blocks, BLOCK // 4, LANES, 4), np.uint8)
        spread = np.empty((n_blocks + 1, n_rest), np.float32)

        def fill(start: int) -> None:
            here = slice(start, min(start + _TURNED, n_whole if start < n_whole else len(ids)))
            ints, scale[here] = quantised((tokens[ids[here]].float() - mean) @ back)
            if start < n_whole:
                whole[here] = ints
                return
            part = slice(here.start - n_whole, here.stop - n_whole)
            tail = ints[:, head:].contiguous().numpy()
            heads[part] = ints[:, :head]
            tails[part.start // LANES : part.stop // LANES] = packed(tail)
            spread[:, part] = Tails.of(tail, scale[here].numpy()).reach.T

        starts = [*range(0, n_whole, _TURNED), *range(n_whole, len(ids), _TURNED)]
        workers.run(fill, starts)
        return cls(
            turn=turn,
            ids=ids.int().numpy(),
            counted=len(counted),
            scale=scale,
            whole=whole,
            heads=heads,
            tails=tails,
            spread=spread,
        )

    def search(
        self,
        ints: Int8[Tensor, "latent d_model"],
        count: int,
        per_std: Float[Tensor, " latent"],
        bins_per_std: int,
        n_bins: int,
    ) -> "Found":
        """The extremes of integer products with the vocabulary, times scale, and how such are spread.

        `ints` are directions, turned; `per_std` makes such products standard deviations.
        """
        # late: numba takes a second to import
        from sae.kernels.lanes import Tails
        from viewer.index.extreme_loops import drop, extremes, no_extremes

        found = Found.empty(len(ints), count, n_bins)
        head = self.heads.shape[1]
        heads, tail = ints[:, :head].contiguous(), ints[:, head:].contiguous().numpy()
        tails = Tails.of(tail, np.ones(len(ints), np.float32))
        cubes, per_bin = np.zeros((2, len(ints))), (per_std * bins_per_std).numpy()
        # so many of those seen first are expected among the `count` of all
        at_first = min(count, int(np.ceil(_MARGIN * count * len(self.whole) / len(self.ids))))

        def search(start: int) -> None:
            part = slice(start, start + _TILE_ROWS)
            rows, room = ints[part], torch.empty(len(ints[part]) * _TILE_COLUMNS, dtype=torch.int32)
            kept = no_extremes(len(rows), count)
            histogram = found.histogram[part].numpy()
            self._search_whole(rows, room, kept, count, per_bin[part], histogram, cubes[0, part])
            if len(self.heads):
                drop(*kept, 0, len(rows), at_first)
                self._search_heads(heads[part], tails.part(part), room, kept, count, cubes[1, part])
            found.scores[part], found.ids[part] = map(torch.from_numpy, extremes(*kept, count))
            found.limits[part] = torch.from_numpy(kept[3])

        workers_for(torch.get_num_threads()).run(search, range(0, len(ints), _TILE_ROWS))
        whole, rest = torch.from_numpy(cubes) * per_std.double() ** 3
        # a head that holds too little says less than a share of the tokens does
        missing = self._tail_variance(tails.reach) * per_std**2
        found.cubes[:] = whole + torch.where(
            missing < _MISSING, rest, whole * (len(self.heads) / max(1, len(self.whole)))
        )
        return found

    def _tail_variance(self, reach: Float32[np.ndarray, "latent edge"]) -> Float[Tensor, " latent"]:
        """About the variance of the tails' products: coordinates of a block are even."""
        if not len(self.heads):
            return torch.zeros(len(reach))
        latents, tokens = torch.from_numpy(reach).square(), torch.from_numpy(self.spread).square().mean(1)
        blocks = latents.diff(dim=1).neg(), tokens.diff().neg()
        n_coordinates = self.whole.shape[1] - self.heads.shape[1]
        return blocks[0] @ blocks[1] * (len(blocks[1]) / n_coordinates)

    def _search_whole(
        self,
        ints: Tensor,
        room: Tensor,
        found: tuple[np.ndarray, ...],
        count: int,
        per_bin: np.ndarray,
        histogram: np.ndarray,
        cubes: np.ndarray,
    ) -> None:
        from viewer.index.extreme_loops import SPAN, count_bins, keep_extremes

        bins, filled = np.empty((len(ints), _BINNED_SPANS + _TILE_COLUMNS // SPAN, SPAN), np.uint8), 0
        for tile in _tiles(0, self.counted) + _tiles(self.counted, len(self.whole)):
            products = int8_products(ints, self.whole[tile], room).numpy()
            filled = keep_extremes(
                products, self.scale[tile].numpy(), self.ids[tile], *found, count, cubes,
                tile.stop <= self.counted, per_bin, histogram.shape[1], bins, filled,
            )  # fmt: skip
            if filled >= _BINNED_SPANS or tile.stop == len(self.whole):
                count_bins(bins, filled, histogram)
                filled = 0

    def _search_heads(
        self,
        heads: Tensor,
        tails: tuple[np.ndarray, ...],
        room: Tensor,
        found: tuple[np.ndarray, ...],
        count: int,
        cubes: np.ndarray,
    ) -> None:
        from sae.kernels.lanes import LANES
        from viewer.index.head_loops import keep_extremes_of_heads

        first = len(self.whole)
        for tile in _tiles(0, len(self.heads)):
            products = int8_products(heads, self.heads[tile], room).numpy()
            here = slice(first + tile.start, first + tile.stop)
            packed = self.tails[tile.start // LANES : tile.stop // LANES]
            tokens = self.scale[here].numpy(), packed, np.ascontiguousarray(self.spread[:, tile])
            keep_extremes_of_heads(products, tails, tokens, self.ids[here], *found, count, cubes)


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


def _tiles(start: int, stop: int) -> list[slice]:
    return [slice(at, min(at + _TILE_COLUMNS, stop)) for at in range(start, stop, _TILE_COLUMNS)]


def _turned(
    directions: Float64[Tensor, "d_model d_model"], covariance: Float64[Tensor, "d_model d_model"], block: int
) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, "d_model d_model"], int]:
    """A^T and A^-1 for products of these moments, and how many coordinates the head has; all if in doubt."""
    d_model = len(covariance)
    turn = balancing(directions, covariance)
    if turn is None:
        return torch.eye(d_model), torch.eye(d_model), d_model
    variance = (turn @ directions @ turn.T).diagonal() ** 2
    missing = 1 - variance.cumsum(0) / variance.sum()
    least = int((missing > 1 - _HELD).sum()) + 1
    head = d_model - (d_model - least) // block * block
    if least > _LARGEST * d_model:
        head = d_model
    turn = evened(turn, [head] + [block] * ((d_model - head) // block))
    return turn.T.float().contiguous(), torch.linalg.inv(turn).float(), head
