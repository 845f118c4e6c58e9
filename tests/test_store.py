"""Reading an activation store: what comes back, in which order, and what is refused."""

import contextlib
import json
import threading

import pytest
import torch
from safetensors import safe_open
from store_rows import FACTS, SITES, WIDTHS, all_rows, assert_same, source, whole, write

from activations import store as store_module
from activations.order import permutation
from activations.ring import ShuffleRing
from activations.store import manifest_bytes, open_store
from sae.errors import UserError


@pytest.fixture
def stored(tmp_path):
    return write(tmp_path / "s")


@pytest.fixture
def small_reads(monkeypatch):
    monkeypatch.setattr(store_module, "_READ_ROWS", 8)


def test_rows_come_back_as_they_went_in(stored, small_reads):
    assert_same(whole(stored.iter_rows()), all_rows())
    only, _ = whole(stored.iter_rows(SITES[1:]))
    assert list(only) == [SITES[1]]


@pytest.mark.parametrize("order", ["harvested", "stored"])
@pytest.mark.parametrize("start", [0, 1, 29, 30, 31, 60, 99, 100])
def test_reading_starts_at_any_row_and_says_which_it_is(stored, small_reads, order, start):
    whole_rows, whole_maps = whole(stored.iter_rows(order=order))
    rest = list(stored.iter_rows(start=start, order=order))
    assert sum(map(len, rest)) == 100 - start
    place = start
    for batch in rest:
        assert batch.begin.kept == place
        for site in SITES:
            assert torch.equal(batch.rows[site], whole_rows[site][place : place + len(batch)])
        assert torch.equal(batch.map.token, whole_maps["token"][place : place + len(batch)])
        place += len(batch)


def test_rows_lie_in_a_hashed_order_within_their_shard(stored):
    _, maps = whole(stored.iter_rows(order="stored"))
    expected = [
        first + row
        for number, (first, rows) in enumerate([(0, 30), (30, 30), (60, 30), (90, 10)])
        for row in permutation(rows, FACTS.seed, number)
    ]
    assert (maps["token"] - 500).tolist() == expected
    assert len(set(maps["document"][:5].tolist())) > 1


def test_shards_are_plain_safetensors_of_a_bounded_size(stored):
    shards = sorted(stored.place.folder.glob("shard-*.safetensors"))
    assert [path.name for path in shards] == [f"shard-0000{i}.safetensors" for i in range(4)]
    order = torch.from_numpy(permutation(30, FACTS.seed, 0))
    with safe_open(shards[0], framework="pt") as file:
        assert set(file.keys()) == {*SITES, "document", "position", "token"}
        rows, maps = all_rows()
        assert torch.equal(file.get_tensor(SITES[1]), rows[SITES[1]][order])
        assert torch.equal(file.get_tensor("position"), maps["position"][order])


def test_the_manifest_says_what_the_rows_are(stored):
    manifest = json.loads((stored.place.folder / "manifest.json").read_text())
    expected = {
        "format": "jumpscope-activations",
        "version": 2,
        "model": "tiny",
        "tokenizer_hash": "abc",
        "corpus": "wiki-leads",
        "split": "train",
        "context": 256,
        "seed": 3,
        "model_batch": 8,
        "model_dtype": "bfloat16",
        "widths": WIDTHS,
        "dtype": "bfloat16",
        "rows_dtype": "bfloat16",
        "rows": 100,
        "complete": True,
        "corpus_ended": False,
        "shard_rows": 30,
        "cursor": {"epoch": 0, "document": 5, "offset": 0, "kept": 85},
    }
    assert {key: manifest[key] for key in expected} == expected
    assert set(manifest["versions"]) == {"torch", "transformers", "transformer-lens", "safetensors"}
    assert [entry["rows"] for entry in manifest["shards"].values()] == [30, 30, 30, 10]
    on_disk = {path.name: path.stat().st_size for path in stored.place.folder.glob("shard-*")}
    assert {name: entry["bytes"] for name, entry in manifest["shards"].items()} == on_disk


def test_statistics_cover_all_rows(stored):
    rows, _ = all_rows()
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
    disk = ShuffleRing(lambda start: stored.iter_rows(start=start.kept), stored.widths, **options)
    live = ShuffleRing(source(), stored.widths, **options)
    for mine, theirs in zip(disk, live, strict=True):
        assert all(torch.equal(mine[site], theirs[site]) for site in SITES)


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("store-")]


def test_the_thread_ends_with_the_iterator(stored, small_reads):
    for take in (1, 5, 100):
        rows = stored.iter_rows()
        for _ in range(take):
            if next(rows, None) is None:
                break
        assert len(readers()) == (take < 100)
        rows.close()
        assert readers() == []


