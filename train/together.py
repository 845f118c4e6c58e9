"""What the ranks of a training run do together: refusals, the run's own facts, and who is slow."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from activations.exchange import Ownership, RefusedByAll, owners
from activations.ranks import Ranks
from sae.errors import UserError
from sae.kernels.shards import Shard

_log = logging.getLogger(__name__)

# a rank is slow when the same work takes it so many times as long as the median of the others, and so many
# seconds between two looks
_SLOW, _LONG_ENOUGH = 1.5, 1.0


def together(ranks: Ranks, what: str, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on each rank, by rank, as JSON has it; all ranks wait for the slowest.

    What the system or a UserError refuses on one rank is raised on all of them. `what` names the work.
    """
    if ranks.world == 1:
        return [work()]
    value, refused = None, None
    try:
        with ranks.busy(what):
            value = work()
    except (UserError, OSError) as error:
        refused = _told(error, ranks.rank)
    answers = ranks.share(what, [value, refused])
    for _, refusal in answers:
        if refusal is not None:
            raise RefusedByAll(*refusal)
    return [answer for answer, _ in answers]


def by_first(ranks: Ranks, what: str, work: Callable[[], Any]) -> Any:
    """The same of work that rank 0 does for all: what it returned there."""
    return together(ranks, what, work if ranks.first else lambda: None)[0]


def _told(error: UserError | OSError, rank: int) -> list[str]:
    if isinstance(error, UserError):
        return [error.must, error.found, error.do]
    return [f"rank {rank} must be able to write what is its own", str(error), "look at its disk"]


def divide(sites: Mapping[str, int], dtype: torch.dtype, world: int, shards: int = 1) -> Ownership:
    """Which rank trains which site: dictionaries are of one width, so a site costs what its rows are wide.

    `shards` ranks in a row train a site together. Raises UserError when they do not divide the ranks.
    """
    if world % shards:
        raise UserError(
            "--shard-latents must divide the number of ranks",
            f"--shard-latents {shards} with {world} rank{'s' if world > 1 else ''}",
            "start as many ranks as a multiple of it under torchrun, or give another --shard-latents",
        )
    costs = {site: float(d_in) for site, d_in in sites.items()}
    owner = {site: shards * group for site, group in owners(costs, world // shards).items()}
    return Ownership(owner=owner, widths=sites, dtype=dtype, together=shards)


def shard_of(ranks: Ranks, width: int, shards: int) -> Shard | None:
    """The latents of its dictionaries that this rank has; None where it has all. Every rank asks."""
    if shards == 1:
        return None
    groups = [ranks.group(range(first, first + shards)) for first in range(0, ranks.world, shards)]
    group = groups[ranks.rank // shards]
    return Shard(ranks.rank % shards, shards, width, lambda tensor: ranks.add(tensor, group))


class Stragglers:
    """Looks whether one rank takes much longer than the others for the same work, and says so once."""

    def __init__(self, loads: Sequence[float]) -> None:
        """`loads` is what each rank's steps cost, in any unit."""
        self._loads, self._looked, self._said = loads, False, False

    def look(self, spent: Sequence[Mapping[str, float]]) -> None:
        """`spent`: seconds of each rank, by kind of work, over the same steps. The first are not judged."""
        # kernels are compiled then, by whoever finds none kept
        if not self._looked:
            self._looked = True
            return
        loads = {"model": [1.0] * len(spent), "step": self._loads}
        for kind, words in (("model", "forward passes take"), ("step", "training steps take")):
            paces = {
                rank: seconds[kind] / load
                for rank, (seconds, load) in enumerate(zip(spent, loads[kind], strict=True))
                if load and seconds.get(kind)
            }
            for rank, pace in paces.items():
                others = sorted(other for at, other in paces.items() if at != rank)
                usual = others[len(others) // 2] if others else pace
                if not self._said and pace > _SLOW * usual and spent[rank][kind] > _LONG_ENOUGH:
                    self._said = True
                    _log.warning(
                        "rank %d is slow, and all wait for it: its %s %.1f times as long as on other ranks",
                        rank,
                        words,
                        pace / usual,
                    )
