"""Builds the feature index: what every latent of every site does on held-out text, in one pass."""

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow
import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.int8 import HasUnembedding
from sae import Dictionary, DictionaryConfig, UserError
from sae.sparse import SparseEncoder, SparseLatents
from viewer.accumulate import BINS_PER_OCTAVE, Chunk, SiteAccumulator, histogram_edges
from viewer.lens import TokenLogits, Vocabulary, top_logits
from viewer.storage import write_site

LOGITS = 10
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
    dictionaries: Mapping[str, Dictionary],
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

    What is kept of the text is said at `IndexBuilder`, of the files in `storage`. `out(site)` is the folder
    to write. `corpus` is recorded. `tokens` is how many kept tokens `blocks` will bring: `progress` is called
    with (done, total), which count those and then the latents written. Raises UserError when a dictionary
    does not fit its site, when there is no token to index, or when the disk refuses.
    """
    builder = IndexBuilder(model, dictionaries, examples=examples, context_tokens=context_tokens)
    encoders = {site: SparseEncoder(dictionary) for site, dictionary in dictionaries.items()}
    seen = 0
    for batch in blocks:
        acts = model.activations(batch.tokens, sorted(set(builder.sites_read.values())))
        for site, encoder in encoders.items():
            x = acts[builder.sites_read[site]]
            _check_fits(encoder.dictionary, x)
            builder.add(site, batch, encoder.encode(x[batch.keep.to(x.device)]))
        seen += int(batch.keep.sum())
        if progress:
            progress(seen, max(tokens, seen) + builder.n_latents)
    return builder.write(
        out,
        corpus=corpus,
        progress=progress and (lambda done, total: progress(seen + done, seen + total)),
    )


class IndexBuilder:
    """Collects what every latent of every site does on some text, a batch of blocks at a time.

    For each latent, over the tokens where `blocks.keep` holds: firings, density, mean and maximum over
    firings, an exact histogram, the `examples` documents in which it fires hardest (each by its best token,
    with up to `context_tokens` tokens of the same document either side and the latent's activation on
    each), and the tokens its decoder row raises and lowers most (`lens.top_logits`; none for a site that
    does not write to the residual stream). Memory does not grow with the text: a site keeps d_sae * examples
    windows.
    """

    def __init__(
        self,
        model: IndexModel,
        dictionaries: Mapping[str, Dictionary],
        *,
        examples: int = 20,
        context_tokens: int = 24,
    ) -> None:
        self.model, self.dictionaries = model, dict(dictionaries)
        self.sites_read = {site: d.cfg.site_in or site for site, d in dictionaries.items()}
        """The site that each dictionary reads."""
        self.n_latents = sum(d.cfg.d_sae for d in dictionaries.values())
        self._texts: dict[int, str] = {}
        self._found = {
            site: SiteAccumulator(d.cfg.d_sae, examples=examples, context_tokens=context_tokens)
            for site, d in dictionaries.items()
        }

    def add(self, site: str, batch: TokenBlocks, latents: SparseLatents) -> None:
        """Takes in the latents at the kept positions of a batch, in reading order."""
        if not bool(latents.activation.isfinite().all()):
            where = self.sites_read[site]
            raise UserError(
                "latents must be finite", f"infinity or NaN at {where}", "train the dictionary again"
            )
        self._found[site].add(
            Chunk(
                latents=latents,
                tokens=batch.tokens,
                document=batch.document,
                position=batch.position,
                keep=batch.keep,
            )
        )

    @torch.inference_mode()
    def write(
        self,
        out: Callable[[str], Path],
        *,
        corpus: str = "",
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Path]:
        """Writes every site's index, once: its memory is given back. `progress` counts latents."""
        if not any(found.tokens_seen for found in self._found.values()):
            raise UserError(
                "the index needs text", "no token to index", "give a corpus with held-out documents"
            )
        vocabulary = Vocabulary.of(self.model, self.n_latents)
        folders = {site: out(site) for site in self.dictionaries}
        written, writing = 0, None

        def wait(writing: "Future[int] | None") -> None:
            nonlocal written
            written += writing.result() if writing else 0
            if writing and progress:
                progress(written, self.n_latents)

        # one site is written while the next one's logits are searched for
        with ThreadPoolExecutor(max_workers=1) as writer:
            for site, dictionary in self.dictionaries.items():
                logits = None
                if _speaks(dictionary, site, self.model):
                    logits = top_logits(self.model, dictionary.W_dec, count=LOGITS, vocabulary=vocabulary)
                wait(writing)
                writing = writer.submit(self._write_site, site, folders[site], corpus, logits)
            wait(writing)
        return folders

    def _write_site(self, site: str, folder: Path, corpus: str, logits: TokenLogits | None) -> int:
        """Writes a site and gives its memory back; returns how many latents it has."""
        dictionary, found = self.dictionaries[site], self._found.pop(site)
        manifest = _manifest(self.model.name, dictionary.cfg, site, corpus, found, spoken=logits is not None)
        threshold = dictionary.firing_threshold
        write_site(
            folder,
            found,
            threshold=None if threshold is None else threshold.detach().float().cpu().numpy(),
            logit_tokens=None if logits is None else logits.ids,
            logits=None if logits is None else logits.logits,
            token_strings=self._token_strings,
            manifest=manifest,
        )
        return dictionary.cfg.d_sae

    def _token_strings(self, ids: Sequence[int]) -> list[str]:
        """As the model's, but each token is decoded once for all sites."""
        new = [token for token in ids if token not in self._texts]
        self._texts.update(zip(new, self.model.token_strings(new), strict=True))
        return [self._texts[token] for token in ids]


def _check_fits(dictionary: Dictionary, x: Tensor) -> None:
    cfg = dictionary.cfg
    if x.shape[-1] != cfg.d_in:
        raise UserError(
            "a dictionary must fit its site",
            f"d_in {cfg.d_in} at {cfg.site_in}, which is {x.shape[-1]} wide",
            "use the model it was trained on",
        )


def _speaks(dictionary: Dictionary, site: str, model: IndexModel) -> bool:
    """Whether it writes to the residual stream, which the unembedding reads."""
    cfg = dictionary.cfg
    return (cfg.site_out or site).endswith(_RESIDUAL_KINDS) and cfg.d_out == model.W_U.shape[0]


def _manifest(
    model: str, cfg: DictionaryConfig, site: str, corpus: str, found: SiteAccumulator, *, spoken: bool
) -> dict[str, Any]:
    return {
        "model": model,
        "site": site,
        "site_in": cfg.site_in or site,
        "site_out": cfg.site_out or site,
        "d_sae": cfg.d_sae,
        "corpus": corpus or cfg.corpus,
        "tokens": found.tokens_seen,
        "examples": found.examples,
        "context_tokens": found.context_tokens,
        "histogram": {"bins_per_octave": BINS_PER_OCTAVE, "lowest_edge": float(histogram_edges()[0])},
        "logits": LOGITS if spoken else 0,
        "silent": int((found.firings == 0).sum()),
        "versions": {
            "jumpscope": _version("jumpscope"),
            "torch": torch.__version__,
            "pyarrow": pyarrow.__version__,
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"
