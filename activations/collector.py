"""Python's collector of cycles, which is told to rest where many objects are made that stay."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def resting_collector() -> Iterator[None]:
    """Within it nothing is collected: for imports, and for reading a large vocabulary.

    They make some hundred thousand objects and next to no garbage in cycles. The collector would look at them
    all, again and again as they become more: a fifth of the time of the imports, a third of a tokenizer's.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
