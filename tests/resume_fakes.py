"""What the tests of resuming share: a short run, and what it means that two runs are the same."""

import json

import torch

import sae
from train.cli.main import main
from train.run_folder import RunFolder

RING = 256
"""Rows of the ring, which is filled anew several times in the short run."""


def make_sizes(model, folder):
    """The config of two sites and 37 steps; the corpus, written into `folder`, is read several times."""
    corpus = folder / "text.jsonl"
    words = "the cat sat on a mat while capital of France is Paris and Rome".split()
    lines = (" ".join(words[(i * 7 + j * j) % len(words)] for j in range(40)) + f" {i}" for i in range(24))
    corpus.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    inputs = {"model": str(model), "corpus": str(corpus), "context": 32, "model_batch": 2, "layers": "1-2"}
    # silence counts after a few steps, so that a lost count is seen
    silence = {"dead_after": 320, "pull_after": 128}
    steps = {"width": 64, "l0": 5.0, "tokens": 1200, "batch": 64, "passes": 2, "buffer": RING, "log_every": 3}
    return {**inputs, **steps, **silence, "dtype": "float32", "device": "cpu"}


def harvest(sizes, out):
    """A store of the rows of all layers that a live run with these sizes sees; returns its path."""
    names = ("model", "corpus", "context", "model_batch", "tokens", "dtype", "device")
    flags = [f"--{name.replace('_', '-')}={sizes[name]}" for name in names]
    assert main(["harvest", *flags, f"--out={out}"]) == 0
    return str(out)


def weights(run):
    """By site and name, and with them what the probe of each site holds."""
    found = {}
    for site in RunFolder.open(run).sites():
        opened = sae.load(run / "sites" / site)
        probe = {f"probe.{name}": held for name, held in vars(opened.probe).items()}
        tensors = {**opened.state_dict(), **probe}.items()
        found |= {(site, name): tensor for name, tensor in tensors if isinstance(tensor, torch.Tensor)}
    return found


def assert_same(run, other):
    """Both are done, with the same weights, probes and metrics to the last bit, and hold nothing else."""
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(mine[key], tensor), key
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert RunFolder.open(run).state() == "done"
    assert sorted(path.name for path in run.iterdir()) == [".lock", "metrics.jsonl", "run.json", "sites"]
    assert not list(run.rglob("*.tmp"))
