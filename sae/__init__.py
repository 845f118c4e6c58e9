"""Sparse dictionaries: what they are, how they are trained step by step, and the files they live in."""

from typing import TYPE_CHECKING

from sae.errors import UserError
from sae.lazy import attributes_of

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
# a mistake on the command line must not wait for torch
__getattr__ = attributes_of(__name__, _MODULES)


def __dir__() -> list[str]:
    return __all__
