"""The weights that a dictionary's training begins with, placed by some of its rows."""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from activations.ring import RowStatistics
from sae.kernels.shards import Shard, nth_largest
from sae.kernels.step import StepWeights
from train.config import TrainConfig

# pre-activations looked at to place the first thresholds: a quantile of so many is known to a few parts in a
# thousand
_SAMPLE = 2**24
# values searched at once on a GPU: a search takes several times their memory
_SEARCHED = 2**20
# on a CPU one value of so many tells about where the n-th largest is: a prime, so as to meet all latents
_PER_LOOKED_AT = 61
# values that a bound may let by, as a share of all
_LET_BY = 0.25
# of so many directions, one may be taken for a strongest one
_PER_PRINCIPAL = 16
# rows that are all but within their strongest directions have no rest to be measured by: at least this share
# of their energy is taken to be outside
_LEAST_OUTSIDE = 1e-4
# latents whose random numbers are drawn together: a multiple of 16
_DRAWN = 4096
PLACED_TOGETHER = 4
"""Sites that threads of a CPU place at the same time, at most: each takes memory for its pre-activations."""
_TINY = torch.finfo(torch.float32).tiny


class Begun(NamedTuple):
    """What a dictionary begins with."""

    weights: StepWeights
    scale: float
    """What rows are divided by."""
    bandwidth: float
    """In scaled units."""


def first_weights(
    config: TrainConfig,
    site: str,
    statistics: RowStatistics,
    first_rows: Float[Tensor, "row d_in"],
    shard: Shard | None = None,
) -> Begun:
    """The weights before the first step, on the rows' device; of a shard, its latents of the whole
    dictionary's, to rounding.
    """
    device = first_rows.device
    generator = torch.Generator().manual_seed(_site_seed(config.seed, site))
    mean = statistics.mean.to(device)
    strongest, rest = _principal_directions(_copied(first_rows).sub_(mean), config)
    scale, latents = statistics.scale * rest, slice(0, config.width)
    if shard is not None:
        # the first shard's, since another kind of machine may round otherwise
        mean, strongest = shard.gather(mean)[0], shard.gather(strongest)[0]
        scale = shard.gather(torch.tensor(scale, dtype=torch.float64, device=device))[0].item()
        latents = shard.latents
    directions = _first_directions(strongest, config.width, latents, generator)
    mean = mean / scale
    centred = _copied(first_rows).div_(scale).sub_(mean)
    weights = StepWeights(
        W_enc_t=directions.clone(),
        b_enc=torch.zeros(len(directions), device=device),
        W_dec=directions,
        # an SAE subtracts its own b_dec from the input: one tensor in both places
        b_in=mean,
        b_dec=mean,
        threshold=torch.zeros(len(directions), device=device),
    )
    return Begun(weights, scale, _place_thresholds(config, weights, centred, shard))


def _copied(rows: Float[Tensor, "row d_in"]) -> Float32[Tensor, "row d_in"]:
    """The rows in fp32, to be changed in place: new memory takes longer to get than to be computed in."""
    return rows.to(torch.float32, copy=True)


