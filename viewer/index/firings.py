"""Every firing of a site and the texts they are in: what the rest of the index follows from."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int32, Int64
from torch import Tensor

from viewer.once import once


@dataclass(frozen=True, eq=False)
class Texts:
    """The token blocks of an index. A row is a position that counts; rows are numbered in reading order."""

    tokens: Int32[np.ndarray, "block pos"]
    document: Int64[np.ndarray, "block pos"]
    """As in `TokenBlocks`: -1 where the token stands for no text."""
    position: Int32[np.ndarray, "block pos"]
    """The token's place in its document, -1 where there is none."""
    keep: Bool[np.ndarray, "block pos"]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Texts":
        """The inverse of `tensors`."""
        return cls(**{f.name: tensors[f.name].numpy() for f in fields(cls)})

    def tensors(self) -> dict[str, Tensor]:
        """The arrays by name, for a file."""
        return {f.name: torch.from_numpy(getattr(self, f.name)) for f in fields(self)}

    @once
    def place(self) -> Int64[np.ndarray, " row"]:
        """Where each row is: block * pos + position in the block."""
        return np.flatnonzero(self.keep)

    @once
    def row_of(self) -> Int32[np.ndarray, "block pos"]:
        """The row of each position, -1 where it has none."""
        return np.where(self.keep, np.cumsum(self.keep).reshape(self.keep.shape) - 1, -1).astype(np.int32)

    def __len__(self) -> int:
        """Rows."""
        return len(self.place)


@dataclass(frozen=True, eq=False)
class RowLists:
    """Firings as they are found: row r has those from `starts[r]` to `starts[r + 1]`."""

    starts: Int64[np.ndarray, " row_plus_one"]
    latent: Int32[np.ndarray, " firing"]
    activation: Float32[np.ndarray, " firing"]

    def __len__(self) -> int:
        """Rows."""
        return len(self.starts) - 1


@dataclass(frozen=True, eq=False)
class Firings:
    """All firings of a site: latent j has those from `starts[j]` to `starts[j + 1]`, in the order of rows."""

    starts: Int64[np.ndarray, " latent_plus_one"]
    row: Int32[np.ndarray, " firing"]
    activation: Float32[np.ndarray, " firing"]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Firings":
        """The inverse of `tensors`."""
        return cls(**{f.name: tensors[f.name].numpy() for f in fields(cls)})

    @classmethod
    def by_latent(cls, lists: RowLists, d_sae: int) -> "Firings":
        """The same firings in the order of latents."""
        from viewer.index.evidence_loops import sort_by_latent  # late: numba takes a second to import

        starts = np.zeros(d_sae + 1, np.int64)
        np.cumsum(np.bincount(lists.latent, minlength=d_sae), out=starts[1:])
        row, activation = np.empty_like(lists.latent), np.empty_like(lists.activation)
        sort_by_latent(lists.starts, lists.latent, lists.activation, starts[:-1].copy(), row, activation)
        return cls(starts, row, activation)

    def tensors(self) -> dict[str, Tensor]:
        """The arrays by name, for a file."""
        return {f.name: torch.from_numpy(getattr(self, f.name)) for f in fields(self)}

    def __len__(self) -> int:
        """Latents."""
        return len(self.starts) - 1

    def latent(self, latent: int) -> tuple[Int[np.ndarray, " here"], Float32[np.ndarray, " here"]]:
        """The rows on which a latent fires, rising, and its activation there."""
        span = slice(self.starts[latent], self.starts[latent + 1])
        return self.row[span], self.activation[span]
