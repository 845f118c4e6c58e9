"""Sparse dictionaries: what they are, how they are trained step by step, and the files they live in."""

from sae.errors import UserError
from sae.formats import load, save
from sae.jumprelu import DictionaryConfig, JumpReLU

__all__ = ["DictionaryConfig", "JumpReLU", "UserError", "load", "save"]
