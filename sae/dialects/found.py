"""What was found in a folder, as the dialects get it, and values out of configs that may say anything."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.dialects.archives import Kind
from sae.dialects.parts import wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A weights file, the config beside it, and the path by which people know it."""

    path: Path
    """The weights file."""
    kind: Kind
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    """cfg.json or config.json; None where there is neither."""
    label: str
    """The folder as a path or an id: some dialects say the model and the site nowhere else."""


@dataclasses.dataclass(frozen=True)
class Values:
    """A config's values by name, each of the type that is asked for. Raises UserError where it is not."""

    values: Mapping[str, Any]
    source: str

    def text(self, *names: str) -> str:
        """The first of the names that is there and not null; empty when none is."""
        return self._get(names, str, "")

    def whole(self, *names: str) -> int:
        """A whole number that is not negative; 0 when none is there."""
        found = self._get(names, int, 0)
        # a size beyond this is no size, and overflows where it is used
        if not 0 <= found < 2**40:
            raise wrong(self.source, f"{names[0]} must be a size", repr(found))
        return found

    def number(self, *names: str) -> float | None:
        """A finite number; None when none is there."""
        found = self._get(names, (int, float), None)
        # the comparison takes whole numbers of any length, and no NaN
        if found is not None and not abs(found) < 1e300:
            raise wrong(self.source, f"{names[0]} must be finite", f"{found!r:.60}")
        return None if found is None else float(found)

    def flag(self, name: str, default: bool) -> bool:
        """A truth value."""
        return self._get((name,), bool, default)

    def part(self, name: str) -> "Values":
        """An object within; empty when it is not there."""
        return Values(self._get((name,), dict, {}), self.source)

    def one_of(self, name: str, known: Collection[str], default: str = "") -> str:
        """One of the known words; raises UserError for another."""
        found = self.text(name) or default
        if found not in known:
            raise wrong(self.source, f"{name} must be one of {', '.join(sorted(known))}", repr(found))
        return found

    def _get(self, names: tuple[str, ...], kind: Any, default: Any) -> Any:
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise wrong(self.source, f"{name} must be of type {_name(kind)}", f"{value!r:.60}")
            # it goes to files and terminals: no control characters, and nothing that UTF-8 cannot say
            if isinstance(value, str) and not value.isprintable():
                raise wrong(self.source, f"{name} must be plain text", f"{value!r:.60}")
            return value
        return default


def layer_in(label: str, pattern: str = r"layers?[._](\d{1,4})(?!\d)") -> int | None:
    """The last layer that a path names; None when it names none."""
    numbers = re.findall(pattern, label)
    return int(numbers[-1]) if numbers else None


def _name(kind: Any) -> str:
    return " or ".join(each.__name__ for each in kind) if isinstance(kind, tuple) else kind.__name__
