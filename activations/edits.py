"""The usual edits of latents, for `activations.hooks.spliced`: one changes a copy [batch, pos, d_sae]."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import UserError

Edit = Callable[[Tensor], Tensor | None]
"""Gets a copy of the latents [batch, pos, d_sae] of a site; changes it in place, or returns them changed."""


def ablate(*latents: int) -> Edit:
    """These latents do not fire."""
    return clamp(*latents, to=0.0)


def clamp(*latents: int, to: float) -> Edit:
    """These latents have the activation `to` at every position, whether they fire there or not."""

    def edit(acts: Tensor) -> Tensor:
        acts[..., _known(latents, acts.shape[-1])] = to
        return acts

    return edit


def scale(*latents: int, by: float) -> Edit:
    """These latents fire where they did, `by` times as strongly."""

    def edit(acts: Tensor) -> Tensor:
        acts[..., _known(latents, acts.shape[-1])] *= by
        return acts

    return edit


@dataclass(frozen=True, eq=False)
class Addition:
    """The edit that adds to activations at every position, whatever they are there."""

    strengths: Mapping[int, float]
    """What is added to each latent."""

    def __call__(self, acts: Tensor) -> Tensor:
        latents = _known(self.strengths, acts.shape[-1])
        acts[..., latents] += torch.tensor(list(self.strengths.values())).to(acts)
        return acts

    def written(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, " d_out"]:
        """What it adds to the output: each latent's row of W_dec, as often as its strength says."""
        rows = W_dec[_known(self.strengths, len(W_dec))]
        return torch.tensor(list(self.strengths.values())).to(rows) @ rows


def steer(*latents: int, by: float) -> Addition:
    """Adds `by` to these activations at every position: each latent's row of W_dec, `by` times."""
    return Addition(dict.fromkeys(latents, by))


def _known(latents: Iterable[int], d_sae: int) -> list[int]:
    # looked at here, since on a GPU an index that is too large ends the process
    if wrong := [latent for latent in latents if not 0 <= latent < d_sae]:
        must = f"latents of this dictionary are from 0 to {d_sae - 1}"
        raise UserError(must, ", ".join(map(str, wrong)), "choose among them")
    return list(latents)
