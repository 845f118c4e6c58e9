"""Rows for the ranks that own their sites: each rank runs the model on its own batches, then all trade.

Model batches are numbered in the order of their stream, which is the same on every rank. A round is as many
of them as there are ranks: rank r runs the model on the r-th, and hands each site's rows to the site's owner.
The owner puts a round's rows in the order of their batches, so it sees what one rank alone would have made:
the same row batches, with fewer sites in them. Rows cross as bytes.
"""

import itertools
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.harvest import Activates, RowBatch, RowMap, harvest_rows
from sae.errors import UserError

# a part's first bytes say what it is; parts are whole multiples, so that rows stay aligned wherever one lies
_HEAD = 16
_ROWS, _STOP, _REFUSED = 0, 1, 2
# seconds between two signs of life while rows are waited for
_POLL = 0.2


@runtime_checkable
class Swaps(Protocol):
    """What the exchange needs of the ranks: a channel that nothing else uses meanwhile."""

    rank: int
    world: int

    def swap(self, parts: Sequence[Tensor]) -> list[Tensor]: ...


class RefusedByAll(UserError):
    """What one rank's part of the model gave, refused by all ranks behind the same row."""


@dataclass
class Spent:
    """Seconds by kind of work, since someone last looked, and whether there is work at all."""

    seconds: dict[str, float] = field(default_factory=dict)
    turns: int = 0
    """Pieces of work counted in all."""
    waiting: bool = False
    """Whether the thread that harvests waits for other ranks."""

    def add(self, kind: str, since: float) -> float:
        """Counts the time since `since` as `kind`; returns the time now. A kind belongs to one thread."""
        now = time.perf_counter()
        self.seconds[kind] = self.seconds.get(kind, 0.0) + now - since
        self.turns += 1
        return now

    def take(self) -> dict[str, float]:
        """What was counted, which starts again from zero."""
        taken, self.seconds = self.seconds, {}
        return taken


def owners(costs: Mapping[str, float], world: int) -> dict[str, int]:
    """The rank that owns each site: the costliest first, each onto the rank that has least to do.

    Depends on the costs, their order and the number of ranks alone. Ranks may be left without a site.
    """
    load = [0.0] * world
    found = {}
    for site in sorted(costs, key=lambda site: -costs[site]):
        found[site] = min(range(world), key=load.__getitem__)
        load[found[site]] += costs[site]
    return {site: found[site] for site in costs}


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """Who owns which site, and what its rows are: the same on every rank."""

    owner: Mapping[str, int]
    widths: Mapping[str, int]
    """Sites, in the order of the harvest, and their d_in."""
    dtype: torch.dtype

    def sites(self, rank: int) -> dict[str, int]:
        """A rank's sites and their widths, in the order of the harvest."""
        return {site: width for site, width in self.widths.items() if self.owner[site] == rank}

    def part_bytes(self, rank: int, rows: int) -> int:
        """Bytes of a part with so many rows for that rank."""
        size = rows * sum(self.sites(rank).values()) * self.dtype.itemsize
        return _HEAD + math.ceil(size / _HEAD) * _HEAD


def exchange_bytes(
    owned: Ownership, rank: int, *, world: int, model_batch: int, context: int, ahead: int
) -> int:
    """Most bytes that the exchange takes on a rank beside its forward pass, `ahead` rows in store included.

    A round's rows of all sites on their way out and of the rank's own on their way in, each twice: as they
    are and as the process group has them.
    """
    rows = model_batch * context
    leaving = sum(owned.part_bytes(owner, rows) for owner in range(world))
    coming = world * owned.part_bytes(rank, rows)
    return 2 * (leaving + coming) + owned.part_bytes(rank, ahead)


def exchanged_rows(
    ranks: Swaps,
    model: Activates,
    blocks: Iterable[TokenBlocks],
    owned: Ownership,
    *,
    stopped: Callable[[], bool] = lambda: False,
    spent: Spent | None = None,
) -> Iterator[RowBatch]:
    """The rows of this rank's sites from every batch of blocks, as `harvest_rows` on one rank gives them.

    Every rank must give the same blocks and take as many of the rows; a rank without a site gets batches
    without rows, which have their map. When `stopped` says so on any rank, the rows end after the same batch
    on all. Raises UserError on every rank, naming site and rank, when an activation is not finite on one.
    """
    spent = spent or Spent()
    batches = iter(blocks)
    # those that keep nothing are passed over by all alike
    while group := list(itertools.islice(batches, ranks.world)):
        now = time.perf_counter()
        mine = group[ranks.rank : ranks.rank + 1]
        if stopped():
            parts = [_word(_STOP, b"", model.device)] * ranks.world
        else:
            parts = _parts_or_refusal(ranks, model, mine, owned)
        now = spent.add("model", now)
        spent.waiting = True
        received = ranks.swap(parts)
        spent.waiting = False
        spent.add("exchange", now)
        del parts
        if not _all_rows(received):
            return
        own = owned.sites(ranks.rank)
        for number, block in enumerate(group):
            kept = block.keep.flatten().nonzero().squeeze(1)
            if len(kept):
                yield RowBatch(
                    rows=_unpacked(received[number], len(kept), own, owned.dtype),
                    map=RowMap(
                        *(part.flatten()[kept] for part in (block.document, block.position, block.tokens))
                    ),
                    begin=block.begin,
                )


