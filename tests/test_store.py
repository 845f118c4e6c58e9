"""The activation store: what comes back, what is refused, and what a failure leaves behind."""

import json

import pytest
import torch
from safetensors import safe_open

from activations import store as store_module
from activations.harvest import RowBatch, RowMap
from activations.ring import ShuffleRing
from activations.store import StoreFacts, check_new, open_store, write_store
from sae.errors import UserError

FACTS = StoreFacts(
    model="tiny", tokenizer_hash="abc", corpus="wiki-leads", split="train", context=256, seed=3
)
SITES = ("blocks.0.hook_resid_post", "blocks.1.attn.hook_z")
ROW_BYTES = (4 + 6) * 2 + 12


def batches(n=100, size=17):
    generator = torch.Generator().manual_seed(0)
    for start in range(0, n, size):
        ids = torch.arange(start, min(start + size, n), dtype=torch.int32)
        rows = {
            site: (torch.randn(len(ids), width, generator=generator) + 5).bfloat16()
            for site, width in zip(SITES, (4, 6), strict=True)
        }
        yield RowBatch(rows=rows, map=RowMap(document=ids // 10, position=ids % 10, token=ids + 500))


def whole(source):
    found = list(source)
    rows = {site: torch.cat([batch.rows[site] for batch in found]) for site in found[0].rows}
    maps = {
        key: torch.cat([getattr(batch.map, key) for batch in found])
        for key in ("document", "position", "token")
    }
    return rows, maps


@pytest.fixture
def stored(tmp_path):
    return write_store(tmp_path / "s", batches(), FACTS, shard_bytes=30 * ROW_BYTES)


def test_rows_come_back_as_they_went_in(stored, monkeypatch):
    monkeypatch.setattr(store_module, "_READ_ROWS", 8)
    got, expected = whole(stored.iter_rows()), whole(batches())
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert mine[key].dtype == tensor.dtype
            assert torch.equal(mine[key], tensor)
    only, _ = whole(stored.iter_rows(SITES[1:]))
    assert list(only) == [SITES[1]]


def test_shards_are_plain_safetensors_of_a_bounded_size(stored):
    shards = sorted(stored.folder.glob("shard-*.safetensors"))
    assert [path.name for path in shards] == [f"shard-0000{i}.safetensors" for i in range(4)]
    with safe_open(shards[0], framework="pt") as file:
        assert set(file.keys()) == {*SITES, "document", "position", "token"}
        assert file.get_slice(SITES[1]).get_shape() == [30, 6]


def test_the_manifest_says_what_the_rows_are(stored):
    manifest = json.loads((stored.folder / "manifest.json").read_text())
    assert manifest["format"] == "jumpscope-activations"
    assert (manifest["version"], manifest["dtype"], manifest["rows"]) == (1, "bfloat16", 100)
    assert manifest["widths"] == {SITES[0]: 4, SITES[1]: 6} == stored.widths
    assert {
        key: manifest[key] for key in ("model", "tokenizer_hash", "corpus", "split", "context", "seed")
    } == {
        "model": "tiny",
        "tokenizer_hash": "abc",
        "corpus": "wiki-leads",
        "split": "train",
        "context": 256,
        "seed": 3,
    }
    assert set(manifest["versions"]) == {"torch", "transformers", "transformer-lens", "safetensors"}
    assert sorted(manifest["files"]) == sorted(
        p.name for p in stored.folder.iterdir() if p.name != "manifest.json"
    )


def test_statistics_cover_all_rows(stored):
    rows, _ = whole(batches())
    for site in SITES:
        exact = rows[site].double()
        got = stored.statistics[site]
        torch.testing.assert_close(got.mean.double(), exact.mean(0), rtol=1e-6, atol=0)
        assert got.scale == pytest.approx(
            float((exact - exact.mean(0)).square().sum(1).mean().sqrt()), rel=1e-6
        )
        assert got.n == 100


def test_a_store_feeds_the_ring_as_the_live_harvest_does(stored):
    options = {"dtype": torch.bfloat16, "rows": 40, "batch": 5, "passes": 2, "seed": 1}
    disk = ShuffleRing(lambda at: stored.iter_rows(start=at.kept), stored.widths, **options)
    live = ShuffleRing(lambda _: batches(), stored.widths, **options)
    for mine, theirs in zip(disk, live, strict=True):
        assert all(torch.equal(mine[site], theirs[site]) for site in SITES)


def test_verify_names_the_shard_that_changed(stored):
    stored.verify()
    shard = stored.folder / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00002\.safetensors.*checksum"):
        open_store(stored.folder).verify()


def test_torn_missing_and_foreign_things_are_refused(stored, tmp_path):
    shard = stored.folder / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(
        UserError, match=rf"shard-00001.*{len(content) - 100} bytes instead of {len(content)}"
    ):
        open_store(stored.folder)
    with pytest.raises(UserError, match=r"shard-00001"):
        list(stored.iter_rows())
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001.*no such file"):
        open_store(stored.folder)
    with pytest.raises(UserError, match=r"no blocks\.7"):
        stored.iter_rows(["blocks.7"])
    with pytest.raises(UserError, match="manifest"):
        open_store(tmp_path)
    manifest = stored.folder / "manifest.json"
    manifest.write_text(json.dumps({**stored.manifest, "version": 2}))
    with pytest.raises(UserError, match="version 2"):
        open_store(stored.folder)
    manifest.write_text("{")
    with pytest.raises(UserError, match="JSON"):
        open_store(stored.folder)


def test_a_taken_folder_is_refused_before_anything_is_harvested(stored, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("dear")
    (tmp_path / "cut.partial").mkdir()
    for name, found in (("s", "a store in"), ("other", "other files"), ("cut", r"cut\.partial")):
        with pytest.raises(UserError, match=found):
            check_new(tmp_path / name)
        with pytest.raises(UserError, match=found):
            write_store(tmp_path / name, (pytest.fail("harvested") for _ in range(1)), FACTS)
    assert (tmp_path / "other" / "thesis.tex").read_text() == "dear"
    assert open_store(stored.folder).rows == 100


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "s").mkdir()
    assert write_store(tmp_path / "s", batches(), FACTS).rows == 100


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("a", "b", "c")])
def test_a_harvest_cut_off_leaves_nothing(tmp_path, error):
    def interrupted():
        yield from batches()
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        write_store(tmp_path / "s", interrupted(), FACTS, shard_bytes=30 * ROW_BYTES)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, tensors, metadata=None):
        path.write_bytes(b"half")
        with store_module.disk_errors(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "save_tensors", full)
    with pytest.raises(UserError, match="room for the file"):
        write_store(tmp_path / "s", batches(), FACTS)
    assert list(tmp_path.iterdir()) == []


def test_no_rows_make_no_store(tmp_path):
    with pytest.raises(UserError, match="hold rows"):
        write_store(tmp_path / "s", iter(()), FACTS)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(tmp_path):
    told = []
    write_store(tmp_path / "s", batches(), FACTS, on_rows=told.append)
    assert told == [17, 34, 51, 68, 85, 100]
