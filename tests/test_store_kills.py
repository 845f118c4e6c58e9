"""A harvest killed with -9 at every kind of moment, and what it comes to once it is run again."""

import contextlib
import os
import random
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch
from store_rows import files

from activations import committer
from activations.blocks import iter_blocks
from activations.corpora import Document, FiniteCorpus
from activations.harvest import harvest_rows
from activations.ring import ShuffleRing
from activations.sites import expand_sites
from activations.store import open_store
from activations.store_writer import StoreFacts, write_store
from sae.errors import UserError

TOKENS = 500
SHARD_BYTES = 64 * (4 * 32 * 4 + 12)
WORDS = "the capital of France is Paris and it was the best of times a dictionary per layer".split()


@pytest.fixture(scope="module")
def corpus():
    texts = [" ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(12)) for i in range(60)]
    documents = [Document(i, f"{text} {i}.", None, None) for i, text in enumerate(texts)]
    return FiniteCorpus(documents, name="words", source="here", licence="none")


def rows_of(model, corpus, tokens, start=None):
    sites = expand_sites("resid_post", "all", model.n_layers)
    blocks = iter_blocks(
        model, corpus, split="train", context=16, blocks_per_batch=3, max_tokens=tokens, start=start
    )
    return harvest_rows(model, blocks, sites)


def harvest(folder, model, corpus, tokens=TOKENS):
    sites = expand_sites("resid_post", "all", model.n_layers)
    facts = StoreFacts(
        model=model.name,
        tokenizer_hash=model.tokenizer_hash,
        corpus=corpus.name,
        split="train",
        context=16,
        seed=0,
        model_batch=3,
        model_dtype="float32",
        widths={site: model.site_width(site) for site in sites},
    )
    write_store(
        folder,
        lambda start, wanted: rows_of(model, corpus, tokens, start),
        facts,
        wanted_rows=tokens,
        shard_bytes=SHARD_BYTES,
    )


def in_child(work):
    """Forks, and returns the child's process id; it exits with 0 unless `work` raises."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(owner, name, call):
    """Makes the `call`-th call of a function the end of the process."""
    real, calls = getattr(owner, name), []

    def counted(*words, **more):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*words, **more)

    setattr(owner, name, counted)


def kill_inside_shard(call):
    """Ends the process when half of a shard's tensors are in its temporary file."""
    real, calls = committer.write_shard, []

    def cut(append, fields, parts):
        calls.append(None)

        def some(field):
            if len(calls) == call and field == list(fields)[-2]:
                os.kill(os.getpid(), signal.SIGKILL)
            return parts(field)

        return real(append, fields, some)

    committer.write_shard = cut


@pytest.fixture(scope="module")
def straight(tiny_model, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "s"
    assert exit_code(in_child(lambda: harvest(folder, tiny_model, corpus))) == 0
    return files(folder)


MOMENTS = {
    "fsync": lambda model, call: kill_at(os, "fsync", call),
    "rename": lambda model, call: kill_at(Path, "replace", call),
    "forward": lambda model, call: kill_at(type(model), "activations", call),
    "shard": lambda model, call: kill_inside_shard(call),
}


@pytest.mark.parametrize(
    ("moment", "call"),
    [
        *(("fsync", call) for call in (1, 2, 3, 4, 5, 6, 11, 16, 27)),
        *(("rename", call) for call in (1, 2, 3, 4, 9)),
        *(("forward", call) for call in (1, 2, 5, 9)),
        *(("shard", call) for call in (1, 2, 7)),
    ],
)
def test_a_harvest_killed_at_a_moment_is_made_whole(moment, call, tiny_model, corpus, straight, tmp_path):
    def doomed():
        MOMENTS[moment](tiny_model, call)
        harvest(tmp_path / "s", tiny_model, corpus)

    assert exit_code(in_child(doomed)) == -signal.SIGKILL
    with contextlib.suppress(FileNotFoundError):
        if (tmp_path / "s" / "manifest.json").stat():
            assert open_store(tmp_path / "s").verify() == {}
    assert exit_code(in_child(lambda: harvest(tmp_path / "s", tiny_model, corpus))) == 0
    assert files(tmp_path / "s") == straight


@pytest.mark.parametrize("seed", [1, 2])
def test_kills_at_random_times_change_nothing(seed, tiny_model, corpus, straight, tmp_path):
    times = random.Random(seed)
    for _ in range(8):
        child = in_child(lambda: harvest(tmp_path / "s", tiny_model, corpus))
        time.sleep(times.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) in (0, -signal.SIGKILL)
    assert exit_code(in_child(lambda: harvest(tmp_path / "s", tiny_model, corpus))) == 0
    assert files(tmp_path / "s") == straight


def test_a_store_that_another_process_writes_is_refused_until_that_one_dies(tiny_model, corpus, tmp_path):
    folder = tmp_path / "s"

    def stuck():
        tiny_model.activations = lambda *_: time.sleep(60)
        harvest(folder, tiny_model, corpus)

    child = in_child(stuck)
    try:
        while not (folder / ".lock").exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.2)  # the file is there just before the lock is held
        with pytest.raises(UserError, match="another process"):
            harvest(folder, tiny_model, corpus)
    finally:
        os.kill(child, signal.SIGKILL)
        exit_code(child)
    harvest(folder, tiny_model, corpus)
    assert open_store(folder).rows == TOKENS


def test_the_store_is_what_a_live_harvest_gives(tiny_model, corpus, tmp_path):
    harvest(tmp_path / "s", tiny_model, corpus)
    harvest(tmp_path / "s", tiny_model, corpus, tokens=700)
    store = open_store(tmp_path / "s")
    live = list(rows_of(tiny_model, corpus, 700))
    stored = list(store.iter_rows())
    for site in store.sites:
        # the last batch of the first harvest stopped at its last token, so its sums may round otherwise
        torch.testing.assert_close(
            torch.cat([batch.rows[site] for batch in stored]),
            torch.cat([batch.rows[site] for batch in live]),
            rtol=1e-5,
            atol=1e-5,
        )
    for key in ("document", "position", "token"):
        assert torch.equal(
            torch.cat([getattr(batch.map, key) for batch in stored]),
            torch.cat([getattr(batch.map, key) for batch in live]),
        )


def test_the_ring_serves_the_same_batches_from_a_store_and_live(tiny_model, corpus, tmp_path):
    harvest(tmp_path / "s", tiny_model, corpus)
    store = open_store(tmp_path / "s")
    options = {"dtype": torch.float32, "rows": 200, "batch": 20, "passes": 2, "seed": 1}
    live = ShuffleRing(lambda _: rows_of(tiny_model, corpus, TOKENS), store.widths, **options)
    disk = ShuffleRing(lambda start: store.iter_rows(start=start.kept), store.widths, **options)
    for mine, theirs in zip(disk, live, strict=True):
        assert all(torch.equal(mine[site], theirs[site]) for site in store.sites)
