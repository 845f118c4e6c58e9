"""The work behind `jumpscope index`: which text, which dictionaries, and where the index goes."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sae
from activations.blocks import Cursor, TokenBlocks, iter_blocks
from activations.corpora import load_corpus
from activations.models import LanguageModel, load_model
from activations.ranks import Ranks, alone
from activations.sites import layer_of, parse_layers, site_label
from sae import Dictionary, UserError
from train.cli import plan, work
from train.cli.console import note
from train.cli.options import IndexOptions
from train.cli.progress import progress
from train.rows import own_device
from train.run_folder import RUN, hold
from viewer.index.build import build_index, check_fits
from viewer.index.share import Share

_CORPUS, _CONTEXT, _MODEL_BATCH = "wiki-leads", 256, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Indexing:
    """An index that is to be built."""

    model: LanguageModel
    dictionaries: Mapping[str, Dictionary]
    text: Mapping[str, Any]
    """What decides which tokens are read: corpus, split, context, model_batch, seed, tokens."""
    out: Path
    ranks: Ranks

    def blocks(self, start: Cursor) -> Iterator[TokenBlocks]:
        """The text from a place on."""
        text = self.text
        return iter_blocks(
            self.model,
            load_corpus(text["corpus"]),
            split=text["split"],
            context=text["context"],
            blocks_per_batch=text["model_batch"],
            seed=text["seed"],
            max_tokens=text["tokens"],
            start=start,
        )


def open_sources(options: IndexOptions, ranks: Ranks | None = None) -> Indexing:
    """Opens a run or dictionaries, and loads their model; `ranks` build the index together.

    Raises UserError when a source is neither, when dictionaries do not say where they belong, or two are of
    one site.
    """
    runs = [source for source in options.sources if (Path(source) / RUN).is_file()]
    ranks = ranks or alone()
    if not runs:
        return _of_dictionaries(options, ranks)
    if len(options.sources) > 1:
        raise UserError(
            "an index must be of one run or of dictionaries",
            f"{len(options.sources)} sources, {runs[0]} a run",
            "index each run by itself",
        )
    if options.model:
        raise UserError(
            "--model must be left out for a run", options.model, "the run knows its model; leave it out"
        )
    loaded = work.load_run(
        runs[0],
        layers=options.layers,
        dtype=options.dtype,
        device=options.device,
        ranks=ranks,
        others=True,
    )
    plan.tell_time(loaded.config, loaded.widths, loaded.model, index_tokens=options.tokens)
    return of_run(loaded, options, ranks)


def of_run(loaded: work.LoadedRun, options: IndexOptions, ranks: Ranks | None = None) -> Indexing:
    """The index of a run that is loaded."""
    text = loaded.text(options.tokens, options.corpus)
    return Indexing(
        model=loaded.model,
        dictionaries=loaded.dictionaries,
        text={**text, "context": options.context or text["context"]},
        out=Path(options.out) if options.out else loaded.folder.index_root,
        ranks=ranks or alone(),
    )


def build(indexing: Indexing, examples: int) -> dict[str, Path]:
    """Builds the index, or goes on with it, with progress on the console. Returns {site: folder}."""
    ranks, model, dictionaries = indexing.ranks, indexing.model, indexing.dictionaries
    share = None
    if ranks.world > 1:
        share = Share.of(ranks, model, dictionaries, model.dtype)
        for dictionary in dictionaries.values():
            check_fits(dictionary.cfg, model.site_width(dictionary.cfg.site_in))
        # those of others stay mapped files: of their neighbours the weights are read, once
        dictionaries = {
            site: found.to(model.device) if site in share.own else found
            for site, found in dictionaries.items()
        }
    held = hold(indexing.out, "indexing into") if ranks.first else contextlib.nullcontext()
    try:
        with held, progress(unit="steps") as report:
            return build_index(
                model,
                dictionaries,
                indexing.blocks,
                indexing.out,
                text=indexing.text,
                examples=examples,
                tokens=indexing.text["tokens"],
                resume=True,
                progress=lambda done, total: report("feature index from held-out text", done, total),
                share=share,
            )
    except KeyboardInterrupt:
        note("the same command goes on with this index")
        raise


def _of_dictionaries(options: IndexOptions, ranks: Ranks) -> Indexing:
    found: dict[str, Dictionary] = {}
    for source in options.sources:
        dictionary = sae.load(source)
        site = dictionary.cfg.site_out
        if not site:
            raise UserError(
                "a dictionary must say where it belongs",
                f"{source} names no site",
                "name it with `jumpscope import --site`",
            )
        if site in found:
            raise UserError(
                "each dictionary of an index must have a site of its own",
                f"{source} is a second one of {site}",
                "index it into another --out",
            )
        found[site] = dictionary
    wanted = set(parse_layers(options.layers, 1 + max(map(layer_of, found))))
    chosen = {site: dictionary for site, dictionary in found.items() if layer_of(site) in wanted}
    if not chosen:
        have = f"the dictionaries are of {', '.join(map(site_label, found))}"
        raise UserError("--layers must name a layer of a dictionary", repr(options.layers), have)
    found = chosen
    out = _out(options)
    name = _one_of(options.model, {dictionary.cfg.model for dictionary in found.values()})
    note(f"loading {name}")
    with ranks.busy("loading the model"):
        model = load_model(name, dtype=options.dtype, device=str(own_device(options.device, ranks)))
    model.check_sites(sorted({dictionary.cfg.site_in for dictionary in found.values()}))
    contexts = [dictionary.cfg.context for dictionary in found.values() if dictionary.cfg.context]
    text = {
        "corpus": options.corpus or _CORPUS,
        "split": "held_out",
        "context": options.context or min([model.max_context, *(contexts or [_CONTEXT])]),
        "model_batch": _MODEL_BATCH,
        "seed": 0,
        "tokens": options.tokens,
    }
    if ranks.world == 1:
        found = {site: dictionary.to(model.device) for site, dictionary in found.items()}
    return Indexing(model=model, dictionaries=found, text=text, out=out, ranks=ranks)


def _out(options: IndexOptions) -> Path:
    if options.out:
        return Path(options.out)
    if len(options.sources) == 1 and Path(options.sources[0]).is_dir():
        return Path(options.sources[0]) / "index"
    raise UserError(
        "--out must say where the index of several dictionaries goes, or of one that is no folder here",
        "no --out",
        "give a folder",
    )


def _one_of(given: str, named: set[str]) -> str:
    if given:
        return given
    if len(named) != 1 or not min(named):
        raise UserError(
            "dictionaries must be of one language model",
            ", ".join(sorted(named - {""})) or "their files name none",
            "name it with --model",
        )
    return min(named)
