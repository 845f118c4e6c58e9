"""How training scales with ranks: predicted from the times of its pieces, and held against real processes.

Pieces, each measured on as many processes at once as there are cores: the text's way to token blocks, the
forward pass over a model batch, the exchange of its rows (seconds a swap, processor seconds a byte), a step
of a site with the ring's share, and a meeting of all ranks. From these, `simulate` plays the rounds of a run:
ranks harvest a batch each, trade (which waits for the slowest), and train their sites, harvesting ahead as
far as the ring takes in. Samples are drawn from the measured ones, so stragglers are in it. A machine with
fewer cores than the ranks' threads need cannot be faster than the sum of all work over its cores.

`--check 2,4` runs real training on so many processes of this machine and says how far off the prediction was.
Without it, only predictions. Where other programs run the clock says little: `work_off` compares processor
time for a token instead, which is what bounds ranks that outnumber the cores. The last line is JSON.

What is predicted for 8, 64 and 512 ranks, each with the cores and the link of `--cores-per-rank` and
`--bandwidth`:
    weak     as many sites a rank as one rank has here: sites grow with ranks
    sites    `--fixed` sites in all, whole: a rank beyond them only harvests
    shards   the same sites; ranks beyond them divide a dictionary's latents, and add up reconstructions

    python benchmarks/scaling.py [--check 2,4] [--layers 0-7] [--width 2048] [--bandwidth 10G]
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from activations.blocks import iter_blocks
from activations.corpora import load_corpus
from activations.harvest import RowBatch, harvest_rows
from activations.models import LanguageModel, load_model
from activations.ranks import Ranks, open_ranks
from activations.ring import ShuffleRing
from activations.sites import expand_sites
from sae.kernels.dispatch import choose_kernel, make_kernel
from sae.numbers import parse_size, parse_width
from train.config import TrainConfig
from train.site_trainer import SiteTrainer
from train.trainer import train_run

PERIODS = 16
"""Generations of the ring over which a real run is timed, once its stock is full: some rounds of four ranks,
for up to a round has been harvested before."""
ROUNDS = 60
_FEW = 1e-6


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of a run, in rows, and the bytes that a row of all sites has."""

    sites: int
    batch: int
    passes: int
    batch_rows: int
    """Rows of a model batch."""
    ahead_rows: int
    row_bytes: float
    log_every: int


@dataclass(frozen=True, kw_only=True)
class Times:
    """What was measured, in seconds."""

    model: list[float]
    """A forward pass over a model batch."""
    step: list[float]
    """A step of one site, with its rows' way through the ring."""
    text: float
    """Tokenising and packing, for each token: every rank does it for all of the text."""
    swap: float
    """The least that an exchange takes."""
    swap_byte: float
    """Processor time for a byte that a rank sends."""
    share: float
    """A meeting, for each rank that comes."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How training scales with ranks, predicted and checked.")
    parser.add_argument("--check", default="", help="numbers of real processes, with commas")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--corpus", default="wiki-leads")
    parser.add_argument("--layers", default="0-7")
    parser.add_argument("--width", type=parse_width, default=2048)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--generation", type=int, default=4096, help="rows that the ring takes in at once")
    parser.add_argument("--fixed", type=int, default=42, help="sites of the model that is divided")
    parser.add_argument("--cores-per-rank", type=float, default=1.0)
    parser.add_argument("--bandwidth", type=parse_size, default=0, help="bytes/s a rank; 0: as measured here")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def config_of(options: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        model=options.model,
        corpus=options.corpus,
        layers=options.layers,
        width=options.width,
        l0=40.0,
        batch=options.batch,
        passes=options.passes,
        buffer=options.passes * options.generation,
        tokens=(options.passes + PERIODS + 1) * options.generation,
        # a small share of the work, as in long runs
        log_every=20,
        wandb="off",
        out=str(Path(options.out) / "run"),
    )


def simulate(
    times: Times, setting: Setting, world: int, *, cores: float, bandwidth: float = 0.0, shards: bool = False
) -> float:
    """Tokens a second that a run on `world` ranks harvests and trains on, all of it on `cores` cores.

    `bandwidth` is what a rank sends in a second; 0 leaves only the processor's time for it. With `shards`,
    ranks beyond the sites divide dictionaries.
    """
    random = np.random.default_rng(0)
    loads = np.bincount(np.arange(setting.sites) % world, minlength=world).astype(float)
    steps = world * setting.batch_rows * setting.passes / setting.batch
    extra = 0.0
    if shards and world > setting.sites:
        group = world // setting.sites
        loads[:] = 1 / group
        # fp32 reconstructions of a step, there and back around the ring of a group
        sent = 8 * setting.batch * setting.row_bytes / 2 / setting.sites * (group - 1) / group
        extra = times.swap + sent * (times.swap_byte + (1 / bandwidth if bandwidth else 0.0))
    share = times.share * world * steps / setting.log_every
    sent = setting.batch_rows * setting.row_bytes * (world - 1) / world
    swap_work = sent * times.swap_byte if world > 1 else 0.0
    swap = max(swap_work, sent / bandwidth if bandwidth else 0.0) + times.swap * (world > 1)
    model = random.choice(times.model, (ROUNDS, world)) + world * setting.batch_rows * times.text
    # a round has many steps, so their mean is what counts
    train = loads * steps * random.choice(times.step, (ROUNDS, world, 16)).mean(2) + steps * extra + share
    work = float(model.sum() + train.sum()) + ROUNDS * world * swap_work
    if world == 1:
        # harvest and training take turns in one thread
        return ROUNDS * setting.batch_rows / work
    # what is in store, and as much again that the ring has taken in and trains on
    ahead = 2 * setting.ahead_rows / (world * setting.batch_rows)
    met, ends = 0.0, [np.zeros(world)]
    for number in range(ROUNDS):
        # the next round begins once so many rounds, the last of them in part, are trained on
        wanted = max(0.0, number - ahead)
        last = math.ceil(wanted)
        room = ends[last] - (last - wanted) * train[last - 1] if last else ends[0]
        met = float((np.maximum(met, room) + model[number]).max()) + swap
        ends.append(np.maximum(ends[-1], met) + train[number])
    trained = ends[-1]
    seconds = max(float(trained.max()), work / cores)
    return ROUNDS * world * setting.batch_rows / seconds


def predictions(times: Times, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Rates and efficiencies at 8, 64 and 512 ranks: an efficiency is a rank's rate over one's alone."""
    found: dict[str, Any] = {}
    row = setting.row_bytes / setting.sites
    fixed = replace(setting, sites=options.fixed, row_bytes=row * options.fixed)
    own = options.cores_per_rank
    for world in (8, 64, 512):
        grown = replace(setting, sites=setting.sites * world, row_bytes=setting.row_bytes * world)
        for name, case, shards in (("weak", grown, False), ("sites", fixed, False), ("shards", fixed, True)):
            rate = simulate(times, case, world, cores=own * world, bandwidth=options.bandwidth, shards=shards)
            one = simulate(times, case, 1, cores=own)
            found[f"{name}_{world}"] = {
                "tokens_per_s": round(rate, 1),
                "efficiency": round(rate / one / world, 3),
            }
    return found


