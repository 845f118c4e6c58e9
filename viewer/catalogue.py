"""All latents of a run side by side, to filter, sort and page through: a table of 300,000 rows stays quick.

Numbers are kept as arrays; only the rows of the page that is asked for become objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from activations.sites import layer_of
from sae.errors import UserError
from viewer.once import once
from viewer.tables import IndexFolder, SiteTables, containing

STATES = ("live", "silent", "dense", "duplicate")
"""What a latent can be; a duplicate is live or dense as well."""
SORTS = ("place", "label", "token", "density", "firings", "mean", "max", "score")
"""What latents can be sorted by. `place` is site and number; `score` needs the answer of a search."""
_DESCENDING = ("density", "firings", "mean", "max", "score")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which latents, in which order."""

    site: str = ""
    """One site's only; "" for all."""
    state: str = ""
    """One of STATES only; "" for all."""
    label: str = ""
    """Only those whose label has this text, in any case."""
    density: tuple[float, float] = (0.0, 1.0)
    """The least and the greatest share of tokens on which they fire."""
    highest: float = 0.0
    """The least highest activation."""
    sort: str = "place"
    """One of SORTS."""
    reverse: bool = False
    """Against the usual direction: numbers highest first, texts and places from the start."""

    def __post_init__(self) -> None:
        for name, value, known in (("state", self.state, ("", *STATES)), ("sort", self.sort, SORTS)):
            if value not in known:
                raise UserError(
                    f"{name} must be one that latents have", repr(value), f"choose from {', '.join(known)}"
                )


@dataclass(frozen=True)
class Found:
    """A page of latents."""

    rows: pd.DataFrame
    """site, layer, latent, label, label_source, token (its strongest driver, "" for none), density, firings,
    mean, max, state, duplicate_of (NaN for none), score (NaN without a search), why ("" without)."""
    total: int
    """Latents on all pages."""
    torn: dict[str, str]
    """Sites whose index cannot be read, which are left out, and why."""