def _parts(
    model: Activates, blocks: Sequence[TokenBlocks], owned: Ownership, world: int
) -> list[UInt8[Tensor, " _"]]:
    """A part for each rank: the rows of its sites, one site after another, from the batch of this rank."""
    parts = [torch.zeros(_HEAD, dtype=torch.uint8, device=model.device) for _ in range(world)]
    for batch in harvest_rows(model, blocks, list(owned.widths)):
        for owner in range(world):
            # what pads a part is never read
            part = torch.empty(owned.part_bytes(owner, len(batch)), dtype=torch.uint8, device=model.device)
            part[:_HEAD] = _ROWS
            into = _unpacked(part, len(batch), owned.sites(owner), owned.dtype)
            for site, rows in into.items():
                rows.copy_(batch.rows[site])
            parts[owner] = part
    return parts


def _unpacked(
    part: UInt8[Tensor, " byte"], rows: int, sites: Mapping[str, int], dtype: torch.dtype
) -> dict[str, Float[Tensor, "row _"]]:
    """The rows of each site in a part, in its own memory."""
    body = part[_HEAD : _HEAD + rows * sum(sites.values()) * dtype.itemsize].view(dtype)
    pieces = body.split([rows * width for width in sites.values()]) if sites else ()
    return {site: piece.view(rows, width) for (site, width), piece in zip(sites.items(), pieces, strict=True)}


def _parts_or_refusal(
    ranks: Swaps, model: Activates, blocks: Sequence[TokenBlocks], owned: Ownership
) -> list[UInt8[Tensor, " _"]]:
    """The parts, or in their place what this rank refuses, told to every rank."""
    try:
        return _parts(model, blocks, owned, ranks.world)
    except UserError as error:
        told = [error.must, f"{error.found.rstrip('.')}, on rank {ranks.rank}", error.do]
        return [_word(_REFUSED, json.dumps(told).encode(), model.device)] * ranks.world


def _word(kind: int, text: bytes, device: torch.device) -> UInt8[Tensor, " byte"]:
    padded = text.ljust(math.ceil(len(text) / _HEAD) * _HEAD)
    return torch.tensor([kind] * _HEAD + list(padded), dtype=torch.uint8, device=device)


def _all_rows(received: Sequence[UInt8[Tensor, " _"]]) -> bool:
    """Whether every rank sent rows; False when one stops. Raises what the lowest rank that refused says."""
    kinds = torch.stack([part[0] for part in received]).tolist()  # device sync
    for part, kind in zip(received, kinds, strict=True):
        if kind == _REFUSED:
            raise RefusedByAll(*json.loads(bytes(part[_HEAD:].tolist())))
    return _STOP not in kinds


class Ahead(Iterator[RowBatch]):
    """Row batches that a thread makes ahead of who takes them: at most `rows` of them, and a round, in store.

    `make` is given a question, whether to stop, and is iterated in the thread alone. Whoever waits for rows
    calls `beat` meanwhile, which may raise, and tells it whether the thread is getting on, or waits for other
    ranks. Raises what `make` raised, behind the batches before it.
    """

    def __init__(
        self,
        make: Callable[[Callable[[], bool]], Iterator[RowBatch]],
        rows: int,
        *,
        beat: Callable[[bool], object] = lambda moving: None,
        spent: Spent | None = None,
    ) -> None:
        self._most, self._tell, self._spent = rows, beat, spent or Spent()
        self._turns = 0
        self._ready: deque[RowBatch] = deque()
        self._rows = 0
        self._changed = threading.Condition()
        self._stopped = self._ended = False
        self._failure: BaseException | None = None
        threads = torch.get_num_threads()
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def work() -> None:
            # both are a thread's own: a new one would take the number that was wished for last, by whomever,
            # on which rows must not depend, and the first GPU
            torch.get_num_threads()
            torch.set_num_threads(threads)
            if gpu is not None:
                torch.cuda.set_device(gpu)
            try:
                for batch in make(lambda: self._stopped):
                    self._put(batch)
            except BaseException as error:
                self._failure = error
            with self._changed:
                self._ended = True
                self._changed.notify_all()

        self._thread = threading.Thread(target=work, name="jumpscope-harvest", daemon=True)
        self._thread.start()

    def __next__(self) -> RowBatch:
        now = time.perf_counter()
        with self._changed:
            while not self._ready and not self._ended:
                self._changed.wait(_POLL)
                self._beat()
            self._spent.add("wait", now)
            if not self._ready:
                if self._failure is not None:
                    raise self._failure
                raise StopIteration
            batch = self._ready.popleft()
            self._rows -= len(batch)
            self._changed.notify_all()
            return batch

    def check(self) -> None:
        """Raises what this rank alone failed with, before its rows are used up."""
        if self._failure is not None and not isinstance(self._failure, RefusedByAll):
            raise self._failure

    def close(self) -> None:
        """Stops the thread with its next round, for which every rank must close; waits for it."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        while self._thread.is_alive():
            self._thread.join(_POLL)
            self._beat()

    def _beat(self) -> None:
        moving = self._spent.waiting or self._spent.turns != self._turns
        self._turns = self._spent.turns
        self._tell(moving)

    def _put(self, batch: RowBatch) -> None:
        with self._changed:
            while self._rows >= self._most and not self._stopped:
                self._changed.wait()
            if not self._stopped:
                self._ready.append(batch)
                self._rows += len(batch)
                self._changed.notify_all()