def now() -> np.ndarray:
    """The clock, and the processor time that this process has taken."""
    return np.array([time.perf_counter(), time.process_time()])


def timed(work: Callable[[], object], rounds: int, warm: int = 1) -> np.ndarray:
    """Seconds of each turn, by the clock and of the processor."""
    ends = []
    for turn in range(warm + rounds + 1):
        ends.append(now())
        if turn < warm + rounds:
            work()
    return np.diff(ends[warm:], axis=0)


def measure_pieces(ranks: Ranks, options: argparse.Namespace) -> dict[str, Any]:
    """The pieces on this rank, while every other rank does the same."""
    config = config_of(options)
    with ranks.busy("measuring"):
        model = load_model(config.model)
        sites = expand_sites(config.sites, config.layers, model.n_layers)
        blocks = iter_blocks(
            model,
            load_corpus(config.corpus),
            split="train",
            context=config.context,
            blocks_per_batch=config.model_batch,
            max_tokens=20_000,
        )
        block = next(blocks)
        before = time.process_time()
        kept = sum(int(other.keep.sum()) for other in blocks)
        text = (time.process_time() - before) / kept
        rows = next(iter(harvest_rows(model, [block], sites)))
    ranks.share("the model", None)
    with ranks.busy("measuring"):
        passes = timed(lambda: list(harvest_rows(model, [block], sites)), 8)
    ranks.share("the passes", None)
    own = sites[ranks.rank :: ranks.world]
    with ranks.busy("measuring"):
        steps = measure_steps(config, model, rows, own)
    n_bytes = sum(part.nbytes for part in rows.rows.values())
    parts = [torch.zeros(n_bytes // ranks.world, dtype=torch.uint8)] * ranks.world
    swaps = timed(lambda: ranks.swap([part[:16] for part in parts]), 50)
    ranks.share("the steps", None)
    sent = n_bytes * max(1, ranks.world - 1) / ranks.world
    swap_byte = float(timed(lambda: ranks.swap(parts), 20)[:, 1].mean()) / sent
    shares = timed(lambda: ranks.share("nothing", None), 50)
    return {
        "times": [
            asdict(
                Times(
                    model=passes[:, clock].tolist(),
                    step=steps[:, clock].tolist(),
                    text=text,
                    swap=float(np.median(swaps[:, clock])),
                    swap_byte=swap_byte,
                    share=float(np.median(shares[:, clock])) / ranks.world,
                )
            )
            for clock in (0, 1)
        ],
        "batch_rows": len(rows),
        "row_bytes": n_bytes / len(rows),
        "sites": len(sites),
    }


def measure_steps(
    config: TrainConfig, model: LanguageModel, rows: RowBatch, sites: tuple[str, ...]
) -> np.ndarray:
    """Seconds of a step of one site, by both clocks, over generations of a ring filled from memory."""
    kernel = make_kernel(choose_kernel(model.device))
    batch = RowBatch({site: rows.rows[site] for site in sites}, rows.map)
    ring = ShuffleRing(
        lambda _: itertools.repeat(batch),
        {site: model.site_width(site) for site in sites},
        dtype=model.dtype,
        rows=config.buffer,
        batch=config.batch,
        passes=config.passes,
        seed=0,
    )
    first = {site: ring.first_rows(site, 4096) for site, _ in ring.statistics.items()}
    trainers = {
        site: SiteTrainer.begin(config, site, ring.statistics[site], first[site], kernel) for site in sites
    }
    period = config.buffer // config.batch
    # rounds before the stock is full are shorter, and the first step compiles
    full = sum(turn * (period // config.passes) for turn in range(1, config.passes + 1))
    ends = []
    for number, served in enumerate(ring, 1):
        made = kernel.steps([trainer.job(served[site], 0.5) for site, trainer in trainers.items()])
        for trainer, figures in zip(trainers.values(), made, strict=True):
            trainer.take(figures)
        ends.append(now())
        if number == full + 2 * period:
            break
    return np.diff(ends[full - 1 :], axis=0) / len(sites)


def measure_run(ranks: Ranks, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of a real run, and processor time a token, over whole generations of its ring."""
    config, ends = config_of(options), {}

    def report(what: str, done: int, total: int, detail: str) -> None:
        if what == "train":
            ends[done // config.batch] = now()

    train_run(config, on_progress=report)
    if not ranks.first:
        return {}
    generation = config.buffer // config.passes // config.batch
    begin = sum(turn * generation for turn in range(1, config.passes + 1))
    end = begin + PERIODS * generation * config.passes
    rows = PERIODS * generation * config.batch
    seconds, work = ends[end] - ends[begin]
    # sites and batches are divided evenly, so this rank's work is everyone's
    return {"tokens_per_s": rows / seconds, "work_us": 1e6 * work * ranks.world / rows}


def start(part: str, world: int, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a part of this script on so many processes of one thread each; returns what rank 0 found."""
    words = [word for word in sys.argv[1:] if not word.startswith("--check")]
    if "--check" in sys.argv:
        words.remove(options.check)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(world)] if world > 1 else []
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [sys.executable, *launch, __file__, *words, "--part", part, "--out", out],
            check=True,
            stdout=sys.stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
        )
        return json.loads((Path(out) / "found.json").read_text(encoding="utf-8"))


def work(options: argparse.Namespace) -> None:
    """What one of the processes does."""
    with open_ranks() as ranks:
        found = (measure_pieces if options.part == "pieces" else measure_run)(ranks, options)
        if ranks.first:
            (Path(options.out) / "found.json").write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    options = parse()
    if options.part:
        work(options)
        return
    cores = psutil.cpu_count(logical=True) or 1
    pieces = start("pieces", cores, options)
    times, works = (Times(**measured) for measured in pieces["times"])
    setting = Setting(
        sites=pieces["sites"],
        batch=options.batch,
        passes=options.passes,
        batch_rows=pieces["batch_rows"],
        ahead_rows=options.generation,
        row_bytes=pieces["row_bytes"],
        log_every=20,
    )
    found: dict[str, Any] = {
        "model_ms": round(1e3 * statistics.mean(times.model), 1),
        "step_ms": round(1e3 * statistics.mean(times.step), 2),
        "text_us": round(1e6 * times.text, 2),
        "swap_ms": round(1e3 * times.swap, 2),
        "swap_ns_per_byte": round(1e9 * times.swap_byte, 3),
        "share_ms": round(1e3 * times.share, 2),
    }
    for world in map(int, filter(None, options.check.split(","))):
        real = start("run", world, options)
        predicted = simulate(times, setting, world, cores=cores)
        # so few cores that nothing else counts
        busy = 1e6 * _FEW / simulate(works, setting, world, cores=_FEW)
        found[f"check_{world}"] = {
            "tokens_per_s": round(real["tokens_per_s"], 1),
            "predicted": round(predicted, 1),
            "off": round(predicted / real["tokens_per_s"] - 1, 3),
            "work_us": round(real["work_us"], 1),
            "work_predicted": round(busy, 1),
            "work_off": round(busy / real["work_us"] - 1, 3),
        }
    found |= predictions(times, setting, options)
    print(json.dumps({"benchmark": "scaling", **found, **asdict(setting), "cores": cores}))


if __name__ == "__main__":
    main()
