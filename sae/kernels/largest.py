"""Which pairs are the k largest of each row, or of the batch, for the step on a CPU."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.cpu_loops import Pairs
from sae.kernels.shards import Shard, largest_of_all

SAMPLE = 1024
"""Latents looked at to guess how large the k-th largest pre-activation is."""


def first_bounds(
    sample: Float[Tensor, "batch some"], every: int, k: int, by_row: bool, bounds: np.ndarray
) -> None:
    """Fills `bounds` [batch] with what more than k pre-activations of a row, or k a row of the batch, exceed.

    From those of every so many-th latent; too high only by bad luck, which the caller sees from what passed.
    """
    values = sample if by_row else sample.reshape(1, -1)
    share = k / every if by_row else k / every * len(sample)
    count = min(values.shape[1], math.ceil(1.3 * share + 4 * math.sqrt(share) + 1))
    least = values.topk(count, dim=1).values[:, -1]
    # only positive pre-activations can be active
    bounds[:] = least.clamp(min=0).expand(len(bounds)).numpy()


def keep_largest(
    pairs: list[Pairs], k: int, by_row: bool, active: np.ndarray, shard: Shard | None = None
) -> None:
    """Drops all pairs but the largest, and counts what is left of each row in `active` [block, batch].

    Ties go to the earlier row, then to the lower latent. A shard's are held against those of the others.
    """
    sizes = [int(block.starts[-1]) for block in pairs]
    rows = np.concatenate([block.rows[:size] for block, size in zip(pairs, sizes, strict=True)])
    values = np.concatenate([block.values[:size] for block, size in zip(pairs, sizes, strict=True)])
    # pairs lie in the order of latents, and within a latent of rows; stable sorts keep that among equals
    order = np.argsort(rows, kind="stable")
    kept = np.zeros(len(rows), bool)
    if shard is not None:
        sorted_pairs = torch.from_numpy(rows[order]).long(), torch.from_numpy(values[order])
        kept[order] = largest_of_all(*sorted_pairs, k, active.shape[1], by_row, shard).numpy()
    else:
        order = order[np.argsort(-values[order], kind="stable")]
        if by_row:
            order = order[np.argsort(rows[order], kind="stable")]
            begin = np.searchsorted(rows[order], np.arange(active.shape[1]))
            kept[order[np.arange(len(order)) - begin[rows[order]] < k]] = True
        else:
            kept[order[: k * active.shape[1]]] = True
    for index, (block, part) in enumerate(zip(pairs, np.split(kept, np.cumsum(sizes)[:-1]), strict=True)):
        active[index] = np.bincount(_drop(block, part), minlength=active.shape[1])


def _drop(block: Pairs, kept: np.ndarray) -> np.ndarray:
    """Closes the gaps in a block's pairs and returns the rows that are left."""
    before = np.concatenate([[0], np.cumsum(kept)])
    for values in (block.rows, block.values):
        values[: before[-1]] = values[: len(kept)][kept]
    block.starts[:] = before[block.starts]
    return block.rows[: before[-1]]
