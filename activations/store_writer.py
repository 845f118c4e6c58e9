"""Writing a store, shard by shard, so that a harvest killed at any moment goes on from its last shard."""

import contextlib
import dataclasses
import importlib.metadata
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from activations.blocks import Cursor
from activations.harvest import RowBatch
from activations.order import permutation
from activations.places import Place
from activations.quantise import Quantiser
from activations.ring import RunningStatistics
from activations.shards import MAP, empty_fields, scale_name, shard_fields, write_shard
from activations.store import FORMAT, MANIFEST, VERSION, Store, manifest_bytes, open_store
from sae.errors import UserError
from sae.files import disk_errors

SHARD_BYTES = 256 * 2**20
StoreDtype = Literal["auto", "bfloat16", "float16", "int8"]
Source = Callable[[Cursor], Iterator[RowBatch]]
"""The rows of a stream from a place in it on."""
LOCK = ".lock"
_OURS = re.compile(r"shard-\d{5,}\.safetensors|\.lock|\..+\.tmp")
_CHUNK_ROWS = 4096
_PACKAGES = ("torch", "transformers", "transformer-lens", "safetensors")


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """What the rows of a store are. A harvest goes on only under the same facts."""

    model: str
    tokenizer_hash: str
    corpus: str
    split: str
    context: int
    seed: int
    model_batch: int
    model_dtype: str
    """The dtype of the rows as harvested, "bfloat16" for instance."""
    widths: Mapping[str, int]
    """d_in of each site."""


def begun_store(url: Path | str) -> Store | None:
    """The store at `url` that a harvest would go on with; None where it would begin one.

    Raises UserError when other files are in its place, or a shard of it is torn.
    """
    place = Place(url)
    if place.folder is not None and place.folder.is_file():
        raise UserError("a store needs a folder", f"a file at {place}", "give another --out")
    names = place.sizes()
    if MANIFEST in names:
        store = open_store(url)
        return store if store.rows else None
    if foreign := [name for name in names if not _OURS.fullmatch(name)]:
        raise UserError(
            "a new store needs an empty folder",
            f"other files at {place}, {foreign[0]} for instance",
            "give another --out",
        )
    return None


def write_store(
    url: Path | str,
    source: Source,
    facts: StoreFacts,
    *,
    wanted_rows: int,
    shard_bytes: int = SHARD_BYTES,
    dtype: StoreDtype = "auto",
    on_rows: Callable[[int], None] | None = None,
) -> Store:
    """Writes the rows of `source` until the store holds `wanted_rows` or they end, and opens it.

    A store that was begun goes on after its last whole shard: `source` is called with the place to go on
    from, and rows that are there already are dropped. One that holds as many rows is left as it is.
    `shard_bytes`, of rows as harvested, bounds each shard of a new store. `dtype` is that on disk, "auto"
    the rows' own. Memory: two shards. `on_rows` is told the rows so far.

    Raises UserError when another harvest is writing the store, the facts differ from those it was begun
    with, a disk refuses, or there are no rows. What the manifest lists stays good whatever happens.
    """
    place = Place(url)
    begun_store(url)  # a folder of someone else's gets no lock of ours
    place.make()
    with _lock(place):
        begun = begun_store(url)
        if begun is not None:
            _check_same(begun, facts, _on_disk(facts, dtype))
            if begun.rows >= wanted_rows or begun.manifest["corpus_ended"]:
                _Committer(place, begun.manifest).finish(ended=begun.manifest["corpus_ended"])
                return open_store(url)
        manifest = begun.manifest if begun else _new_manifest(facts, _on_disk(facts, dtype), shard_bytes)
        _Harvest(place, manifest, wanted_rows).run(source, on_rows)
        return open_store(url)


