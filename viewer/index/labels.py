"""A short label for each latent from what it fires on, without a language model, and how far it goes.

Every candidate is a property of the text: the token here, its word, the word's family, how it begins or
ends, its kind, the word before, the next one, the place in the sentence, words nearby, or the tokens that the
latent raises. A candidate holds on a share q of the latent's activation and on a share p of all tokens. It
can be the label when q is half at least and twice p at least, when it rests on three firings in two documents
at least, and when the latent fires on a fiftieth of the tokens where it holds. Of those the label is the one
that tells most of where the activation lies:

    q log2(q / p) + (1 - q) log2((1 - q) / (1 - p))    bits, less a little for the stranger kinds

Where none does, the same is asked of the firings above half of the latent's highest; what is left is called
mixed. A label says what goes with the latent, not what it is for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sae.kernels.workers import workers_for
from viewer.index.firings import Firings
from viewer.index.words import Reading, View, plain_word

LEAST_SHARE, LEAST_LIFT, LEAST_FIRINGS, LEAST_HIT = 0.5, 2.0, 3, 0.02
_LATENTS = 256
# bits that a kind of label costs: of two that say about as much, the plainer one
_PRICE = {
    "word": 0.0,
    "token": 0.05,
    "phrase": 0.2,
    "stem": 0.3,
    "kind": 0.3,
    "group": 0.3,
    "position": 0.3,
    "predicts": 0.4,
    "after word": 0.5,
    "before word": 0.7,
    "near": 0.9,
}
_PRICE_OF_OTHERS = 0.7
# in a list of words, for each after the first
_PRICE_OF_MORE = 0.5
_LISTS = ("word", "after word", "before word")
_LONGEST_LIST = 4
# words named where nothing explains half
_MIXED = 3
_NEAR_WORDS, _REACH, _NEAR_FIRINGS = 3, 16, 128


class Labels(NamedTuple):
    """A label a latent, made automatically."""

    text: list[str]
    evidence: list[str]
    """The share of its activation that the label explains, and how often it fires where the label holds."""
    kind: list[str]
    """What sort of label it is: silent, rare, mixed, or the property it names."""
    share: Float[np.ndarray, " latent"]
    """Of its activation, what the label explains at least; 0 for silent, rare and mixed ones."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    """One property for every latent."""

    kind: str
    length: int
    """Things that the label names."""
    price: float
    share: Float[np.ndarray, " latent"]
    """q."""
    base: Float[np.ndarray, " latent"]
    """p."""
    firings: Int[np.ndarray, " latent"]
    """Where it holds; for what is near, documents."""
    several: Bool[np.ndarray, " latent"]
    """Whether it is there at all, in two documents at least."""
    rows: int
    """Of the text."""
    text_of: Callable[[int, int], str]
    """A label, from the number of a latent and the number of things to name."""

    def text(self, latent: int) -> str:
        """The label of a latent."""
        return self.text_of(latent, self.length)

    @property
    def hit(self) -> Float[np.ndarray, " latent"]:
        """Of the rows where it holds, those where the latent fires; for what is near, 1."""
        there = self.base * self.rows if self.kind != "near" else self.firings
        return np.minimum(self.firings / np.maximum(there, 1), 1)

    def evidence(self, latent: int) -> str:
        """How far that goes."""
        explained = f"{self.share[latent]:.0%} of its activation"
        if self.kind == "near":
            return f"{explained} is on these or at most {_REACH} tokens after them"
        return f"{explained}; it fires on {self.hit[latent]:.0%} of all such tokens"

    def bits(self, firings: Int[np.ndarray, " latent"]) -> Float[np.ndarray, " latent"]:
        """What it tells of each latent of so many firings, less its price; -inf where it can be no label."""
        # a few firings that all agree are no certainty
        q = self.share * firings / (firings + 1)
        p = self.base.clip(1e-9, 1 - 1e-9)
        with np.errstate(divide="ignore", invalid="ignore"):
            told = np.where(q > 0, q * np.log2(q / p), 0) + (1 - q) * np.log2((1 - q) / (1 - p))
        fits = (self.share >= LEAST_SHARE) & (self.share >= LEAST_LIFT * p) & self.several
        fits &= (self.firings >= LEAST_FIRINGS) & (self.hit >= LEAST_HIT)
        return np.where(fits, told - self.price, -np.inf)


def make_labels(
    firings: Firings,
    reading: Reading,
    *,
    top_tokens: Int[np.ndarray, "latent rank"] | None = None,
    strings: Mapping[int, str] | None = None,
) -> Labels:
    """Labels a site's latents. `reading` is of the texts that the firings are in; make one for all sites.

    `top_tokens` are those that each latent raises most (`lens.top_logits`), and `strings` their text.
    """
    counts = np.diff(firings.starts)
    raised = None
    if top_tokens is not None and strings is not None:
        raised = _words_of(top_tokens, reading, strings)
    found = _best(firings, reading, raised)
    unexplained = np.array([c is None for c in found.chosen], bool) & (counts >= LEAST_FIRINGS)
    strong = _strong(firings, unexplained)
    at_peak = _best(strong, reading, raised)
    share = np.zeros(len(counts), np.float32)
    text, evidence, kind = [], [], []
    for latent, n in enumerate(counts.tolist()):
        plain, peak = found.chosen[latent], at_peak.chosen[latent]
        if n == 0:
            made = ("never fired here", "", "silent")
        elif plain is not None:
            share[latent] = plain.share[latent]
            made = (plain.text(latent), plain.evidence(latent), plain.kind)
        elif peak is not None:
            share[latent] = peak.share[latent] * at_peak.total[latent] / found.total[latent]
            shown = f"{peak.share[latent]:.0%} of its activation above half its highest, "
            shown += f"which is {share[latent]:.0%} of all its activation"
            made = (f"at its strongest: {peak.text(latent)}", shown, f"strongest {peak.kind}")
        else:
            sort = "rare" if n < LEAST_FIRINGS else "mixed"
            named = found.words if found.words.firings[latent] else found.tokens
            shown = f"these hold {named.share[latent]:.0%} of its activation; firings: {n:,}"
            made = (f"{sort}: {named.text(latent)}", shown, sort)
        for column, value in zip((text, evidence, kind), made, strict=True):
            column.append(value)
    return Labels(text, evidence, kind, share)


class _Best(NamedTuple):
    """The best candidate of each latent, None where none will do."""

    chosen: list[_Candidate | None]
    words: _Candidate
    tokens: _Candidate
    """The words, and the tokens, that tell most of it, whether they explain it or not."""
    total: Float[np.ndarray, " latent"]
    """Its activation, summed."""


def _best(firings: Firings, reading: Reading, raised: Int[np.ndarray, "latent rank"] | None) -> _Best:
    total = np.maximum(_per_latent(np.add, firings, np.float64), np.finfo(np.float64).tiny)
    candidates = [c for view in reading.views for c in _of_view(view, firings, reading, total)]
    words = next(c for c in candidates if c.kind == "list of words" and c.length == _MIXED)
    tokens = next(c for c in candidates if c.kind == "token")
    candidates += _near(firings, reading)
    if raised is not None:
        candidates.append(_predicts(firings, reading, raised, total))
    bits = np.stack([c.bits(np.diff(firings.starts)) for c in candidates])
    best = zip(bits.argmax(0).tolist(), (bits.max(0) > -np.inf).tolist(), strict=True)
    return _Best([candidates[n] if there else None for n, there in best], words, tokens, total)


def _per_latent(ufunc: np.ufunc, firings: Firings, dtype: type) -> Float[np.ndarray, " latent"]:
    """`ufunc` over each latent's activations, as their sum or the largest; 0 where there are none."""
    found, fired = np.zeros(len(firings), dtype), np.diff(firings.starts) > 0
    # a latent that never fires ends where it begins, so the others' lists are whole
    found[fired] = ufunc.reduceat(firings.activation, firings.starts[:-1][fired], dtype=dtype)
    return found


