"""Ranks that are threads of one process: for what they do together, without starting processes."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from activations.ranks import RankLost, Ranks
from activations.watch import LOST, loss_record


class Hub:
    """Where the threads of one world meet, call by call, on each lane."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._changed = threading.Condition()
        self._told: dict[tuple[str, int], dict[int, Any]] = {}
        self.lost: dict[str, Any] | None = None

    def meet(self, lane: str, call: int, rank: int, value: Any) -> list[Any]:
        """Every rank's value, once all have come to this call; raises RankLost when one has failed."""
        with self._changed:
            here = self._told.setdefault((lane, call), {})
            here[rank] = value
            self._changed.notify_all()
            while len(here) < self.world:
                if self.lost is not None:
                    raise RankLost(self.lost)
                if not self._changed.wait(30):
                    raise TimeoutError(f"rank {rank} waits alone at {lane} {call}")
            return [here[i] for i in range(self.world)]

    def fail(self, rank: int, found: str) -> None:
        with self._changed:
            must, again = "every rank must go on", "run it again"
            self.lost = self.lost or loss_record(rank, "here", 0, must, f"rank {rank}: {found}", again, LOST)
            self._changed.notify_all()


class ThreadRanks(Ranks):
    """One thread's view of its world."""

    def __init__(self, hub: Hub, rank: int, lane: str = "main") -> None:
        self.rank, self.world, self.local_rank = rank, hub.world, rank
        self._hub, self._lane, self._calls, self._made = hub, lane, 0, 0
        self._watch = None

    def share(self, what: str, value: Any) -> list[Any]:
        answers = self._meet([what, json.loads(json.dumps(value))])
        assert {answer[0] for answer in answers} == {what}, answers
        return [answer[1] for answer in answers]

    def swap(self, parts):
        assert len(parts) == self.world
        sent = [part.contiguous().reshape(-1).view(torch.uint8).clone() for part in parts]
        mine = [theirs[1][self.rank] for theirs in self._meet(["rows", sent])]
        # one behind another in one piece of memory, as a wire leaves them
        return list(torch.cat(mine).split([len(part) for part in mine]))

    def lane(self) -> "ThreadRanks":
        self._made += 1
        return ThreadRanks(self._hub, self.rank, f"{self._lane}.{self._made}")

    def _meet(self, value: Any) -> list[Any]:
        self._calls += 1
        return self._hub.meet(self._lane, self._calls, self.rank, value)


def on_ranks(world: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Runs ``work(ranks)`` on a thread for each rank; what each returned, or the exception it raised."""
    hub = Hub(world)

    def one(rank):
        try:
            return work(ThreadRanks(hub, rank))
        except BaseException as error:
            hub.fail(rank, str(error))
            return error

    with ThreadPoolExecutor(world) as pool:
        return [future.result(120) for future in [pool.submit(one, rank) for rank in range(world)]]
