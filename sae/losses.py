"""Sparsity terms: what training pays for latents that fire.

Every term is a function of L0 per row and of the firing rate per latent, both of which depend on the
parameters only
through the gates [pre > threshold]. `sparsity_value` is what autograd differentiates in the reference;
`sparsity_gradient`
is the same derivative written out for the sparse step.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from sae.config import SparsityKind
from sae.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Which term, how strongly, and around which L0."""

    kind: SparsityKind = "quadratic"
    """`quadratic`: c (mean L0 / target - 1)^2 on the batch (after Gemma Scope 2); `quadratic_token`: the
    same of each row's
    L0, averaged; `linear`: c L0 / target (after Gemma Scope 1); `frequency`: c sum_i p_i (1 + p_i / s) /
    target with p_i the
    batch firing rate (Gemma Scope 2), which weighs on latents that fire often."""
    coefficient: float = 0.1
    """c above, in units of the mean squared error of predicting the mean."""
    frequency_scale: float = 0.1
    """s above: a latent that fires on this share of tokens pays double."""

    def __post_init__(self) -> None:
        if self.kind not in ("quadratic", "quadratic_token", "linear", "frequency"):
            raise UserError(
                "the sparsity term must be quadratic, quadratic_token, linear or frequency",
                repr(self.kind),
                "choose one of them",
            )
        if self.coefficient < 0 or self.frequency_scale <= 0:
            raise UserError(
                "the sparsity coefficient must not be negative and frequency_scale must be positive",
                f"coefficient {self.coefficient}, frequency_scale {self.frequency_scale}",
                "the defaults 0.1 and 0.1 suit most runs",
            )


def sparsity_value(
    term: Sparsity,
    l0: Float[Tensor, " batch"],
    rate: Float[Tensor, " d_sae"],
    target: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """The term's value, from each row's count of firing latents and each latent's rate in the batch."""
    if term.kind == "quadratic":
        return term.coefficient * (l0.mean() / target - 1) ** 2
    if term.kind == "quadratic_token":
        return term.coefficient * ((l0 / target - 1) ** 2).mean()
    if term.kind == "linear":
        return term.coefficient * l0.mean() / target
    return term.coefficient * (rate * (1 + rate / term.frequency_scale)).sum() / target


def sparsity_gradient(
    term: Sparsity,
    l0: Float[Tensor, " batch"],
    rate: Float[Tensor, " d_sae"],
    target: Float[Tensor, ""] | float,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " d_sae"]]:
    """d value / d gate_bi, as a part for row b and a part for latent i: their sum is the whole derivative."""
    rows, latents, batch = torch.zeros_like(l0), torch.zeros_like(rate), len(l0)
    if term.kind == "quadratic":
        rows += 2 * term.coefficient * (l0.mean() / target - 1) / (target * batch)
    elif term.kind == "quadratic_token":
        rows = 2 * term.coefficient * (l0 / target - 1) / (target * batch)
    elif term.kind == "linear":
        rows += term.coefficient / (target * batch)
    else:
        latents = term.coefficient * (1 + 2 * rate / term.frequency_scale) / (target * batch)
    return rows, latents
