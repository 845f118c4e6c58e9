"""How fast the Features API answers on an index of full size, made up.

    python benchmarks/feature_speed.py [--sites 18] [--latents 16k] [--tokens 200k] [--l0 50] [--d-in 640]
                                       [--keep FOLDER] [--times 40]

Latents fire on random tokens, drawn as in text (the k-th word 1/k as often), with densities spread over three
decades. Every call is made on latents drawn anew, in turns; `first_ms` is the first call in the process,
which opens files, and then the median and the slowest of the rest are given, in CPU milliseconds
(`time.process_time`; the wall clock of a busy machine says little) and by the wall. "find(token=), run just
opened" is the first thing asked in a process of its own: no site is open yet. The folder is made unless
--keep has it already. The last line is JSON.
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

import sae
import viewer
from sae.dictionary import parameter_shapes
from sae.numbers import parse_count, parse_width
from train.run_folder import RunFolder
from viewer.index.firings import Firings, Texts
from viewer.index.histogram import N_BINS
from viewer.index.storage import SCHEMAS, make_lists, make_table, write_site, write_texts, write_tokens

CONTEXT, VOCABULARY, TOP, BANDED = 128, 50_000, 20, 25


def main() -> None:
    """Makes the index where it is not kept, and prints what each call takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, default=18)
    parser.add_argument("--latents", type=parse_width, default=2**14)
    parser.add_argument("--tokens", type=parse_count, default=200_000)
    parser.add_argument("--l0", type=int, default=50)
    parser.add_argument("--d-in", type=int, default=640)
    parser.add_argument("--times", type=int, default=40)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)) / "run"
        if not (folder / "run.json").is_file():
            make_run(folder, arguments)
        found = measure(folder, arguments.times)
        found["find(token=), run just opened"] = first_searches(folder, 7)
    for name, row in found.items():
        print(f"{name:31}", row)
    sizes = {name: getattr(arguments, name) for name in ("sites", "latents", "tokens", "l0", "d_in")}
    print(json.dumps({"benchmark": "feature_speed", **sizes, "calls": found}))


