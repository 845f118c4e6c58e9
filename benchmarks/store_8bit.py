"""What 8 bits cost: a dictionary trained from an int8 store against one trained from a bfloat16 store.

Both stores hold the same rows in the same order, so the runs differ in the rounding alone; a third run from
the bfloat16 store with another seed shows what chance does. All are measured on the same held-out rows, as
the model gave them. `error_over_variance` is the mean squared rounding error of each site over the rows'
variance. The last line is JSON.

    python benchmarks/store_8bit.py [--layers all] [--train-layer 9] [--tokens 268k] [--width 4k] [--passes 4]
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import sae
from activations.blocks import Cursor, iter_blocks
from activations.corpora import Split, load_corpus
from activations.harvest import RowBatch, Wanted, harvest_rows
from activations.models import LanguageModel, load_model
from activations.sites import expand_sites
from activations.store import Store
from activations.store_writer import StoreFacts, write_store
from sae.numbers import parse_count, parse_width
from train.config import TrainConfig
from train.trainer import train_run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Dictionaries from an int8 store against a bfloat16 one.")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--corpus", default="wiki-leads")
    parser.add_argument("--layers", default="all", help="layers to harvest and to measure the rounding at")
    parser.add_argument("--train-layer", default="9")
    parser.add_argument("--width", type=parse_width, default=4096)
    parser.add_argument("--l0", type=float, default=50.0)
    parser.add_argument("--tokens", type=parse_count, default=268_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--eval-tokens", type=parse_count, default=26_000)
    parser.add_argument("--scratch", default=None, help="folder to write in; emptied afterwards")
    return parser.parse_args()


def harvest(
    arguments: argparse.Namespace, model: LanguageModel, folder: Path, split: Split, tokens: int
) -> tuple[Store, StoreFacts]:
    """A store of the model's own rows, in bfloat16."""
    corpus = load_corpus(arguments.corpus)
    sites = expand_sites("resid_post", arguments.layers, model.n_layers)
    facts = StoreFacts(
        model=model.name,
        tokenizer_hash=model.tokenizer_hash,
        corpus=arguments.corpus,
        split=split,
        context=256,
        seed=0,
        model_batch=8,
        model_dtype="bfloat16",
        widths={site: model.site_width(site) for site in sites},
    )

    def source(start: Cursor, _: Wanted) -> Iterator[RowBatch]:
        return harvest_rows(
            model, iter_blocks(model, corpus, split=split, max_tokens=tokens, start=start), sites
        )

    return write_store(folder, source, facts, wanted_rows=tokens), facts


def rounding(exact: Store, rounded: Store) -> dict[str, float]:
    """Mean squared difference over the variance, by site."""
    errors = dict.fromkeys(exact.sites, 0.0)
    for rows, others in zip(exact.iter_rows(), rounded.iter_rows(), strict=True):
        for site in exact.sites:
            gap = others.rows[site].float() - rows.rows[site].float()
            errors[site] += float(gap.double().square().sum())
    return {site: error / (exact.rows * exact.statistics[site].scale ** 2) for site, error in errors.items()}


def train(arguments: argparse.Namespace, store: Path, out: Path, seed: int) -> dict[str, sae.Dictionary]:
    config = TrainConfig(
        store=str(store),
        model=arguments.model,
        corpus=arguments.corpus,
        layers=arguments.train_layer,
        width=arguments.width,
        l0=arguments.l0,
        tokens=arguments.tokens,
        batch=arguments.batch,
        passes=arguments.passes,
        seed=seed,
        out=str(out),
    )
    run = train_run(config)
    return {site: sae.load(run.site_dir(site)) for site in run.sites()}


@torch.no_grad()
def measure(dictionary: sae.Dictionary, store: Store, site: str) -> tuple[float, float]:
    """FVU and L0 of a dictionary over all rows of a store."""
    residual = active = 0.0
    for batch in store.iter_rows([site]):
        rows = batch.rows[site].float()
        acts = dictionary.encode(rows)
        residual += float((rows - dictionary.decode(acts)).double().square().sum())
        active += float((acts > 0).sum())
    return residual / (store.rows * store.statistics[site].scale ** 2), active / store.rows


def main() -> None:
    arguments = parse()
    model = load_model(arguments.model, dtype="bfloat16")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        scratch = Path(name)
        exact, facts = harvest(arguments, model, scratch / "bfloat16", "train", arguments.tokens)
        held_out, _ = harvest(arguments, model, scratch / "held_out", "held_out", arguments.eval_tokens)
        del model
        rounded = write_store(
            scratch / "int8",
            lambda start, _: exact.iter_rows(start=start.kept),
            facts,
            wanted_rows=exact.rows,
            dtype="int8",
        )
        errors = rounding(exact, rounded)
        runs = {
            "bfloat16": train(arguments, scratch / "bfloat16", scratch / "run-bfloat16", 0),
            "int8": train(arguments, scratch / "int8", scratch / "run-int8", 0),
            "bfloat16_seed_1": train(arguments, scratch / "bfloat16", scratch / "run-seed", 1),
        }
        site = next(iter(runs["int8"]))
        found = {name: measure(run[site], held_out, site) for name, run in runs.items()}
    result = {
        "benchmark": "store_8bit",
        "site": site,
        "fvu": {name: round(fvu, 6) for name, (fvu, _) in found.items()},
        "l0": {name: round(l0, 3) for name, (_, l0) in found.items()},
        "fvu_difference": round(found["int8"][0] - found["bfloat16"][0], 6),
        "fvu_difference_of_seeds": round(found["bfloat16_seed_1"][0] - found["bfloat16"][0], 6),
        "error_over_variance": {site: float(f"{error:.3g}") for site, error in errors.items()},
        "bytes_ratio": round(rounded.bytes / exact.bytes, 3),
        "tokens": exact.rows,
        "passes": arguments.passes,
        "width": arguments.width,
        "held_out_tokens": held_out.rows,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
