"""Which rank of a harvest writes which shards: a span of consecutive ones in each turn.

A rank runs the model on the batches that its spans touch, so a batch at the edge of two spans is run by both.
Sending rows to whoever writes them instead would move every byte of the store once more, where a span of 16
batches costs a sixteenth of the forward passes at most, and would make ranks wait for one another at every
batch. Spans end where shards do, so the store does not show how many ranks wrote it.
"""

import bisect
from dataclasses import dataclass

# batches in a span at least, where there are so many: a harvest that is killed loses a turn at most
_BATCHES = 16


@dataclass(frozen=True)
class Spans:
    """The rows from `first` to `wanted`, in shards of `shard_rows`, divided into turns of one span a rank."""

    first: int
    wanted: int
    shard_rows: int
    bounds: tuple[int, ...]
    """The shards, from 0, at which spans begin; the last one is the number of shards."""
    world: int

    @classmethod
    def plan(cls, first: int, wanted: int, *, shard_rows: int, batch_rows: int, world: int) -> "Spans":
        """Spans of nearly equal length; one shard each where one rank writes them all."""
        shards = -(-(wanted - first) // shard_rows)
        least = 1 if world == 1 else -(-_BATCHES * batch_rows // shard_rows)
        count = world * max(1, shards // (world * least))
        # rounded up, so that the first rank has the first shard however few there are
        bounds = tuple(-(-shards * i // count) for i in range(count + 1))
        return cls(first, wanted, shard_rows, bounds, world)

    def turns_of(self, row: int) -> int:
        """In how many turns the rows before `row` are written."""
        return self.span_of(row - 1) // self.world + 1 if row > self.first else 0

    def shard_of(self, row: int) -> int:
        """The shard, counted from the first one of these rows, that a row is in."""
        return (row - self.first) // self.shard_rows

    def span_of(self, row: int) -> int:
        """The span that a row is in; span i is that of rank i % world in turn i // world."""
        return bisect.bisect_right(self.bounds, self.shard_of(row)) - 1

    def end_of_shard(self, row: int) -> int:
        """The number of the first row behind the shard of a row."""
        return min(self.wanted, self.first + (self.shard_of(row) + 1) * self.shard_rows)

    def end_of_span(self, span: int) -> int:
        """The number of the first row behind a span."""
        return min(self.wanted, self.first + self.bounds[span + 1] * self.shard_rows)

    def touches(self, rank: int, row: int, count: int) -> bool:
        """Whether any of `count` rows from `row` on is in a span of a rank."""
        begin, end = max(row, self.first), min(row + count, self.wanted)
        if begin >= end:
            return False
        # a batch may reach over several short spans; where shards are few, some spans are empty
        spans = range(self.span_of(begin), self.span_of(end - 1) + 1)
        return any(i % self.world == rank and self.bounds[i] < self.bounds[i + 1] for i in spans)
