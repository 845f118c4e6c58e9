"""Rows in 8 bits: each coordinate about its mean and in its own unit, each row by its largest value."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

_LEVELS = 127
_CHUNK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Quantiser:
    """``x ~ mean + col * scale * q`` with q a whole number of -127 to 127 and a `scale` for each row.

    Without `col` the few coordinates that are a hundred times wider than the rest would take all the levels.
    """

    mean: Float32[Tensor, " d_in"]
    col: Float32[Tensor, " d_in"]
    """The standard deviation of each coordinate, kept from zero."""

    @classmethod
    def fit(cls, rows: Float[Tensor, "row d_in"]) -> "Quantiser":
        """Mean and deviation of each coordinate over `rows`, with sums in float64."""
        chunks = rows.split(_CHUNK_ROWS)
        mean = torch.stack([chunk.double().sum(0) for chunk in chunks]).sum(0) / len(rows)
        squares = torch.stack([(chunk.double() - mean).square().sum(0) for chunk in chunks]).sum(0)
        col = (squares / len(rows)).sqrt()
        # a coordinate that stood still here may move later; rows may all be equal
        floor = 1e-3 * float(col.mean()) or 1.0
        return cls(mean=mean.float(), col=col.clamp_min(floor).float())

    def scales(self, rows: Float[Tensor, "row d_in"]) -> Float32[Tensor, " row"]:
        """What each row's deviations are divided by: its largest one becomes 127."""
        largest = ((rows.float() - self.mean) / self.col).abs().amax(1)
        return (largest / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny)

    def encode(
        self, rows: Float[Tensor, "row d_in"], scales: Float32[Tensor, " row"]
    ) -> Int8[Tensor, "row d_in"]:
        units = (rows.float() - self.mean) / (self.col * scales[:, None])
        return units.round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8)

    def decode(
        self, q: Int8[Tensor, "row d_in"], scales: Float32[Tensor, " row"]
    ) -> Float32[Tensor, "row d_in"]:
        return q.float().mul_(scales[:, None]).mul_(self.col).add_(self.mean)
