"""The check of shapes and types that every test makes: beartype, once for a function within a function.

jaxtyping decorates an inner function anew whenever the outer one runs, and beartype writes and compiles
code for it each time, which takes longer than a small training step. What jaxtyping hands over is never the
function itself but an empty one of its signature, so one check serves all that have the same.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype

_MADE: dict[tuple[object, ...], Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype's check of a function of jaxtyping's, made or found."""
    # a default may be a tensor, which must not be kept
    if "<locals>" not in function.__qualname__ or function.__defaults__ or function.__kwdefaults__:
        return beartype(function)
    code = function.__code__
    takes = code.co_varnames, code.co_flags, code.co_posonlyargcount, code.co_argcount, code.co_code
    key = (function.__module__, function.__qualname__, *takes, *function.__annotations__.values())
    if key not in _MADE:
        _MADE[key] = beartype(function)
    return _MADE[key]
