"""One dictionary's latents divided over several states, and what their steps tell one another.

Each shard holds a range of latents and all of b_dec, and is given the same rows as the others. All that
crosses goes through one operation, a sum over the shards:

    a step           the parts of the reconstruction [batch, d_out] with each row's L0 [batch]; whether the
                     step can be made; b_dec's gradient [d_out]; the value of a term that sums over latents
    topk, batchtopk  before these what `largest_of_all` says, and batchtopk's least activation
"""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Int64, Shaped
from torch import Tensor

from sae.errors import UserError

# bits of a value that are looked at together when the n-th largest is searched for
_DIGIT = 11
# bytes of a dictionary that cross together when it is put together
_AT_ONCE = 2**26
_WHOLE_NUMBERS = {4: torch.int32, 8: torch.int64}


Reduce = Callable[[Tensor], object]
"""Adds a tensor up over the shards, in place.

Every shard calls it, in the same order and with equal shapes and dtypes, and gets the same bits. It raises
when another shard is lost.
"""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which of a dictionary's latents a state has, and how it reaches the other shards."""

    index: int
    count: int
    d_sae: int
    """Latents of the whole dictionary."""
    add: Reduce

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count <= self.d_sae:
            raise UserError(
                "each shard of a dictionary must have a latent",
                f"shard {self.index} of {self.count}, {self.d_sae} latents",
                "divide it over fewer ranks",
            )

    @property
    def latents(self) -> slice:
        """The range that it has; sizes differ by one at most."""
        return slice(*(self.d_sae * edge // self.count for edge in (self.index, self.index + 1)))

    def gather(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "shards *shape"]:
        """Every shard's tensor, with all its bits. Shapes must be equal, values be of four bytes or eight."""
        everyone = tensor.new_zeros(self.count, *tensor.shape)
        everyone[self.index] = tensor
        # as whole numbers, since -0.0 + 0.0 is 0.0
        self.add(everyone.view(_WHOLE_NUMBERS[tensor.itemsize]))
        return everyone

    def collect(
        self, tensor: Shaped[Tensor, "own *rest"], whole: Shaped[Tensor, "d_sae *rest"] | None
    ) -> None:
        """Fills the first shard's `whole` with all shards' rows, by latent; the others give None.

        A part of it crosses at a time, so that the others never hold more.
        """
        mine, kind = self.latents, _WHOLE_NUMBERS[tensor.itemsize]
        step = max(1, _AT_ONCE // max(1, tensor[:1].nbytes))
        for start in range(0, self.d_sae, step):
            stop = min(start + step, self.d_sae)
            part = tensor.new_zeros(stop - start, *tensor.shape[1:])
            first, last = max(start, mine.start), min(stop, mine.stop)
            if first < last:
                part[first - start : last - start] = tensor[first - mine.start : last - mine.start]
            self.add(part.view(kind))
            if whole is not None:
                whole[start:stop] = part

    def all(self, flag: Bool[Tensor, ""]) -> Bool[Tensor, ""]:
        """Whether it is set on every shard: so all make a step, or none does."""
        unset = (~flag).int()
        self.add(unset)
        return unset == 0


def largest_of_all(
    rows: Int64[Tensor, " pair"],
    values: Float[Tensor, " pair"],
    k: int,
    batch: int,
    by_row: bool,
    shard: Shard,
) -> Bool[Tensor, " pair"]:
    """Which of a shard's pairs of row and latent are active: among all shards' k largest of their row, or k a
    row largest of the batch, and above zero. Ties go to the earlier row, then to the lower latent.

    Pairs come by row, a row's by latent; the shard's own largest must be among them. What crosses is a row's
    k largest of each shard, or [2048] counts for every 11 bits of a value and then a number a row.
    """
    if k < 1:
        return torch.zeros_like(values, dtype=torch.bool)
    choose = _of_rows if by_row else _of_batch
    return choose(rows, values.clamp(min=0), k, batch, shard) & (values > 0)


def nth_largest(values: Float[Tensor, " value"], n: int, shard: Shard) -> Float[Tensor, ""]:
    """The n-th largest of all shards' values, none of them below zero; zero where there are fewer."""
    whole = _WHOLE_NUMBERS[values.itemsize]
    return _cut(values.view(whole), n, shard)[0].to(whole).view(values.dtype)


def _of_rows(
    rows: Int64[Tensor, " pair"], values: Float[Tensor, " pair"], k: int, batch: int, shard: Shard
) -> Bool[Tensor, " pair"]:
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    here = torch.arange(len(rows), device=rows.device)
    place = here - torch.searchsorted(rows, torch.arange(batch, device=rows.device))[rows]
    # what is beyond the k-th goes into a column that is cut off
    offered = values.new_zeros(batch, k + 1)
    offered[rows, place.clamp(max=k)] = values[order]
    # shards side by side: equal values then lie in the order of latents
    everyone = shard.gather(offered[:, :k]).transpose(0, 1).flatten(1)
    best = everyone.argsort(dim=1, descending=True, stable=True)[:, :k]
    mine = (best // k == shard.index).sum(1)
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(0, order, place < mine[rows])


def _of_batch(
    rows: Int64[Tensor, " pair"], values: Float[Tensor, " pair"], k: int, batch: int, shard: Shard
) -> Bool[Tensor, " pair"]:
    bits = values.view(_WHOLE_NUMBERS[values.itemsize])
    cut, left = _cut(bits, k * batch, shard)
    tied = (bits == cut).long()
    in_row = torch.zeros(batch, dtype=torch.int64, device=rows.device).index_add_(0, rows, tied)
    everyone = shard.gather(in_row).T
    before = (everyone.flatten().cumsum(0).view_as(everyone) - everyone)[:, shard.index]
    # of the ties up to here, those in earlier rows are counted for all shards
    place = tied.cumsum(0) - (in_row.cumsum(0) - in_row)[rows] + before[rows]
    return (bits > cut) | ((tied > 0) & (place <= left))


def _cut(bits: Int[Tensor, " value"], n: int, shard: Shard) -> tuple[Int64[Tensor, ""], Int64[Tensor, ""]]:
    """The bits of all shards' n-th largest value, 0 where there are fewer; and how many of the n have them.

    Values are not negative, and rise as their bits do, as whole numbers.
    """
    alike = torch.ones_like(bits, dtype=torch.int64)
    cut = torch.zeros((), dtype=torch.int64, device=bits.device)
    left = torch.full((1,), n, dtype=torch.int64, device=bits.device)
    for shift in range(8 * bits.itemsize // _DIGIT * _DIGIT, -1, -_DIGIT):
        digit = ((bits >> shift) & (2**_DIGIT - 1)).long()
        counts = torch.zeros(2**_DIGIT, dtype=torch.int64, device=bits.device).index_add_(0, digit, alike)
        shard.add(counts)
        above = counts.flip(0).cumsum(0).flip(0) - counts
        found = (above >= left).sum()
        # not above[found], for which a GPU would be waited for
        left = left - above.index_select(0, found.view(1))
        cut = (cut << _DIGIT) | found
        alike = alike * (digit == found)
    return cut, left[0]
