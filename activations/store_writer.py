"""Writing a store, shard by shard, so that a harvest killed at any moment goes on from its last shard."""

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from activations.blocks import Cursor
from activations.committer import LOCK, OURS, Committer
from activations.harvest import RowBatch, Wanted
from activations.places import Place
from activations.ranks import Ranks, alone
from activations.shards import MAP, empty_fields, shard_fields
from activations.spans import Spans
from activations.store import FORMAT, MANIFEST, VERSION, Store, open_store
from sae.errors import UserError
from sae.files import disk_errors

SHARD_BYTES = 256 * 2**20
StoreDtype = Literal["auto", "bfloat16", "float16", "int8"]
Source = Callable[[Cursor, Wanted], Iterator[RowBatch]]
"""The rows of a stream from a place in it on; batches that are not wanted may have a map alone."""
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
    if foreign := [name for name in names if not OURS.fullmatch(name)]:
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
    ranks: Ranks | None = None,
) -> Store:
    """Writes the rows of `source` until the store holds `wanted_rows` or they end, and opens it.

    A store that was begun goes on after its last whole shard: `source` is called with the place to go on
    from, and rows that are there already are dropped. One that holds as many rows is left as it is.
    `shard_bytes`, of rows as harvested, bounds each shard of a new store. `dtype` is that on disk, "auto"
    the rows' own. Memory: two shards. `on_rows` is told the rows so far.

    With `ranks` all of them call it alike and write the store together, the same files as one would; the
    manifest is then replaced after each turn (`Spans`). It goes on with any number of ranks.

    Raises UserError when another harvest is writing the store, the facts differ from those it was begun
    with or between ranks, a disk refuses, or there are no rows. What the manifest lists stays good whatever
    happens.
    """
    ranks = ranks or alone()
    place = Place(url)
    asked = {"store": str(url), "rows": wanted_rows, "shard bytes": shard_bytes, "dtype on disk": dtype}
    ranks.agree("harvest", {**dataclasses.asdict(facts), **asked, "versions": _versions()})
    begun_store(url)  # a folder of someone else's gets no lock of ours
    place.make()
    with _lock(place) if ranks.first else contextlib.nullcontext():
        begun = begun_store(url)
        ranks.agree("store", {name: begun and begun.manifest[name] for name in ("writer", "rows")})
        if begun is not None:
            _check_same(begun, facts, _on_disk(facts, dtype))
        if begun is not None and (begun.rows >= wanted_rows or begun.manifest["corpus_ended"]):
            Committer(place, begun.manifest, ranks).finish(ended=begun.manifest["corpus_ended"])
        else:
            manifest = begun.manifest if begun else _new_manifest(facts, _on_disk(facts, dtype), shard_bytes)
            _Harvest(place, manifest, wanted_rows, ranks).run(source, on_rows)
        ranks.share("the store to be whole", None)
        return open_store(url)


class _Harvest:
    """Fills two buffers of a shard in turn; while one is filled, a thread writes the other.

    Every rank follows the whole stream, so that all know where a shard begins and where the rows end, and
    takes in the rows of its own spans.
    """

    def __init__(self, place: Place, manifest: dict[str, Any], wanted_rows: int, ranks: Ranks) -> None:
        self._ranks, self._committer = ranks, Committer(place, manifest, ranks.lane())
        self._wanted, self._shard_rows = wanted_rows, manifest["shard_rows"]
        self._cursor = Cursor(**manifest["cursor"])
        self._widths, self._dtype = manifest["widths"], getattr(torch, manifest["model_dtype"])
        self._rows: int = manifest["rows"]
        """Rows of the stream so far, all ranks' together."""
        self._first_shard = len(manifest["shards"])
        self._spans = Spans.plan(
            self._rows,
            wanted_rows,
            shard_rows=self._shard_rows,
            batch_rows=manifest["model_batch"] * manifest["context"],
            world=ranks.world,
        )
        self._turns = 0
        """Turns that this rank has done its part of."""
        self._filled = 0
        self._buffers = self._new_buffers()
        self._spare = self._new_buffers()
        self._pending: list[Future[None]] = []

    def run(self, source: Source, on_rows: Callable[[int], None] | None) -> None:
        """Harvests and writes. A shard that is being written when it fails is still finished."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        try:
            for number, batch in enumerate(source(self._cursor, self._wants)):
                if not number:
                    self._claim()
                self._ranks.beat()
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
            self._end(pool)
        finally:
            with self._ranks.busy("writing a shard"):
                pool.shutdown()

    def _end(self, pool: ThreadPoolExecutor) -> None:
        """Writes what is left, and the part in the turns that the rows did not come to the end of."""
        ended = self._rows < self._wanted
        if self._filled:
            self._submit(pool)
        while self._turns < self._spans.turns_of(self._rows):
            self._commit(pool, ended=ended)
        self._wait()
        self._committer.finish(ended=ended)

    def _claim(self) -> None:
        if self._ranks.first:
            self._committer.claim()
        self._committer.follow(self._ranks)

    def _wants(self, row: int, count: int) -> bool:
        return self._spans.touches(self._ranks.rank, row, count)

    def _take(self, batch: RowBatch, pool: ThreadPoolExecutor) -> None:
        parts = {**batch.rows, **{key: getattr(batch.map, key) for key in MAP}}
        assert batch.begin is not None
        # after a resume the first batch begins before the first row that is still wanted
        taken = self._rows - batch.begin.kept
        end = min(len(batch), self._wanted - batch.begin.kept)
        while taken < end:
            shard_end, span = self._spans.end_of_shard(self._rows), self._spans.span_of(self._rows)
            mine = span % self._ranks.world == self._ranks.rank
            count = min(shard_end - self._rows, end - taken)
            if mine:
                for key, buffer in self._buffers.items():
                    buffer[self._filled : self._filled + count].copy_(parts[key][taken : taken + count])
                self._filled += count
            taken += count
            self._rows += count
            if mine and self._rows == shard_end:
                self._submit(pool)
                if self._rows == self._spans.end_of_span(span):
                    self._commit(pool, ended=False)

    def _submit(self, pool: ThreadPoolExecutor) -> None:
        """Has the buffer written, as the shard that ends with the last row taken."""
        self._wait()
        part = {key: buffer[: self._filled] for key, buffer in self._buffers.items()}
        number = self._first_shard + self._spans.shard_of(self._rows - 1)
        self._pending.append(pool.submit(self._committer.write, number, part, self._cursor))
        self._buffers, self._spare = self._spare, self._buffers
        self._filled = 0

    def _commit(self, pool: ThreadPoolExecutor, *, ended: bool) -> None:
        self._pending.append(pool.submit(self._committer.commit, self._wanted, ended=ended))
        self._turns += 1

    def _wait(self) -> None:
        """Until the shard before is on the disk; raises what went wrong with it."""
        pending, self._pending = self._pending, []
        with self._ranks.busy("writing a shard"):
            for future in pending:
                future.result()

    def _new_buffers(self) -> dict[str, Tensor]:
        return empty_fields(shard_fields(self._widths, self._dtype, self._shard_rows))


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
        "versions": _versions(),
        "writer": "",
        "cursor": dataclasses.asdict(Cursor()),
        "shard_rows": max(1, shard_bytes // row_bytes),
        "shards": {},
        "statistics": {},
        "quantisation": {},
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


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
