"""An activation store: harvested rows on disk, in plain safetensors shards under one manifest.

NAME/
  manifest.json            written last: what the rows are, and a checksum for each other file
  statistics.safetensors   the mean row of each site, float32 [d_in]
  shard-00000.safetensors  each site's rows [row, d_in]; document, position and token, int32 [row]
  ...
"""

import importlib.metadata
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from activations.blocks import Cursor
from activations.harvest import RowBatch, RowMap
from activations.ring import RowStatistics, RunningStatistics
from sae.errors import UserError
from sae.files import disk_errors, load_tensors, make_folder, read_json, save_tensors, sha256_file, write_json

FORMAT, VERSION = "jumpscope-activations", 1
MANIFEST, STATISTICS = "manifest.json", "statistics.safetensors"
SHARD_BYTES = 256 * 2**20
_MAP = ("document", "position", "token")
_READ_ROWS = 8192
_PACKAGES = ("torch", "transformers", "transformer-lens", "safetensors")


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """What the rows of a store are; kept in its manifest, so that nobody trains on what they did not mean."""

    model: str
    tokenizer_hash: str
    corpus: str
    split: str
    context: int
    seed: int


def check_new(folder: Path | str) -> None:
    """Raises UserError unless a store can be written at `folder`: it must not exist, or be empty."""
    folder = Path(folder).absolute()
    if (folder / MANIFEST).exists():
        raise UserError(
            "a new store needs a folder of its own",
            f"a store in {folder}",
            "give another --out, or delete it",
        )
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError("a new store needs an empty folder", f"other files at {folder}", "give another --out")
    if _partial(folder).exists():
        raise UserError(
            "a store is written under a temporary name that must be free",
            f"{_partial(folder)}, of a harvest that was cut off or is still running",
            "delete that folder, or wait for the other harvest",
        )


def write_store(
    folder: Path | str,
    source: Iterable[RowBatch],
    facts: StoreFacts,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_rows: Callable[[int], None] | None = None,
) -> "Store":
    """Writes all rows of `source`, in their order, and opens the store.

    It grows in FOLDER.partial and gets its name once it is whole; on any failure, Ctrl-C too, what was
    written is removed. Memory: two shards of at most `shard_bytes`. `on_rows` is told the rows so far.
    Raises UserError when the folder is taken, the disk refuses, or the source is empty.
    """
    folder = Path(folder).absolute()  # "." has no name to add to
    check_new(folder)
    partial = _partial(folder)
    make_folder(folder.parent)
    with disk_errors(partial):
        partial.mkdir()
    try:
        writer = _Writer(partial, shard_bytes)
        for batch in source:
            writer.add(batch)
            if on_rows is not None:
                on_rows(writer.rows)
        writer.finish(facts)
        with disk_errors(folder):
            if folder.is_dir():
                folder.rmdir()
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_store(folder)


