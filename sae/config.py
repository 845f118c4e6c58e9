"""What every config dataclass can do: become plain values, and come back from them. Needs no torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from sae.errors import UserError

_C = TypeVar("_C", bound="Config")

SparsityKind = Literal["quadratic", "quadratic_token", "linear", "frequency"]
"""The sparsity terms of `sae.losses`."""


class Config:
    """Base of the frozen, keyword-only dataclasses that are written to disk."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[_C], values: Mapping[str, Any]) -> _C:
        """The inverse of `to_dict`. Raises UserError for a key it does not know."""
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            raise UserError(
                f"a {cls.__name__} must hold known keys only",
                f"unknown {unknown}",
                f"known keys: {', '.join(sorted(known))}",
            )
        return cls(**values)
