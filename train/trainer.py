"""The training run: rows in, one dictionary per site out. The loop is `_train`; the rest prepares and
keeps.
"""

import contextlib
import dataclasses
import logging
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from types import FrameType

import torch

import sae
from activations.blocks import TokenBlocks, iter_blocks
from activations.corpora import Corpus, load_corpus
from activations.harvest import RowBatch, harvest_rows
from activations.models import LanguageModel, load_model
from activations.precision import pick_device
from activations.ring import ShuffleRing
from activations.shapes import model_shape
from activations.sites import expand_sites, layer_of
from activations.store import open_store
from sae.errors import UserError
from sae.files import make_folder
from sae.jumprelu import DictionaryConfig
from sae.kernels.dispatch import choose_kernel, make_kernel
from sae.numbers import format_count
from train.config import TrainConfig
from train.mirror import Mirror, check_wandb
from train.plan import fixed_costs, plan_ring_rows
from train.run_folder import RunFolder, refuse_occupied
from train.site_trainer import SiteTrainer

_log = logging.getLogger(__name__)

# rows of the first generation that each site's first weights are placed by
_FIRST_ROWS = 8192


Report = Callable[[str, int, int, str], object]
"""Told what is going on (`harvest` or `train`), how much of it is done, of how much, and a detail to show."""


def train_run(
    config: TrainConfig,
    *,
    model: LanguageModel | None = None,
    on_progress: Report | None = None,
) -> RunFolder:
    """Trains every site of `config` and leaves a run folder, also when stopped by Ctrl-C or SIGTERM.

    `model` spares loading `config.model` again. Raises UserError for what the config asks wrongly, before
    anything is written; KeyboardInterrupt after saving what is there; NonFiniteError naming the site, the
    run's state then says why it failed.
    """
    refuse_occupied(config.out)
    check_wandb(config.wandb)
    choose_kernel(pick_device(config.device), config.kernel)
    on_progress = on_progress or (lambda what, done, total, detail: None)
    rows = _open_rows(config, model, on_progress)
    run = RunFolder.create(
        config.out, config.to_dict(), sites=list(rows.ring.widths), device=str(rows.device)
    )
    started, trainers = time.time(), {}
    try:
        with Mirror(config, run) as mirror, _Stop() as stop:
            _train(config, rows, run, trainers, mirror, stop, on_progress)
    except KeyboardInterrupt as interrupt:
        if trainers:
            _save(config, run, trainers, rows)
        run.set_state(f"stopped: {interrupt}", **_totals(rows, started))
        raise
    except Exception as error:
        run.set_state(f"failed: {error}", **_totals(rows, started))
        raise
    run.set_state("done", **_totals(rows, started))
    return run