def open_store(folder: Path | str) -> "Store":
    """Opens a store, reading its manifest alone. Raises UserError for what is missing, torn or newer."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"a store is a folder with a {MANIFEST}, which is written last",
            f"none in {folder}",
            "check the path, or harvest again",
        )
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder / MANIFEST} must describe a store", "something else", "check the path")
    if manifest["version"] != VERSION:
        raise UserError(
            f"this program reads stores of version {VERSION}",
            f"version {manifest['version']} in {folder}",
            "update jumpscope, or harvest again",
        )
    for name, entry in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != entry["bytes"]:
            found = "no such file" if size is None else f"{size} bytes"
            raise _torn(folder / name, f"{found} instead of {entry['bytes']} bytes")
    return Store(folder, manifest)


class Store:
    """A store on disk: its manifest, and its rows as often as they are asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.sites: tuple[str, ...] = tuple(manifest["sites"])
        self.widths: dict[str, int] = dict(manifest["widths"])
        self.rows: int = manifest["rows"]
        self.dtype: torch.dtype = getattr(torch, manifest["dtype"])

    @property
    def statistics(self) -> dict[str, RowStatistics]:
        """Mean and scale of each site over all rows of the store."""
        means = load_tensors(self.folder / STATISTICS)
        scales = self.manifest["scale"]
        return {site: RowStatistics(mean=means[site], scale=scales[site], n=self.rows) for site in self.sites}

    def iter_rows(self, sites: Sequence[str] | None = None, start: int = 0) -> Iterator[RowBatch]:
        """The rows from number `start` on, 8,192 at a time, read from mapped files: a source for a ring.

        `sites` leaves out the others. Raises UserError naming an unknown site or a torn shard.
        """
        wanted = self.sites if sites is None else tuple(sites)
        if unknown := [site for site in wanted if site not in self.widths]:
            raise UserError(
                "the store must hold the site",
                f"no {unknown[0]} in {self.folder}, which holds {', '.join(self.sites)}",
                "choose among these, or harvest again",
            )
        return self._iter_rows(wanted, start)

    def _iter_rows(self, sites: Sequence[str], first: int) -> Iterator[RowBatch]:
        shard = 0
        for name, entry in self.manifest["files"].items():
            if "rows" not in entry:
                continue
            try:
                with safe_open(self.folder / name, framework="pt") as file:
                    parts = {key: file.get_slice(key) for key in (*sites, *_MAP)}
                    for start in range(max(0, first - shard), entry["rows"], _READ_ROWS):
                        span = slice(start, min(start + _READ_ROWS, entry["rows"]))
                        yield RowBatch(
                            rows={site: parts[site][span] for site in sites},
                            map=RowMap(*(parts[key][span] for key in _MAP)),
                            begin=Cursor(kept=shard + start),
                        )
                shard += entry["rows"]
            except (SafetensorError, OSError) as error:
                raise _torn(self.folder / name, str(error)) from error

    def verify(self) -> None:
        """Reads every file and compares checksums. Raises UserError naming the first that differs."""
        for name, entry in self.manifest["files"].items():
            if (digest := sha256_file(self.folder / name)) != entry["sha256"]:
                raise _torn(self.folder / name, f"checksum {digest[:12]} instead of {entry['sha256'][:12]}")


class _Writer:
    """Fills one preallocated shard after another, and keeps the running statistics."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.rows = 0
        self.shard_rows = 0
        self.filled = 0
        self.buffers: dict[str, Tensor] = {}
        self.statistics: dict[str, RunningStatistics] = {}
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, batch: RowBatch) -> None:
        if not self.buffers:
            self._allocate(batch)
        for site, rows in batch.rows.items():
            self.statistics[site].update(rows)
        parts = {**batch.rows, **{key: getattr(batch.map, key) for key in _MAP}}
        taken = 0
        while taken < len(batch):
            count = min(self.shard_rows - self.filled, len(batch) - taken)
            for key, rows in parts.items():
                self.buffers[key][self.filled : self.filled + count].copy_(rows[taken : taken + count])
            taken += count
            self.filled += count
            self.rows += count
            if self.filled == self.shard_rows:
                self._flush()

    def finish(self, facts: StoreFacts) -> None:
        if not self.rows:
            raise UserError(
                "a store must hold rows", "no tokens to harvest", "give more --tokens or another corpus"
            )
        if self.filled:
            self._flush()
        found = {site: running.result() for site, running in self.statistics.items()}
        save_tensors(self.folder / STATISTICS, {site: part.mean for site, part in found.items()})
        self._record(STATISTICS)
        sites = {site: self.buffers[site] for site in found}
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(facts),
            "sites": list(sites),
            "widths": {site: buffer.shape[1] for site, buffer in sites.items()},
            "dtype": str(next(iter(sites.values())).dtype).removeprefix("torch."),
            "rows": self.rows,
            "scale": {site: part.scale for site, part in found.items()},
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
            "files": self.files,
        }
        write_json(self.folder / MANIFEST, manifest)

    def _allocate(self, batch: RowBatch) -> None:
        row_bytes = sum(rows[:1].nbytes for rows in batch.rows.values()) + 4 * len(_MAP)
        self.shard_rows = max(1, self.shard_bytes // row_bytes)
        for site, rows in batch.rows.items():
            self.buffers[site] = torch.empty(self.shard_rows, rows.shape[1], dtype=rows.dtype)
            self.statistics[site] = RunningStatistics(rows.shape[1])
        for key in _MAP:
            self.buffers[key] = torch.empty(self.shard_rows, dtype=torch.int32)

    def _flush(self) -> None:
        name = f"shard-{len(self.files):05d}.safetensors"
        save_tensors(self.folder / name, {key: buffer[: self.filled] for key, buffer in self.buffers.items()})
        self._record(name, rows=self.filled)
        self.filled = 0

    def _record(self, name: str, **more: int) -> None:
        path = self.folder / name
        self.files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path), **more}


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _torn(path: Path, found: str) -> UserError:
    return UserError(f"{path} must be whole", found, "restore the file from a copy, or harvest again")