class Catalogue:
    """The numbers of every latent of some sites, as their tables are."""

    def __init__(self, index: IndexFolder, tables_of: Mapping[str, SiteTables]) -> None:
        self._index, self._tables = index, dict(tables_of)
        self.sites = list(self._tables)
        tables = list(tables_of.values())
        number = [t.n_latents for t in tables]
        self._starts = np.cumsum([0, *number])
        self._site = np.repeat(np.arange(len(tables), dtype=np.int16), number)
        scalars = [t.scalars for t in tables]
        self._columns: dict[str, np.ndarray] = {
            name: np.concatenate([np.zeros(0), *(s[name].to_numpy() for s in scalars)])
            for name in ("density", "firings", "mean", "max", "duplicate_of")
        }
        states = [s["state"].to_numpy() for s in scalars]
        self._state = np.concatenate([np.zeros(0, object), *states]).astype(str)

    def browse(
        self, choice: Choice, among: pd.DataFrame | None, torn: dict[str, str], *, start: int, rows: int
    ) -> Found:
        """Of the latents that `choice` leaves, in its order, the `rows` from `start` on.

        `among` has the columns site, latent, score and why, as an answer of `Run.find`: only these then.
        """
        keep = self._kept(choice)
        score = None
        if among is not None:
            place, score = self._places(among), np.full(len(keep), np.nan)
            known = place >= 0
            score[place[known]] = among["score"].to_numpy()[known]
            keep &= ~np.isnan(score)
        chosen = np.flatnonzero(keep)
        chosen = chosen[self._order(choice, chosen, score)]
        page = chosen[start : start + rows]
        frame = self._rows(page)
        frame["score"] = np.nan if score is None else score[page]
        why = dict(zip(self._places(among).tolist(), among["why"], strict=True)) if among is not None else {}
        frame["why"] = [why.get(place, "") for place in page.tolist()]
        return Found(frame, len(chosen), torn)

    def _kept(self, choice: Choice) -> Bool[np.ndarray, " all"]:
        low, high = choice.density
        density = self._columns["density"]
        keep = (density >= low) & (density <= high) & (self._columns["max"] >= choice.highest)
        if choice.site:
            known = self.sites.index(choice.site) if choice.site in self.sites else -1
            keep &= self._site == known
        if choice.state == "duplicate":
            keep &= ~np.isnan(self._columns["duplicate_of"])
        elif choice.state:
            keep &= self._state == choice.state
        if choice.label:
            keep &= containing(self._labels(), choice.label.casefold())
        return keep

    def _order(
        self, choice: Choice, chosen: Int[np.ndarray, " chosen"], score: np.ndarray | None
    ) -> Int[np.ndarray, " chosen"]:
        """How to put the chosen in order; ties keep that of sites and latents."""
        if choice.sort == "place" or (choice.sort == "score" and score is None):
            order = np.arange(len(chosen))
            return order[::-1] if choice.reverse else order
        if choice.sort == "label":
            key = _ranks(self._labels().take(pa.array(chosen)))
        elif choice.sort == "token":
            key = self._token_rank[chosen]
        else:
            key = (
                score[chosen]
                if choice.sort == "score" and score is not None
                else self._columns[choice.sort][chosen]
            )
        if choice.sort in ("label", "token"):
            # what has none comes last, whichever way
            key = np.where(key < 0, np.inf, -key if choice.reverse else key)
        elif not choice.reverse:
            key = -key
        return np.argsort(key, kind="stable")

    def _labels(self) -> pa.Array:
        """Every label in one case, people's own for those that have one."""
        arrays = []
        for site, tables in self._tables.items():
            labels = tables.folded_labels
            own = {n: text for n, text in self._index.annotations.labels(site).items() if n < len(labels)}
            if own:
                texts = labels.to_pylist()
                for latent, text in own.items():
                    texts[latent] = text.casefold()
                labels = pa.array(texts, pa.string())
            arrays.append(labels)
        return pa.concat_arrays(arrays) if arrays else pa.array([], pa.string())

    @once
    def _token(self) -> Int[np.ndarray, " all"]:
        return np.concatenate([np.zeros(0, np.int32), *(t.top_driver for t in self._tables.values())])

    @once
    def _token_rank(self) -> Int[np.ndarray, " all"]:
        """The place of each latent's strongest driver in the alphabet; -1 for none."""
        known, which = np.unique(self._token, return_inverse=True)
        texts = [text.strip().casefold() for text in self._index.strings.of(known)]
        rank = _ranks(pa.array(texts, pa.string()))
        return np.where(self._token < 0, -1, rank[which])

    def _places(self, found: pd.DataFrame) -> Int[np.ndarray, " found"]:
        """Where the latents of `found` are among all; -1 for those that are not."""
        start = {site: int(self._starts[n]) for n, site in enumerate(self.sites)}
        places = [
            start[site] + latent if site in start else -1
            for site, latent in zip(found["site"], found["latent"].tolist(), strict=True)
        ]
        return np.array(places, np.int64)

    def _rows(self, page: Int[np.ndarray, " page"]) -> pd.DataFrame:
        site = self._site[page]
        names = [self.sites[n] for n in site]
        latents = page - self._starts[site]
        frame = pd.DataFrame({"site": names, "layer": [layer_of(name) for name in names], "latent": latents})
        label, source = np.full(len(page), "", object), np.full(len(page), "", object)
        for n in np.unique(site).tolist():
            name, here = self.sites[n], np.flatnonzero(site == n)
            wanted = latents[here].tolist()
            own = self._index.annotations.labels(name)
            label[here] = texts = self._index.labels_of(name, wanted)
            source[here] = [
                "yours" if n in own else "automatic" if t else "" for n, t in zip(wanted, texts, strict=True)
            ]
        frame["label"], frame["label_source"] = label, source
        token = self._token[page]
        frame["token"] = np.where(token < 0, "", np.array(self._index.strings.of(token), dtype=object))
        for name, values in self._columns.items():
            frame[name] = values[page]
        frame["firings"] = frame["firings"].astype("int64")
        frame["state"] = self._state[page]
        return frame


def _ranks(texts: pa.Array) -> Int[np.ndarray, " text"]:
    """The place of each text in the alphabet; -1 for the empty one. Equal texts share a place."""
    encoded = texts.dictionary_encode()
    options = pc.RankOptions(sort_keys="ascending")
    rank = pc.call_function("rank", [encoded.dictionary], options).to_numpy().astype(np.int64)
    empty = encoded.dictionary.index("").as_py()
    if empty >= 0:
        rank[empty] = -1
    return rank[encoded.indices.to_numpy()]
