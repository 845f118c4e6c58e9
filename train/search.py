"""The search for what explains a misfit: every candidate measured on the same rows, and the rule by which one
is believed (`train.diagnosis` says it in words).
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

from activations.models import LanguageModel
from activations.sites import kind_of, layer_of, site_name
from sae.dictionary import Dictionary
from sae.errors import UserError
from sae.sparse import SparseEncoder
from train import causes
from train.causes import Candidate
from train.fit import Fit, Rows, ScaleScan, measure, per_token, usual_scales

MOST_FVU, MOST_FVU_EXPLAINED = 0.7, 0.5
"""The most that a dictionary which fits leaves unexplained; the most with which a cause is believed."""
MOST_FVU_SPECIAL = 0.05
"""The most when that cause is BOS and its like having been counted."""
L0_OCTAVES = 1.0
"""Doublings by which L0 may differ from the published one."""
FAR_BETTER, FAR_BETTER_PLACE = 0.5, 0.8
"""What FVU falls to, in parts of what it was, when a cause is believed; when it is hook or BOS alone."""
_WORTH_A_SECOND_LOOK = 6
# where a dictionary passes, its gate is not doubted: more latents explain more anyway
_DOUBTED = {
    "hook",
    "BOS",
    "scale",
    "per-token norm",
    "centring",
    "b_dec",
    "folded norms",
    "transposed",
    "skip",
}


@dataclasses.dataclass(frozen=True)
class Published:
    """The L0 that a dictionary was published with: one number, or the ends of a range."""

    low: float
    high: float
    where: str
    """Where it is said."""

    def octaves_off(self, l0: float) -> float:
        """Doublings between an L0 and the range; 0 within it."""
        if l0 <= 0:
            return math.inf
        return max(0.0, math.log2(self.low / l0), math.log2(l0 / self.high))

    def __str__(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate and how it fits."""

    candidate: Candidate
    fit: Fit


