"""Which sites lie next to one another, and the neighbours that their latents have there."""

from collections.abc import Collection, Mapping

from activations.sites import kind_of, layer_of
from sae import Dictionary
from viewer.index.geometry import Neighbours, neighbours, neighbours_of_both


def adjacent_sites(dictionaries: Mapping[str, Dictionary], site: str) -> dict[str, str]:
    """The nearest of these sites of the same kind and width above (`next`) and below (`previous`)."""
    same = {
        layer_of(other): other
        for other, dictionary in dictionaries.items()
        if kind_of(other) == kind_of(site) and dictionary.cfg.d_out == dictionaries[site].cfg.d_out
    }
    above = [layer for layer in same if layer > layer_of(site)]
    below = [layer for layer in same if layer < layer_of(site)]
    found = {"next": same[min(above)]} if above else {}
    return found | ({"previous": same[max(below)]} if below else {})


class Between:
    """Neighbours in sites that lie next to one, while the sites of an index are made one after another.

    A pair of sites that are both made here is searched once: what the search says of the second is kept until
    that one is made.
    """

    def __init__(self, dictionaries: Mapping[str, Dictionary], to_make: Collection[str]) -> None:
        self._dictionaries, self._to_make = dictionaries, frozenset(to_make)
        self._kept: dict[tuple[str, str], Neighbours] = {}

    def neighbours(self, site: str, other: str) -> Neighbours:
        """Those in the other site of the latents of a site that is being made, asked for once."""
        kept = self._kept.pop((site, other), None)
        if kept is not None:
            return kept
        rows = self._dictionaries[site].W_dec
        # another rank's lies in a file that is mapped
        theirs = self._dictionaries[other].W_dec.to(rows.device)
        if other not in self._to_make:
            return neighbours(rows, theirs)
        # it is yet to be made: one that was made before has left what is asked for here
        found, self._kept[other, site] = neighbours_of_both(rows, theirs)
        return found
