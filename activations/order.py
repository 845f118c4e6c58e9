"""Shuffles that depend on nothing but their key: no generator state, no library version, no device."""

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of ``range(n)`` as int64 [n], the same for the same `key` everywhere and for ever.

    The numbers are hashed one by one and sorted by their hash. The hash (splitmix64) maps 64 bits onto 64
    bits one to one, so there are no ties and the order is unique whatever the sort. The generators of torch
    and numpy are faster but promise a stream only within a release, and a run must resume after an upgrade.
    """
    state = 0
    for part in key:
        state = int(_mix(np.array([(state + part + _GOLDEN) & _MASK], dtype=np.uint64))[0])
    counters = np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(state)
    return np.argsort(_mix(counters))


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
