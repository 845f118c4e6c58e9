"""Ranks without processes: threads that meet at a barrier."""

import threading
from collections.abc import Callable
from typing import Any

import torch


class FakeRanks:
    """A rank among threads. Parts are copied, as a wire does, one behind another in one piece of memory."""

    def __init__(self, rank: int, world: int, meeting: "Meeting") -> None:
        self.rank, self.world, self._meeting = rank, world, meeting

    def swap(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `Ranks.swap`."""
        assert len(parts) == self.world
        sent = self._meeting.all(self.rank, parts)
        mine = [theirs[self.rank].contiguous().view(torch.uint8).flatten() for theirs in sent]
        return list(torch.cat(mine).split([len(part) for part in mine]))


class Meeting:
    """Where the threads exchange what they have, in turn."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._barrier, self._given = threading.Barrier(world, timeout=20), [None] * world

    def all(self, rank: int, value: Any) -> list[Any]:
        """Every thread's value, by rank."""
        self._given[rank] = value
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given

    def abandon(self) -> None:
        """Makes those who wait fail."""
        self._barrier.abort()


def on_ranks(world: int, work: Callable[[FakeRanks], Any]) -> list[Any]:
    """What `work` returns on each rank, or the exception that it raised there."""
    meeting, found = Meeting(world), [None] * world

    def run(rank: int) -> None:
        try:
            found[rank] = work(FakeRanks(rank, world, meeting))
        except Exception as error:
            found[rank] = error
            if isinstance(error, AssertionError):
                meeting.abandon()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
