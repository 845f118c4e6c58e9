"""A vocabulary in 8-bit integers, for searches and sums over all of it: products at twice bfloat16's rate."""

import dataclasses
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from sae.kernels.int8 import quantised
from sae.kernels.workers import workers_for

# tokens summed at once, and taken as a sample
_ROWS = 32_768
# rows turned into integers at once, and coordinates whose mean is taken at once, by one thread
_QUANTISED_ROWS, _MEAN_COORDINATES = 4096, 128


def mean_column(W_U: Float[Tensor, "d_model d_vocab"]) -> Float[Tensor, " d_model"]:
    """The mean of an unembedding over its vocabulary, summed in fp64."""
    total = torch.zeros(len(W_U), dtype=torch.float64, device=W_U.device)

    def add(start: int) -> None:
        some = slice(start, start + _MEAN_COORDINATES)
        for part in W_U[some].split(_ROWS, dim=1):
            total[some] += part.sum(1, dtype=torch.float64)

    workers_for(torch.get_num_threads()).run(add, range(0, len(W_U), _MEAN_COORDINATES))
    return (total / W_U.shape[1]).float()


@runtime_checkable
class HasUnembedding(Protocol):
    """The end of a language model."""

    @property
    def W_U(self) -> Tensor:
        """The unembedding, [d_model, d_vocab]."""
        ...

    def final_norm(self, resid: Tensor) -> Tensor:
        """The norm before it, [..., d_model] to [..., d_model]."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Vocabulary:
    """An unembedding ready for products in 8-bit integers.

        <h, W_U[:, v]> = <h, mean> + <h / divide, (W_U[:, v] - mean) * divide>

    and the second term is what `rows` and `scale` hold the right side of, rounded. One coordinate that is
    large in one of the two factors would set the scale of a whole row; `divide` gives both the same spread.
    """

    rows: Int8[Tensor, "d_vocab d_model"]
    scale: Float[Tensor, " d_vocab"]
    mean: Float[Tensor, " d_model"]
    divide: Float[Tensor, " d_model"]

    @classmethod
    @torch.inference_mode()
    def of(cls, model: HasUnembedding) -> "Int8Vocabulary":
        """Rounds a model's vocabulary, for products with what its final norm puts out."""
        columns = model.W_U.T
        # the norm's weight is the spread of what it puts out: its answers to +1 and -1 and to their negative
        signs = torch.ones(columns.shape[1])
        signs[1::2] = -1
        plus, minus = model.final_norm(torch.stack([signs, -signs]).to(columns.dtype)).float()
        mean = mean_column(model.W_U)
        # a sample is enough: the division is undone
        sample = columns[:: max(1, len(columns) // _ROWS)].float()
        ratio = ((plus - minus).abs() / sample.std(0)).sqrt()
        divide = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1)
        rows = torch.empty(columns.shape, dtype=torch.int8)
        scale = torch.empty(len(columns))

        def fill(start: int) -> None:
            part = slice(start, start + _QUANTISED_ROWS)
            rows[part], scale[part] = quantised((columns[part].float() - mean) * divide)

        workers_for(torch.get_num_threads()).run(fill, range(0, len(columns), _QUANTISED_ROWS))
        return cls(rows=rows, scale=scale, mean=mean, divide=divide)

    def left(
        self, vectors: Float[Tensor, "row d_model"]
    ) -> tuple[Int8[Tensor, "row d_model"], Float[Tensor, " row"], Float[Tensor, " row"]]:
        """The left sides of the products with these fp32 vectors: integers, their scales, and <h, mean>."""
        ints, scale = quantised(vectors / self.divide)
        return ints, scale, vectors @ self.mean
