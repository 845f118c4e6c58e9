"""The index's files against damage, kills, other texts, and builds in pieces."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_index import TEXT, build, joined
from viewer_fakes import SITES, FakeModel, fake_blocks, fake_dictionary

from activations.blocks import Cursor, TokenBlocks
from sae import UserError
from sae.sparse import SparseEncoder
from viewer.index.build import IndexBuilder, build_index
from viewer.index.storage import (
    EXAMPLES,
    FIRINGS,
    MANIFEST,
    RELATED,
    SCHEMAS,
    TEXTS,
    TOKENS,
    read_manifest,
    verify_firings,
)


def files_of(root):
    """Every file of an index and its bytes."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert len(found) == 3 + len(SITES) * (2 + len(SCHEMAS))
    return found


def numbered(first=0, last=None):
    """Blocks that say where they begin, as a stream's do."""
    parts = list(enumerate(fake_blocks()))[first:last]
    return [TokenBlocks(**joined([b]), begin=Cursor(document=n)) for n, b in parts]


def test_a_damaged_index_is_named(tmp_path):
    folders, _, _ = build(tmp_path)
    folder = folders[SITES[0]]
    read_manifest(folder)
    for name in (EXAMPLES, FIRINGS):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-10])
        with pytest.raises(UserError, match=name):
            read_manifest(folder)
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match=name):
            read_manifest(folder)
            verify_firings(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match="missing"):
            read_manifest(folder)
        (folder / name).write_bytes(whole)
    read_manifest(folder)
    tokens = (tmp_path / TOKENS).read_bytes()
    (tmp_path / TOKENS).unlink()
    with pytest.raises(UserError, match="cut short"):
        read_manifest(folder)
    (tmp_path / TOKENS).write_bytes(tokens)
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="cut short"):
        read_manifest(folder)


@pytest.mark.parametrize("version", [1, 3, 99, None])
def test_an_index_of_another_version_is_refused(version, tmp_path):
    folders, _, _ = build(tmp_path)
    path = folders[SITES[0]] / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    with pytest.raises(UserError, match=f"version {version} .*Build the index again"):
        read_manifest(path.parent)


