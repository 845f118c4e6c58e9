"""Runs that are killed, stopped and broken, and go on: the end is that of a run that nothing happened to."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sae
from train.cli.main import main
from train.run_folder import RunFolder

HERE = Path(__file__).resolve().parent
RING = 256
SEED = random.randrange(10**6)


@pytest.fixture(scope="module")
def sizes(tiny_folder, tmp_path_factory):
    """Two sites, 36 steps, a ring that is filled anew several times, a checkpoint at each step."""
    corpus = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = "the cat sat on a mat while capital of France is Paris and Rome".split()
    lines = (" ".join(words[(i * 7 + j * j) % len(words)] for j in range(40)) + f" {i}" for i in range(24))
    corpus.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    inputs = {
        "model": str(tiny_folder),
        "corpus": str(corpus),
        "context": 32,
        "model_batch": 2,
        "layers": "1-2",
    }
    steps = {"width": 64, "l0": 5.0, "tokens": 1200, "batch": 64, "passes": 2, "log_every": 3}
    return {**inputs, **steps, "dtype": "float32", "device": "cpu", "checkpoint_minutes": 1e-9}


class Server:
    """Trains in a process of its own, one after another."""

    def __init__(self, sizes, folder):
        self.sizes, self.folder, self.runs = sizes, folder, 0
        arguments = [sys.executable, str(HERE / "resume_server.py"), str(RING), json.dumps(sizes)]
        paths = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            arguments, env={**os.environ, **paths, "OMP_NUM_THREADS": "1"}, **pipes
        )

    def start(self, out, at=None, sent="SIGKILL", **fields):
        """Begins a run, or goes on with the one in `out`; returns the id of its process."""
        config = {**self.sizes, **fields, "out": str(out)}
        order = {"config": config, "resume": (out / "run.json").is_file(), "at": at, "signal": sent}
        order["errors"] = str(self.folder / "errors")
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        """Waits for the run's process; returns its exit code."""
        return int(self.process.stdout.readline())

    def train(self, out, **options):
        self.start(out, **options)
        return self.end()

    @property
    def errors(self):
        return (self.folder / "errors").read_text()


@pytest.fixture(scope="module")
def server(sizes, tmp_path_factory):
    made = Server(sizes, tmp_path_factory.mktemp("server"))
    yield made
    made.process.stdin.close()
    assert made.process.wait(60) == 0


@pytest.fixture(scope="module")
def store(sizes, tmp_path_factory):
    """The rows of all layers, as the live runs see them."""
    out = tmp_path_factory.mktemp("store") / "store"
    flags = [f"--{name.replace('_', '-')}={sizes[name]}" for name in ("model", "corpus", "context", "tokens")]
    flags += ["--model-batch=2", "--dtype=float32", "--device=cpu", f"--out={out}"]
    # the corpus has fewer tokens than that: as many rows as one pass gives
    assert main(["harvest", *flags]) == 0
    return str(out)


@pytest.fixture(scope="module")
def undisturbed(server, store, tmp_path_factory):
    """Runs that nothing happened to, live and from the store."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = {"": folder / "live", store: folder / "stored"}
    for source, out in found.items():
        assert server.train(out, store=source) == 0, server.errors
    return found


def weights(run):
    return {
        (site, name): tensor
        for site in RunFolder.open(run).sites()
        for name, tensor in sae.load(run / "sites" / site).state_dict().items()
    }


def assert_same(run, other):
    """Both are done, with the same weights and metrics to the last bit, and hold nothing else."""
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(mine[key], tensor), key
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert RunFolder.open(run).state() == "done"
    assert sorted(path.name for path in run.iterdir()) == [".lock", "metrics.jsonl", "run.json", "sites"]
    assert not list(run.rglob("*.tmp"))


def test_the_runs_are_long_enough_to_be_worth_breaking(undisturbed):
    for run in undisturbed.values():
        record = RunFolder.open(run).record()
        assert record["rows_harvested"] > 3 * RING
        assert record["rows_served"] > 30 * 64


KILLS = {
    "step": (1, 60),
    "forward": (1, 20),
    "fsync": (1, 250),
    "rename": (1, 60),
    "replace": (1, 100),
    "unlink": (2, 200),
    "save": (1, 60),
    "log": (1, 10),
}


@pytest.mark.parametrize("turn", range(14))
def test_a_killed_run_ends_as_if_nothing_had_happened(turn, server, store, undisturbed, tmp_path):
    """kill -9 in the nth call of something, up to three times."""
    draw = random.Random(SEED + turn)
    source = store if turn % 3 == 2 else ""
    kinds = [name for name in KILLS if not (source and name == "forward")]
    places = []
    for kill in range(draw.choice([1, 1, 2, 3])):
        name = kinds[turn % len(kinds)] if kill == 0 else draw.choice(kinds)
        places.append([name, draw.randint(*KILLS[name])])
        code = server.train(tmp_path / "run", at=places[-1], store=source)
        assert code in (0, -signal.SIGKILL), (SEED, places, server.errors)
    while (code := server.train(tmp_path / "run", store=source)) != 0:
        raise AssertionError((SEED, places, code, server.errors))
    assert_same(tmp_path / "run", undisturbed[source])


@pytest.mark.parametrize("turn", range(4))
def test_a_run_killed_at_any_moment_goes_on(turn, server, undisturbed, tmp_path):
    draw = random.Random(SEED + turn)
    waits = [draw.uniform(0, 0.8) for _ in range(2)]
    for wait in waits:
        pid = server.start(tmp_path / "run")
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)  # a child that has ended waits for its parent: the id is still its own
        server.end()
    assert server.train(tmp_path / "run") == 0, (SEED, waits, server.errors)
    assert_same(tmp_path / "run", undisturbed[""])
