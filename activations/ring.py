"""The shuffle ring: a bounded stock of rows, drawn from in batches, each row a fixed number of times."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from activations.blocks import Cursor
from activations.harvest import RowBatch, RowMap
from activations.order import permutation
from activations.positions import Generation, RingPosition
from sae.errors import UserError
from sae.numbers import format_size

_log = logging.getLogger(__name__)
_CHUNK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """Mean row and ``scale = sqrt(E ||x - mean||^2)`` of one site over `n` rows."""

    mean: Float[Tensor, " d_in"]
    scale: float
    n: int


class RunningStatistics:
    """Mean and spread of rows that pass by once: Chan's update, sums in float64 between chunks of rows."""

    def __init__(self, width: int) -> None:
        self._mean = torch.zeros(width, dtype=torch.float64)
        self._spread = 0.0
        self.n = 0

    def update(self, rows: Float[Tensor, "row d_in"]) -> None:
        """Takes in rows of any dtype on any device, a few thousand at a time."""
        for chunk in rows.split(_CHUNK_ROWS):
            exact = chunk.float()
            mean = exact.mean(0)
            spread = float((exact - mean).square().sum())
            n = len(chunk)
            gap = mean.double().cpu() - self._mean
            self._spread += spread + float(gap.square().sum()) * self.n * n / (self.n + n)
            self._mean += gap * (n / (self.n + n))
            self.n += n

    @classmethod
    def from_state(cls, mean: Sequence[float], spread: float, n: int) -> "RunningStatistics":
        """Goes on, to the bit, from what `state` gave."""
        made = cls(len(mean))
        made._mean, made._spread, made.n = torch.tensor(mean, dtype=torch.float64), spread, n
        return made

    def state(self) -> tuple[list[float], float]:
        """The mean, and the sum of squared distances to it, as plain floats."""
        return self._mean.tolist(), self._spread

    def result(self) -> RowStatistics:
        return RowStatistics(
            mean=self._mean.float(), scale=math.sqrt(self._spread / max(self.n, 1)), n=self.n
        )


def ring_rows(rows: int, *, batch: int, passes: int) -> int:
    """The rows a ring of about that size really holds: whole batches in each of its generations."""
    return rows // (passes * batch) * (passes * batch)


def ring_bytes(widths: Mapping[str, int], *, dtype: torch.dtype, rows: int, batch: int, passes: int) -> int:
    """Bytes that a ring takes for its rows."""
    return ring_rows(rows, batch=batch, passes=passes) * sum(widths.values()) * dtype.itemsize


