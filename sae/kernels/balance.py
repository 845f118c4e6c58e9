"""Coordinates in which few hold most of every product.

    <x, w> = <A x, A^-T w>

A makes the coordinates of both sides equally large and puts the largest first: the balanced truncation of
B. C. Moore (1981), of the second moments of both. Some of them, the head, hold nearly all of any product.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

# second moments that both sides have at least, beside the mean one: nothing is divided by zero
_LEAST = 1e-4
_SEED = 0


def balancing(
    left: Float64[Tensor, "d_in d_in"], right: Float64[Tensor, "d_in d_in"]
) -> Float64[Tensor, "d_in d_in"] | None:
    """A, for the second moments of both sides; None where there is nothing to balance."""
    means = [part.diagonal().mean() for part in (left, right)]
    if not all(0 < mean < torch.inf for mean in means):
        return None
    least = torch.eye(len(left), dtype=torch.float64) * _LEAST
    left, right = left / means[0] + least, right / means[1] + least
    lower = torch.linalg.cholesky(left)
    values, vectors = torch.linalg.eigh(lower.T @ right @ lower)
    # both sides' moments become the root of these, the largest first
    turned = torch.linalg.solve_triangular(lower, vectors.T, left=False, upper=False)
    return (values.clamp(min=1e-12 * values[-1]) ** 0.25)[:, None].flip(0) * turned.flip(0)


def evened(turn: Float64[Tensor, "d_in d_in"], sizes: list[int]) -> Float64[Tensor, "d_in d_in"]:
    """A with each so many coordinates turned among themselves, at random and the same way every time.

    A row's integers lose least where its coordinates are even.
    """
    return torch.cat([_at_random(len(part)) @ part for part in turn.split(sizes)])


def _at_random(size: int) -> Float64[Tensor, "size size"]:
    """A rotation."""
    made = torch.randn(size, size, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    return torch.linalg.qr(made)[0]