class Search:
    """Tries candidates for one dictionary and keeps them all."""

    def __init__(
        self,
        dictionary: Dictionary,
        model: LanguageModel,
        rows: Rows,
        published: Published | None,
    ) -> None:
        self.dictionary, self.model, self.rows, self.published = dictionary, model, rows, published
        cfg = dictionary.cfg
        without_bos = not cfg.prepend_bos and model.bos_id is not None
        self.base = Candidate(
            causes=(),
            what="as it says of itself",
            remedy="",
            make=lambda: dictionary,
            site=(cfg.site_in, cfg.site_out),
            text="no BOS" if without_bos else "BOS",
        )
        self.tried: list[Tried] = []
        self._on_tried: Callable[[int], None] = lambda n: None
        # many candidates differ in the site alone
        self._encoders: dict[int, SparseEncoder] = {}

    @property
    def readable(self) -> bool:
        """Whether the model has the sites that the dictionary says, as wide as it is."""
        known, cfg = causes.widths(self.model), self.dictionary.cfg
        return known.get(cfg.site_in) == cfg.d_in and known.get(cfg.site_out) == cfg.d_out

    @cached_property
    def claimed(self) -> Tried | None:
        """The dictionary as it says of itself; None where the model has no such site."""
        return self._try(self.base) if self.readable else None

    def cause(self, *, passes: bool, on_tried: Callable[[int], None] = lambda n: None) -> Tried | None:
        """What explains the misfit, or is far better than what passes; None when nothing does.

        `on_tried` is told how many candidates were tried so far.
        """
        self._on_tried = on_tried
        self._all(self._first(passes))
        if found := self._believed(passes):
            # a dictionary may have two things wrong with it
            self._all(self._second(found.candidate))
            return self._believed(passes)
        if passes:
            return None
        if self.readable:
            self._all(causes.moved(self.base, site) for site in self._sites(far=True))
            if found := self._believed(passes):
                return found
        for near in self._nearest():
            self._all(self._second(near.candidate))
            self._all(causes.gates(near.candidate, self._l0) if "gate" not in near.candidate.causes else ())
        for one in causes.b_dec(self.base):
            self._all(self._scales(one))
        for site in self._sites(far=False):
            self._all(self._scales(causes.moved(self.base, site), solve=False))
        return self._believed(passes)

    def closest(self) -> Tried | None:
        """The candidate that fits best of those that change something."""
        return min((one for one in self.tried if one.candidate.causes), key=self._misfit, default=None)

    def octaves_off(self, fit: Fit) -> float:
        """Doublings between an L0 and the published one; 0 when none is published."""
        return self.published.octaves_off(fit.l0) if self.published else 0.0

    @property
    def _l0(self) -> float | None:
        return None if self.published is None else self.published.high

    def _first(self, passes: bool) -> Iterator[Candidate]:
        places = [causes.moved(self.base, site) for site in self._sites(far=False)]
        self.rows.harvest({site for one in places for site in one.site}, self.base.text)
        yield from places
        if not self.readable:
            return
        yield from causes.read_otherwise(self.base, self.model.bos_id is not None)
        yield from self._scales(self.base)
        for one in causes.changed_weights(self.base, self._l0):
            if not passes or one.causes[-1] in _DOUBTED:
                yield one
        yield from self._norm_weights(self.base)

    def _second(self, first: Candidate) -> Iterator[Candidate]:
        if first.reading or first.text == "special tokens" or len(first.causes) > 1:
            return
        kinds = set(first.causes)
        if "scale" not in kinds:
            yield from self._scales(first)
        if "b_dec" not in kinds:
            yield from causes.b_dec(first)
        if kinds & {"hook"}:
            yield from self._norm_weights(first)
        elif self.readable:
            for site in self._sites(far=False):
                one = dataclasses.replace(causes.moved(self.base, site), causes=(*first.causes, "hook"))
                yield dataclasses.replace(
                    one,
                    make=first.make,
                    stands_in=first.stands_in,
                    text=first.text,
                    what=f"{first.what}, and {one.what}",
                    remedy=f"{first.remedy}; {one.remedy}",
                )

    def _scales(self, first: Candidate, *, solve: bool = True) -> Iterator[Candidate]:
        """On activations times the factor that fits best; without `solve`, the best of the usual ones."""
        x, y = (self.rows.at(site, first.text).float() for site in first.site)
        usual = usual_scales(x)
        scales = ScaleScan(first.make(), x, y)
        factors = [scales.least_fvu() if solve else min(usual.values(), key=scales.fvu)]
        if solve and self.published:
            factors.append(scales.nearest_l0(self.published.octaves_off))
        for factor in factors:
            if (made := causes.rescaled(first, factor, usual)) is not None:
                yield made

    def _norm_weights(self, first: Candidate) -> Iterator[Candidate]:
        layer = layer_of(first.site[0])
        before, after = site_name(layer, "ln2_normalized"), site_name(layer, "mlp_in")
        if kind_of(first.site[0]) not in ("ln2_normalized", "mlp_in") or before not in self.model.sites:
            return
        x, y = (self.rows.at(site, first.text).double() for site in (before, after))
        yield from causes.norm_weight(first, (x * y).sum(0) / x.square().sum(0))

    def _sites(self, *, far: bool) -> list[tuple[str, str]]:
        return causes.sites_to_try(self.dictionary, self.model, far=far)

    def _all(self, candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            with contextlib.suppress(UserError):  # weights that overflow with the change explain nothing
                self._try(candidate)

    def _try(self, candidate: Candidate) -> Tried:
        dictionary = candidate.make()
        encoder = self._encoders.get(id(dictionary)) or SparseEncoder(dictionary)
        if dictionary is self.dictionary:
            self._encoders[id(dictionary)] = encoder
        x, y = (self.rows.at(site, candidate.text) for site in candidate.site)
        if candidate.reading:
            x, y = (per_token(candidate.reading, part) for part in (x, y))
        made = Tried(candidate, measure(encoder, x, y, massive=candidate.text == "special tokens"))
        self.tried.append(made)
        self._on_tried(len(self.tried))
        return made

    def _believed(self, passes: bool) -> Tried | None:
        explaining = [one for one in self.tried if self._explains(one, passes)]
        least = min((one.candidate.stands_in for one in explaining), default=0)
        explaining = [one for one in explaining if one.candidate.stands_in == least]
        # two changes have to explain far more than one
        explaining.sort(key=lambda one: self._misfit(one) / FAR_BETTER ** len(one.candidate.causes))
        return explaining[0] if explaining else None

    def _explains(self, one: Tried, passes: bool) -> bool:
        kinds, fit = one.candidate.causes, one.fit
        off = self.octaves_off(fit)
        if not kinds or off > L0_OCTAVES or (passes and not set(kinds) <= _DOUBTED):
            return False
        if kinds == ("special tokens",):
            # BOS is one vector, and holds most of the variance: who was trained on it leaves almost nothing
            return fit.fvu <= MOST_FVU_SPECIAL
        if fit.fvu > (MOST_FVU if passes else MOST_FVU_EXPLAINED):
            return False
        if self.claimed is None:
            return True
        was = self.claimed.fit
        was_off = self.octaves_off(was)
        if was_off > L0_OCTAVES and off <= L0_OCTAVES / 2 and (fit.fvu <= 1.1 * was.fvu or fit.l0 < was.l0):
            return True
        if passes and fit.l0 > 1.1 * was.l0 and off >= was_off:
            # more latents explain more at any site
            return False
        margin = FAR_BETTER_PLACE if kinds in (("hook",), ("BOS",)) else FAR_BETTER
        return fit.fvu <= margin * min(1.0, was.fvu) and off <= (
            was_off + 0.1 if passes else max(was_off, 0.5)
        )

    def _nearest(self) -> list[Tried]:
        """The best of each kind of cause."""
        ranked = sorted((one for one in self.tried if one.candidate.causes), key=self._misfit, reverse=True)
        best = {one.candidate.causes: one for one in ranked}
        return sorted(best.values(), key=self._misfit)[:_WORTH_A_SECOND_LOOK]

    def _misfit(self, one: Tried) -> float:
        # twice the latents explain about so much more of what one dictionary of their size leaves
        return one.fit.fvu * 4 ** self.octaves_off(one.fit)
