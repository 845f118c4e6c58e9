"""Loops as machine code, by numba, kept on disk for the next process."""

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile

# sums may be reordered when compiled, which makes them vectors; infinities and NaN keep their meaning
_FLAGS = {"contract", "reassoc", "nsz"}
# how a file with loops is known, or with what they are made of
_MARKS = b"from sae.kernels.compiled import", b"from numba.extending import", b"from llvmlite import"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Machine code without the interpreter's lock, kept on disk where there is a place to write.

    A loop may call those of files beside its own and of this folder: what is on disk goes by all of these.
    """
    return _compiled(function, _FLAGS)


def compiled_as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, every operation in its order: for loops that must give another program's bits."""
    return _compiled(function, set())


def _compiled(function: Callable[..., Any], flags: set[str]) -> Callable[..., Any]:
    # tests wrap every function to check its arguments; numba wants the function itself
    function = inspect.unwrap(function)
    loop = njit(nogil=True, error_model="numpy", fastmath=flags)(function)
    with contextlib.suppress(RuntimeError):  # no folder for copies: compile in every process
        loop._cache = _Copies(function)  # pyright: ignore[reportAttributeAccessIssue]
    return loop


class _Copies(FunctionCache):
    """Copies on disk of one loop. Those of numba go by its own file alone, whatever it calls elsewhere."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        folders = {Path(inspect.getfile(function)).parent, Path(__file__).parent}
        self._cache_file = _Index(
            cache_path=self.cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=(self._impl.locator.get_source_stamp(), *map(_digest, sorted(folders))),
        )


class _Index(IndexDataCacheFile):
    """What is on disk of one loop."""

    def _load_index(self) -> dict[Any, Any]:
        try:
            return super()._load_index()
        except Exception:
            # it names types of the program that wrote it, which this one may no longer have
            return {}


@functools.cache
def _digest(folder: Path) -> str:
    """Of all files with loops in a folder."""
    contents = ((path.name, path.read_bytes()) for path in sorted(folder.glob("*.py")))
    loops = [
        (name, hashlib.sha256(text).digest())
        for name, text in contents
        if any(mark in text for mark in _MARKS)
    ]
    return hashlib.sha256(repr(loops).encode()).hexdigest()
