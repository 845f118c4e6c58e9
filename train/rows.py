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
from activations.exchange import Ahead, Ownership, Spent, exchanged_rows
from activations.harvest import RowBatch, RowMap, harvest_rows
from activations.models import LanguageModel, load_model
from activations.positions import RingPosition
from activations.precision import pick_device
from activations.ranks import Ranks
from activations.ring import ShuffleRing
from activations.shapes import ModelShape, model_shape
from activations.sites import expand_sites, layer_of
from activations.store import open_store
from sae.errors import UserError
from sae.numbers import format_count
from train.config import TrainConfig
from train.plan import fixed_costs, plan_ring_rows, rows_ahead
from train.together import divide

_log = logging.getLogger(__name__)

Report = Callable[[str, int, int, str], object]
"""Told what is going on (`harvest` or `train`), how much of it is done, of how much, and a detail to show."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a run that one rank trains on, in the order of its training."""

    ring: ShuffleRing
    """Of this rank's sites alone: rows of its own size and order, whatever the sites and the ranks."""
    owned: Ownership
    """Which rank trains which site."""
    total: int
    """Rows to be served, repeats included."""
    model: str
    device: torch.device
    dtype: torch.dtype
    identity: dict[str, Any]
    """What they are made from: must be the same when a run is resumed."""
    spent: Spent
    ahead: list[Ahead] = dataclasses.field(default_factory=list)
    """The harvest in a thread of its own, where there are several ranks and it has begun."""

    def check(self) -> None:
        """Raises what the harvest's thread failed with, if it did."""
        for harvest in self.ahead:
            harvest.check()

    def close(self) -> None:
        """Ends the harvest. Every rank must close."""
        for harvest in self.ahead:
            harvest.close()


def open_rows(
    config: TrainConfig,
    model: LanguageModel | None,
    on_progress: Report,
    ranks: Ranks,
    resume: RingPosition | None = None,
) -> Rows:
    """Opens what `config` names; nothing is harvested yet. `model` spares loading it, `resume` is the place
    to go on from. Each rank gets the rows of its own sites. Raises UserError.
    """
    opened = _stored_rows if config.store else _live_rows
    return opened(config, model, on_progress, ranks, resume)


def _live_rows(
    config: TrainConfig,
    given: LanguageModel | None,
    on_progress: Report,
    ranks: Ranks,
    resume: RingPosition | None,
) -> Rows:
    corpus = load_corpus(config.corpus)
    shape = model_shape(config.model)
    sites = expand_sites(config.sites, config.layers, shape.n_layers)
    with ranks.busy("loading the model"):
        model = given or load_model(config.model, dtype=config.dtype, device=str(device_of(config, ranks)))
    model.check_sites(sites)
    if resume is None:
        _refuse_short(config, model, corpus)
    owned = divide({site: model.site_width(site) for site in sites}, model.dtype, ranks.world)
    spent, ahead = Spent(), []
    lane = ranks.lane()

    def source(start: Cursor) -> Iterator[RowBatch]:
        blocks = _blocks(config, model, corpus, start, warns=ranks.first)
        if ranks.world == 1:
            batches = harvest_rows(model, blocks, sites)
        else:
            batches = Ahead(
                lambda stopped: exchanged_rows(lane, model, blocks, owned, stopped=stopped, spent=spent),
                rows_ahead(config),
                beat=lambda moving: (ranks if moving else lane).beat(),
                spent=spent,
            )
            ahead.append(batches)
        for rows in batches:
            done = (rows.begin.kept if rows.begin else 0) + len(rows)
            yield rows
            on_progress("harvest", done, config.tokens, "")

    return Rows(
        ring=_ring(config, source, owned, shape, ranks, model.device, resume),
        owned=owned,
        total=config.tokens * config.passes,
        model=model.name,
        device=model.device,
        dtype=model.dtype,
        identity={"model": model.name, "tokenizer": model.tokenizer_hash, "corpus": corpus.name},
        spent=spent,
        ahead=ahead,
    )


def device_of(config: TrainConfig, ranks: Ranks) -> torch.device:
    """The device to work on: of several GPUs, the one of this rank. Raises UserError when there is none."""
    device = pick_device(config.device)
    if device.type == "cuda" and ranks.world > 1:
        device = ranks.device
        torch.cuda.set_device(device)
    return device


def _ring(
    config: TrainConfig,
    source: Callable[[Cursor], Iterator[RowBatch]],
    owned: Ownership,
    shape: ModelShape | None,
    ranks: Ranks,
    device: torch.device,
    resume: RingPosition | None,
) -> ShuffleRing:
    """The ring of a rank's sites. Raises UserError, the same on all, when one of them has no room for it."""
    for rank in range(ranks.world):
        costs = fixed_costs(config, shape, owned, rank, ranks.world, on_gpu=device.type != "cpu")
        # of the config alone, so the same on every rank
        rows = plan_ring_rows(config, owned.sites(rank), owned.dtype, sum(costs.values()))
    return ShuffleRing(
        source,
        owned.sites(ranks.rank),
        dtype=owned.dtype,
        rows=rows,
        batch=config.batch,
        passes=config.passes,
        seed=config.seed,
        device=device,
        resume=resume,
    )


def _blocks(
    config: TrainConfig, model: LanguageModel, corpus: Corpus, start: Cursor, *, warns: bool
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
        if warns and begin.epoch > 0 and epoch == 0:
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
    config: TrainConfig,
    given: LanguageModel | None,
    on_progress: Report,
    ranks: Ranks,
    resume: RingPosition | None,
) -> Rows:
    store = open_store(config.store)
    device = device_of(config, ranks)
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
    owned = divide({site: store.widths[site] for site in sites}, store.dtype, ranks.world)
    own = list(owned.sites(ranks.rank))
    manifest = json.dumps(store.manifest, sort_keys=True).encode()

    def source(start: Cursor) -> Iterator[RowBatch]:
        # each rank reads the bytes of its own sites: nothing need be traded
        return _first(tokens, store.iter_rows(own, start=start.kept))

    return Rows(
        ring=_ring(config, source, owned, None, ranks, device, resume),
        owned=owned,
        total=tokens * config.passes,
        model=store.manifest["model"],
        device=device,
        dtype=store.dtype,
        identity={"store rows": store.rows, "store manifest": hashlib.sha256(manifest).hexdigest()},
        spent=Spent(),
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
