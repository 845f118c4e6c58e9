"""The usual edits of latents, for `activations.hooks.spliced`: one changes a copy [batch, pos, d_sae]."""

from collections.abc import Callable

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
        acts[..., _known(latents, acts)] = to
        return acts

    return edit


def scale(*latents: int, by: float) -> Edit:
    """These latents fire where they did, `by` times as strongly."""

    def edit(acts: Tensor) -> Tensor:
        acts[..., _known(latents, acts)] *= by
        return acts

    return edit


def steer(*latents: int, by: float) -> Edit:
    """Adds `by` to these activations at every position: each latent's row of W_dec, `by` times."""

    def edit(acts: Tensor) -> Tensor:
        acts[..., _known(latents, acts)] += by
        return acts

    return edit


def _known(latents: tuple[int, ...], acts: Tensor) -> list[int]:
    # looked at here, since on a GPU an index that is too large ends the process
    d_sae = acts.shape[-1]
    if wrong := [latent for latent in latents if not 0 <= latent < d_sae]:
        must = f"latents of this dictionary are from 0 to {d_sae - 1}"
        raise UserError(must, ", ".join(map(str, wrong)), "choose among them")
    return list(latents)
