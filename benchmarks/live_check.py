"""What needs the model, on a real run: how long a trace takes, and attributions against measured ablations.

    python benchmarks/live_check.py runs/demo

For each prompt the 20 largest attributions (gradient times activation) are measured by ablating each alone,
and so are 20 drawn from the 1,000 largest. Correlations are Pearson's over all prompts together, and the
median of those within a prompt. Seconds are CPU time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

import viewer
from activations.models import load_model
from viewer.live.attribution import Verification

TEXT = "The Eiffel Tower is in Paris, the capital of France, and it was built by Gustave Eiffel's company."
PROMPTS = [
    ("The capital of France is", " Paris"),
    ("The capital of Germany is", " Berlin"),
    ("The Eiffel Tower is in the city of", " Paris"),
    ("Barack Obama was the president of the United", " States"),
    ("She opened the door and walked into the", " room"),
    ("The opposite of hot is", " cold"),
    ("In 1945 the Second World", " War"),
    ("Two plus two equals", " four"),
    ("The river flows into the Atlantic", " Ocean"),
    ("He plays the violin and the", " piano"),
]


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """A call's answer and the CPU seconds that it took."""
    start = time.process_time()
    answer = call()
    return answer, round(time.process_time() - start, 3)


def correlations(found: list[Verification]) -> dict[str, float]:
    """Over all rows, and the median of those within a prompt."""
    rows = Verification(pd.concat([check.frame for check in found], ignore_index=True))
    early, late = (Verification(rows.frame.query(which)) for which in ("layer < 3", "layer >= 3"))
    within = [check.correlation for check in found]
    return {
        "pooled": round(rows.correlation, 3),
        "pooled_ranks": round(rows.rank_correlation, 3),
        "layers_0_to_2": round(early.correlation, 3),
        "layers_3_on": round(late.correlation, 3),
        "median": round(statistics.median(within), 3),
        "lowest": round(min(within), 3),
    }


def main() -> None:
    """Measures, and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--dtype", default="fp32")
    args = parser.parse_args()
    name = viewer.open(args.run).config()["model"]
    run = viewer.open(args.run, model=load_model(name, dtype=args.dtype, progress=False))
    first, first_s = timed(lambda: run.trace(TEXT))
    _, trace_s = timed(lambda: run.trace(TEXT))
    top, drawn, seconds = [], [], []
    for prompt, target in PROMPTS:
        attribution, took = timed(lambda p=prompt, t=target: run.attribute(p, t))
        seconds.append(took)
        top.append(attribution.verify(20))
        drawn.append(attribution.verify(20, among=1000))
    record = {
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "trace_tokens": len(first.tokens),
        "trace_sites": len(first.sites),
        "trace_first_s": first_s,
        "trace_s": trace_s,
        "attribute_s": statistics.median(seconds),
        "top_20": correlations(top),
        "20_of_top_1000": correlations(drawn),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