def _place_thresholds(
    config: TrainConfig, weights: StepWeights, centred: Float[Tensor, "row d_in"], shard: Shard | None
) -> float:
    """Puts thresholds where L0 is `l0_start` times the target; returns the bandwidth in scaled units."""
    sample = centred[: max(64, _SAMPLE // config.width)]
    pre = sample @ weights.W_enc_t.T
    firing = min(len(sample) * config.width, max(1, round(config.l0_start * config.l0 * len(sample))))
    # before the search, which may change their order
    deviation = float(pre.std()) if shard is None else _deviation(pre, shard)
    largest = _largest(pre.flatten(), firing)
    if shard is None:
        level = largest.min().clamp(min=0)
    else:
        level = nth_largest(largest.clamp(min=0), firing, shard)
    weights.threshold.fill_(level)
    return config.bandwidth * deviation


def _deviation(pre: Float[Tensor, "row d_sae"], shard: Shard) -> float:
    """The standard deviation over all shards' latents."""
    exact = pre.double()
    sums = torch.stack([exact.sum(), exact.square().sum()])
    shard.add(sums)
    count = len(pre) * shard.d_sae
    total, squares = sums.tolist()
    return ((squares - total**2 / count) / (count - 1)) ** 0.5


def _principal_directions(
    centred: Float[Tensor, "row d_in"], config: TrainConfig
) -> tuple[Float[Tensor, "strongest d_in"], float]:
    """The `config.principal` strongest principal directions of some rows, fewer where there is no room, and
    the norm of what is outside of them, over the rows' norm.
    """
    n_rows, d_in = centred.shape
    q = min(config.principal, d_in // _PER_PRINCIPAL, n_rows, config.width // 4)
    if q < 1:
        return centred[:0], 1.0
    # exact, by the small Gram matrix: the randomised methods draw from torch's global generator
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    outside = float(values[:-q].clamp(min=0).sum() / values.clamp(min=0).sum().clamp(min=_TINY))
    return vectors[:, -q:].T, max(outside, _LEAST_OUTSIDE) ** 0.5


def _first_directions(
    strongest: Float[Tensor, "strongest d_in"], width: int, latents: slice, generator: torch.Generator
) -> Float[Tensor, "d_sae d_in"]:
    """Random unit rows, but for the strongest principal directions, which get two latents each and are taken
    out of the rest. Those of `latents`, of so many as there are in all.

    A few directions (massive activations) can hold most of the variance. Random rows would all feel them,
    all learn them at once, overshoot, and half of them would die of the correction. Latents of their own
    carry them from the start.
    """
    q, d_in = strongest.shape
    rows = _random_rows(width, d_in, latents, generator).to(strongest.device)
    if q > 0:
        rows -= (rows @ strongest.T) @ strongest
        own = torch.cat([strongest, -strongest])[latents]
        rows[: len(own)] = own
    return F.normalize(rows, dim=1)


def _random_rows(
    width: int, d_in: int, latents: slice, generator: torch.Generator
) -> Float[Tensor, "d_sae d_in"]:
    """The rows `latents` of torch.randn(width, d_in), of which no more than two blocks are made at a time."""
    rows = torch.empty(latents.stop - latents.start, d_in)
    # the last block is long: torch draws normal numbers 16 at a time, and those of a rest once more
    for start in range(0, max(1, width // _DRAWN) * _DRAWN, _DRAWN):
        stop = width if width - start < 2 * _DRAWN else start + _DRAWN
        block = torch.randn(stop - start, d_in, generator=generator)
        first, last = max(start, latents.start), min(stop, latents.stop)
        if first < last:
            rows[first - latents.start : last - latents.start] = block[first - start : last - start]
    return rows


def _largest(values: Float[Tensor, " value"], n: int) -> Float[Tensor, " chosen"]:
    """The n largest of the values, or all of fewer, with little memory beside theirs and that of n.

    Those given may be left in another order.
    """
    return (_selected if values.device.type == "cpu" else _searched)(values, n)


def _selected(values: Float[Tensor, " value"], n: int) -> Float[Tensor, " chosen"]:
    """`_largest` on a CPU: by numpy's selection, in place, and mostly of those few that a bound lets by."""
    left = values.numpy()
    looked_at = left[::_PER_LOOKED_AT].copy()
    wanted = n / _PER_LOOKED_AT
    # with four standard deviations to spare
    above = 1 + int(wanted + 4 * wanted**0.5)
    if above < _LET_BY * len(looked_at):
        looked_at.partition(len(looked_at) - above)
        # in this way round a NaN is let by: it counts as largest, for numpy and for torch
        high = left < looked_at[-above]
        np.logical_not(high, out=high)
        # where many values are equal, it may let by all of them
        if n <= np.count_nonzero(high) <= _LET_BY * len(left):
            left = left[high]
    if n < len(left):
        left.partition(len(left) - n)
    return torch.from_numpy(left[max(0, len(left) - n) :])


def _searched(values: Float[Tensor, " value"], n: int) -> Float[Tensor, " chosen"]:
    """`_largest` on a GPU: part by part."""
    largest = values.new_empty(0)
    for part in values.split(_SEARCHED):
        both = torch.cat([largest, part])
        largest = both.topk(min(n, len(both)), sorted=False).values
    return largest


def _site_seed(seed: int, site: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{site}".encode(), digest_size=7).digest(), "big")
