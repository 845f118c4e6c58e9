"""Builds the feature index: what every latent of every site does on held-out text, in one pass."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import torch
from torch import Tensor

from activations.blocks import Cursor, TokenBlocks
from activations.harvest import check_finite
from activations.int8 import HasUnembedding
from activations.ranks import alone
from sae import Dictionary, DictionaryConfig, UserError
from sae.files import read_json
from sae.kernels.workers import workers_for
from sae.sparse import SparseEncoder, SparseLatents
from viewer.index import storage
from viewer.index.adjacent import Between
from viewer.index.ahead import OneAhead, thread_beside
from viewer.index.evidence import DENSE, TextRows, gather_evidence
from viewer.index.histogram import BINS_PER_OCTAVE, histogram_edges
from viewer.index.lens import Vocabulary
from viewer.index.parts import PASS, Parts
from viewer.index.share import Share
from viewer.index.site_tables import (
    Common,
    Logits,
    Site,
    TokenStrings,
    lowest_activation,
    make_tables,
    prepare_site,
    read_logits,
)
from viewer.index.storage import LATENTS
from viewer.index.words import Reading

PARTS = "parts"
_log = logging.getLogger(__name__)


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
    blocks: Callable[[Cursor], Iterable[TokenBlocks]],
    out: Path,
    *,
    text: Mapping[str, Any],
    examples: int = 20,
    tokens: int = 0,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    share: Share | None = None,
) -> dict[str, Path]:
    """Indexes every latent of every site from one forward pass a batch of blocks. Returns {site: folder}.

    `blocks` gives the text from a place on, `text` says in plain values which it is. With `resume` a build
    of the same that was killed goes on. `tokens` is how many kept tokens will come in all: `progress` is
    called with (done, total), which count those and then the latents written. Raises UserError when a
    dictionary does not fit its site, when there is no token to index, or when the disk refuses.

    With a `share` several ranks build the index together, the same files: each calls this with the same
    dictionaries, runs the model on its own batches, and reads and writes the sites that are its own.
    """
    builder = IndexBuilder(model, dictionaries, out, text=text, examples=examples, resume=resume, share=share)
    encoders = {site: SparseEncoder(dictionaries[site]) for site in builder.own}
    coming = () if builder.next is None else blocks(builder.next)
    reads = list(dict.fromkeys(builder.sites_read.values()))
    for batch, rows in kept_rows(model, coming, reads) if share is None else share.rows(coming):
        builder.begin(batch)
        for site, encoder in encoders.items():
            x = rows[builder.sites_read[site]]
            check_fits(encoder.dictionary.cfg, x.shape[-1])
            check_finite({builder.sites_read[site]: x})
            builder.add(site, batch, encoder.encode(x))
        if progress:
            progress(builder.rows, max(tokens, builder.rows) + builder.n_latents)
    seen = builder.rows
    with share.ranks.busy("writing the index") if share else contextlib.nullcontext():
        return builder.write(progress and (lambda done, total: progress(seen + done, seen + total)))


class IndexBuilder:
    """Collects what every latent of every site does on some text, and writes the index under `out`.

    Every firing on the tokens where `blocks.keep` holds is kept, on disk once there are many, so memory does
    not grow with the text; what the index says is worked out from them at the end, site by site. The files
    are described in `storage`. An index has one text for all its sites: more sites can be added to one of
    the same text.

    `text` says which text it is, in plain values, `corpus` among them. With `resume`, the same text and the
    same dictionaries, a pass that was cut off goes on at `next`; it lasts on disk until the index is written.
    """

    def __init__(
        self,
        model: IndexModel,
        dictionaries: Mapping[str, Dictionary],
        out: Path,
        *,
        text: Mapping[str, Any],
        examples: int = 20,
        resume: bool = False,
        share: Share | None = None,
    ) -> None:
        self.model, self.dictionaries, self.out = model, dict(dictionaries), out
        self._ranks = share.ranks if share else alone()
        self.own = share.own if share else tuple(dictionaries)
        """The sites that are indexed here; the others by other ranks."""
        self.sites_read = {site: d.cfg.site_in or site for site, d in dictionaries.items()}
        """The site that each dictionary reads."""
        self.n_latents = sum(dictionaries[site].cfg.d_sae for site in self.own)
        """Latents of the sites indexed here."""
        self._text, self._examples, self._resume = dict(text), examples, resume
        digests: dict[str, str] = {}
        workers = workers_for(torch.get_num_threads())
        workers.run(lambda site: digests.update({site: _digest(dictionaries[site])}), self.own)
        self._digests = {site: digests[site] for site in self.own}
        self._check_others()
        facts = {"model": model.name, "text": self._text, "dictionaries": self._digests}
        ranks = self._ranks
        folder = PARTS if ranks.world == 1 else f"{PARTS}-{ranks.rank}-of-{ranks.world}"
        self._parts = Parts(out / folder, self.own, facts if resume else None, ranks)
        if resume and ranks.first and not self.rows and any(out.glob(f"{PARTS}*/{PASS}")):
            _log.warning("%s holds a pass of another number of ranks: this one begins anew", out)

    @property
    def next(self) -> Cursor | None:
        """Where the pass goes on; None when it has come to its end."""
        return self._parts.next

    @property
    def rows(self) -> int:
        """Tokens taken in so far."""
        return self._parts.rows

    def begin(self, batch: TokenBlocks) -> None:
        """Begins a batch of which a rank without a site adds nothing."""
        self._parts.begin(batch)

    def add(self, site: str, batch: TokenBlocks, latents: SparseLatents) -> None:
        """Takes in the latents at the kept positions of a batch; every site's, before the next batch."""
        if not bool(latents.activation.isfinite().all()):
            where = self.sites_read[site]
            raise UserError(
                "latents must be finite", f"infinity or NaN at {where}", "train the dictionary again"
            )
        self._parts.add(site, batch, latents)

    def finish(self) -> None:
        """Ends the pass without writing the index, for one that takes in several passes."""
        self._parts.finish()

    def take(self, other: "IndexBuilder") -> None:
        """Puts the text of another finished pass behind this one's, as if one pass had read both.

        Both need a folder of their own, the same model and the same dictionaries.
        """
        if other.next is not None or (other.model.name, other._digests) != (self.model.name, self._digests):
            raise UserError(
                "passes put together must be finished, and of the same model and dictionaries",
                f"{other.out} is not",
                "run both with the same flags but for the text",
            )
        self._parts.take(other._parts)

    @torch.inference_mode()
    def write(self, progress: Callable[[int, int], None] | None = None) -> dict[str, Path]:
        """Writes the index of the sites here, once. Returns all sites' folders; `progress` counts latents."""
        if not self.rows:
            raise UserError(
                "the index needs text", "no token to index", "give a corpus with held-out documents"
            )
        self._parts.finish()
        rows = TextRows(self._parts.texts())
        written_texts = self._write_texts(rows) if self._ranks.first else ""
        checksum = self._ranks.share("the texts of the index", written_texts)[0]
        written, writing = 0, None

        def wait(writing: "Future[int] | None") -> None:
            nonlocal written
            written += writing.result() if writing else 0
            if writing and progress:
                progress(written, self.n_latents)

        to_make = [site for site in self.own if not self._is_written(site, checksum)]
        strings = TokenStrings(self.model.token_strings)
        strings.add(rows.texts.tokens)
        between = Between(self.dictionaries, to_make)
        threads = workers_for(torch.get_num_threads()).threads
        # while a site is labelled and written, the logits of the next are read and what else is known of it
        # is gathered: some of each is done by one core alone
        with (
            thread_beside("writer", threads) as writer,
            OneAhead(lambda site: self._gather(site, rows, between), to_make, threads) as gathered,
        ):
            common = self._common(rows, strings)
            for site in self.own:
                work = (read_logits(common, site), gathered.take()) if site in to_make else None
                wait(writing)
                writing = writer.submit(self._write_site, site, checksum, common, work)
                del work  # it is let go of once it is written
            wait(writing)
        self._ranks.share("the sites of the index", None)
        if self._ranks.first:
            self._write_tokens(strings)
        self._parts.remove()
        self._ranks.share("the index to be whole", None)
        if self._ranks.first:
            # what a pass of another number of ranks left
            for folder in (self.out / PARTS, *self.out.glob(f"{PARTS}-*-of-*")):
                shutil.rmtree(folder, ignore_errors=True)
        return {site: self.out / site for site in self.dictionaries}

    def _write_texts(self, rows: TextRows) -> str:
        """Writes the texts, which begins the index anew; returns their checksum."""
        for path in (self.out / storage.TOKENS, *self.out.glob(f".{storage.TOKENS}.*.tmp")):
            path.unlink(missing_ok=True)
        facts = {"model": self.model.name, "text": self._text, "tokens": len(rows)}
        return storage.write_texts(self.out, rows.texts, facts)

    def _gather(self, site: str, rows: TextRows, between: Between) -> Generator[None, None, Site]:
        """What the tables of a site are made from; touches nothing that the making of another one does."""
        lowest = lowest_activation(self.dictionaries[site])
        found = yield from gather_evidence(
            self._parts.lists(site), rows, lowest=lowest, examples=self._examples
        )
        return (yield from prepare_site(self.dictionaries, between, site, found))

    def _common(self, rows: TextRows, strings: TokenStrings) -> Common:
        return Common(
            model=self.model,
            dictionaries=self.dictionaries,
            # of all sites: it decides which arithmetic finds a latent's tokens
            vocabulary=Vocabulary.of(self.model, sum(d.cfg.d_sae for d in self.dictionaries.values())),
            strings=strings,
            reading=Reading.of(rows.texts, strings),
        )

    def _identity(self, site: str, checksum: str) -> dict[str, Any]:
        """What decides all that a site's index says."""
        return {
            "model": self.model.name,
            "site": site,
            "dictionary": self._digests[site],
            "texts": checksum,
            "examples": self._examples,
            "versions": {
                "jumpscope": _version("jumpscope"),
                "torch": torch.__version__,
                "pyarrow": pa.__version__,
            },
        }

    def _is_written(self, site: str, checksum: str) -> bool:
        """Whether the build that this one goes on with has come past this site."""
        if not self._resume:
            return False
        try:
            manifest = storage.read_manifest(self.out / site, finished=False)
        except UserError:
            return False
        return self._identity(site, checksum).items() <= manifest.items()

    def _write_site(self, site: str, checksum: str, common: Common, work: tuple[Logits, Site] | None) -> int:
        """Labels and writes a site; returns how many latents it has."""
        cfg = self.dictionaries[site].cfg
        if work is None:
            return cfg.d_sae
        logits, known = work
        tables, facts = make_tables(common, known, logits)
        states = known.found.latents["state"]
        manifest = {
            **self._identity(site, checksum),
            "site_in": cfg.site_in or site,
            "site_out": cfg.site_out or site,
            "d_sae": cfg.d_sae,
            "corpus": self._text.get("corpus") or cfg.corpus,
            "tokens": self.rows,
            "histogram": {"bins_per_octave": BINS_PER_OCTAVE, "lowest_edge": float(histogram_edges()[0])},
            "dense_above": DENSE,
            "states": {state: int((states == state).sum()) for state in ("live", "silent", "dense")},
            **facts,
        }
        storage.write_site(self.out / site, firings=known.found.firings, tables=tables, manifest=manifest)
        return cfg.d_sae

    def _write_tokens(self, strings: TokenStrings) -> None:
        """The text of all tokens that the index names, those of sites from an earlier build too."""
        for path in self.out.glob(f"*/{LATENTS}"):
            named = storage.read_rows(path, columns=["top_tokens", "bottom_tokens"])
            for column in named.columns:
                strings.add(column.combine_chunks().flatten().to_numpy())
        storage.write_tokens(self.out, strings)

    def _check_others(self) -> None:
        """Raises UserError when sites that are not indexed now are of another text."""
        path = self.out / storage.TEXTS / storage.MANIFEST
        sites = {path.parent.name for path in self.out.glob(f"*/{storage.MANIFEST}")} - {storage.TEXTS}
        others = sorted(sites - self.dictionaries.keys())
        if not others or not path.is_file():
            return
        if read_json(path).get("text") != json.loads(json.dumps(self._text)):
            raise UserError(
                "an index must be of one text for all its sites",
                f"{self.out} has {', '.join(others)} on another text",
                "index all sites again, or give --out another folder",
            )


def kept_rows(
    model: IndexModel, blocks: Iterable[TokenBlocks], sites: Sequence[str]
) -> Iterator[tuple[TokenBlocks, Mapping[str, Tensor]]]:
    """Each batch of blocks, and the activations at its kept positions."""
    for batch in blocks:
        acts = model.activations(batch.tokens, sites)
        yield batch, {site: x[batch.keep.to(x.device)] for site, x in acts.items()}


def check_fits(cfg: DictionaryConfig, width: int) -> None:
    """Raises UserError when a dictionary does not read rows of a site that is so wide."""
    if width != cfg.d_in:
        raise UserError(
            "a dictionary must fit its site",
            f"d_in {cfg.d_in} at {cfg.site_in}, which is {width} wide",
            "use the model it was trained on",
        )


def _digest(dictionary: Dictionary) -> str:
    """A checksum of a dictionary's config and weights."""
    digest = hashlib.sha256(json.dumps(dictionary.cfg.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(dictionary.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"
