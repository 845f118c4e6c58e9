"""Several ranks harvest, evaluate and index together: the files of one rank, byte for byte."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cli_fakes import SMALL, make_inputs
from fake_ranks import on_ranks
from ranks_processes import Processes
from store_rows import files
from viewer_fakes import SITES, FakeModel, fake_blocks, fake_dictionary

from activations.blocks import Cursor
from activations.ranks import alone
from activations.store import open_store
from activations.store_writer import write_store
from train.cli.main import main
from viewer.index.build import build_index
from viewer.index.share import Share
from viewer.index.storage import is_whole

TEXT = {"corpus": "made up"}
SHARD_BYTES = 20_000
HARVEST = "--layers 1-2 --context 16 --model-batch 2 --device cpu --tokens 2500".split()
# a line of JSON holds command lines; each rank carries out all of them and prints the exit codes
VERBS = f"""
import json, sys
from functools import partial
from train.cli import work
from train.cli.main import main
work.write_store = partial(work.write_store, shard_bytes={SHARD_BYTES})
for words in json.loads(sys.argv[1]):
    code = main([word.replace("RANK", __import__("os").environ["RANK"]) for word in words])
    sys.stderr.write(f"code {{code}}\\n")
    if code not in (0, 2):
        sys.exit(code)
"""


class Model(FakeModel):
    """Fails at one forward pass, if told to."""

    device = torch.device("cpu")
    dtype = torch.float32
    fails_at = 0

    def activations(self, tokens, sites):
        found = super().activations(tokens, sites)
        if self.forwards == self.fails_at:
            raise KeyboardInterrupt
        return found


def dictionaries():
    found = {site: fake_dictionary(site, seed=n) for n, site in enumerate(SITES)}
    # a transcoder that reads what another one reads
    return found | {
        "blocks.1.hook_mlp_out": fake_dictionary(SITES[0], seed=7, site_out="blocks.1.hook_mlp_out")
    }


def blocks_from(start):
    """Blocks that can be gone on with; the third batch keeps nothing, and so does the last."""
    kept = 0
    for number, batch in enumerate(fake_blocks(8)):
        if number in (2, 7):
            batch = dataclasses.replace(batch, keep=torch.zeros_like(batch.keep))
        if kept >= start.kept and number >= start.document:
            yield dataclasses.replace(batch, begin=Cursor(document=number, kept=kept))
        kept += int(batch.keep.sum())


def build(ranks, out, fails_at=0, sites=None):
    model, made = Model(), dictionaries()
    model.fails_at = fails_at if ranks.rank == ranks.world - 1 else 0
    share = Share.of(ranks, model, made, model.dtype) if ranks.world > 1 else None
    options = {"text": TEXT, "examples": 6, "resume": True, "share": share}
    return build_index(model, made, blocks_from, out, **options), model.forwards


def contents(root: Path):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name[0] != "."}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "index"
    _, forwards = build(alone(), out)
    assert forwards == 8
    return contents(out)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_write_the_index_of_one_and_each_runs_its_part_of_the_model(straight, tmp_path, world):
    found = on_ranks(world, lambda ranks: build(ranks, tmp_path))
    assert [set(folders) for folders, _ in found] == [set(dictionaries())] * world
    assert contents(tmp_path) == straight
    # batches that keep nothing are not run
    assert sum(forwards for _, forwards in found) == 6 and max(forwards for _, forwards in found) <= 6 / 2
    assert is_whole(tmp_path / SITES[0])


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_an_index_that_was_cut_off_goes_on_and_with_other_ranks_begins_anew(
    straight, tmp_path, monkeypatch, caplog, fails_at
):
    monkeypatch.setattr("viewer.index.parts._PART_BYTES", 1)
    (tmp_path / "a").mkdir()
    cut = on_ranks(2, lambda ranks: build(ranks, tmp_path / "a", fails_at))
    assert isinstance(cut[1], KeyboardInterrupt)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    if torn := sorted((tmp_path / "a").glob("parts-0-of-2/part-*.safetensors"))[1:]:
        torn[-1].write_bytes(b"half")
    again = on_ranks(2, lambda ranks: build(ranks, tmp_path / "a"))
    assert contents(tmp_path / "a") == straight
    assert sum(forwards for _, forwards in again) < 6 or fails_at == 1
    assert "begins anew" not in caplog.text
    on_ranks(3, lambda ranks: build(ranks, tmp_path / "b"))
    assert contents(tmp_path / "b") == straight
    with pytest.raises(KeyboardInterrupt):
        build(alone(), tmp_path / "c", fails_at + 2)
    on_ranks(2, lambda ranks: build(ranks, tmp_path / "c"))
    assert contents(tmp_path / "c") == straight
    assert "c holds a pass of another number of ranks: this one begins anew" in caplog.text
    assert not list(tmp_path.glob("*/parts*"))


def same_metrics(a, b):
    """Losses to rounding, for their products have other sizes where sites are elsewhere; the rest equal."""
    a, b = json.loads(a.read_text()), json.loads(b.read_text())
    assert a.keys() == b.keys()
    for site, metrics in a.items():
        losses = {name: value for name, value in metrics.items() if re.match("ce|delta|kl", name)}
        assert len(losses) > 5 and metrics.keys() == b[site].keys()
        assert losses == pytest.approx({name: b[site][name] for name in losses}, rel=1e-4, abs=1e-5)
        assert {n: v for n, v in metrics.items() if n not in losses} == {
            n: v for n, v in b[site].items() if n not in losses
        }


def test_the_verbs_of_two_processes_leave_the_files_of_one(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("train.cli.work.write_store", functools.partial(write_store, shard_bytes=SHARD_BYTES))
    inputs, one, two = make_inputs(tmp_path), tmp_path / "one", tmp_path / "two"
    assert main(["train", *inputs, *SMALL, "--layers", "0-2", "--out", str(one)]) == 0
    shutil.copytree(one, two)

    def verbs(run):
        return [
            *(
                ["harvest", *inputs, *HARVEST, "--store-dtype", kind, "--out", f"{run}/{kind}"]
                for kind in ("float16", "int8")
            ),
            ["eval", str(run), "--tokens", "300", "--loss-tokens", "60", "--baseline-tokens", "20"],
            ["index", str(run), "--tokens", "300"],
        ]

    wrong = [
        ["harvest", *inputs, *HARVEST, "--seed", "RANK", "--out", str(two / "wrong")],
        ["eval", f"{two}", "--tokens", "10RANK"],
        ["index", f"{two}", "--examples", "1RANK"],
    ]
    for words in verbs(one):
        assert main(words) == 0
    capfd.readouterr()
    threads = str(torch.get_num_threads())
    ends = Processes(2, VERBS, json.dumps([*verbs(two), *wrong]), OMP_NUM_THREADS=threads).finish()
    assert [code for code, _, _ in ends] == [2, 2], ends
    codes = [[line for line in err.splitlines() if line.startswith("code")] for _, _, err in ends]
    assert codes == [["code 0"] * 4 + ["code 2"] * 3] * 2, ends
    refusals = [line for line in ends[0][2].splitlines() if line.startswith("jumpscope:")]
    assert len(refusals) == 3 and all("every rank must have the same" in line for line in refusals)
    assert not [line for line in ends[1][2].splitlines() if line.startswith("jumpscope:")]
    for kind in ("float16", "int8"):
        assert files(two / kind) == files(one / kind)
        assert len(open_store(two / kind).manifest["shards"]) > 10
    words = [
        "train",
        "--store",
        str(two / "int8"),
        *SMALL[:10],
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "three"),
    ]
    assert main(words) == 0
    same_metrics(two / "eval.json", one / "eval.json")
    assert contents(two / "index") == contents(one / "index")