def test_a_rebuild_that_dies_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    build(tmp_path)
    monkeypatch.setattr(FakeModel, "token_strings", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(tmp_path)
    with pytest.raises(UserError, match="cut short"):
        read_manifest(tmp_path / SITES[0])
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_site_can_be_added_to_an_index_of_the_same_text(tmp_path):
    _, _, dictionaries = build(tmp_path / "together")
    for site, dictionary in dictionaries.items():
        build(tmp_path / "apart", dictionaries={site: dictionary})
        read_manifest(tmp_path / "apart" / site)
    one, other = files_of(tmp_path / "apart"), files_of(tmp_path / "together")
    # sites look for neighbours among those that they are indexed with
    same = [name for name in one if Path(name).name not in (RELATED, MANIFEST)]
    assert len(same) == 2 + 4 * len(SITES) and all(one[name] == other[name] for name in same)


def test_another_text_for_some_sites_is_refused_before_the_work(tmp_path):
    _, _, dictionaries = build(tmp_path)
    before = files_of(tmp_path)
    some = {SITES[0]: dictionaries[SITES[0]]}
    with pytest.raises(UserError, match=f"one text .*{SITES[1]}.*--out"):
        build(tmp_path, dictionaries=some, text={"corpus": "other"})
    assert files_of(tmp_path) == before
    build(tmp_path, fake_blocks(3), text={"corpus": "other"})
    assert read_manifest(tmp_path / SITES[0])["corpus"] == "other"


def test_a_site_of_other_texts_is_named(tmp_path):
    build(tmp_path / "one")
    build(tmp_path / "two", fake_blocks(3))
    (tmp_path / "one" / TEXTS / MANIFEST).write_bytes((tmp_path / "two" / TEXTS / MANIFEST).read_bytes())
    with pytest.raises(UserError, match="other texts"):
        read_manifest(tmp_path / "one" / SITES[0])


def collect(out, blocks, *, resume=True, text=TEXT):
    """A builder that has seen some blocks."""
    model = FakeModel()
    dictionaries = {site: fake_dictionary(site, seed=n) for n, site in enumerate(SITES)}
    builder = IndexBuilder(model, dictionaries, out, text=text, examples=6, resume=resume)
    for batch in blocks:
        acts = model.activations(batch.tokens, SITES)
        for site, dictionary in dictionaries.items():
            builder.add(site, batch, SparseEncoder(dictionary).encode(acts[site][batch.keep]))
    return builder


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("part_bytes", [1, 2**30])
def test_two_halves_put_together_are_one_pass_to_the_last_bit(resume, part_bytes, tmp_path, monkeypatch):
    build(tmp_path / "whole", numbered())
    monkeypatch.setattr("viewer.index.parts._PART_BYTES", part_bytes)
    halves = [
        collect(tmp_path / name, numbered(*span), resume=resume, text={"half": name})
        for name, span in (("a", (0, 2)), ("b", (2, None)))
    ]
    both = collect(tmp_path / "both", [], resume=False)
    with pytest.raises(UserError, match="finished"):
        both.take(halves[0])
    for half in halves:
        half.finish()
        both.take(half)
    both.write()
    assert files_of(tmp_path / "both") == files_of(tmp_path / "whole")


def test_halves_of_other_dictionaries_are_refused(tmp_path):
    one = collect(tmp_path / "one", numbered())
    one.finish()
    other = IndexBuilder(
        FakeModel(), {site: fake_dictionary(site, seed=7) for site in SITES}, tmp_path / "other", text=TEXT
    )
    with pytest.raises(UserError, match="same model and dictionaries"):
        other.take(one)


def test_a_pass_goes_on_behind_its_last_whole_part(tmp_path, monkeypatch):
    build(tmp_path / "whole", numbered())
    monkeypatch.setattr("viewer.index.parts._PART_BYTES", 1)
    out = tmp_path / "cut"
    assert collect(out, numbered(0, 4)).next.document == 3
    again = collect(out, [])
    assert again.next.document == 3 and again.rows == sum(int(b.keep.sum()) for b in numbered(0, 3))
    (out / "parts" / "part-00001.safetensors").write_bytes(b"torn")
    again = collect(out, [])
    # what lies behind the torn part can no longer be used
    assert again.next.document == 1 and len(list((out / "parts").glob("*.safetensors"))) == 1
    # of another text, or not asked to go on, it begins anew
    assert collect(tmp_path / "cut", [], text={"corpus": "other"}).next == Cursor()
    assert not (out / "parts").exists()
    collect(out, numbered(0, 4))
    assert collect(out, [], resume=False).next == Cursor()
    collect(out, numbered(0, 4))
    goes_on = lambda start: numbered(start.document)  # noqa: E731
    dictionaries = {site: fake_dictionary(site, seed=n) for n, site in enumerate(SITES)}
    model = FakeModel()
    build_index(model, dictionaries, goes_on, out, text=TEXT, examples=6, resume=True)
    assert model.forwards == 2
    assert files_of(out) == files_of(tmp_path / "whole")


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
import torch
import viewer.index.evidence_loops
import viewer.index.parts
from test_index_files import *

viewer.index.parts._PART_BYTES = 1
torch.set_num_threads(1)
out, replace = Path(sys.argv[1]), Path.replace

def build_until(where):
    def dies(path, target):
        if where in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)
    Path.replace = dies
    model, made = FakeModel(), {s: fake_dictionary(s, seed=n) for n, s in enumerate(SITES)}
    blocks = lambda start: numbered(start.document)
    build_index(model, made, blocks, out, text=TEXT, examples=6, resume=True)
    return model.forwards

for where in sys.argv[2:]:
    child = os.fork()
    if not child:
        os._exit(build_until(where))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, *(path.stat().st_mtime_ns for path in sorted(out.glob(f"*/{EXAMPLES}"))))
"""


def test_kills_at_any_rename_are_gone_on_with(tmp_path):
    build(tmp_path / "whole", numbered())
    out, root = tmp_path / "out", Path(__file__).resolve().parents[1]
    # in the third part, in the writing of the second site, at its manifest, at the very end, and not at all
    places = ("part-00002", f"{SITES[1]}/.examples", f"{SITES[1]}/.manifest", ".tokens", "never")
    run = [sys.executable, "-c", KILLED, str(out), *places]
    lines = subprocess.run(run, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    codes, written = [line.split()[0] for line in lines], [line.split()[1:] for line in lines]
    # at last neither the pass is made again nor a site
    assert codes == [str(-signal.SIGKILL)] * 4 + ["0"]
    assert [len(stamps) for stamps in written] == [0, 1, 2, 2, 2] and written[4] == written[3]
    assert files_of(out) == files_of(tmp_path / "whole")
