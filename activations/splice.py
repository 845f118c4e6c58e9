"""A dictionary in the middle of the model: what the rest of the model makes of a replaced activation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.models import LanguageModel
from activations.side_by_side import Gathered, own_part
from activations.sites import kind_of, layer_of, site_name
from sae.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CleanRun:
    """One undisturbed forward pass and what splicing into it needs."""

    final: Float[Tensor, "batch pos d_model"]
    """Hidden states after the final norm."""
    acts: dict[str, Tensor]
    """The activation [batch, pos, d_in] at each site."""
    block_inputs: dict[int, Tensor]
    """The residual stream [batch, pos, d_model] entering the block, for each layer that has a site."""
    in_tuples: bool
    """Whether blocks hand on their output inside a tuple, as older versions of transformers have it."""

    def at(self, site: str, blocks: Int[Tensor, " some"]) -> "CleanRun":
        """What splicing at one site needs of some blocks of the batch, in that order, some more than once."""
        layer = layer_of(site)
        return CleanRun(
            final=self.final[blocks],
            acts={site: self.acts[site][blocks]},
            block_inputs={layer: self.block_inputs[layer][blocks]},
            in_tuples=self.in_tuples,
        )


@torch.inference_mode()
def clean_run(model: LanguageModel, tokens: Int[Tensor, "batch pos"], sites: Sequence[str]) -> CleanRun:
    """Runs the model once and keeps what splicing at any of `sites` needs.

    Memory: one activation for each site and one residual stream for each of their layers, in the model's
    dtype. Raises UserError for a site that the model does not have.
    """
    model.check_sites(sites)
    found = Gathered()
    shapes: list[bool] = []
    entries = {layer: site_name(layer, "resid_pre") for layer in map(layer_of, sites)}
    wanted = {*sites, *entries.values()}
    watchers = {site: partial(found.put, site) for site in wanted}
    handle = model.bridge.blocks[0].register_forward_hook(
        lambda _module, _inputs, output: shapes.append(isinstance(output, tuple))
    )
    try:
        with model.watching(watchers):
            final = model.run_parts(tokens)
    finally:
        handle.remove()
    whole = {site: found.take(site) for site in wanted}
    return CleanRun(
        final=final,
        acts={site: whole[site] for site in sites},
        block_inputs={layer: whole[site] for layer, site in entries.items()},
        in_tuples=shapes[0],
    )


@torch.inference_mode()
def spliced_final(
    model: LanguageModel,
    tokens: Int[Tensor, "batch pos"],
    run: CleanRun,
    site: str,
    replacement: Float[Tensor, "batch pos d_in"],
) -> Float[Tensor, "batch pos d_model"]:
    """Hidden states after the final norm when the activation at `site` is `replacement`.

    `run` is the clean run of the same tokens. Blocks below the site are not computed: its residual stream
    stands in for their work. Raises UserError when the run has not kept the site or the shapes differ.
    """
    if site not in run.acts:
        raise UserError("the clean run must have kept the site", site, f"name it among {', '.join(run.acts)}")
    if replacement.shape != run.acts[site].shape:
        found = f"{tuple(replacement.shape)} for {tuple(run.acts[site].shape)}"
        raise UserError(
            f"the replacement at {site} must have the activation's shape", found, "check the site"
        )
    replacement = replacement.to(dtype=run.final.dtype, device=run.final.device)
    layer, kind = layer_of(site), kind_of(site)
    if kind == "resid_post":
        with _standing_in(model, layer + 1, replacement, run.in_tuples):
            return model.run_parts(tokens)
    if kind == "resid_pre" and layer > 0:
        with _standing_in(model, layer, replacement, run.in_tuples):
            return model.run_parts(tokens)
    with (
        _standing_in(model, layer, run.block_inputs[layer], run.in_tuples),
        model.watching({site: lambda clean: put(site, clean, replacement[own_part()])}),
    ):
        return model.run_parts(tokens)


def put(site: str, activation: Tensor, replacement: Tensor) -> Tensor:
    """What a hook at `site` returns so that the model goes on with `replacement` instead of `activation`.

    `hook_resid_mid` is hooked where the MLP's norm reads it, and the residual stream goes past that: the same
    tensor, which has to be written in place for both to have the new values. Raises UserError where backward
    hooks stand there, which rules that out.
    """
    if not site.endswith(".hook_resid_mid"):
        return replacement
    # what torch.nn.Module hands on for backward hooks is a view, and the stream past the hook is its base
    if torch.is_grad_enabled() and activation._is_view():
        must = (
            "the residual stream in the middle of a block can be replaced only where no backward hook stands"
        )
        raise UserError(must, f"one at {site}", "splice at resid_post, or keep gradients with gradients=True")
    return activation.copy_(replacement)


@contextmanager
def _standing_in(model: LanguageModel, n_blocks: int, resid: Tensor, in_tuples: bool) -> Iterator[None]:
    """Within it the first `n_blocks` blocks compute nothing, and the block above them reads `resid`."""

    def stand_in(*_args: object, **_kwargs: object) -> object:
        own = resid[own_part()]
        return (own,) if in_tuples else own

    blocks = list(model.bridge.blocks)[:n_blocks]
    try:
        for block in blocks:
            # an attribute of the instance hides the class's method, and the list of blocks stays as it is:
            # models look up masks, position embeddings and caches by a block's place in it
            block.__dict__["forward"] = stand_in
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
