"""A rank's share of an index that several build together: the sites that are its own, and their rows."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.exchange import Ownership, exchanged_rows, owners
from activations.harvest import Activates
from activations.ranks import Ranks
from sae import Dictionary


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which sites a rank indexes: each runs the model on its own batches and is sent its sites' rows."""

    ranks: Ranks
    model: Activates
    own: tuple[str, ...]
    owned: Ownership
    """Of the sites that dictionaries read: one that two of them read has one owner, who indexes both."""

    @classmethod
    def of(
        cls, ranks: Ranks, model: Activates, dictionaries: Mapping[str, Dictionary], dtype: torch.dtype
    ) -> "Share":
        """By the weights of the dictionaries. `dtype` is that of the model's activations."""
        reads = {site: d.cfg.site_in or site for site, d in dictionaries.items()}
        costs = dict.fromkeys(reads.values(), 0.0)
        for site, dictionary in dictionaries.items():
            costs[reads[site]] += dictionary.W_dec.numel()
        owner = owners(costs, ranks.world)
        widths = {reads[site]: dictionary.cfg.d_in for site, dictionary in dictionaries.items()}
        own = tuple(site for site in dictionaries if owner[reads[site]] == ranks.rank)
        owned = Ownership(owner=owner, widths=widths, dtype=dtype)
        return cls(ranks=ranks, model=model, own=own, owned=owned)

    def rows(self, blocks: Iterable[TokenBlocks]) -> Iterator[tuple[TokenBlocks, Mapping[str, Tensor]]]:
        """Each batch of blocks, and the activations at its kept positions at the sites that are read here."""
        waiting: deque[TokenBlocks] = deque()

        def noted() -> Iterator[TokenBlocks]:
            for batch in blocks:
                waiting.append(batch)
                yield batch

        for batch in exchanged_rows(self.ranks, self.model, noted(), self.owned):
            self.ranks.beat()
            # the exchange passes over batches that keep nothing
            while not bool(waiting[0].keep.any()):
                yield waiting.popleft(), self._none()
            yield waiting.popleft(), batch.rows
        while waiting:
            yield waiting.popleft(), self._none()

    def _none(self) -> dict[str, Tensor]:
        return {
            site: torch.empty(0, width, dtype=self.owned.dtype, device=self.model.device)
            for site, width in self.owned.sites(self.ranks.rank).items()
        }