def measure(folder: Path, times: int) -> dict[str, dict[str, float]]:
    """{call: first, median and worst, by CPU and by the wall}."""
    generator = np.random.default_rng(0)
    started = (time.process_time(), time.perf_counter())
    run = viewer.open(folder)
    opened = {
        "cpu_ms": 1e3 * (time.process_time() - started[0]),
        "wall_ms": 1e3 * (time.perf_counter() - started[1]),
    }
    layers = len(run.sites)

    def feature() -> viewer.Feature:
        site = run.layer(int(generator.integers(layers)))
        return site[int(generator.integers(len(site)))]

    def relabel(f: viewer.Feature) -> None:
        f.label = "made up"

    on_feature: dict[str, Callable[[viewer.Feature], object]] = {
        "examples": lambda f: f.examples(),
        "examples top, 24": lambda f: f.examples(0, 24),
        "activations": lambda f: f.activations(),
        "logits": lambda f: f.logits(),
        "histogram": lambda f: f.histogram(),
        "drivers": lambda f: f.drivers(),
        "neighbours": lambda f: f.neighbours(),
        "cofiring": lambda f: f.cofiring(),
        "plot_histogram": lambda f: f.plot_histogram(),
        "card": lambda f: f._repr_html_(),
        "text": repr,
        "label": lambda f: f.label,
        "label = ...": relabel,
    }
    words = [f" word{n}" for n in np.unique(run.index.texts.tokens[run.index.texts.keep])[: 20 * times]]
    taken = {"open a site": [_timed(functools.partial(run.site, site)) for site in run.sites]}
    taken |= {"run.layer(l)[i]": [_timed(feature) for _ in range(times)]}
    for name, call in on_feature.items():
        taken[name] = [_timed(functools.partial(call, feature())) for _ in range(times)]
    for name, call in {
        "find(token=)": lambda: run.find(token=str(generator.choice(words))),
        "find(text=)": lambda: run.find(text=" ".join(generator.choice(words, 2))),
        "find(like=)": lambda: run.find(like=feature()),
        "latents()": run.latents,
        "duplicates()": run.duplicates,
        "sql(count by site)": lambda: run.sql(
            "select site, count(*) from latents where density > 0.01 group by 1"
        ),
    }.items():
        taken[name] = [_timed(call) for _ in range(max(4, times // 6))]
    return {"open": {k: round(v, 2) for k, v in opened.items()}} | {n: _summary(t) for n, t in taken.items()}


def first_searches(folder: Path, times: int) -> dict[str, float]:
    """What the first search for a token takes in so many processes."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        return _summary([pool.submit(_first_search, folder, f" word{40 + n}").result() for n in range(times)])


def _first_search(folder: Path, word: str) -> tuple[float, float]:
    run = viewer.open(folder)
    return _timed(lambda: run.find(token=word))


def make_run(folder: Path, size: argparse.Namespace) -> None:
    """A run folder with dictionaries and indexes of random numbers."""
    generator = np.random.default_rng(1)
    sites = [f"blocks.{layer}.hook_resid_post" for layer in range(size.sites)]
    run = RunFolder.create(folder, {"model": "made up", "corpus": "made up"}, sites=sites, device="cpu")
    texts = _texts(size.tokens, generator)
    sha = write_texts(folder / "index", texts, {"corpus": "made up"})
    write_tokens(folder / "index", {n: f" word{n}" for n in range(VOCABULARY)})
    for layer, site in enumerate(sites):
        started = time.process_time()
        cfg = sae.DictionaryConfig(d_in=size.d_in, d_sae=size.latents, site_in=site, site_out=site)
        shapes = parameter_shapes(cfg)
        sae.save(sae.build(cfg, {n: torch.randn(shape) for n, shape in shapes.items()}), run.site_dir(site))
        firings = _firings(size.latents, len(texts), size.l0, generator)
        tables = _tables(
            firings, texts, site, sites[layer - 1 : layer] + sites[layer + 1 : layer + 2], generator
        )
        manifest = {
            "model": "made up", "site": site, "site_in": site, "site_out": site, "d_sae": size.latents,
            "corpus": "made up", "tokens": len(texts), "texts": sha, "logit_histogram_edges": list(range(42)),
        }  # fmt: skip
        write_site(run.index_dir(site), firings=firings, tables=tables, manifest=manifest)
        print(f"made {site} in {time.process_time() - started:.1f} s of CPU", flush=True)
    run.set_state("done")


def _texts(tokens: int, generator: np.random.Generator) -> Texts:
    blocks = -(-tokens // (CONTEXT - 1))
    shape = (blocks, CONTEXT)
    word = np.minimum(generator.zipf(1.2, shape), VOCABULARY - 1).astype(np.int32)
    place = np.arange(blocks * CONTEXT).reshape(shape)
    keep = np.ones(shape, bool)
    keep[:, 0] = False
    return Texts(
        tokens=word,
        document=np.where(keep, place // 300, -1),
        position=np.where(keep, place % 300, -1).astype(np.int32),
        keep=keep,
    )


def _firings(latents: int, rows: int, l0: int, generator: np.random.Generator) -> Firings:
    density = 10 ** generator.uniform(-4, -1, latents)
    number = np.minimum(generator.poisson(density * rows * l0 / density.sum()), rows)
    # a random start and stride visit each row once, and cost less than drawing without putting back
    row = [
        np.sort((int(generator.integers(rows)) + np.arange(n) * (rows // max(1, n))) % rows)
        for n in number.tolist()
    ]
    starts = np.concatenate([[0], np.cumsum(number)])
    return Firings(
        starts=starts,
        row=np.concatenate(row).astype(np.int32),
        activation=generator.gamma(2, 3, int(starts[-1])).astype(np.float32),
    )


def _tables(
    firings: Firings, texts: Texts, site: str, beside: list[str], generator: np.random.Generator
) -> dict[str, pa.Table]:
    latents, rows = len(firings), len(texts)
    number = np.diff(firings.starts)
    every = np.arange(latents, dtype=np.int32)
    tens = generator.integers(0, VOCABULARY, (2, latents, 10))
    logits = generator.normal(size=(2, latents, 10)).astype(np.float32)
    bins = np.full(latents, 20)
    first = {
        "latent": every,
        "state": np.where(number == 0, "silent", "live"),
        "label": [f"word{n} and what is near it" for n in range(latents)],
        "label_evidence": ["61 % of its activation is on it"] * latents,
        "firings": number,
        "density": number / rows,
        "log10_density": np.log10(np.maximum(number, 1) / rows),
        "mean": np.ones(latents, np.float32),
        "max": np.full(latents, 40, np.float32),
        "threshold": np.zeros(latents, np.float32),
        "histogram_first": np.full(latents, N_BINS // 2),
        "histogram": make_lists(bins, generator.integers(0, 99, int(bins.sum())).astype(np.int32)),
        "top_tokens": tens[0].astype(np.int32),
        "bottom_tokens": tens[1].astype(np.int32),
        "top_logits": logits[0],
        "bottom_logits": logits[1],
        "logit_histogram": generator.integers(0, 9999, (latents, 41)).astype(np.int32),
        "decoder_norm": np.ones(latents, np.float32),
        "encoder_decoder_cosine": np.ones(latents, np.float32),
    }
    columns = {
        "latents.parquet": first,
        "examples.parquet": _examples(firings, texts, generator),
        "drivers.parquet": _drivers(firings, texts, generator),
        "related.parquet": _related(latents, site, beside, generator),
    }
    return {name: make_table(SCHEMAS[name], columns[name]) for name in SCHEMAS}


def _some(
    firings: Firings, many: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At most so many firings of each latent, drawn at random: latent, rank, and which firing."""
    number = np.diff(firings.starts)
    has = np.minimum(number, many)
    latent = np.repeat(np.arange(len(firings), dtype=np.int32), has)
    rank = np.arange(len(latent)) - np.repeat(np.cumsum(has) - has, has)
    return (
        latent,
        rank,
        firings.starts[latent] + (generator.integers(1 << 40, size=len(latent)) + rank) % number[latent],
    )


def _examples(firings: Firings, texts: Texts, generator: np.random.Generator) -> dict[str, np.ndarray]:
    latent, rank, firing = _some(firings, TOP + BANDED, generator)
    block, peak = np.divmod(texts.place[firings.row[firing]], texts.tokens.shape[1])
    return {
        "latent": latent,
        "band": np.where(rank < TOP, 0, 1 + (rank - TOP) // 5),
        "rank": np.where(rank < TOP, rank, (rank - TOP) % 5),
        "block": block,
        "peak": peak,
        "activation": firings.activation[firing],
        "token": texts.tokens[block, peak],
    }


def _drivers(firings: Firings, texts: Texts, generator: np.random.Generator) -> dict[str, np.ndarray]:
    latent, rank, firing = _some(firings, 20, generator)
    n = len(latent)
    return {
        "latent": latent,
        "order": np.where(rank < 10, "activation", "lift"),
        "rank": rank % 10,
        "token": texts.tokens.reshape(-1)[texts.place[firings.row[firing]]],
        "count": generator.integers(1, 50, n),
        "mean": generator.random(n, np.float32),
        "share": generator.random(n, np.float32) / 10,
        "lift": generator.random(n, np.float32) * 100,
    }


def _related(
    latents: int, site: str, beside: list[str], generator: np.random.Generator
) -> dict[str, np.ndarray | list]:
    kinds = [("cofiring", site), ("cosine", site), *zip(("next", "previous"), beside[::-1], strict=False)]
    n = latents * len(kinds) * 10
    kind = np.tile(np.repeat(np.arange(len(kinds)), 10), latents)
    return {
        "latent": np.repeat(np.arange(latents, dtype=np.int32), len(kinds) * 10),
        "kind": np.array([k for k, _ in kinds])[kind],
        "rank": np.tile(np.arange(10), latents * len(kinds)),
        "other_site": np.array([s for _, s in kinds])[kind],
        "other": generator.integers(0, latents, n),
        "value": generator.random(n, np.float32) * 0.905,
        "count": generator.integers(0, 50, n),
    }


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def _summary(taken: list[tuple[float, float]]) -> dict[str, float]:
    cpu, wall = ([t[n] for t in taken[1:] or taken] for n in (0, 1))
    return {
        "first_cpu_ms": round(taken[0][0], 2),
        "first_wall_ms": round(taken[0][1], 2),
        "median_cpu_ms": round(statistics.median(cpu), 2),
        "worst_cpu_ms": round(max(cpu), 2),
        "median_wall_ms": round(statistics.median(wall), 2),
        "worst_wall_ms": round(max(wall), 2),
    }


if __name__ == "__main__":
    main()