def _strong(firings: Firings, which: Bool[np.ndarray, " latent"]) -> Firings:
    """The firings of some latents that are above half of the latent's highest."""
    from viewer.index.label_loops import mark_above

    least = np.where(which, _per_latent(np.maximum, firings, np.float32) / 2, np.inf).astype(np.float32)
    kept, counts = np.empty(len(firings.row), bool), np.zeros(len(firings), np.int64)

    def some(first: int) -> None:
        span = slice(first, first + _LATENTS)
        mark_above(firings.starts[first : span.stop + 1], firings.activation, least[span], kept, counts[span])

    workers_for(torch.get_num_threads()).run(some, range(0, len(firings), _LATENTS))
    starts = np.append(0, np.cumsum(counts))
    return Firings(starts=starts, row=firings.row[kept], activation=firings.activation[kept])


def _of_view(view: View, firings: Firings, reading: Reading, total: np.ndarray) -> list[_Candidate]:
    """The property that tells most of each latent's activation, and lists of two and more of them."""
    from viewer.index.label_loops import sum_by_key  # late: numba takes a second to import

    ranks = _LONGEST_LIST if view.kind in _LISTS else 1
    shape = (len(firings), ranks)
    best, mass, count = np.full(shape, -1), np.zeros(shape), np.zeros(shape, np.int64)
    several = np.zeros(len(firings), bool)
    share_of = view.share if len(view.names) else np.ones(1)

    def some(first: int) -> None:
        part = [array[first : first + _LATENTS] for array in (best, mass, count, several)]
        arrays = (firings.starts, firings.row, firings.activation, view.key, reading.document)
        sum_by_key(*arrays, share_of, first, *part)

    workers_for(torch.get_num_threads()).run(some, range(0, len(firings), _LATENTS))
    # a list that names a word for each firing explains nothing
    each = np.minimum.accumulate(count, axis=1) >= np.minimum(np.arange(ranks) + 1, LEAST_FIRINGS)
    share = np.cumsum(mass, axis=1) / total[:, None]
    base = np.cumsum(np.append(view.share, 0)[best], axis=1)
    count = np.cumsum(count, axis=1)

    def text(latent: int, length: int) -> str:
        return view.lead + ", ".join(view.names[k] for k in best[latent, :length].tolist() if k >= 0)

    return [
        _Candidate(
            kind=view.kind if rank == 0 else f"list of {view.kind}s",
            length=rank + 1,
            price=_PRICE.get(view.kind, _PRICE_OF_OTHERS) + rank * _PRICE_OF_MORE,
            share=share[:, rank],
            base=base[:, rank],
            firings=count[:, rank],
            several=several & each[:, rank],
            rows=len(reading.document),
            text_of=text,
        )
        for rank in range(ranks)
    ]


