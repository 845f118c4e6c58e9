"""A few seconds of the real work, timed: what a plan's times and the size of the process rest on."""

import dataclasses
import gc
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from activations.blocks import iter_blocks
from activations.corpora import load_corpus
from activations.harvest import RowBatch, harvest_rows
from activations.models import LanguageModel
from activations.precision import pick_device
from activations.ring import RunningStatistics
from activations.store import open_store
from sae.errors import UserError
from sae.kernels.dispatch import StepKernel, choose_kernel, make_kernel
from train.config import TrainConfig
from train.machine import own_memory, own_peak
from train.site_trainer import SiteTrainer
from train.times import Measured

# work is repeated until it has taken so long, in seconds, or so often
_LONG_ENOUGH = 0.8
_OFTEN_ENOUGH = 4
# rows that the dictionary in the trial is begun from; more make its start slower, not truer
_FIRST_ROWS = 512
_PAGE = 4096


def measure(config: TrainConfig, sites: Sequence[str], model: LanguageModel | None) -> Measured:
    """Makes some rows of `sites` and some training steps on them, about five seconds of work.

    Rows come from the model, or without one from `config.store`. Raises UserError when there is no
    text for a single batch.
    """
    rows, harvest_rate = _stored(config, sites) if model is None else _harvested(config, sites, model)
    kernel = make_kernel(choose_kernel(pick_device(config.device), config.kernel))
    seconds = _step_seconds(config, rows.rows, kernel)
    del rows, kernel
    return _measured(model, harvest_rate, config.batch / seconds)


def measure_harvest(
    model: LanguageModel, rows: Iterator[RowBatch], sites: Sequence[str], context: int
) -> Measured:
    """The same for rows alone: takes some of `rows`, a stream that the model makes of such blocks."""
    _, rate = _timed(model, rows, sites, context)
    return _measured(model, rate, None)


def _stored(config: TrainConfig, sites: Sequence[str]) -> tuple[RowBatch, None]:
    batch = next(open_store(config.store).iter_rows(sites))
    device = pick_device(config.device)
    rows = {site: part.to(device) for site, part in batch.rows.items()}
    return dataclasses.replace(batch, rows=rows), None


def _harvested(config: TrainConfig, sites: Sequence[str], model: LanguageModel) -> tuple[RowBatch, float]:
    blocks = iter_blocks(
        model,
        load_corpus(config.corpus),
        split="train",
        context=config.context,
        blocks_per_batch=config.model_batch,
        seed=config.seed,
    )
    return _timed(model, harvest_rows(model, blocks, sites), sites, config.context)


def _timed(
    model: LanguageModel, stream: Iterator[RowBatch], sites: Sequence[str], context: int
) -> tuple[RowBatch, float]:
    """The first rows of a stream, and the rate at which its rows come."""
    _read_weights(model)
    # one block sets up the libraries and costs little
    model.activations(torch.ones(1, context, dtype=torch.long), sites)
    first, done, elapsed, start = None, 0, 0.0, time.perf_counter()
    for rows in itertools.islice(stream, _OFTEN_ENOUGH):
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        first, done, elapsed = first or rows, done + len(rows), time.perf_counter() - start
        if elapsed >= _LONG_ENOUGH:
            break
    if first is None:
        raise UserError("there must be text to make rows of", "no token", "give a longer corpus")
    return first, done / elapsed


def _step_seconds(
    config: TrainConfig, rows: Mapping[str, Float[Tensor, "row _"]], kernel: StepKernel
) -> float:
    """Seconds of one training step of all sites, from one site of each width."""
    of_width: dict[int, float] = {}
    for site, part in rows.items():
        width = part.shape[1]
        if width not in of_width:
            of_width[width] = _one_site(config, site, part, kernel)
    return sum(of_width[part.shape[1]] for part in rows.values())


def _one_site(config: TrainConfig, site: str, rows: Float[Tensor, "row d_in"], kernel: StepKernel) -> float:
    statistics = RunningStatistics(rows.shape[1])
    statistics.update(rows)
    # begun at the L0 aimed at, which decides how much there is to do; as many latents as a rank has
    width = config.own_width
    begun = dataclasses.replace(config, l0_start=1.0, width=width, l0=min(config.l0, width), shard_latents=1)
    trainer = SiteTrainer.begin(begun, site, statistics.result(), rows[:_FIRST_ROWS], kernel)
    batch = rows[torch.arange(config.batch, device=rows.device) % len(rows)]
    for _ in range(2):  # both compile: the second may take another product, where the first let too much pass
        trainer.step(batch, 0.5)
    trainer.metrics()  # device sync
    start, count, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < _LONG_ENOUGH and count < _OFTEN_ENOUGH:
        trainer.step(batch, 0.5)
        trainer.metrics()  # device sync
        count, elapsed = count + 1, time.perf_counter() - start
    return elapsed / count


def _read_weights(model: LanguageModel) -> None:
    """Touches every page of the weights: those of a mapped file count only once they were read."""
    if model.device.type == "cpu":
        for weight in _weights(model):
            weight.view(torch.uint8).flatten()[::_PAGE].sum()


def _weights(model: LanguageModel) -> list[Tensor]:
    found = {p.data_ptr(): p.detach() for p in model.bridge.parameters() if p.numel()}
    return [weight for weight in found.values() if weight.is_contiguous()]


def _measured(model: LanguageModel | None, harvest_rate: float | None, train_rate: float | None) -> Measured:
    gc.collect()
    weights = 0 if model is None else sum(weight.nbytes for weight in _weights(model))
    on_cpu = model is not None and model.device.type == "cpu"
    return Measured(
        harvest_rate=harvest_rate,
        train_rate=train_rate,
        weights=weights,
        process=own_memory() - (weights if on_cpu else 0),
        peak=own_peak(),
    )
