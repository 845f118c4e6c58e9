"""What the store's tests share: known rows, as a stream that can start between any two batches."""

import json

import torch

from activations.blocks import Cursor
from activations.harvest import RowBatch, RowMap
from activations.store_writer import StoreFacts, write_store

SITES = ("blocks.0.hook_resid_post", "blocks.1.attn.hook_z")
WIDTHS = dict(zip(SITES, (4, 6), strict=True))
FACTS = StoreFacts(
    model="tiny",
    tokenizer_hash="abc",
    corpus="wiki-leads",
    split="train",
    context=256,
    seed=3,
    model_batch=8,
    model_dtype="bfloat16",
    widths=WIDTHS,
)
ROW_BYTES = (4 + 6) * 2 + 12
BATCH = 17


def all_rows(n=100, dtype=torch.bfloat16):
    """Every row at each site, and its (document, position, token)."""
    generator = torch.Generator().manual_seed(0)
    rows = {
        site: (torch.randn(400, width, generator=generator) + 5).to(dtype) for site, width in WIDTHS.items()
    }
    ids = torch.arange(n, dtype=torch.int32)
    maps = {"document": ids // 10, "position": ids % 10, "token": ids + 500}
    return {site: part[:n] for site, part in rows.items()}, maps


def source(n=100, size=BATCH, dtype=torch.bfloat16, starts=None):
    """A source of `n` rows in batches of `size`; notes in `starts` where it was asked to begin."""
    rows, maps = all_rows(n, dtype)

    def batches(start, wanted=None):
        if starts is not None:
            starts.append(start)
        for begin in range(start.kept, n, size):
            span = slice(begin, min(begin + size, n))
            yield RowBatch(
                rows={site: part[span] for site, part in rows.items()},
                map=RowMap(**{key: part[span] for key, part in maps.items()}),
                begin=Cursor(document=begin // size, kept=begin),
            )

    return batches


def write(url, rows=100, facts=FACTS, shard_rows=30, **options):
    """A store of `rows` rows in shards of `shard_rows`."""
    given = {"source": source(rows), "wanted_rows": rows} | options
    return write_store(url, given.pop("source"), facts, shard_bytes=shard_rows * ROW_BYTES, **given)


def whole(batches):
    """Batches put together again: {site: rows}, {key: values}."""
    found = list(batches)
    rows = {site: torch.cat([batch.rows[site] for batch in found]) for site in found[0].rows}
    maps = {
        key: torch.cat([getattr(batch.map, key) for batch in found])
        for key in ("document", "position", "token")
    }
    return rows, maps


def assert_same(got, expected):
    """Both of what `whole` gives, by torch.equal."""
    for mine, theirs in zip(got, expected, strict=True):
        assert list(mine) == list(theirs)
        for key, tensor in theirs.items():
            assert mine[key].dtype == tensor.dtype
            assert torch.equal(mine[key], tensor)


def files(folder):
    """Bytes of each file of a store, apart from its lock; of the manifest, what does not name the writer."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    manifest = json.loads(found.pop("manifest.json"))
    for key in ("writer", "checksum"):
        manifest.pop(key)
    return found, manifest