def _train(
    config: TrainConfig,
    rows: "_Rows",
    run: RunFolder,
    trainers: dict[str, SiteTrainer],
    mirror: Mirror,
    stop: "_Stop",
    on_progress: Report,
) -> None:
    """The loop. `trainers` is the caller's, who saves what is in it if this is interrupted."""
    ring, total, latest = rows.ring, rows.total, {}
    # one for all sites: they share its buffers
    kernel = make_kernel(choose_kernel(rows.device, config.kernel))
    for site, moments in ring.statistics.items():
        trainers[site] = SiteTrainer(config, site, moments, ring.first_rows(site, _FIRST_ROWS), kernel)
    step = 0
    for batch in ring:
        with stop.at_step_boundary():
            share = min(1.0, step * config.batch / total)
            jobs = [trainer.job(batch[site], share) for site, trainer in trainers.items()]
            for trainer, figures in zip(trainers.values(), kernel.steps(jobs), strict=True):
                trainer.take(figures)
            step += 1
        if step % config.log_every == 0:
            latest = {site: trainer.metrics() for site, trainer in trainers.items()}
            lines = [
                {"step": step, "rows": ring.rows_served, "site": site, **latest[site]} for site in latest
            ]
            run.log(lines)
            mirror.log(step, latest)
        on_progress("train", ring.rows_served, total, _summary(config, latest))
    _save(config, run, trainers, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """Where a run's rows come from: a live model or a store, behind one ring."""

    ring: ShuffleRing
    total: int
    """Rows to be served, repeats included."""
    model: str
    device: torch.device


def _open_rows(config: TrainConfig, model: LanguageModel | None, on_progress: Report) -> _Rows:
    return _stored_rows(config) if config.store else _live_rows(config, model, on_progress)


def _live_rows(config: TrainConfig, model: LanguageModel | None, on_progress: Report) -> _Rows:
    corpus = load_corpus(config.corpus)
    shape = model_shape(config.model)
    sites = expand_sites(config.sites, config.layers, shape.n_layers)
    model = model or load_model(config.model, dtype=config.dtype, device=config.device)
    model.check_sites(sites)
    widths = {site: model.site_width(site) for site in sites}
    fixed = sum(fixed_costs(config, shape, widths, model.dtype, on_gpu=model.device.type != "cpu").values())
    blocks = _training_blocks(config, model, corpus)
    ring = ShuffleRing(
        _watched(harvest_rows(model, blocks, sites), config.tokens, on_progress),
        widths,
        dtype=model.dtype,
        rows=plan_ring_rows(config, widths, model.dtype, fixed),
        batch=config.batch,
        passes=config.passes,
        seed=config.seed,
        device=model.device,
    )
    return _Rows(ring=ring, total=config.tokens * config.passes, model=model.name, device=model.device)


def _training_blocks(config: TrainConfig, model: LanguageModel, corpus: Corpus) -> Iterator[TokenBlocks]:
    """Blocks with `config.tokens` tokens in all; a shorter corpus is read again, in another order."""

    def blocks(tokens: int, seed: int, epochs: int | None) -> Iterator[TokenBlocks]:
        return iter_blocks(
            model,
            corpus,
            split="train",
            context=config.context,
            blocks_per_batch=config.model_batch,
            seed=seed,
            max_tokens=tokens,
            epochs=epochs,
        )

    found = 0
    for block in blocks(config.tokens, config.seed, 1):
        found += int(block.keep.sum())
        yield block
    # less than a batch is the ring's to refuse: going round would only hide it
    if config.batch <= found < config.tokens:
        _log.warning(
            "%s has %s training tokens, fewer than the %s asked for: it is read again",
            corpus.name,
            format_count(found),
            format_count(config.tokens),
        )
        yield from blocks(config.tokens - found, config.seed + 1, None)


def _watched(source: Iterator[RowBatch], total: int, on_progress: Report) -> Iterator[RowBatch]:
    done = 0
    for rows in source:
        yield rows
        done += len(rows)
        on_progress("harvest", done, total, "")


def _stored_rows(config: TrainConfig) -> _Rows:
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
    ring = ShuffleRing(
        store.iter_rows(sites),
        widths,
        dtype=store.dtype,
        rows=plan_ring_rows(config, widths, store.dtype, fixed),
        batch=config.batch,
        passes=config.passes,
        seed=config.seed,
        device=device,
    )
    return _Rows(ring=ring, total=tokens * config.passes, model=store.manifest["model"], device=device)


def _save(config: TrainConfig, run: RunFolder, trainers: dict[str, SiteTrainer], rows: _Rows) -> None:
    for site, trainer in trainers.items():
        cfg = DictionaryConfig(
            d_in=rows.ring.widths[site],
            d_sae=config.width,
            site_in=site,
            model=rows.model,
            corpus=config.corpus,
            context=config.context,
            l0_target=config.l0,
        )
        sae.save(trainer.dictionary(cfg), make_folder(run.site_dir(site)))


def _summary(config: TrainConfig, metrics: dict[str, dict[str, float]]) -> str:
    """The figures of the run at a glance: the median site, since 18 do not fit on a line."""
    if not metrics:
        return ""
    l0, fvu = (statistics.median(row[name] for row in metrics.values()) for name in ("l0", "fvu"))
    return f"L0 {l0:.0f} (target {config.l0:g}), FVU {fvu:.3f}"


def _totals(rows: _Rows, started: float) -> dict[str, float | int]:
    return {
        "rows_harvested": rows.ring.rows_harvested,
        "rows_served": rows.ring.rows_served,
        "ring_rows": rows.ring.rows,
        "seconds": round(time.time() - started, 1),
    }


class _Stop:
    """Turns Ctrl-C and SIGTERM into a KeyboardInterrupt that never falls inside a step."""

    def __enter__(self) -> "_Stop":
        self._in_step, self._asked = False, ""
        self._previous = {}
        # only the main thread may set handlers; elsewhere Ctrl-C keeps its usual meaning
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_step_boundary(self) -> Iterator[None]:
        """Within it a signal waits; it is raised at the end."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        if self._asked:
            raise KeyboardInterrupt(self._asked)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self._asked = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if not self._in_step:
            raise KeyboardInterrupt(self._asked)
