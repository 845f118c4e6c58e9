"""A training step against SAELens's and against its own encoder product, in turns; then peak memory, each in
a process of its own.

Floors of a step at d_in 640, d_sae 16,384, batch 2,048, L0 50: 43 GFLOP of encoder product; bytes: both
matrices and both of Adam's moments read and written once, 500 MB, and the rounded encoder, 21 MB.

Rows are Gaussian; thresholds are placed at the L0 asked for and the bandwidth is the recipe's, which gives
about twice as many candidates as active latents. SAELens's step is its own forward pass, backward and Adam,
without its statistics and its clipping. The last line is JSON; a ratio is the median over rounds of ratios
within a round. `int8` is what a trainer uses where a CPU multiplies 8-bit integers fast.

    python benchmarks/step_speed.py [--width 16k] [--l0 50] [--batch 2048] [--rounds 9] [--no-saelens]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sae.kernels.dispatch import choose_kernel, make_kernel
from sae.kernels.step import StepSettings, StepState, StepWeights
from sae.losses import Sparsity
from sae.numbers import parse_width
from train.config import TrainConfig

COEFFICIENT = 0.1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A training step against SAELens's and its encoder product.")
    parser.add_argument("--d-in", type=int, default=640)
    parser.add_argument("--width", type=parse_width, default=16_384)
    parser.add_argument("--l0", type=float, default=50.0)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-saelens", action="store_true", help="only our own step and the products")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


class Problem:
    """Rows and first weights, the same for every contender."""

    def __init__(self, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        self.width, self.l0, self.batch, self.d_in = options.width, options.l0, options.batch, options.d_in
        rows = torch.randn(4 * self.batch, self.d_in, generator=generator) / self.d_in**0.5
        self.rows = rows.bfloat16().float().split(self.batch)
        directions = torch.randn(self.width, self.d_in, generator=generator)
        self.directions = torch.nn.functional.normalize(directions, dim=1)
        sample = rows[:256] @ self.directions.T
        self.threshold = float(sample.flatten().topk(round(256 * self.l0)).values[-1])
        self.bandwidth = TrainConfig.bandwidth * float(sample.std())

    def ours(self, product_dtype: torch.dtype) -> Callable[[int], object]:
        """A step of ours; learning rates so small that L0 stays."""
        bias = torch.zeros(self.d_in)
        weights = StepWeights(
            W_enc_t=self.directions.clone(),
            b_enc=torch.zeros(self.width),
            W_dec=self.directions.clone(),
            b_in=bias,
            b_dec=bias,
            threshold=torch.full((self.width,), self.threshold),
        )
        state = StepState.begin(weights, beta1=0.9)
        settings = StepSettings(
            bandwidth=self.bandwidth,
            sparsity=Sparsity(coefficient=COEFFICIENT),
            l0_wanted=self.l0,
            lr=1e-6,
            threshold_lr=1e-6,
            pull_after=10**9,
            product_dtype=product_dtype,
        )
        kernel = make_kernel(choose_kernel(torch.device("cpu")))
        low = [rows.bfloat16() for rows in self.rows]
        return lambda turn: kernel.step(state, low[turn % 4], low[turn % 4], settings)

    def saelens(self) -> Callable[[int], object]:
        """A step of SAELens's trainer class with torch's Adam."""
        from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
        from sae_lens.saes.sae import TrainStepInput

        config = JumpReLUTrainingSAEConfig(
            d_in=self.d_in,
            d_sae=self.width,
            jumprelu_init_threshold=self.threshold,
            jumprelu_bandwidth=self.bandwidth,
            target_l0=self.l0,
            l0_coefficient=COEFFICIENT,
        )
        model = JumpReLUTrainingSAE(config)
        model.W_enc.data.copy_(self.directions.T)
        model.W_dec.data.copy_(self.directions)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
        silent = torch.zeros(self.width, dtype=torch.bool)

        def step(turn: int) -> None:
            given = TrainStepInput(self.rows[turn % 4], {"l0": COEFFICIENT}, silent, turn, False)
            model.training_forward_pass(given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def product(self, dtype: torch.dtype) -> Callable[[int], object]:
        """The encoder's product alone, into memory that is there."""
        rows = [rows.to(dtype) for rows in self.rows]
        encoder, out = self.directions.to(dtype), torch.empty(self.batch, self.width, dtype=dtype)
        return lambda turn: torch.mm(rows[turn % 4], encoder.T, out=out)


def measure(works: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 2):
        for name, work in works.items():
            start = time.perf_counter()
            work(turn)
            if turn >= 2:  # the first turns compile and set up threads
                times[name].append(time.perf_counter() - start)
    return times


def peak_memory(name: str) -> float:
    """GiB that a contender adds to a process which holds only rows and first weights."""
    words = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    answer = subprocess.run(words, capture_output=True, text=True, check=True, env=dict(os.environ))
    return float(answer.stdout)


def peak() -> int:
    """The most memory this process has held, in kB; getrusage would count its parent's too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def print_memory(problem: Problem, name: str) -> None:
    before = peak()
    step = problem.saelens() if name == "saelens" else problem.ours(torch.int8)
    for turn in range(3):
        step(turn)
    print((peak() - before) / 2**20)


def main() -> None:
    options = parse()
    problem = Problem(options)
    if options.memory_of:
        print_memory(problem, options.memory_of)
        return
    works = {
        "product_bf16": problem.product(torch.bfloat16),
        "step_int8": problem.ours(torch.int8),
        "step_bf16": problem.ours(torch.bfloat16),
        "product_fp32": problem.product(torch.float32),
        "step_fp32": problem.ours(torch.float32),
    }
    if not options.no_saelens:
        works["saelens"] = problem.saelens()
    times = measure(works, options.rounds)

    def ratio(top: str, bottom: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[top], times[bottom], strict=True)), 2)

    found: dict[str, object] = {
        f"{name}_ms": round(1e3 * statistics.median(t), 1) for name, t in times.items()
    }
    found |= {f"step_over_product_{d}": ratio(f"step_{d}", f"product_{d}") for d in ("bf16", "fp32")}
    # integers have no product of their own here: the bar is bfloat16's
    found["step_int8_over_product_bf16"] = ratio("step_int8", "product_bf16")
    figures = works["step_bf16"](0)
    found["l0"] = round(float(figures.l0.mean()), 1)  # type: ignore[attr-defined]
    if not options.no_saelens:
        found |= {f"saelens_over_step_{d}": ratio("saelens", f"step_{d}") for d in ("int8", "bf16", "fp32")}
        found["peak_gib"] = {name: round(peak_memory(name), 2) for name in ("saelens", "ours")}
    told = {name: value for name, value in vars(options).items() if name != "memory_of"}
    print(json.dumps({**told, **found, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
