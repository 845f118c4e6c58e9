"""Builds the feature index: what every latent of every site does on held-out text, in one pass."""

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow
import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.int8 import HasUnembedding, Int8Vocabulary
from sae import JumpReLU, UserError
from viewer.accumulate import BINS_PER_OCTAVE, Chunk, SiteAccumulator, histogram_edges
from viewer.lens import search_vocabulary, top_logits
from viewer.storage import write_site

LOGITS = 10
# elements of the dense latents held at once: 256 MB in fp32
_DENSE_ELEMENTS = 2**26
_RESIDUAL_KINDS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


@runtime_checkable
class IndexModel(HasUnembedding, Protocol):
    """What the index asks of a language model; `activations.models.LanguageModel` has it."""

    name: str

    def activations(self, tokens: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
        """Tokens [batch, pos] to {site: [batch, pos, d_in]}."""
        ...

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Tokens as they decode."""
        ...


@torch.inference_mode()
def build_index(
    model: IndexModel,
    dictionaries: Mapping[str, JumpReLU],
    blocks: Iterable[TokenBlocks],
    out: Callable[[str], Path],
    *,
    examples: int = 20,
    context_tokens: int = 24,
    corpus: str = "",
    tokens: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Indexes every latent of every site from one forward pass a batch of blocks. Returns {site: folder}.

    For each latent, over the tokens where `blocks.keep` holds: firings, density, mean and maximum over
    firings, an exact histogram, the `examples` documents in which it fires hardest (each by its best token,
    with up to `context_tokens` tokens of the same document either side and the latent's activation on
    each), and the tokens its decoder row raises and lowers most (`lens.top_logits`; none for a site that
    does not write to the residual stream). Files are described in `storage`. Memory does not grow with the
    text: a site keeps d_sae * examples windows.

    `out(site)` is the folder to write. `corpus` is recorded. `tokens` is how many kept tokens `blocks` will
    bring: progress(done, total) counts those and then the latents written. Raises UserError when a
    dictionary does not fit its site, when there is no token to index, or when the disk refuses.
    """
    sites = {name: d.cfg.site_in or name for name, d in dictionaries.items()}
    found = {
        name: SiteAccumulator(d.cfg.d_sae, examples=examples, context_tokens=context_tokens)
        for name, d in dictionaries.items()
    }
    n_latents = sum(d.cfg.d_sae for d in dictionaries.values())
    seen = 0
    for batch in blocks:
        acts = model.activations(batch.tokens, sorted(set(sites.values())))
        for name, dictionary in dictionaries.items():
            for chunk in _encode(dictionary, acts[sites[name]], batch):
                found[name].add(chunk)
        seen += int(batch.keep.sum())
        if progress:
            progress(seen, max(tokens, seen) + n_latents)
    if not seen:
        raise UserError("the index needs text", "no token to index", "give a corpus with held-out documents")
    vocabulary = search_vocabulary(model, n_latents)
    folders, written = {}, 0
    for name, dictionary in dictionaries.items():
        folders[name] = out(name)
        # popped, so that each site's memory is given back once it is on disk
        _finish(model, dictionary, name, folders[name], found.pop(name), corpus, vocabulary)
        written += dictionary.cfg.d_sae
        if progress:
            progress(seen + written, seen + n_latents)
    return folders


def _encode(dictionary: JumpReLU, x: Tensor, batch: TokenBlocks) -> Iterator[Chunk]:
    """One site's latents, a few blocks at a time to bound the dense array; zero where not kept."""
    n_blocks, context, d_in = x.shape
    cfg = dictionary.cfg
    if d_in != cfg.d_in:
        raise UserError(
            "a dictionary must fit its site",
            f"d_in {cfg.d_in} at {cfg.site_in}, which is {d_in} wide",
            "use the model it was trained on",
        )
    step = max(1, _DENSE_ELEMENTS // (context * cfg.d_sae))
    for start in range(0, n_blocks, step):
        span = slice(start, start + step)
        keep = batch.keep[span].to(x.device)
        acts = dictionary.encode(x[span].to(dictionary.W_enc.device))
        if acts.numel() and not acts.amax().isfinite():
            raise UserError(
                "latents must be finite", f"infinity or NaN at {cfg.site_in}", "train the dictionary again"
            )
        acts[~keep.to(acts.device)] = 0
        yield Chunk(
            acts=acts.to(x.device),
            tokens=batch.tokens[span].to(x.device),
            document=batch.document[span].to(x.device),
            position=batch.position[span].to(x.device),
            keep=keep,
        )


def _finish(
    model: IndexModel,
    dictionary: JumpReLU,
    site: str,
    folder: Path,
    found: SiteAccumulator,
    corpus: str,
    vocabulary: Int8Vocabulary | None,
) -> None:
    cfg = dictionary.cfg
    site_out = cfg.site_out or site
    speaks = site_out.endswith(_RESIDUAL_KINDS) and cfg.d_out == model.W_U.shape[0]
    tokens, logits = None, None
    if speaks:
        tokens, logits = top_logits(model, dictionary.W_dec, count=LOGITS, vocabulary=vocabulary)
    manifest: dict[str, Any] = {
        "model": model.name,
        "site": site,
        "site_in": cfg.site_in or site,
        "site_out": site_out,
        "d_sae": cfg.d_sae,
        "corpus": corpus or cfg.corpus,
        "tokens": found.tokens_seen,
        "examples": found.examples,
        "context_tokens": found.context_tokens,
        "histogram": {"bins_per_octave": BINS_PER_OCTAVE, "lowest_edge": float(histogram_edges()[0])},
        "logits": LOGITS if speaks else 0,
        "silent": int((found.firings == 0).sum()),
        "versions": {
            "jumpscope": _version("jumpscope"),
            "torch": torch.__version__,
            "pyarrow": pyarrow.__version__,
        },
    }
    write_site(
        folder,
        found,
        threshold=dictionary.threshold.detach().float().cpu().numpy(),
        logit_tokens=None if tokens is None else tokens.numpy(),
        logits=None if logits is None else logits.numpy().astype(np.float32),
        token_strings=model.token_strings,
        manifest=manifest,
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"
