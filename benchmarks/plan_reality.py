"""What was planned against what was taken: memory, disk and time of real runs, each in a process of its own.

A run has few tokens, but a buffer that they fill: memory does not depend on more. One configuration is run at
three numbers of tokens to show it. Peak memory is the resident set at its highest, by the kernel's own record.
The last line is JSON; the bar is a peak within 10 % of the plan, for every run.

    python benchmarks/plan_reality.py [--only one-layer,fp32] [--tokens 20k] [--steady 50k,200k,800k]
"""

import argparse
import contextlib
import dataclasses
import io
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

from sae.numbers import format_count, format_size, format_time, parse_count
from train.cli import harvest, plan
from train.cli.main import main as command_line
from train.cli.options import HarvestOptions
from train.config import TrainConfig
from train.machine import own_peak
from train.plan import Plan

BAR = 0.10
# flags beyond the model, the tokens and the folder; the buffer is filled by the fewest tokens
RUNS: dict[str, dict[str, Any]] = {
    "one layer, 4k": {"layers": "9", "width": 4096},
    "three layers, 16k": {"layers": "3,9,15", "width": 16_384},
    "18 layers, 2k": {"layers": "all", "width": 2048, "l0": 40.0, "batch": 512, "passes": 3},
    "SmolLM2, two layers": {"model": "smollm2-135m", "layers": "9,19", "sites": "resid_post,mlp_out"},
    "from a store": {"layers": "3-8", "store": "STORE"},
    "fp32": {"layers": "9", "dtype": "float32"},
}
STORE = HarvestOptions(layers="3-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plans against reality.")
    parser.add_argument("--only", help="names or their beginnings, with commas", default="")
    parser.add_argument("--tokens", type=parse_count, default=20_000)
    parser.add_argument("--steady", help="tokens of the runs that show that memory does not grow", default="")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_child(told: dict[str, Any]) -> dict[str, Any]:
    """Plans and runs one verb through the command line; returns what was planned and what was taken."""
    verb, values = told["verb"], told["values"]
    plans, show = [], plan.print_plan
    plan.print_plan = lambda made: (plans.append(made), show(made))[1]
    begun: list[float] = []
    with contextlib.redirect_stdout(io.StringIO()):
        words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        plan.note = lambda text: begun.append(time.monotonic())
        code = command_line([verb, *words])
    if code:
        raise SystemExit(code)
    made: Plan = plans[-1]
    return {
        "planned": made.memory_total,
        "loading": made.loading,
        "items": made.memory,
        "peak": own_peak(),
        "planned_disk": made.disk_total,
        "disk": sum(f.stat().st_size for f in Path(values["out"]).rglob("*") if f.is_file()),
        "planned_s": made.seconds_total,
        "s": time.monotonic() - begun[0],
    }


def reality(verb: str, values: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own."""
    told = json.dumps({"verb": verb, "values": values})
    process = subprocess.run(
        [sys.executable, __file__, "--child", told], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    pass
