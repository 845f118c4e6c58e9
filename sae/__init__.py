"""Sparse dictionaries: what they are, how they are trained step by step, and the files they live in."""

import importlib
from typing import TYPE_CHECKING, Any

from sae.errors import UserError

if TYPE_CHECKING:
    from sae.architectures import BatchTopK, Gated, JumpReLU, ReLU, TopK, build
    from sae.dictionary import Dictionary, DictionaryConfig
    from sae.formats import load, save
    from sae.saelens_object import from_saelens

__all__ = [
    "BatchTopK",
    "Dictionary",
    "DictionaryConfig",
    "Gated",
    "JumpReLU",
    "ReLU",
    "TopK",
    "UserError",
    "build",
    "from_saelens",
    "load",
    "save",
]
_MODULES = {
    **dict.fromkeys(("BatchTopK", "Gated", "JumpReLU", "ReLU", "TopK", "build"), "sae.architectures"),
    **dict.fromkeys(("Dictionary", "DictionaryConfig"), "sae.dictionary"),
    **dict.fromkeys(("load", "save"), "sae.formats"),
    "from_saelens": "sae.saelens_object",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and a mistake on the command line must not wait for it
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
