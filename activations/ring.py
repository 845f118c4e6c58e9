"""The shuffle ring: a bounded stock of rows, drawn from in batches, each row a fixed number of times."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from activations.harvest import RowBatch
from activations.order import permutation
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

    The stock is `passes` generations of equal size. Each round takes in a new generation in place of the
    oldest one and then serves every row present once, in an order that depends on (seed, round) alone. The
    first rounds have fewer generations, and after the source's last row the remaining ones are served out, so
    each row is served exactly `passes` times. The last ``rows_left_over`` servings, fewer than a batch, are
    dropped. All buffers are allocated at the start, in `dtype` on `device`: `bytes` of them.

    With one pass the stock is replaced as a whole, so a batch mixes only rows that were harvested together.
    Can be iterated once. Raises UserError when the ring is too small or the source has less than a batch.
    """

    def __init__(
        self,
        source: Iterator[RowBatch],
        widths: Mapping[str, int],
        *,
        dtype: torch.dtype,
        rows: int,
        batch: int,
        passes: int,
        seed: int,
        device: torch.device | str = "cpu",
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
        self.widths, self.batch, self.passes, self.seed = dict(widths), batch, passes, seed
        self.rows_harvested = self.rows_served = self.rows_left_over = 0
        self._generation_rows = self.rows // passes
        self._buffers = {
            site: torch.empty(self.rows, width, dtype=dtype, device=device) for site, width in widths.items()
        }
        self._device = torch.device(device)
        self._source = iter(source)
        self._waiting: tuple[RowBatch, int] | None = None
        self._sizes: list[int] = []  # of the generations taken in so far
        self._statistics: dict[str, RowStatistics] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @property
    def statistics(self) -> dict[str, RowStatistics]:
        """Mean and scale of each site over the first generation; harvests it if that is still to do."""
        if not self._sizes:
            self._take_in()
        if self._statistics is None:
            raise RuntimeError("the ring is empty")
        return self._statistics

    def first_rows(self, site: str, count: int) -> Float[Tensor, "row d_in"]:
        """Up to `count` rows of the first generation, evenly spaced, before it is replaced; a copy in the
        ring's dtype.
        """
        if self._statistics is None or len(self._sizes) > 1:
            raise RuntimeError("first_rows is for the time between reading `statistics` and the second round")
        filled = self._sizes[0]
        return self._buffers[site][:filled][:: max(1, filled // count)][:count].clone()

    def __iter__(self) -> Iterator[RingBatch]:
        waiting = torch.empty(0, dtype=torch.int64)
        round_ = 0
        while True:
            if round_ == len(self._sizes):
                self._take_in()
            present = self._present(round_)
            if not len(present):
                break
            order = torch.from_numpy(permutation(len(present), self.seed, round_))
            # generations are whole batches, so rows wait for the next round only once no more are taken in
            queue = torch.cat([waiting, present[order]]).to(self._device)
            whole = len(queue) // self.batch * self.batch
            for start in range(0, whole, self.batch):
                self.rows_served += self.batch
                yield RingBatch(self, queue[start : start + self.batch])
            waiting = queue[whole:].cpu()
            round_ += 1
        self.rows_left_over = len(waiting)
        if self.rows_left_over:
            _log.info(
                "%d of %d servings left over: less than a batch of %d",
                self.rows_left_over,
                self.rows_served + self.rows_left_over,
                self.batch,
            )

    def _take_in(self) -> None:
        """Fills the next generation from the source; it stays short, or empty, when the source ends."""
        start = len(self._sizes) % self.passes * self._generation_rows
        filled = 0
        while filled < self._generation_rows:
            rows, taken = self._waiting or (next(self._source, None), 0)
            if rows is None:
                break
            count = min(self._generation_rows - filled, len(rows) - taken)
            for site, buffer in self._buffers.items():
                part = rows.rows[site][taken : taken + count]
                buffer[start + filled : start + filled + count].copy_(part, non_blocking=True)
            filled += count
            self._waiting = (rows, taken + count) if taken + count < len(rows) else None
        self.rows_harvested += filled
        if not self._sizes:
            self._begin(filled)
        self._sizes.append(filled)

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

    def _present(self, round_: int) -> Int64[Tensor, " row"]:
        """Places in the buffers of the rows served in a round, oldest generation first."""
        return torch.cat(
            [
                torch.arange(self._sizes[generation]) + generation % self.passes * self._generation_rows
                for generation in range(max(0, round_ - self.passes + 1), round_ + 1)
            ]
        )