def _near(firings: Firings, reading: Reading) -> list[_Candidate]:
    """Whether a word, or one of two or three, stands nearby."""
    from viewer.index.label_loops import cover_near, list_near

    words, n_words = reading.topic_word, max(len(reading.topic_words), 1)
    counts = np.zeros(n_words, np.int64)
    lists = np.empty((len(words), 1 + _REACH), np.int32)
    list_near(words, reading.document, lists, counts)
    near = counts / max(len(words), 1)
    shape = (len(firings), _NEAR_WORDS)
    chosen: np.ndarray = np.full(shape, -1)
    covered = np.zeros(shape)
    documents = np.zeros(shape, np.int64)

    def some(first: int) -> None:
        part = [array[first : first + _LATENTS] for array in (chosen, covered, documents)]
        arrays = (firings.starts, firings.row, firings.activation, lists, reading.document)
        cover_near(*arrays, near, first, _NEAR_FIRINGS, *part)

    workers_for(torch.get_num_threads()).run(some, range(0, len(firings), _LATENTS))
    base = np.cumsum(np.append(near, 0)[chosen], axis=1)

    def text(latent: int, length: int) -> str:
        return "near " + ", ".join(reading.topic_words[k] for k in chosen[latent, :length].tolist())

    return [
        _Candidate(
            kind="near",
            length=rank + 1,
            price=_PRICE["near"] + rank * _PRICE_OF_MORE,
            share=covered[:, rank],
            base=base[:, rank],
            firings=documents[:, rank],
            several=chosen[:, rank] >= 0,
            rows=len(reading.document),
            text_of=text,
        )
        for rank in range(_NEAR_WORDS)
    ]


def _words_of(
    top: Int[np.ndarray, "latent rank"], reading: Reading, strings: Mapping[int, str]
) -> Int[np.ndarray, "latent rank"]:
    """The words of each latent's tokens that the text has, in their order, and then -1."""
    tokens, at = np.unique(top, return_inverse=True)
    numbers = [reading.word_of.get(plain_word(strings[token]), -1) for token in tokens.tolist()]
    words = np.array(numbers, np.int64)[at.reshape(top.shape)]
    # a word counts once, however many of its spellings are raised
    again = np.zeros(top.shape, bool)
    for rank in range(1, top.shape[1]):
        again[:, rank] = (words[:, :rank] == words[:, rank, None]).any(1)
    words[again] = -1
    return np.take_along_axis(words, np.argsort(words < 0, axis=1, kind="stable"), 1)


def _predicts(firings: Firings, reading: Reading, sets: np.ndarray, total: np.ndarray) -> _Candidate:
    """Whether the next word is one that the latent raises."""
    from viewer.index.label_loops import sum_on_sets

    n_words = max(len(reading.word_of), 1)
    mass, count = np.zeros(len(firings)), np.zeros(len(firings), np.int64)
    several = np.zeros(len(firings), bool)
    arrays = (firings.row, firings.activation, reading.next_word, reading.document)

    def some(first: int) -> None:
        span = slice(first, first + _LATENTS)
        starts = firings.starts[first : span.stop + 1]
        sum_on_sets(starts, *arrays, sets[span], n_words, mass[span], count[span], several[span])

    workers_for(torch.get_num_threads()).run(some, range(0, len(firings), _LATENTS))
    there = reading.next_word[reading.next_word >= 0]
    base = np.append(np.bincount(there, minlength=n_words) / max(len(reading.next_word), 1), 0)[sets]

    def text(latent: int, length: int) -> str:
        likely = sorted(range(sets.shape[1]), key=lambda rank: -base[latent, rank])
        found = sets[latent, likely[:length]].tolist()
        return "predicts " + ", ".join(reading.words[k] for k in found if k >= 0)

    return _Candidate(
        kind="predicts",
        length=_MIXED,
        price=_PRICE["predicts"],
        share=mass / total,
        base=base.sum(1),
        firings=count,
        several=several,
        rows=len(reading.document),
        text_of=text,
    )
