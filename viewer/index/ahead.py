"""Work done ahead: what is needed next is made on a thread of its own while the last is in use."""

import functools
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


class OneAhead(Generic[Item, Made]):
    """What `steps` returns for each item, in their order, one item ahead of what is asked for.

    Nothing is made further ahead, so no more than one thing lies waiting, and the steps of two items never
    run side by side. An error of theirs is raised where their item is asked for. To leave the `with` block
    stops them where they next yield, and waits for that. With one of `threads` each is made when it is asked
    for, by the caller: there is no idle core to fill.
    """

    def __init__(
        self, steps: Callable[[Item], Generator[None, None, Made]], items: Sequence[Item], threads: int
    ) -> None:
        self._steps, self._items, self._left = steps, iter(items), threading.Event()
        self._pool = thread_beside("ahead", threads) if threads > 1 else None

    def __enter__(self) -> "OneAhead[Item, Made]":
        self._coming = self._next()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._pool is not None:
            self._pool.shutdown()

    def take(self) -> Made:
        """What the next item's steps return; IndexError behind the last."""
        if self._coming is None:
            raise IndexError("nothing is left to make")
        made = self._coming()
        self._coming = self._next()
        return made

    def _next(self) -> Callable[[], Made] | None:
        """Begins with the next item; returns what waits for it."""
        for item in self._items:
            # torch keeps inference mode for each thread on its own
            make = functools.partial(self._make, item, torch.is_inference_mode_enabled())
            return make if self._pool is None else self._pool.submit(make).result
        return None

    def _make(self, item: Item, inference: bool) -> Made:
        with torch.inference_mode(inference):
            steps = self._steps(item)
            while not self._left.is_set():
                try:
                    next(steps)
                except StopIteration as end:
                    return end.value
        raise CancelledError


def thread_beside(name: str, threads: int) -> ThreadPoolExecutor:
    """A pool of one thread that runs torch with `threads` of them, and on the caller's GPU."""
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    return ThreadPoolExecutor(1, f"jumpscope-{name}", _be, (threads, gpu))


def _be(threads: int, gpu: int | None) -> None:
    # both are a thread's own: a new one would take the number that was wished for last, by whomever, and the
    # first GPU; asked first, since a thread's first question would set its number to that wish again
    torch.get_num_threads()
    torch.set_num_threads(threads)
    if gpu is not None:
        torch.cuda.set_device(gpu)
