"""Where a run's rows come from: a live model or a store, behind one shuffle ring."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from activations.blocks import Cursor, TokenBlocks, iter_blocks
from activations.corpora import Corpus, load_corpus
from activations.harvest import RowBatch, RowMap, harvest_rows
from activations.models import LanguageModel, load_model
from activations.positions import RingPosition
from activations.precision import pick_device
from activations.ring import ShuffleRing
from activations.shapes import model_shape
from activations.sites import expand_sites, layer_of
from activations.store import open_store
from sae.errors import UserError
from sae.numbers import format_count
from train.config import TrainConfig
from train.plan import fixed_costs, plan_ring_rows

_log = logging.getLogger(__name__)

Report = Callable[[str, int, int, str], object]
"""Told what is going on (`harvest` or `train`), how much of it is done, of how much, and a detail to show."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a run, in the order of its training."""

    ring: ShuffleRing
    total: int
    """Rows to be served, repeats included."""
    model: str
    device: torch.device
    dtype: torch.dtype
    identity: dict[str, Any]
    """What they are made from: must be the same when a run is resumed."""


def open_rows(
    config: TrainConfig,
    model: LanguageModel | None,
    on_progress: Report,
    resume: RingPosition | None = None,
) -> Rows:
    """Opens what `config` names; nothing is harvested yet. `model` spares loading it, `resume` is the place
    to go on from. Raises UserError.
    """
    opened = _stored_rows if config.store else _live_rows
    return opened(config, model, on_progress, resume)


def _live_rows(
    config: TrainConfig, given: LanguageModel | None, on_progress: Report, resume: RingPosition | None
) -> Rows:
    corpus = load_corpus(config.corpus)
    shape = model_shape(config.model)
    sites = expand_sites(config.sites, config.layers, shape.n_layers)
    model = given or load_model(config.model, dtype=config.dtype, device=config.device)
    model.check_sites(sites)
    if resume is None:
        _refuse_short(config, model, corpus)
    widths = {site: model.site_width(site) for site in sites}
    fixed = sum(fixed_costs(config, shape, widths, model.dtype, on_gpu=model.device.type != "cpu").values())

    def source(start: Cursor) -> Iterator[RowBatch]:
        for rows in harvest_rows(model, _blocks(config, model, corpus, start), sites):
            done = (rows.begin.kept if rows.begin else 0) + len(rows)
            yield rows
            on_progress("harvest", done, config.tokens, "")

    return Rows(
        ring=ShuffleRing(
            source,
            widths,
            dtype=model.dtype,
            rows=plan_ring_rows(config, widths, model.dtype, fixed),
            batch=config.batch,
            passes=config.passes,
            seed=config.seed,
            device=model.device,
            resume=resume,
        ),
        total=config.tokens * config.passes,
        model=model.name,
        device=model.device,
        dtype=model.dtype,
        identity={"model": model.name, "tokenizer": model.tokenizer_hash, "corpus": corpus.name},
    )


def _blocks(
    config: TrainConfig, model: LanguageModel, corpus: Corpus, start: Cursor
) -> Iterator[TokenBlocks]:
    """Blocks with `config.tokens` tokens in all; a shorter corpus is read again, in another order."""
    blocks = iter_blocks(
        model,
        corpus,
        split="train",
        context=config.context,
        blocks_per_batch=config.model_batch,
        seed=config.seed,
        max_tokens=config.tokens,
        epochs=None,
        start=start,
    )
    epoch = start.epoch
    for block in blocks:
        begin = block.begin or start
        if begin.epoch > 0 and epoch == 0:
            _log.warning(
                "%s has about %s training tokens, fewer than the %s asked for: it is read again",
                corpus.name,
                format_count(begin.kept // begin.epoch),
                format_count(config.tokens),
            )
        epoch = begin.epoch
        yield block


def _refuse_short(config: TrainConfig, model: LanguageModel, corpus: Corpus) -> None:
    # going round a corpus of less than a batch would only hide what is wrong
    blocks = iter_blocks(
        model, corpus, split="train", context=config.context, seed=config.seed, max_tokens=config.batch
    )
    found = sum(int(block.keep.sum()) for block in blocks)
    if found < config.batch:
        raise UserError(
            f"there must be tokens for at least one batch of {config.batch} rows",
            f"{found} tokens in the training part of {corpus.name}",
            "give a smaller --batch or a longer corpus",
        )


def _stored_rows(
    config: TrainConfig, given: LanguageModel | None, on_progress: Report, resume: RingPosition | None
) -> Rows:
    store = open_store(config.store)
    device = pick_device(config.device)
    layers = 1 + max(map(layer_of, store.sites))
    wanted = set(expand_sites(config.sites, config.layers, layers))
    sites = [site for site in store.sites if site in wanted]
    if not sites:
        raise UserError(
            "the store must hold a site that --sites and --layers name",
            f"it holds {', '.join(store.sites)}",
            "choose from these",
        )
    tokens = min(store.rows, config.tokens)
    widths = {site: store.widths[site] for site in sites}
    fixed = sum(fixed_costs(config, None, widths, store.dtype, on_gpu=device.type != "cpu").values())
    manifest = json.dumps(store.manifest, sort_keys=True).encode()
    return Rows(
        ring=ShuffleRing(
            lambda start: _first(tokens, store.iter_rows(sites, start=start.kept)),
            widths,
            dtype=store.dtype,
            rows=plan_ring_rows(config, widths, store.dtype, fixed),
            batch=config.batch,
            passes=config.passes,
            seed=config.seed,
            device=device,
            resume=resume,
        ),
        total=tokens * config.passes,
        model=store.manifest["model"],
        device=device,
        dtype=store.dtype,
        identity={"store rows": store.rows, "store manifest": hashlib.sha256(manifest).hexdigest()},
    )


def _first(tokens: int, source: Iterator[RowBatch]) -> Iterator[RowBatch]:
    """The rows with numbers below `tokens`."""
    for rows in source:
        room = tokens - (rows.begin.kept if rows.begin else 0)
        if room < len(rows):
            if room > 0:
                part = RowMap(rows.map.document[:room], rows.map.position[:room], rows.map.token[:room])
                yield RowBatch({site: x[:room] for site, x in rows.rows.items()}, part, rows.begin)
            return
        yield rows
