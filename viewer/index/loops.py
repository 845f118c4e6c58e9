"""Loops of the index's geometry, compiled by numba."""

import numpy as np

from sae.kernels.compiled import compiled
from sae.kernels.cpu_loops import widened


@compiled
def multiply_at(left, right, places, products):
    """`products[r, c]` is that of row r of `left` and row `places[r, c]` of `right`, summed in fp32.

    `right` may be bfloat16 as uint16.
    """
    for r in range(places.shape[0]):
        for c in range(places.shape[1]):
            other = right[places[r, c]]
            total = np.float32(0)
            for d in range(len(other)):
                total += left[r, d] * widened(other[d])
            products[r, c] = total


@compiled
def count_common(starts, row, pairs, common):
    """How many rows both latents of each pair fire on; `row` rises within a latent."""
    for p in range(len(pairs)):
        i, end = starts[pairs[p, 0]], starts[pairs[p, 0] + 1]
        j, other_end = starts[pairs[p, 1]], starts[pairs[p, 1] + 1]
        while i < end and j < other_end:
            if row[i] == row[j]:
                common[p] += 1
                i += 1
                j += 1
            elif row[i] < row[j]:
                i += 1
            else:
                j += 1
