"""The activation store: writing against the live harvest, reading against a mapped file, memory.

Three parts, each optional; `--scratch` is a folder with a few GiB of room.
- write: tokens per second of a harvest to disk over those of the same harvest to nowhere, in turns.
- read: MB/s of the rows in the order of the harvest and in that on disk, and of a plain sequential copy out
  of the same files mapped by numpy, in turns; warm (in the page cache) and cold (dropped from it).
- memory: peak resident memory of a harvest of random rows at three lengths, each in a process of its own.
The last line is JSON.

    python benchmarks/store_speed.py [--parts write,read,memory] [--rounds 5] [--tokens 24000] [--scratch DIR]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from activations.blocks import Cursor, iter_blocks
from activations.corpora import load_corpus
from activations.harvest import RowBatch, RowMap, Wanted, harvest_rows
from activations.sites import expand_sites
from activations.store import Store, open_store
from activations.store_writer import SHARD_BYTES, StoreFacts, write_store

SITE = "blocks.{}.hook_resid_post"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed and memory of the activation store.")
    parser.add_argument("--parts", default="write,read,memory")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--corpus", default="wiki-leads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24_000, help="tokens a turn of the part `write`")
    parser.add_argument("--rows", type=int, default=60_000, help="rows of 18 x 640 in the part `read`")
    parser.add_argument(
        "--lengths", default="50000,200000,800000", help="rows of 2 x 640 in the part `memory`"
    )
    parser.add_argument("--store-dtype", default="auto", choices=("auto", "bfloat16", "float16", "int8"))
    parser.add_argument("--scratch", default=None, help="folder to write in; emptied afterwards")
    parser.add_argument("--peak-of", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def facts_of(widths: dict[str, int], model: str, dtype: str = "bfloat16") -> StoreFacts:
    return StoreFacts(
        model=model,
        tokenizer_hash="benchmark",
        corpus="benchmark",
        split="train",
        context=256,
        seed=0,
        model_batch=8,
        model_dtype=dtype,
        widths=widths,
    )


def random_rows(widths: dict[str, int], rows: int, batch: int = 2048) -> Callable[..., Iterator[RowBatch]]:
    """A source that costs next to nothing: the same random rows again and again."""
    generator = torch.Generator().manual_seed(0)
    same = {site: torch.randn(batch, width, generator=generator).bfloat16() for site, width in widths.items()}

    def source(start: Cursor, _: Wanted | None = None) -> Iterator[RowBatch]:
        for begin in range(start.kept, rows, batch):
            ids = torch.arange(begin, begin + batch, dtype=torch.int32)
            yield RowBatch(
                rows=same, map=RowMap(document=ids, position=ids, token=ids), begin=Cursor(kept=begin)
            )

    return source


def compare_writing(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    from activations.models import load_model

    model, corpus = load_model(arguments.model), load_corpus(arguments.corpus)
    sites = expand_sites("resid_post", "all", model.n_layers)
    dtype = str(model.dtype).removeprefix("torch.")
    facts = facts_of({site: model.site_width(site) for site in sites}, model.name, dtype)

    def source(start: Cursor, _: Wanted | None = None) -> Iterator[RowBatch]:
        blocks = iter_blocks(
            model, corpus, split="train", max_tokens=arguments.tokens, epochs=None, start=start
        )
        return harvest_rows(model, blocks, sites)

    def timed(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return arguments.tokens / (time.perf_counter() - start)

    def to_disk(turn: int) -> float:
        folder = scratch / f"write-{turn}"
        speed = timed(
            lambda: write_store(
                folder, source, facts, wanted_rows=arguments.tokens, dtype=arguments.store_dtype
            )
        )
        remove(folder)
        return speed

    for _, _ in zip(range(2), source(Cursor()), strict=False):
        pass  # the first passes allocate
    speeds = [
        (to_disk(turn), timed(lambda: deque(source(Cursor()), maxlen=0))) for turn in range(arguments.rounds)
    ]
    ratios = [disk / live for disk, live in speeds]
    return {
        "write_ratio": round(statistics.median(ratios), 3),
        "write_ratio_per_round": [round(ratio, 3) for ratio in ratios],
        "write_tokens_per_s": round(statistics.median(disk for disk, _ in speeds)),
        "live_tokens_per_s": round(statistics.median(live for _, live in speeds)),
        "write_shards": -(
            -arguments.tokens * sum(facts.widths.values()) * model.dtype.itemsize // SHARD_BYTES
        ),
    }


def compare_reading(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    widths = {SITE.format(layer): 640 for layer in range(18)}
    write_store(
        scratch / "read",
        random_rows(widths, arguments.rows),
        facts_of(widths, "random"),
        wanted_rows=arguments.rows,
        dtype=arguments.store_dtype,
    )
    store = open_store(scratch / "read")
    files = [scratch / "read" / name for name in store.manifest["shards"]]
    buffer = np.empty(max(path.stat().st_size for path in files), dtype=np.uint8)

    def mapped() -> None:
        for path in files:
            content = np.memmap(path, dtype=np.uint8, mode="r")
            np.copyto(buffer[: len(content)], content)

    ways: dict[str, Callable[[], object]] = {
        "mapped": mapped,
        "harvested": lambda: deque(store.iter_rows(), maxlen=0),
        "stored": lambda: deque(store.iter_rows(order="stored"), maxlen=0),
    }
    mapped()
    found: dict[str, Any] = {"read_bytes": store.bytes}
    for state in ("warm", "cold"):
        turns = [
            {way: read_speed(work, store, files if state == "cold" else []) for way, work in ways.items()}
            for _ in range(arguments.rounds)
        ]
        for way in ways:
            found[f"{state}_{way}_mb_per_s"] = round(statistics.median(turn[way] for turn in turns))
        for way in ("harvested", "stored"):
            ratio = statistics.median(turn[way] / turn["mapped"] for turn in turns)
            found[f"{state}_{way}_ratio"] = round(ratio, 3)
    remove(scratch / "read")
    return found


def read_speed(work: Callable[[], object], store: Store, to_drop: list[Path]) -> float:
    """Millions of bytes a second; `to_drop` are put out of the page cache first."""
    for path in to_drop:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    start = time.perf_counter()
    work()
    return store.bytes / 1e6 / (time.perf_counter() - start)


def compare_memory(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    peaks = {}
    for length in map(int, arguments.lengths.split(",")):
        words = ["--peak-of", str(length), "--scratch", str(scratch), "--store-dtype", arguments.store_dtype]
        answer = subprocess.run(
            [sys.executable, __file__, *words], capture_output=True, text=True, check=True
        )
        peaks[length] = int(answer.stdout)
    return {
        "peak_mib": {length: round(peak / 2**20) for length, peak in peaks.items()},
        "peak_growth": round(max(peaks.values()) / min(peaks.values()) - 1, 3),
    }


def peak_of(rows: int, arguments: argparse.Namespace) -> int:
    """Bytes of peak resident memory after harvesting that many random rows into shards of 32 MiB."""
    widths = {SITE.format(layer): 640 for layer in range(2)}
    folder = Path(arguments.scratch) / f"peak-{rows}"
    write_store(
        folder,
        random_rows(widths, rows),
        facts_of(widths, "random"),
        wanted_rows=rows,
        shard_bytes=32 * 2**20,
        dtype=arguments.store_dtype,
    )
    remove(folder)
    # not getrusage: a process starts with the peak of the one that forked it
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def main() -> None:
    arguments = parse()
    if arguments.peak_of:
        print(peak_of(arguments.peak_of, arguments))
        return
    parts = {"write": compare_writing, "read": compare_reading, "memory": compare_memory}
    result: dict[str, Any] = {"benchmark": "store_speed", "store_dtype": arguments.store_dtype}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        for name in arguments.parts.split(","):
            result |= parts[name](arguments, Path(scratch))
    result |= {
        "model": arguments.model,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
