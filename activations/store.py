"""An activation store: harvested rows on disk, in plain safetensors shards under one manifest.

NAME/
  manifest.json            what the rows are, mean and scale of each site, a checksum for each shard, and
                           where the harvest goes on; replaced after each shard
  shard-00000.safetensors  each site's rows [row, d_in]; document, position and token, int32 [row]
  ...

Rows are numbered from 0 in the order of the harvest. Within a shard they lie in a hashed order, so that
whoever reads the start of a shard gets many documents. A shard that the manifest does not list is not there.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from activations.blocks import Cursor
from activations.harvest import RowBatch, RowMap
from activations.order import permutation
from activations.places import Place
from activations.quantise import Quantiser
from activations.ring import RowStatistics
from activations.shards import MAP, empty_fields, read_shard, scale_name, shard_fields, torn
from sae.errors import UserError

FORMAT, VERSION = "jumpscope-activations", 2
MANIFEST = "manifest.json"
Order = Literal["harvested", "stored"]
_READ_ROWS = 2048
_HASH_BYTES = 8 * 2**20


def open_store(url: Path | str, *, check_sizes: bool = True) -> "Store":
    """Opens a store at a path or URL, reading its manifest alone, and compares the shards' sizes.

    Without `check_sizes` it opens with shards missing or cut short, so that `verify` can name them all.
    Raises UserError for what is missing, torn or newer.
    """
    place = Place(url)
    try:
        content = place.read(MANIFEST)
    except OSError as error:
        raise UserError(
            f"a store is a folder with a {MANIFEST}",
            f"none in {place} ({error.strerror or type(error).__name__})",
            "check the path, or harvest it",
        ) from error
    manifest = _checked_manifest(place, content)
    if check_sizes:
        for name, found in _wrong_sizes(place, manifest).items():
            raise torn(place.of(name), found)
    return Store(place, manifest)


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is written: with its own checksum, a line for each of its keys."""
    whole = {**manifest, "checksum": _checksum(manifest)}
    lines = (
        f"{json.dumps(key)}: {json.dumps(value, allow_nan=False, ensure_ascii=False)}"
        for key, value in whole.items()
    )
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


