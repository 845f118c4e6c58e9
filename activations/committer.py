"""What a harvest leaves on the disk: shards, by every rank, and by the first one their manifest."""

import dataclasses
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from activations.blocks import Cursor
from activations.order import permutation
from activations.places import Place
from activations.quantise import Quantiser
from activations.ranks import Ranks
from activations.ring import CHUNK_ROWS, ChunkStatistics, RunningStatistics, chunk_statistics
from activations.shards import MAP, scale_name, shard_fields, write_shard
from activations.store import MANIFEST, manifest_bytes, open_store
from sae.errors import UserError

LOCK = ".lock"
OURS = re.compile(r"shard-\d{5,}\.safetensors|\.lock|\..+\.tmp")
"""Names of files that a harvest makes beside the manifest."""
_CHUNK_ROWS = 4096
# a file system behind a network may show another machine's file that much later
_SEEN_SECONDS = 10.0


class Committer:
    """Writes this rank's shards and, with the other ranks, the manifest after each turn; used by one thread.

    Every rank has the manifest as it was at the start. The first one carries the statistics on, taking in
    what each rank found of its rows in their order, so that no bit depends on the number of ranks.
    """

    def __init__(self, place: Place, manifest: dict[str, Any], ranks: Ranks) -> None:
        self._place, self._ranks = place, ranks
        self._manifest = dict(manifest)
        self._widths: dict[str, int] = manifest["widths"]
        self._dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self._entries: dict[str, dict[str, Any]] = {}
        """Shards that were written and are not listed yet."""
        self._found: list[Mapping[str, ChunkStatistics]] = []
        """What is known of their rows: of each chunk, by site."""
        self._running = {
            site: RunningStatistics.from_state(found["mean"], found["spread"], manifest["rows"])
            for site, found in manifest["statistics"].items()
        } or {site: RunningStatistics(width) for site, width in self._widths.items()}
        self._quantisers = {
            site: Quantiser(mean=torch.tensor(found["mean"]), col=torch.tensor(found["col"]))
            for site, found in manifest["quantisation"].items()
        }

    @property
    def rows(self) -> int:
        """Rows that the manifest lists."""
        return self._manifest["rows"]

    def claim(self) -> None:
        """Makes this harvest the store's writer, and removes what an earlier one left unlisted."""
        for name in self._place.sizes():
            if OURS.fullmatch(name) and name != LOCK and name not in self._manifest["shards"]:
                self._place.remove(name)
        self._manifest |= {"writer": secrets.token_hex(8), "complete": False}
        self._place.replace(MANIFEST, manifest_bytes(self._manifest))

    def follow(self, ranks: Ranks) -> None:
        """Tells every rank that the first one has claimed the store; `ranks` is the calling thread's channel.

        Raises UserError on a rank that does not reach the same files.
        """
        self._manifest["writer"] = ranks.share("the store to be claimed", self._manifest["writer"])[0]
        until = time.monotonic() + _SEEN_SECONDS
        while (owner := self._owner()) != self._manifest["writer"]:
            if time.monotonic() > until:
                raise UserError(
                    "every rank must reach the same store",
                    f"rank {ranks.rank} finds another one at {self._place} (writer {owner})",
                    "give an --out that all machines share, a network file system or a URL",
                )
            ranks.beat()
            time.sleep(0.1)

    def write(self, number: int, rows: Mapping[str, Tensor], cursor: Cursor) -> None:
        """Writes a shard; the manifest lists it once all ranks have committed the turn."""
        count = len(rows[MAP[0]])
        by_site = {site: list(chunk_statistics(rows[site])) for site in self._widths}
        self._found += [
            {site: chunks[i] for site, chunks in by_site.items()} for i in range(-(-count // CHUNK_ROWS))
        ]
        self._make_quantisers(rows if number == 0 else None)
        order = torch.from_numpy(permutation(count, self._manifest["seed"], number))
        fields = shard_fields(self._widths, self._dtype, count)
        name = f"shard-{number:05d}.safetensors"
        self._check_owner()
        entry = self._place.write(
            name, lambda append: write_shard(append, fields, lambda field: self._parts(rows, order, field))
        )
        self._entries[name] = {"rows": count, **entry, "cursor": dataclasses.asdict(cursor)}

    def commit(self, wanted: int, *, ended: bool) -> None:
        """Lists what all ranks have written since the last time, in the order of the ranks.

        `ended` says that there are no rows behind it. Every rank must call it as often.
        """
        self._make_quantisers(None)
        entries = self._ranks.share("the shards of a turn", self._entries)
        parts = [_packed(self._found, self._widths), *[torch.empty(0)] * (self._ranks.world - 1)]
        statistics = self._ranks.swap(parts)
        self._entries, self._found = {}, []
        if not self._ranks.first:
            return
        for written, packed in zip(entries, statistics, strict=True):
            for chunk in _unpacked(packed, [entry["rows"] for entry in written.values()], self._widths):
                for site, running in self._running.items():
                    running.take(chunk[site])
            for name, entry in written.items():
                self._manifest["cursor"] = entry.pop("cursor")
                self._manifest["shards"] = {**self._manifest["shards"], name: entry}
                self._manifest["rows"] += entry["rows"]
        self._replace_manifest(complete=ended or self.rows == wanted, ended=ended)

    def finish(self, *, ended: bool) -> None:
        """Says that the harvest is complete, if the last commit did not."""
        if self._ranks.first and not self._manifest["complete"]:
            self._replace_manifest(complete=True, ended=ended)

    def _make_quantisers(self, rows: Mapping[str, Tensor] | None) -> None:
        """From the first shard's rows, which the first rank has; the others are sent them."""
        if self._dtype != torch.int8 or self._quantisers:
            return
        made = {site: Quantiser.fit(rows[site]) for site in self._widths} if rows is not None else {}
        whole = [torch.stack([made[site].mean, made[site].col], 1) for site in made] or [torch.empty(0, 2)]
        received = self._ranks.swap([torch.cat(whole)] * self._ranks.world)[0].view(torch.float32).view(-1, 2)
        for site, part in zip(self._widths, received.split(list(self._widths.values())), strict=True):
            self._quantisers[site] = Quantiser(mean=part[:, 0].contiguous(), col=part[:, 1].contiguous())

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

    def _owner(self) -> str:
        try:
            return open_store(self._place.url, check_sizes=False).manifest["writer"]
        except UserError as error:
            return f"none ({error.found})"

    def _check_owner(self) -> None:
        # the lock keeps out other processes of this machine; this, whoever else reaches the folder
        if (owner := self._owner()) != self._manifest["writer"]:
            raise UserError(
                f"one harvest at a time writes {self._place}",
                f"another one took it over, or its manifest is gone (writer {owner})",
                "let the other one finish, or run this again once it has ended",
            )


def _packed(found: list[Mapping[str, ChunkStatistics]], widths: Mapping[str, int]) -> Tensor:
    """Means, then spreads, of some chunks, as bytes."""
    means = [chunk[site].mean for chunk in found for site in widths]
    spreads = torch.tensor([chunk[site].spread for chunk in found for site in widths], dtype=torch.float64)
    return torch.cat([spreads.view(torch.uint8), *(mean.view(torch.uint8) for mean in means)])


def _unpacked(
    packed: Tensor, rows: list[int], widths: Mapping[str, int]
) -> Iterator[dict[str, ChunkStatistics]]:
    """The inverse of `_packed`, for shards of so many rows."""
    counts = [min(CHUNK_ROWS, n - begin) for n in rows for begin in range(0, n, CHUNK_ROWS)]
    many = 8 * len(counts) * len(widths)
    spreads = iter(packed[:many].view(torch.float64).tolist())
    means = iter(packed[many:].view(torch.float32).split(list(widths.values()) * len(counts)))
    for n in counts:
        yield {site: ChunkStatistics(next(means), next(spreads), n) for site in widths}


def _converted(site: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    converted = rows.to(dtype)
    if dtype == torch.float16 and not converted.isfinite().all():
        raise UserError(
            f"activations kept as float16 must stay within {torch.finfo(dtype).max:,.0f}",
            f"{float(rows.abs().max()):,.0f} at {site}",
            "harvest into another --out with --store-dtype bfloat16 or int8",
        )
    return converted