class _Harvest:
    """Fills two buffers of a shard in turn; while one is filled, a thread writes the other."""

    def __init__(self, place: Place, manifest: dict[str, Any], wanted_rows: int) -> None:
        self._committer = _Committer(place, manifest)
        self._wanted, self._shard_rows = wanted_rows, manifest["shard_rows"]
        self._cursor = Cursor(**manifest["cursor"])
        self._widths, self._dtype = manifest["widths"], getattr(torch, manifest["model_dtype"])
        self._rows: int = manifest["rows"]
        self._filled = 0
        self._buffers = self._new_buffers()
        self._spare = self._new_buffers()
        self._pending: Future[None] | None = None

    def run(self, source: Source, on_rows: Callable[[int], None] | None) -> None:
        """Harvests and writes. A shard that is being written when it fails is still finished."""
        with ThreadPoolExecutor(1, thread_name_prefix="store-writer") as pool:
            for number, batch in enumerate(source(self._cursor)):
                if not number:
                    self._committer.claim()
                if batch.begin is None or batch.begin.kept > self._rows:
                    raise ValueError(f"row {self._rows} must come next, not those of {batch.begin}")
                self._cursor = batch.begin
                self._take(batch, pool)
                if on_rows is not None:
                    on_rows(self._rows)
                if self._rows >= self._wanted:
                    break
            if not self._rows:
                raise UserError(
                    "a store must hold rows", "no tokens to harvest", "give more --tokens or another corpus"
                )
            ended = self._rows < self._wanted
            if self._filled:
                self._submit(pool, complete=True, ended=ended)
            self._wait()
            self._committer.finish(ended=ended)

    def _take(self, batch: RowBatch, pool: ThreadPoolExecutor) -> None:
        parts = {**batch.rows, **{key: getattr(batch.map, key) for key in MAP}}
        assert batch.begin is not None
        # after a resume the first batch begins before the first row that is still wanted
        taken = self._rows - batch.begin.kept
        end = min(len(batch), self._wanted - batch.begin.kept)
        while taken < end:
            count = min(self._shard_rows - self._filled, end - taken)
            for key, buffer in self._buffers.items():
                buffer[self._filled : self._filled + count].copy_(parts[key][taken : taken + count])
            taken += count
            self._filled += count
            self._rows += count
            if self._filled == self._shard_rows:
                self._submit(pool, complete=self._rows == self._wanted, ended=False)

    def _submit(self, pool: ThreadPoolExecutor, *, complete: bool, ended: bool) -> None:
        self._wait()
        part = {key: buffer[: self._filled] for key, buffer in self._buffers.items()}
        self._pending = pool.submit(
            self._committer.commit, part, self._cursor, complete=complete, ended=ended
        )
        self._buffers, self._spare = self._spare, self._buffers
        self._filled = 0

    def _wait(self) -> None:
        """Until the shard before is on the disk; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _new_buffers(self) -> dict[str, Tensor]:
        return empty_fields(shard_fields(self._widths, self._dtype, self._shard_rows))


class _Committer:
    """Writes shards and the manifest after each, and carries the statistics; used by one thread at a time."""

    def __init__(self, place: Place, manifest: dict[str, Any]) -> None:
        self._place = place
        self._manifest = dict(manifest)
        self._dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self._running = {
            site: RunningStatistics.from_state(found["mean"], found["spread"], manifest["rows"])
            for site, found in manifest["statistics"].items()
        } or {site: RunningStatistics(width) for site, width in manifest["widths"].items()}
        self._quantisers = {
            site: Quantiser(mean=torch.tensor(found["mean"]), col=torch.tensor(found["col"]))
            for site, found in manifest["quantisation"].items()
        }

    def claim(self) -> None:
        """Makes this harvest the store's writer, and removes what an earlier one left unlisted."""
        for name in self._place.sizes():
            if _OURS.fullmatch(name) and name != LOCK and name not in self._manifest["shards"]:
                self._place.remove(name)
        self._manifest |= {"writer": secrets.token_hex(8), "complete": False}
        self._place.replace(MANIFEST, manifest_bytes(self._manifest))

    def commit(self, rows: Mapping[str, Tensor], cursor: Cursor, *, complete: bool, ended: bool) -> None:
        """Writes the next shard, then the manifest that lists it."""
        number, count = len(self._manifest["shards"]), len(rows[MAP[0]])
        for site, running in self._running.items():
            running.update(rows[site])
            if self._dtype == torch.int8 and not number:
                self._quantisers[site] = Quantiser.fit(rows[site])
        order = torch.from_numpy(permutation(count, self._manifest["seed"], number))
        fields = shard_fields(self._manifest["widths"], self._dtype, count)
        name = f"shard-{number:05d}.safetensors"
        self._check_owner()
        entry = self._place.write(
            name, lambda append: write_shard(append, fields, lambda field: self._parts(rows, order, field))
        )
        self._manifest["shards"] = {**self._manifest["shards"], name: {"rows": count, **entry}}
        self._manifest["rows"] += count
        self._manifest["cursor"] = dataclasses.asdict(cursor)
        self._replace_manifest(complete=complete, ended=ended)

    def finish(self, *, ended: bool) -> None:
        """Says that the harvest is complete, if the last shard did not."""
        if not self._manifest["complete"]:
            self._replace_manifest(complete=True, ended=ended)

    def _replace_manifest(self, *, complete: bool, ended: bool) -> None:
        statistics = {}
        for site, running in self._running.items():
            mean, spread = running.state()
            statistics[site] = {"scale": running.result().scale, "spread": spread, "mean": mean}
        quantisation = {
            site: {"mean": found.mean.tolist(), "col": found.col.tolist()}
            for site, found in self._quantisers.items()
        }
        self._manifest |= {
            "complete": complete,
            "corpus_ended": ended,
            "statistics": statistics,
            "quantisation": quantisation,
        }
        self._check_owner()
        self._place.replace(MANIFEST, manifest_bytes(self._manifest))

    def _parts(self, rows: Mapping[str, Tensor], order: Tensor, field: str) -> Iterator[Tensor]:
        """A tensor of the shard, in pieces, in the order on disk."""
        site = field if field in rows else field.removesuffix(scale_name(""))
        for chosen in order.split(_CHUNK_ROWS):
            part = rows[site].index_select(0, chosen)
            if site in self._quantisers:
                quantiser = self._quantisers[site]
                scales = quantiser.scales(part)
                yield quantiser.encode(part, scales) if field == site else scales
            elif field in MAP:
                yield part
            else:
                yield _converted(site, part, self._dtype)

    def _check_owner(self) -> None:
        # the lock keeps out other processes of this machine; this, whoever else reaches the folder
        try:
            owner = open_store(self._place.url, check_sizes=False).manifest["writer"]
        except UserError as error:
            owner = f"none ({error.found})"
        if owner != self._manifest["writer"]:
            raise UserError(
                f"one harvest at a time writes {self._place}",
                f"another one took it over, or its manifest is gone (writer {owner})",
                "let the other one finish, or run this again once it has ended",
            )