def rows_for_memory(
    n_bytes: int, widths: Mapping[str, int], *, dtype: torch.dtype, batch: int, passes: int
) -> int:
    """The largest ring that fits into `n_bytes`. Raises UserError when one batch a pass does not."""
    row_bytes = sum(widths.values()) * dtype.itemsize
    rows = ring_rows(n_bytes // row_bytes, batch=batch, passes=passes)
    if not rows:
        raise UserError(
            f"the shuffle ring must hold {passes} passes x {batch} rows of {len(widths)} sites, "
            f"{format_size(passes * batch * row_bytes)}",
            f"{format_size(n_bytes)}",
            "give more --memory, fewer sites, a smaller --batch or fewer --passes",
        )
    return rows


class RingBatch(Mapping[str, Tensor]):
    """One batch, gathered site by site on demand: ``batch[site]`` is a fresh [batch, d_in] tensor.

    It reads the ring, so it is good until the ring is asked for its next batch.
    """

    def __init__(self, ring: "ShuffleRing", index: Int64[Tensor, " batch"]) -> None:
        self._ring, self._index, self._loaded = ring, index, ring.rows_harvested

    def __getitem__(self, site: str) -> Tensor:
        if self._ring.rows_harvested != self._loaded:
            raise RuntimeError("this batch was replaced in the ring: read it before asking for the next one")
        return self._ring._buffers[site].index_select(0, self._index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ring.widths)

    def __len__(self) -> int:
        return len(self._ring.widths)


class ShuffleRing:
    """Iterates batches {site: rows [batch, d_in]} drawn from a stock of at most `rows` rows a site.

    `source` gives the rows from a cursor on: ``source(Cursor())`` all of them, and ``source(b.begin)`` the
    batch `b` and those after it again.

    The stock is `passes` generations of equal size. Each round takes in a new generation in place of the
    oldest one and then serves every row present once, in an order that depends on (seed, round) alone. The
    first rounds have fewer generations, and after the source's last row the remaining ones are served out, so
    each row is served exactly `passes` times. The last ``rows_left_over`` servings, fewer than a batch, are
    dropped. All buffers are allocated at the start, in `dtype` on `device`: `bytes` of them.

    With one pass the stock is replaced as a whole, so a batch mixes only rows that were harvested together.
    `position` tells where the ring stands, and a ring made with ``resume=position`` serves the batches that
    would have come next, after harvesting again the rows of the stock that are still to be served.

    Can be iterated once. Raises UserError when the ring is too small, the source has less than a batch, or a
    resumed source is not the one that the position belongs to.
    """

    def __init__(
        self,
        source: Callable[[Cursor], Iterator[RowBatch]],
        widths: Mapping[str, int],
        *,
        dtype: torch.dtype,
        rows: int,
        batch: int,
        passes: int,
        seed: int,
        device: torch.device | str = "cpu",
        resume: RingPosition | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("passes", passes)):
            if value < 1:
                raise UserError(f"{name} must be at least 1", str(value), f"give a larger --{name}")
        self.rows = ring_rows(rows, batch=batch, passes=passes)
        if not self.rows:
            raise UserError(
                f"the ring must hold a batch for each pass, {passes} x {batch} = {passes * batch} rows",
                f"{rows} rows",
                "give more --memory, a smaller --batch or fewer --passes",
            )
        self._shape = (self.rows, batch, passes, seed)
        if resume is not None and resume.shape != self._shape:
            raise UserError(
                f"a ring goes on with the rows, batch, passes and seed it had: {resume.shape}",
                str(self._shape),
                "give the same --memory and --batch, --passes and --seed as before",
            )
        self.widths, self.batch, self.passes, self.seed = dict(widths), batch, passes, seed
        self.rows_harvested = self.rows_served = self.rows_left_over = 0
        self._generation_rows = self.rows // passes
        self._buffers = {
            site: torch.empty(self.rows, width, dtype=dtype, device=device) for site, width in widths.items()
        }
        self._device = torch.device(device)
        self._stream, self._latest = _Stream(source), Cursor()
        self._round = self._batches = 0
        self._generations: tuple[Generation, ...] = ()
        self._ended = False
        self._waiting = torch.empty(0, dtype=torch.int64)
        self._statistics: dict[str, RowStatistics] | None = None
        self._to_refill = resume is not None
        if resume is not None:
            self._stand_at(resume)

    @property
    def bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @property
    def statistics(self) -> dict[str, RowStatistics]:
        """Mean and scale of each site over the first generation; harvests it if that is still to do."""
        if not self._generations and not self._ended:
            self._take_in()
        if self._statistics is None:
            raise RuntimeError("the ring is empty, or was resumed behind its first generation")
        return self._statistics

    def first_rows(self, site: str, count: int) -> Float[Tensor, "row d_in"]:
        """Up to `count` rows of the first generation, evenly spaced, before it is replaced; a copy in the
        ring's dtype.
        """
        if self._statistics is None or self._next_number > 1:
            raise RuntimeError("first_rows is for the time between reading `statistics` and the second round")
        filled = self._generations[0].rows
        return self._buffers[site][:filled][:: max(1, filled // count)][:count].clone()

    def position(self) -> RingPosition:
        """Where the ring stands: behind the batch that it gave last."""
        return RingPosition(
            shape=self._shape,
            round=self._round,
            batches=self._batches,
            rows_served=self.rows_served,
            generations=self._generations,
            ended=self._ended,
            waiting=tuple(self._waiting.tolist()),
            latest=self._latest,
        )

    def __iter__(self) -> Iterator[RingBatch]:
        if self._to_refill:
            self._refill()
        while True:
            if self._next_number == self._round and not self._ended:
                self._take_in()
            present = self._present()
            if not len(present):
                break
            order = torch.from_numpy(permutation(len(present), self.seed, self._round))
            # generations are whole batches, so rows wait for the next round only once no more are taken in
            queue = torch.cat([self._waiting, present[order]]).to(self._device)
            whole = len(queue) // self.batch
            while self._batches < whole:
                start = self._batches * self.batch
                self._batches += 1
                self.rows_served += self.batch
                yield RingBatch(self, queue[start : start + self.batch])
            self._waiting = queue[whole * self.batch :].cpu()
            self._round, self._batches = self._round + 1, 0
        self.rows_left_over = len(self._waiting)
        if self.rows_left_over:
            _log.info(
                "%d of %d servings left over: less than a batch of %d",
                self.rows_left_over,
                self.rows_served + self.rows_left_over,
                self.batch,
            )

    @property
    def _next_number(self) -> int:
        return self._generations[-1].number + 1 if self._generations else 0

    def _take_in(self) -> None:
        """Adds the next generation from the source; it stays short, or is none, when the source ends."""
        made = self._fill(self._next_number, self._generation_rows)
        if made.rows:
            self._generations = (*self._generations, made)[-self.passes :]
            self._latest = self._stream.begin
            self.rows_harvested += made.rows
        self._ended = made.rows < self._generation_rows
        if made.number == 0:
            self._begin(made.rows)

    def _fill(self, number: int, wanted: int) -> Generation:
        """Copies the next rows of the source, up to `wanted`, to where that generation stands."""
        start = number % self.passes * self._generation_rows
        first, begin, filled = self._stream.row, None, 0
        tokens = hashlib.blake2b(digest_size=16)
        while filled < wanted and (part := self._stream.read(wanted - filled)) is not None:
            rows, taken, count = part
            begin = begin or self._stream.begin
            for site, buffer in self._buffers.items():
                chunk = rows.rows[site][taken : taken + count]
                buffer[start + filled : start + filled + count].copy_(chunk, non_blocking=True)
            _digest_tokens(tokens, rows.map, slice(taken, taken + count))
            filled += count
        values = {site: _digest_row(buffer[start]) for site, buffer in self._buffers.items() if filled}
        return Generation(number, begin or self._stream.begin, first, filled, tokens.hexdigest(), values)

    def _begin(self, n_rows: int) -> None:
        if n_rows < self.batch:
            raise UserError(
                f"there must be tokens for at least one batch of {self.batch} rows",
                f"{n_rows} rows in all",
                "give a smaller --batch, more --tokens or a longer corpus",
            )
        self._statistics = {}
        for site, buffer in self._buffers.items():
            # over the ring itself: the last bit does not depend on the sizes of the model's batches
            running = RunningStatistics(self.widths[site])
            running.update(buffer[:n_rows])
            self._statistics[site] = running.result()

    def _stand_at(self, position: RingPosition) -> None:
        self._round, self._batches = position.round, position.batches
        self.rows_served, self._ended = position.rows_served, position.ended
        self._generations = position.generations
        self._waiting = torch.tensor(position.waiting, dtype=torch.int64)
        self._latest = position.latest
        if self._generations:
            last = self._generations[-1]
            self.rows_harvested = last.first + last.rows
        self._stream.go_to(position.latest, self.rows_harvested)

    def _refill(self) -> None:
        """Harvests again the generations that have rows still to be served, in their places."""
        self._to_refill = False
        held = set((self._waiting // self._generation_rows).tolist())
        needed = [
            generation
            for generation in self._generations
            if generation.number > self._round - self.passes or generation.number % self.passes in held
        ]
        if not needed:
            return
        self._stream.go_to(needed[0].begin, needed[0].first)
        for was in self._generations[self._generations.index(needed[0]) :]:
            found = self._fill(was.number, was.rows)
            if (found.rows, found.tokens) != (was.rows, was.tokens):
                raise UserError(
                    f"the source must give rows {was.first} to {was.first + was.rows} again, the same tokens",
                    "other tokens" if found.rows == was.rows else f"{found.rows} of {was.rows} rows",
                    "restore the corpus or the store as it was",
                )
            # a site that another rank had then, or an older version, may not be known
            if any(was.values.get(site, digest) != digest for site, digest in found.values.items()):
                _log.warning(
                    "the activations harvested again differ from the first time: the model, the versions or "
                    "the number of threads have changed, and the run goes on, but not bit for bit"
                )

    def _present(self) -> Int64[Tensor, " row"]:
        """Places in the buffers of the rows served in this round, oldest generation first."""
        places = [
            torch.arange(generation.rows) + generation.number % self.passes * self._generation_rows
            for generation in self._generations
            if generation.number > self._round - self.passes
        ]
        return torch.cat([torch.empty(0, dtype=torch.int64), *places])


class _Stream:
    """The source's rows one after another, opened at a cursor when the first of them is asked for."""

    def __init__(self, source: Callable[[Cursor], Iterator[RowBatch]]) -> None:
        self._source = source
        self.go_to(Cursor(), 0)

    def go_to(self, begin: Cursor, row: int) -> None:
        """Makes the row of that number the next one; the source has it from `begin` on."""
        # `begin` is kept up as rows are read: from there the source gives the last of them
        self.begin, self.row = begin, row
        self._rows: Iterator[RowBatch] | None = None
        self._batch: RowBatch | None = None
        self._end = begin.kept

    def read(self, most: int) -> tuple[RowBatch, int, int] | None:
        """A batch, the place in it of the next row, and how many rows from there on: at most `most`."""
        while self._batch is None or self.row >= self._end:
            if self._rows is None:
                self._rows = self._source(self.begin)
            self._batch = next(self._rows, None)
            if self._batch is None:
                return None
            self.begin = self._batch.begin or Cursor(kept=self._end)
            self._end = self.begin.kept + len(self._batch)
        place = self.row - self.begin.kept
        count = min(most, len(self._batch) - place)
        self.row += count
        return self._batch, place, count


def _digest_row(row: Float[Tensor, " d_in"]) -> str:
    return hashlib.blake2b(row.cpu().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def _digest_tokens(digest: hashlib.blake2b, rows: RowMap, part: slice) -> None:
    for column in (rows.document, rows.position, rows.token):
        digest.update(column[part].cpu().numpy().tobytes())
