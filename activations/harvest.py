"""Harvesting: token blocks in, rows of activations out, all sites from one forward pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Int, Int32
from torch import Tensor

from activations.blocks import Cursor, TokenBlocks
from sae.errors import UserError


@dataclass(frozen=True, eq=False)
class RowMap:
    """Where each row comes from: `Document.id`, the token's index in its document, and the token."""

    document: Int32[Tensor, " row"]
    position: Int32[Tensor, " row"]
    token: Int32[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.token)


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Rows of every site, aligned: row i of each site and of the map belong to the same token.

    The rows are in the model's dtype and on its device, [row, d_in] with the site's own d_in.
    """

    rows: Mapping[str, Float[Tensor, "row _"]]
    map: RowMap
    begin: Cursor | None = None
    """Where the stream stood before these rows."""

    def __len__(self) -> int:
        return len(self.map)


@runtime_checkable
class Activates(Protocol):
    """What harvesting needs of a language model."""

    @property
    def device(self) -> torch.device: ...
    def activations(
        self, tokens: Int[Tensor, "batch pos"], sites: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos _"]]: ...


Wanted = Callable[[int, int], bool]
"""Whether rows are wanted, given the number of the first one and how many there are."""


def harvest_rows(
    model: Activates, blocks: Iterable[TokenBlocks], sites: Sequence[str], wanted: Wanted | None = None
) -> Iterator[RowBatch]:
    """The kept rows of each batch of blocks at each site, in the order of the blocks.

    Special tokens and padding are left out; a batch that keeps nothing is passed over. A batch that is not
    `wanted` has its map and no rows: the model is not run on it. Raises UserError naming the site when an
    activation is not finite.
    """
    for block in blocks:
        kept = block.keep.flatten().nonzero().squeeze(1)
        if len(kept):
            run = wanted is None or block.begin is None or wanted(block.begin.kept, len(kept))
            # made inside the yield, so that nothing here holds it through the next forward pass
            yield RowBatch(
                rows=_rows(model, block.tokens, kept, sites) if run else {},
                map=RowMap(
                    *(part.flatten()[kept] for part in (block.document, block.position, block.tokens))
                ),
                begin=block.begin,
            )


@torch.no_grad()
def _rows(
    model: Activates, tokens: Int32[Tensor, "block pos"], kept: Int[Tensor, " row"], sites: Sequence[str]
) -> dict[str, Float[Tensor, "row _"]]:
    acts = model.activations(tokens.to(model.device, torch.long), sites)
    index = kept.to(model.device)
    # one copy, made here, so that each forward pass's tensors can go as soon as their rows are out
    rows = {
        site: rearrange(acts.pop(site), "block pos d_in -> (block pos) d_in").index_select(0, index)
        for site in sites
    }
    check_finite(rows)
    return rows


def check_finite(rows: Mapping[str, Float[Tensor, "row _"]]) -> None:
    """Raises UserError naming the first site with an activation that is not finite."""
    sums = torch.stack([part.sum(dtype=torch.float32) for part in rows.values()])
    for site, total in zip(rows, sums.tolist(), strict=True):  # device sync, one for all sites
        if not -torch.inf < total < torch.inf:
            bad = int((~rows[site].isfinite()).any(1).sum())
            raise UserError(
                f"the activations at {site} must be finite",
                f"NaN or infinity in {bad} of {len(rows[site])} rows ({rows[site].dtype})",
                "load the model with --dtype float32, or check its weights",
            )
