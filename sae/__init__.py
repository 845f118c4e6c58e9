"""Sparse dictionaries: what they are, how they are trained step by step, and the files they live in."""

from sae.architectures import BatchTopK, Gated, JumpReLU, ReLU, TopK, build
from sae.dictionary import Dictionary, DictionaryConfig
from sae.errors import UserError
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
