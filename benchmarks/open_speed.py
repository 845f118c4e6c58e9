"""How fast a dictionary opens, with a probe and without, and how much memory of its own that takes.

    python benchmarks/open_speed.py [--latents 16k 16k 1M] [--d-in 640 2304 64] [--dtype float32] [--l0 50]

A random JumpReLU dictionary of each size is saved twice, then both are opened several times in turns, each in
a process of its own, with the files in the page cache; the processor's time counts where others share the
machine. `anonymous` is memory that no file holds: a copy of the weights would be there. The last line is
JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import sae
from sae.dictionary import parameter_shapes
from sae.numbers import parse_width
from sae.probe import make_probe
from sae.probe_file import PROBE

_OPEN = """
import json, sys, time
from pathlib import Path
import torch
import sae
def anonymous():
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])
torch.ones(9, 9, dtype=torch.float64) @ torch.ones(9, 9, dtype=torch.float64)  # starts torch's threads
before, cpu, wall = anonymous(), time.process_time(), time.perf_counter()
dictionary = sae.load(sys.argv[1])
print(json.dumps({"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu,
                  "anonymous_mib": (anonymous() - before) / 2**20}))
"""


def main() -> None:
    """Prints a line for each size, and all of them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=parse_width, nargs="+", default=[2**14, 2**14, 2**20])
    parser.add_argument("--d-in", type=int, nargs="+", default=[640, 2304, 64])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--l0", type=float, default=50.0)
    parser.add_argument("--times", type=int, default=7)
    arguments = parser.parse_args()
    found = []
    for d_sae, d_in in zip(arguments.latents, arguments.d_in, strict=True):
        with tempfile.TemporaryDirectory() as root:
            folders = [Path(root) / name for name in ("plain", "probed")]
            sizes = _write(folders, d_in, d_sae, getattr(torch, arguments.dtype), arguments.l0)
            pairs = [[_open(folder) for folder in folders] for _ in range(arguments.times)]
        medians = [
            {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
            for runs in zip(*pairs, strict=True)
        ]
        found.append(
            {"d_in": d_in, "d_sae": d_sae, **sizes, **dict(zip(("plain", "probed"), medians, strict=True))}
        )
        print(found[-1])
    print(json.dumps({"benchmark": "open_speed", "dtype": arguments.dtype, "opened": found}))


def _write(folders: list[Path], d_in: int, d_sae: int, dtype: torch.dtype, l0: float) -> dict[str, float]:
    """Saves a dictionary without a probe and with one; returns the files' sizes and what the probe took."""
    cfg = sae.DictionaryConfig(d_in=d_in, d_sae=d_sae)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in parameter_shapes(cfg).items()}
    # a pre-activation's spread over random rows is sqrt(d_in), and the gate leaves l0 of them
    firing = torch.distributions.Normal(0.0, d_in**0.5).icdf(torch.tensor(1 - l0 / d_sae))
    tensors["threshold"] = firing.expand(d_sae).to(dtype)
    dictionary = sae.build(cfg, {name: tensor.contiguous() for name, tensor in tensors.items()})
    sae.save(dictionary, folders[0])
    begin = time.process_time()
    probe = make_probe(dictionary, torch.randn(4096, d_in))
    seconds = time.process_time() - begin
    sae.save(dictionary, folders[1], probe=probe)
    return {
        "mib": round(sum(tensor.nbytes for tensor in tensors.values()) / 2**20),
        "probe_kib": round((folders[1] / PROBE).stat().st_size / 2**10),
        "probe_latents": len(probe.latents),
        "make_probe_cpu_s": round(seconds, 3),
    }


def _open(folder: Path) -> dict[str, float]:
    answer = subprocess.run([sys.executable, "-c", _OPEN, folder], capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)


if __name__ == "__main__":
    main()