def _converted(site: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    converted = rows.to(dtype)
    if dtype == torch.float16 and not converted.isfinite().all():
        raise UserError(
            f"activations kept as float16 must stay within {torch.finfo(dtype).max:,.0f}",
            f"{float(rows.abs().max()):,.0f} at {site}",
            "harvest into another --out with --store-dtype bfloat16 or int8",
        )
    return converted


def _on_disk(facts: StoreFacts, dtype: StoreDtype) -> str:
    return facts.model_dtype if dtype == "auto" else dtype


def _new_manifest(facts: StoreFacts, dtype: str, shard_bytes: int) -> dict[str, Any]:
    rows_dtype: torch.dtype = getattr(torch, facts.model_dtype)
    row_bytes = sum(facts.widths.values()) * rows_dtype.itemsize + 4 * len(MAP)
    # 8 bits come back as bfloat16 where the model has no more; float16 could overflow by the rounding
    back = "bfloat16" if facts.model_dtype == "bfloat16" else "float32"
    return {
        "format": FORMAT,
        "version": VERSION,
        **dataclasses.asdict(facts),
        "dtype": dtype,
        "rows_dtype": back if dtype == "int8" else dtype,
        "rows": 0,
        "complete": False,
        "corpus_ended": False,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "writer": "",
        "cursor": dataclasses.asdict(Cursor()),
        "shard_rows": max(1, shard_bytes // row_bytes),
        "shards": {},
        "statistics": {},
        "quantisation": {},
    }


def _check_same(store: Store, facts: StoreFacts, dtype: str) -> None:
    asked = {**dataclasses.asdict(facts), "dtype": dtype}
    sites = asked.pop("widths")
    differences = [
        f"{name} {store.manifest[name]!r} there, {value!r} asked"
        for name, value in asked.items()
        if store.manifest[name] != value
    ]
    if dict(sites) != store.widths:
        here, there = (", ".join(sorted(one)) or "none" for one in (set(sites), set(store.widths)))
        differences.append(f"sites {there} there, {here} asked")
    if differences:
        raise UserError(
            f"a harvest into {store.place} must be like the one that began it",
            "; ".join(differences),
            "give the same flags, or another --out",
        )


@contextlib.contextmanager
def _lock(place: Place) -> Iterator[None]:
    """Holds a local store; the system lets go of it when the process dies, however it dies."""
    if place.folder is None:
        yield
        return
    lock = FileLock(place.folder / LOCK, timeout=0)
    try:
        # a file system without locks has `_check_owner` alone
        with disk_errors(place.folder), contextlib.suppress(NotImplementedError):
            lock.acquire()
    except Timeout as error:
        raise UserError(
            f"one harvest at a time writes {place}",
            "another process that is writing it",
            "wait for it, or give another --out",
        ) from error
    try:
        yield
    finally:
        lock.release()
