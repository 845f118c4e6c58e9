"""Where a shuffle ring stands, as plain values that a file can hold."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from activations.blocks import Cursor


@dataclass(frozen=True)
class Generation:
    """Rows that came into the ring together, and where to find them again."""

    number: int
    begin: Cursor
    """From here the source gives its first row, and maybe some before it."""
    first: int
    """Number of its first row, in the source's order."""
    rows: int
    tokens: str
    """Digest of which tokens the rows stand for."""
    values: Mapping[str, str]
    """Digest of its first row at each site, to the last bit; of the sites that are known."""


@dataclass(frozen=True, kw_only=True)
class RingPosition:
    """A place between two batches of a ring: all that is needed to go on from there. Plain values alone."""

    shape: tuple[int, int, int, int]
    """Rows, batch, passes and seed of the ring."""
    round: int
    batches: int
    """Batches of this round that have been served."""
    rows_served: int
    generations: tuple[Generation, ...]
    """The latest ones, oldest first: at most `passes` of them."""
    ended: bool
    """Whether the source has given its last row."""
    waiting: tuple[int, ...]
    """Places in the buffers of rows left from the round before: fewer than a batch."""
    latest: Cursor
    """From here the source gives the row after those of the last generation, and maybe some before it."""

    def to_dict(self) -> dict[str, Any]:
        """The position as JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RingPosition":
        """The inverse of `to_dict`, also after a way through JSON."""
        rows, batch, passes, seed = values["shape"]
        parts = [_generation(part) for part in values["generations"]]
        made = {
            "shape": (rows, batch, passes, seed),
            "generations": tuple(parts),
            "waiting": tuple(values["waiting"]),
            "latest": Cursor(**values["latest"]),
        }
        return cls(**{**values, **made})


def _generation(values: Mapping[str, Any]) -> Generation:
    digests = values["values"]
    # older versions kept one digest for all sites together, which tells nothing of any one
    known = digests if isinstance(digests, Mapping) else {}
    return Generation(**{**values, "begin": Cursor(**values["begin"]), "values": known})
