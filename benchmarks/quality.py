"""One dictionary trained by the default recipe and measured on held-out documents.

The defaults are the comparison that the project's bar was set by: Gemma 3 270M, resid_post of layer 9, width
4,096,
L0 50, 268k distinct tokens of Wikipedia leads seen four times in batches of 2,048. The last line is JSON.

    python benchmarks/quality.py [--layers 9] [--width 4k] [--l0 50] [--context 256] [--seed 0]
    python benchmarks/quality.py --principal 0 --l0-gain 0 --dead-after 1B     # without what this recipe adds
"""

import argparse
import dataclasses
import json
import platform
import tempfile
import time

import torch

import sae
from activations.blocks import iter_blocks
from activations.corpora import load_corpus
from activations.models import load_model
from sae.numbers import parse_count, parse_width
from train.config import TrainConfig
from train.evals import evaluate
from train.trainer import train_run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The default recipe, on held-out documents.")
    parser.add_argument("--layers", default="9")
    parser.add_argument("--width", type=parse_width, default=4096)
    parser.add_argument("--l0", type=float, default=50.0)
    parser.add_argument("--tokens", type=parse_count, default=268_000)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--principal", type=int, default=8)
    parser.add_argument("--l0-gain", type=float, default=0.02)
    parser.add_argument("--dead-after", type=parse_count, default=100_000)
    parser.add_argument("--eval-tokens", type=parse_count, default=26_000)
    parser.add_argument("--loss-tokens", type=parse_count, default=4096)
    return parser.parse_args()


def main() -> None:
    options = parse()
    model = load_model("gemma-3-270m")
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    shared = {name: value for name, value in vars(options).items() if name in names}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = train_run(TrainConfig(**shared, out=f"{folder}/run"), model=model)
        seconds = time.perf_counter() - start
        metrics = run.metrics().groupby("site").last()
        dictionaries = {site: sae.load(run.site_dir(site)) for site in run.sites()}
    blocks = iter_blocks(
        model,
        load_corpus("wiki-leads"),
        split="held_out",
        context=options.context,
        max_tokens=options.eval_tokens,
    )
    table = evaluate(model, dictionaries, blocks, tokens=options.eval_tokens, loss_tokens=options.loss_tokens)
    for site, row in table.items():
        figures = {name: round(value, 5) for name, value in row.items() if isinstance(value, float)}
        found = {**figures, "dead_training": round(float(metrics.loc[site, "dead"]), 5)}
        result = {
            **vars(options),
            "site": site,
            **found,
            "seconds": round(seconds),
            "torch": torch.__version__,
        }
        print(json.dumps({**result, "machine": platform.processor() or platform.machine()}))


if __name__ == "__main__":
    main()
