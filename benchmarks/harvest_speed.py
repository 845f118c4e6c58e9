"""Harvesting every resid_post site into the shuffle ring, against the bare transformers body.

Both run the same tokens in the same dtype, batch and context, in turns; neither computes logits. The bare
body is transformers' own, with the attention it picks by default. The last line is JSON; `ratio` is the
median over rounds of our tokens per second over the bare body's.

    python benchmarks/harvest_speed.py [--model gemma-3-270m] [--rounds 7] [--blocks 8] [--context 256]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from activations.blocks import TokenBlocks, iter_blocks
from activations.corpora import load_corpus
from activations.harvest import harvest_rows
from activations.models import LanguageModel, load_model
from activations.ring import ShuffleRing
from activations.sites import expand_sites
from activations.sources import fetch_folder


class Counted:
    """Passes blocks on, counting their tokens and keeping the latest for the other side."""

    def __init__(self, blocks: Iterator[TokenBlocks]) -> None:
        self.blocks, self.tokens, self.latest = blocks, 0, torch.empty(0)

    def __iter__(self) -> Iterator[TokenBlocks]:
        for block in self.blocks:
            self.tokens += block.tokens.numel()
            self.latest = block.tokens
            yield block


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Harvest every site into the ring, against the bare body.")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--corpus", default="wiki-leads")
    parser.add_argument("--kinds", default="resid_post")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    return parser.parse_args()


def filling_ring(model: LanguageModel, counted: Counted, sites: tuple[str, ...], batch: int) -> ShuffleRing:
    """A ring that takes in one batch a round: each harvest is about one batch of blocks."""
    ring = ShuffleRing(
        lambda _: harvest_rows(model, counted, sites),
        {site: model.site_width(site) for site in sites},
        dtype=model.dtype,
        rows=2 * batch,
        batch=batch,
        passes=2,
        seed=0,
        device=model.device,
    )
    _ = ring.statistics  # the first generation's extra work is done here, out of the timings
    return ring


def compare(
    model: LanguageModel, bare: Any, counted: Counted, ring: ShuffleRing, rounds: int
) -> list[tuple[float, float]]:
    """Tokens per second of the harvest and of the bare body, in turns; a first turn is not counted."""
    batches = iter(ring)
    next(batches)  # a serving of the generation that is there already

    def synchronise() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    def ours() -> float:
        before, start = counted.tokens, time.perf_counter()
        while counted.tokens == before:
            next(batches)
        synchronise()
        return (counted.tokens - before) / (time.perf_counter() - start)

    @torch.inference_mode()
    def theirs() -> float:
        tokens = counted.latest.to(model.device, torch.long)
        start = time.perf_counter()
        bare(tokens, use_cache=False)
        synchronise()
        return tokens.numel() / (time.perf_counter() - start)

    return [(ours(), theirs()) for _ in range(rounds + 1)][1:]


def main() -> None:
    arguments = parse()
    model = load_model(arguments.model)
    folder = fetch_folder(arguments.model).folder
    bare: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    bare = bare.to(model.device).eval().base_model
    sites = expand_sites(arguments.kinds, "all", model.n_layers)
    blocks = iter_blocks(
        model,
        load_corpus(arguments.corpus),
        split="train",
        context=arguments.context,
        blocks_per_batch=arguments.blocks,
        epochs=None,
    )
    counted = Counted(blocks)
    ring = filling_ring(model, counted, sites, arguments.blocks * arguments.context)
    speeds = compare(model, bare, counted, ring, arguments.rounds)
    ratios = [mine / theirs for mine, theirs in speeds]
    result = {
        "benchmark": "harvest_speed",
        "ratio": round(statistics.median(ratios), 3),
        "ratio_per_round": [round(ratio, 3) for ratio in ratios],
        "harvest_tokens_per_s": round(statistics.median(mine for mine, _ in speeds)),
        "bare_tokens_per_s": round(statistics.median(theirs for _, theirs in speeds)),
        "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "sites": len(sites),
        "blocks": arguments.blocks,
        "context": arguments.context,
        "bare_attention": bare.config._attn_implementation,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
