"""Threads that each run torch and numba single-threaded, side by side.

A step is many small products and loops, each on its part. One thread of torch's own a part, and no pool
inside another, is faster than letting every operation spread over all cores: nothing waits for the slowest
core in each operation, a block stays in the cache of the core that made it, and no idle thread of one pool
spins against another. It also makes results independent of the number of threads.
"""

import concurrent.futures
import functools
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Part = TypeVar("Part")


class Workers:
    """As many threads as torch uses when they are made."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        if threads == 1:
            return  # the caller's own will do
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="jumpscope-step")
        # every thread must be told, and torch takes the last word as the wish for threads yet to come
        ready = threading.Barrier(threads + 1)
        told = [self._pool.submit(_be_single, ready) for _ in range(threads)]
        ready.wait()
        concurrent.futures.wait(told)
        torch.set_num_threads(threads)

    def run(self, work: Callable[[Part], object], parts: Iterable[Part]) -> None:
        """Does `work` on every part, each as soon as a thread is free. Raises what a part raised.

        Threads take over the caller's inference mode, which torch keeps for each thread on its own.
        """
        if self.threads == 1:
            _drain(work, parts)
            return
        queue, mode = iter(list(parts)), torch.is_inference_mode_enabled()

        def drain() -> None:
            with torch.inference_mode(mode):
                _drain(work, queue)

        waiting = [self._pool.submit(drain) for _ in range(self.threads)]
        for future in waiting:
            future.result()


@functools.lru_cache(maxsize=4)
def workers_for(threads: int) -> Workers:
    """The process's workers for so many threads."""
    return Workers(threads)


def _be_single(ready: threading.Barrier) -> None:
    # asked first, since a thread's first question would set its number to everyone's wish again
    torch.get_num_threads()
    torch.set_num_threads(1)
    ready.wait()


def _drain(work: Callable[[Part], object], queue: Iterable[Part]) -> None:
    # the interpreter's lock makes a list iterator's next() safe between threads
    for part in queue:
        work(part)
