"""A training step of one site, against its own encoder product and against the dense reference, in turns.

The product is the step's floor in operations. Sizes default to the demo's. The last line is JSON; the ratios
are
medians over rounds of ratios taken within a round.

    python benchmarks/step_speed.py [--width 2k] [--l0 40] [--batch 2048] [--rounds 15]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from activations.ring import RunningStatistics
from sae.kernels.reference import reference_step
from sae.numbers import parse_width
from train.config import TrainConfig
from train.site_trainer import SiteTrainer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A training step against its encoder product.")
    parser.add_argument("--d-in", type=int, default=640)
    parser.add_argument("--width", type=parse_width, default=2048)
    parser.add_argument("--l0", type=float, default=40.0)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    return parser.parse_args()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    options = parse()
    dtype = getattr(torch, options.dtype)
    rows = torch.randn(8 * options.batch, options.d_in, generator=torch.Generator().manual_seed(0)).to(dtype)
    moments = RunningStatistics(options.d_in)
    moments.update(rows)
    config = TrainConfig(width=options.width, l0=options.l0, batch=options.batch, tokens=8 * options.batch)
    trainer = SiteTrainer(config, "blocks.0.hook_resid_post", moments.result(), rows)
    batch = rows[: options.batch]
    encoder = trainer.weights.W_enc_t.to(dtype)
    scaled = batch.float() / trainer.scale
    works: dict[str, Callable[[], object]] = {
        "product": lambda: batch @ encoder.T,
        "step": lambda: trainer.step(batch, 0.5),
        "reference": lambda: reference_step(trainer.weights, scaled, scaled, trainer.settings(0.5)),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(options.rounds + 2):
        for name, work in works.items():
            taken = seconds(work)
            if turn >= 2:  # the first turns set up libraries and threads
                times[name].append(taken)
    ratios = {
        f"{top}_over_{bottom}": round(
            statistics.median(a / b for a, b in zip(times[top], times[bottom], strict=True)), 2
        )
        for top, bottom in (("step", "product"), ("reference", "step"))
    }
    medians = {f"{name}_ms": round(1e3 * statistics.median(taken), 1) for name, taken in times.items()}
    print(json.dumps({**vars(options), **medians, **ratios, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
