"""Dictionaries in other people's formats: a module a dialect, all by way of one canonical form."""

from sae.dialects.detect import DIALECTS, read, write
from sae.dialects.parts import Parts

__all__ = ["DIALECTS", "Parts", "read", "write"]
