"""How fast a dictionary opens, and how much memory of its own that takes.

    python benchmarks/open_speed.py [--latents 16k 1M] [--d-in 2304 64] [--dtype float32]

A random JumpReLU dictionary of each size is saved, then opened several times, each in a process of its own,
with the file in the page cache. `anonymous` is memory that no file holds: a copy of the weights would be
there. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import sae
from sae.dictionary import parameter_shapes
from sae.numbers import parse_width

_OPEN = """
import json, sys, time
from pathlib import Path
import sae
def anonymous():
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])
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
    parser.add_argument("--latents", type=parse_width, nargs="+", default=[2**14, 2**20])
    parser.add_argument("--d-in", type=int, nargs="+", default=[2304, 64])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--times", type=int, default=7)
    arguments = parser.parse_args()
    found = []
    for d_sae, d_in in zip(arguments.latents, arguments.d_in, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            size = _write(Path(folder), d_in, d_sae, getattr(torch, arguments.dtype))
            runs = [_open(folder) for _ in range(arguments.times)]
        median = {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}
        best = round(min(run["wall_s"] for run in runs), 4)
        found.append(
            {"d_in": d_in, "d_sae": d_sae, "mib": round(size / 2**20), **median, "best_wall_s": best}
        )
        print(found[-1])
    print(json.dumps({"benchmark": "open_speed", "dtype": arguments.dtype, "opened": found}))


def _write(folder: Path, d_in: int, d_sae: int, dtype: torch.dtype) -> int:
    cfg = sae.DictionaryConfig(d_in=d_in, d_sae=d_sae)
    tensors = {name: torch.rand(shape, dtype=dtype) for name, shape in parameter_shapes(cfg).items()}
    sae.save(sae.build(cfg, tensors), folder)
    return sum(tensor.nbytes for tensor in tensors.values())


def _open(folder: str) -> dict[str, float]:
    answer = subprocess.run([sys.executable, "-c", _OPEN, folder], capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)


if __name__ == "__main__":
    main()
