"""Forward passes of the parts of a batch side by side, each on a core of its own.

On a CPU that beats all cores in one pass: nothing waits for the slowest core in each of many operations.
"""

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.workers import workers_for

Found = TypeVar("Found")

# tokens in a part: fewer keep no core's products busy
_LEAST = 512
# the longest part may exceed an even share by so much: about what side by side gains
_UNEVEN = 1.15

_own = threading.local()


def own_part() -> slice:
    """The blocks of the batch that this thread's forward pass is of: hooks serve the passes of all parts."""
    return getattr(_own, "part", slice(0, None))


class Gathered:
    """Tensors by name, of which the pass of each part brings its own blocks."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[int, Tensor]] = {}

    def put(self, name: str, tensor: Float[Tensor, "_ ..."]) -> None:
        """Takes in this thread's part."""
        self._parts.setdefault(name, {})[own_part().start] = tensor

    def has(self, names: Iterable[str]) -> bool:
        """Whether this thread's part of all of these is there."""
        return all(own_part().start in self._parts.get(name, ()) for name in names)

    def take(self, name: str) -> Float[Tensor, "batch ..."]:
        """Of the whole batch, which is then held here no longer."""
        return joined([part for _, part in sorted(self._parts.pop(name).items())])


def joined(parts: list[Float[Tensor, "_ ..."]]) -> Float[Tensor, "batch ..."]:
    """One tensor of those of all parts, in order; of one part, itself."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def side_by_side(
    tokens: Int[Tensor, "batch pos"], run: Callable[[Int[Tensor, "batch pos"]], Found]
) -> list[Found]:
    """What `run` makes of each part of a batch, in the order of the batch.

    There is one part where more would not be faster: on a GPU, for few tokens, and where threads would have
    much less to do than others.
    """
    threads = torch.get_num_threads() if tokens.device.type == "cpu" else 1
    each = -(-len(tokens) // threads)
    uneven = each * threads > _UNEVEN * len(tokens)
    if threads == 1 or uneven or each * tokens.shape[1] < _LEAST:
        return [run(tokens)]
    parts = [slice(start, min(start + each, len(tokens))) for start in range(0, len(tokens), each)]
    found: list[Found | None] = [None] * len(parts)

    def work(number: int) -> None:
        _own.part = parts[number]
        try:
            found[number] = run(tokens[parts[number]])
        finally:
            del _own.part

    workers_for(threads).run(work, range(len(parts)))
    return found  # pyright: ignore[reportReturnType]  # all are there: run raises what a part raised
