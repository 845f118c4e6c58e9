"""What was planned against what was taken: memory, disk and time of real runs, each in a process of its own.

Memory does not depend on the number of tokens, so a run has few; one small configuration is run at several
numbers to show it. The peak is that of the resident set, by the system's own record. The last line is JSON;
`ok` when every peak is within 10 % of its plan, and those of the small configuration are of each other.

    python benchmarks/plan_reality.py [--only one,fp32] [--tokens 24576] [--steady 50k,200k,800k]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sae.numbers import format_size, format_time
from train.cli import plan
from train.cli.main import main as command_line
from train.machine import own_peak
from train.plan import Plan

BAR = 0.10
STORE = "from a store"
# flags besides the tokens and the folder
RUNS: dict[str, dict[str, str]] = {
    "one layer, 4k": {"layers": "9", "width": "4k"},
    "three layers, 16k": {"layers": "3,9,15", "width": "16k"},
    "18 layers, 2k": {"layers": "all", "width": "2k", "l0": "40", "batch": "512", "passes": "3"},
    "SmolLM2, two kinds": {"model": "smollm2-135m", "layers": "9,19", "sites": "resid_post,mlp_out"},
    "fp32": {"layers": "9", "dtype": "float32"},
    STORE: {"layers": "3-8"},
}
STEADY = {"layers": "0", "width": "1k", "passes": "1", "buffer": "8k"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plans against reality.")
    parser.add_argument("--only", default="", help="beginnings of names, with commas")
    # whole generations of the buffer at 4 passes of 2,048 rows, which they fill
    parser.add_argument("--tokens", default="24576")
    parser.add_argument(
        "--steady", default="5k,20k,80k", help="tokens of the runs of the small configuration"
    )
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_child(words: list[str]) -> dict[str, Any]:
    """Runs a verb through the command line; returns what it planned and what it took after that."""
    plans: list[Plan] = []
    begun: list[float] = []
    shown = plan.print_plan

    def record(made: Plan) -> None:
        shown(made)
        plans.append(made)
        begun.append(time.monotonic())

    plan.print_plan = record
    code = command_line(words)
    if code:
        raise SystemExit(code)
    out, made = Path(words[words.index("--out") + 1]), plans[-1]
    return {
        "memory": [made.memory_total, own_peak()],
        "loading": made.loading,
        "items": made.memory,
        # those go when the run is done
        "disk": [
            sum(n for name, n in made.disk.items() if not name.startswith("checkpoints")),
            sum(f.stat().st_size for f in out.rglob("*") if f.is_file()),
        ],
        "seconds": [round(made.seconds_total, 1), round(time.monotonic() - begun[-1], 1)],
    }


def reality(name: str, verb: str, flags: dict[str, str], out: Path) -> dict[str, Any]:
    """One run in a process of its own, and a line about it."""
    words = [verb, *(word for flag, value in flags.items() for word in (f"--{flag}", value))]
    child = [sys.executable, __file__, "--child", *words, "--out", str(out)]
    process = subprocess.run(child, stdout=subprocess.PIPE, check=True, text=True, env=os.environ)
    found = json.loads(process.stdout.splitlines()[-1])
    (planned, peak), (disk, written), (seconds, took) = (found[key] for key in ("memory", "disk", "seconds"))
    # a model that was loaded had its own peak before there was anything to plan
    found["ratio"] = round(peak / max(planned, found["loading"]), 3)
    print(
        f"{name:<32} memory {format_size(planned):>8}, {format_size(peak):>8} ({found['ratio']:.3f})   "
        f"disk {format_size(disk):>9}, {format_size(written):>9}   "
        f"time {format_time(seconds):>12}, {format_time(took):>12}",
        flush=True,
    )
    return {"name": name, **found}


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(in_child(arguments.child)))
        return
    wanted = tuple(arguments.only.split(","))
    print("planned, taken:")
    with tempfile.TemporaryDirectory() as folder:
        runs, place = [], Path(folder)
        for name, flags in RUNS.items():
            if not name.startswith(wanted):
                continue
            flags = {**flags, "tokens": arguments.tokens}
            if name == STORE:
                runs.append(reality("harvest", "harvest", flags, place / "store"))
                flags["store"] = str(place / "store")
            runs.append(reality(name, "train", flags, place / f"run-{len(runs)}"))
        steady = [
            reality(f"one layer, 1k, {tokens} tokens", "train", {**STEADY, "tokens": tokens}, place / tokens)
            for tokens in arguments.steady.split(",")
        ]
    peaks = {
        tokens: run["memory"][1] for tokens, run in zip(arguments.steady.split(","), steady, strict=True)
    }
    ratios = {run["name"]: run["ratio"] for run in (*runs, *steady)}
    result = {
        "benchmark": "plan_reality",
        "ok": all(abs(ratio - 1) <= BAR for ratio in ratios.values())
        and max(peaks.values()) <= (1 + BAR) * min(peaks.values()),
        "real_over_planned": ratios,
        "peak_by_tokens": peaks,
        "runs": [*runs, *steady],
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