class Store:
    """A store on disk: its manifest, and its rows as often as they are asked for.

    `dtype` is that of the rows that are read; `complete` is False while a harvest is still to go on.
    """

    def __init__(self, place: Place, manifest: dict[str, Any]) -> None:
        self.place, self.manifest = place, manifest
        self.widths: dict[str, int] = dict(manifest["widths"])
        self.sites: tuple[str, ...] = tuple(self.widths)
        self.rows: int = manifest["rows"]
        self.complete: bool = manifest["complete"]
        self.dtype: torch.dtype = getattr(torch, manifest["rows_dtype"])
        self._dtype_on_disk: torch.dtype = getattr(torch, manifest["dtype"])

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(entry["bytes"] for entry in self.manifest["shards"].values())

    @property
    def statistics(self) -> dict[str, RowStatistics]:
        """Mean and scale of each site over all rows as they were harvested, before any rounding."""
        return {
            site: RowStatistics(
                mean=torch.tensor(entry["mean"], dtype=torch.float64).float(),
                scale=entry["scale"],
                n=self.rows,
            )
            for site, entry in self.manifest["statistics"].items()
        }

    def iter_rows(
        self, sites: Sequence[str] | None = None, start: int = 0, order: Order = "harvested"
    ) -> Iterator[RowBatch]:
        """The rows from number `start` on, some thousands at a time, each batch with its first row's number.

        "harvested" is the order in which the model gave them, "stored" the hashed order within each shard,
        which spares a gather. Only the bytes of `sites` are read, a shard ahead, in a thread that ends with
        the iterator. Memory: those sites of two shards, and a batch. Raises UserError naming an unknown
        site, or a shard that is torn or gone.
        """
        wanted = self.sites if sites is None else tuple(sites)
        if unknown := [site for site in wanted if site not in self.widths]:
            raise UserError(
                "the store must hold the site",
                f"no {unknown[0]} in {self.place}, which holds {', '.join(self.sites)}",
                "choose among these, or harvest again",
            )
        if not 0 <= start <= self.rows:
            raise UserError(f"reading must start at row 0 to {self.rows}", str(start), "check the number")
        return self._iter_rows({site: self.widths[site] for site in wanted}, start, order)

    def _iter_rows(self, widths: Mapping[str, int], start: int, order: Order) -> Iterator[RowBatch]:
        shards = list(self.manifest["shards"].items())
        first_rows = list(itertools.accumulate((entry["rows"] for _, entry in shards), initial=0))
        todo = [number for number, first in enumerate(first_rows[1:]) if first > start]
        if not todo:
            return
        most = max(shards[number][1]["rows"] for number in todo)
        # two sets, each read into again and again: fresh memory for every shard costs as much as reading it
        buffers = [empty_fields(shard_fields(widths, self._dtype_on_disk, most)) for _ in todo[:2]]

        def fill(turn: int) -> dict[str, Tensor]:
            name, entry = shards[todo[turn]]
            rows = entry["rows"]
            fields = shard_fields(widths, self._dtype_on_disk, rows)
            parts = {key: buffer[:rows] for key, buffer in buffers[turn % 2].items()}
            read_shard(
                self.place, name, entry["bytes"], {key: (fields[key], part) for key, part in parts.items()}
            )
            return parts

        pool = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        try:
            ahead = pool.submit(fill, 0)
            for turn, number in enumerate(todo):
                parts = ahead.result()
                if turn + 1 < len(todo):
                    ahead = pool.submit(fill, turn + 1)
                first = first_rows[number]
                yield from self._batches(widths, parts, number, first, max(0, start - first), order)
        finally:
            pool.shutdown(cancel_futures=True)

    def _batches(
        self,
        widths: Mapping[str, int],
        parts: Mapping[str, Tensor],
        number: int,
        first: int,
        skip: int,
        order: Order,
    ) -> Iterator[RowBatch]:
        """The rows of one shard from its row `skip` on; copies, since the buffers are read into again."""
        rows = len(parts[MAP[0]])
        index = torch.arange(rows)
        if order == "harvested":
            # row i of the file is row permutation[i] of the harvest
            index[torch.from_numpy(permutation(rows, self.manifest["seed"], number))] = torch.arange(rows)
        quantisers = self._quantisers(widths)
        for begin in range(skip, rows, _READ_ROWS):
            chosen = index[begin : begin + _READ_ROWS]
            batch = empty_fields(shard_fields(widths, self._dtype_on_disk, len(chosen)))
            for key, buffer in batch.items():
                torch.index_select(parts[key], 0, chosen, out=buffer)
            decoded = {
                site: quantiser.decode(batch[site], batch[scale_name(site)]).to(self.dtype)
                for site, quantiser in quantisers.items()
            }
            yield RowBatch(
                rows={site: decoded.get(site, batch[site]) for site in widths},
                map=RowMap(*(batch[key] for key in MAP)),
                begin=Cursor(kept=first + begin),
            )

    def _quantisers(self, sites: Mapping[str, int]) -> dict[str, Quantiser]:
        found = self.manifest["quantisation"]
        return {
            site: Quantiser(mean=torch.tensor(found[site]["mean"]), col=torch.tensor(found[site]["col"]))
            for site in sites
            if site in found
        }

    def verify(self, on_bytes: Callable[[int], object] | None = None) -> dict[str, str]:
        """Reads every byte; for each shard that is missing or differs from what was written, what is wrong.

        `on_bytes` is told the bytes done so far, of `bytes`.
        """
        problems = _wrong_sizes(self.place, self.manifest)
        buffer = memoryview(bytearray(_HASH_BYTES))
        done = 0
        for name, entry in self.manifest["shards"].items():
            if name not in problems:
                digest, offset = hashlib.sha256(), 0
                try:
                    with self.place.reading(name) as read_at:
                        while count := read_at(offset, buffer[: entry["bytes"] - offset]):
                            digest.update(buffer[:count])
                            offset += count
                            if on_bytes is not None:
                                on_bytes(done + offset)
                except OSError as error:
                    problems[name] = error.strerror or str(error)
                    continue
                if digest.hexdigest() != entry["sha256"]:
                    problems[name] = f"checksum {digest.hexdigest()[:12]} instead of {entry['sha256'][:12]}"
            done += entry["bytes"]
            if on_bytes is not None:
                on_bytes(done)
        return problems


def _checked_manifest(place: Place, content: bytes) -> dict[str, Any]:
    path = place.of(MANIFEST)
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise UserError(
            f"{path} must hold JSON", str(error), "restore the file from a copy, or harvest again"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} must describe a store", "something else", "check the path")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"this program reads stores of version {VERSION}",
            f"version {manifest.get('version')} in {place}",
            "update jumpscope, or harvest again",
        )
    if manifest.pop("checksum", None) != _checksum(manifest):
        raise torn(path, "its own checksum is another one")
    return manifest


def _wrong_sizes(place: Place, manifest: Mapping[str, Any]) -> dict[str, str]:
    sizes = place.sizes()
    wrong = {}
    for name, entry in manifest["shards"].items():
        if name not in sizes:
            wrong[name] = "no such file"
        elif sizes[name] != entry["bytes"]:
            wrong[name] = f"{sizes[name]} bytes instead of {entry['bytes']} bytes"
    return wrong


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