def test_batches_stay_good_after_the_next_shards_are_read(stored, small_reads):
    for order in ("harvested", "stored"):
        kept = [
            (batch.rows[SITES[0]], batch.rows[SITES[0]].clone()) for batch in stored.iter_rows(order=order)
        ]
        assert all(torch.equal(now, then) for now, then in kept)


def test_only_the_asked_sites_are_read(stored, monkeypatch):
    read = []
    reading = type(stored.place).reading

    @contextlib.contextmanager
    def counted(place, name):
        with reading(place, name) as read_at:
            yield lambda offset, view: read.append(len(view)) or read_at(offset, view)

    monkeypatch.setattr(type(stored.place), "reading", counted)
    for start, rows, shards in ((0, 100, 4), (90, 10, 1)):
        read.clear()
        list(stored.iter_rows(SITES[:1], start=start))
        headers = shards * 8 + sum(size for size in read if size > 300)
        assert sum(read) == rows * (4 * 2 + 12) + headers


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_shard_harmed_while_it_is_read_is_named(stored, small_reads, harm):
    rows = stored.iter_rows()
    next(rows)
    shard = stored.place.folder / "shard-00002.safetensors"
    if harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.unlink()
    with pytest.raises(UserError, match=r"shard-00002\.safetensors must be whole"):
        list(rows)
    assert readers() == []


def spoiled_header(change):
    def spoil(content):
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return spoil


def move(header):
    begin, end = header["token"]["data_offsets"]
    header["token"]["data_offsets"] = [begin + 10**6, end + 10**6]


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda content: b"\xff" * 8 + content[8:], "a header of"),
        (lambda content: bytes(8) + content[8:], "a header of 0 bytes"),
        (lambda content: content[:8] + b"?" + content[9:], "not JSON"),
        (lambda content: content[:5], "too early"),
        (spoiled_header(lambda header: header.pop("token")), "no tensor token"),
        (spoiled_header(lambda header: header["token"].update(dtype="F32")), "token is F32"),
        (spoiled_header(lambda header: header["token"].update(shape=[31])), r"\[31\] instead"),
        (spoiled_header(lambda header: header["token"].update(data_offsets=[0])), "token at"),
        (spoiled_header(lambda header: header["token"].update(data_offsets=[-4, 116])), "token at"),
        (spoiled_header(move), "token at"),
    ],
)
def test_a_header_that_lies_is_refused(stored, spoil, found):
    shard = stored.place.folder / "shard-00001.safetensors"
    shard.write_bytes(spoil(shard.read_bytes()))
    with pytest.raises(UserError, match=rf"shard-00001.*{found}"):
        list(stored.iter_rows())


def test_verify_names_every_shard_that_is_not_whole(stored):
    told = []
    assert stored.verify(told.append) == {}
    assert (
        told[-1] == stored.bytes == sum(path.stat().st_size for path in stored.place.folder.glob("shard-*"))
    )
    folder = stored.place.folder
    for name, place in (("shard-00000", 3), ("shard-00002", -1)):
        shard = folder / f"{name}.safetensors"
        content = bytearray(shard.read_bytes())
        content[place] ^= 1
        shard.write_bytes(content)
    (folder / "shard-00003.safetensors").unlink()
    problems = open_store(folder, check_sizes=False).verify()
    assert sorted(problems) == [f"shard-0000{i}.safetensors" for i in (0, 2, 3)]
    assert "checksum" in problems["shard-00002.safetensors"]
    assert problems["shard-00003.safetensors"] == "no such file"


def test_torn_missing_and_foreign_things_are_refused(stored, tmp_path):
    folder = stored.place.folder
    shard = folder / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(
        UserError, match=rf"shard-00001.*{len(content) - 100} bytes instead of {len(content)}"
    ):
        open_store(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001.*no such file"):
        open_store(folder)
    with pytest.raises(UserError, match=r"no blocks\.7"):
        stored.iter_rows(["blocks.7"])
    with pytest.raises(UserError, match="row 0 to 100"):
        stored.iter_rows(start=101)
    with pytest.raises(UserError, match="manifest"):
        open_store(tmp_path)
    manifest = folder / "manifest.json"
    whole_text = manifest.read_text()
    for text, found in (
        (manifest_bytes({**stored.manifest, "version": 3}).decode(), "version 3"),
        ("{", "JSON"),
        ("[]", "something else"),
        (whole_text.replace('"rows": 100', '"rows": 101'), "checksum"),
    ):
        assert text != whole_text
        manifest.write_text(text)
        with pytest.raises(UserError, match=found):
            open_store(folder)
