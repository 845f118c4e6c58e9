"""Search over the latents of all indexed sites. Needs no language model: what the index knows is enough.

Scores are from 0 to 1 and are told at each function; `why` says in words what a score rests on.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Float64, Int, Int64

from activations.sites import layer_of
from sae.errors import UserError
from viewer.features import Feature, Site
from viewer.markup import percent, readable
from viewer.tables import IndexFolder, SiteTables, place_of, stem
from viewer.windows import near

# what a word counts for where it is found: nothing but a label or all of a latent's activation is full proof
_IN_LABEL, _IN_CONTEXT, _IN_LOGITS = 1.0, 0.5, 0.5
_REACH = 8
"""Tokens either side of an example's peak that count as its context."""
_HINTS = 5
_ITSELF = -2.0
"""Below every cosine."""
_COLUMNS = ["site", "layer", "latent", "label", "why", "score"]
_PROOFS = ("label", "drivers", "context", "logits")


class _Word(NamedTuple):
    """A word that is looked for: its stem, the tokens that have it, and the places (`place_of`) near one."""

    stem: str
    tokens: Int[np.ndarray, " token"]
    context: Int64[np.ndarray, " place"]


def find_token(token: str | int, index: IndexFolder, sites: Sequence[str], limit: int) -> pd.DataFrame:
    """Latents that the token drives: site, layer, latent, label, why, score and the numbers behind it.

    share is the token's part of the latent's activation, coverage the part of the token's occurrences on
    which it fires; score is their harmonic mean, so a latent must fire on little else and miss little. All
    numbers are exact. Searched are each latent's ten first tokens by activation and by lift: whatever is
    left out has a share under 1/11. Raises UserError when the indexed text does not have the token.
    """
    wanted = np.array(index.strings.ids(token) if isinstance(token, str) else [token])
    occurrences = int((np.isin(index.texts.tokens, wanted) & index.texts.keep).sum())
    if not occurrences:
        raise UserError("the token must be in the indexed text", repr(token), _token_hint(token, index))
    drivers = index.each(sites, lambda site: index.site(site).all_drivers)
    frames = []
    for site, of_site in zip(sites, drivers, strict=True):
        found = _driven(of_site, wanted, occurrences)
        order = np.argsort(-found["score"], kind="stable")[:limit]
        frames.append(pd.DataFrame({"site": site} | {name: column[order] for name, column in found.items()}))
    best = _best(pd.concat(frames, ignore_index=True), index, limit)
    shown = readable(token) if isinstance(token, str) else readable(index.strings.of([token])[0])
    best["why"] = [
        f"{percent(share)} of its activation is on {shown}; fires on {percent(coverage)} of them"
        for share, coverage in zip(best["share"], best["coverage"], strict=True)
    ]
    return best.loc[:, [*_COLUMNS, "share", "coverage", "lift", "count", "mean"]]


def find_text(text: str, index: IndexFolder, sites: Sequence[str], limit: int) -> pd.DataFrame:
    """Latents about the words of a text: site, layer, latent, label, why, score.

    A word is found, in any case and number, in the label; in tokens that drive the latent (worth their
    share of its activation); in the context of its highest examples (worth half the part of them that have
    it); in the tokens it raises (worth half, less for later ranks). What is found of a word adds up as
    1 - (1 - a)(1 - b)...; the score is the mean over words, in which rare ones weigh more. Raises
    UserError when there is no word in the text.
    """
    words = list(dict.fromkeys(stem(word) for word in re.findall(r"\w+", text)))
    if not words:
        raise UserError("find needs a word", repr(text), "give one or several, or look for a token")
    tokens = [np.array(index.strings.by_word.get(word, []), np.int64) for word in words]
    sought = [
        _Word(word, ids, place_of(*near(index.texts, ids, _REACH).nonzero()))
        for word, ids in zip(words, tokens, strict=True)
    ]
    index.each(sites, lambda site: index.site(site).warm())
    proofs = {site: _proof(index.site(site), index.annotations.labels(site), sought) for site in sites}
    found_anywhere = [sum(int((p[n].max(0) > 0).sum()) for p in proofs.values()) for n in range(len(words))]
    total = sum(p.shape[2] for p in proofs.values())
    weight = np.log1p(total / (1 + np.array(found_anywhere)))
    frames = []
    for site, proof in proofs.items():
        score = (weight / weight.sum()) @ (1 - np.prod(1 - proof, axis=1))
        some = np.flatnonzero(score)
        best = some[np.argsort(-score[some], kind="stable")[:limit]]
        frames.append(pd.DataFrame({"site": site, "latent": best, "score": score[best]}))
    found = _best(pd.concat(frames, ignore_index=True), index, limit)
    found["why"] = [
        _why(words, proofs[site][:, :, latent])
        for site, latent in zip(found["site"], found["latent"], strict=True)
    ]
    return found.loc[:, _COLUMNS]


def find_like(like: Feature, index: IndexFolder, sites: Sequence[str], limit: int) -> pd.DataFrame:
    """Latents whose decoder rows point as that of `like`, as in `find_text`; the score is the cosine.

    Sites that write to another width are left out.
    """
    frames = []
    for site, cosine in _cosines(like, index, sites):
        best = np.argsort(-cosine, kind="stable")[: limit + 1]
        best = best[cosine[best] > _ITSELF]
        frames.append(pd.DataFrame({"site": site, "latent": best, "score": cosine[best]}))
    found = pd.concat(frames, ignore_index=True)
    found["why"] = f"decoder cosine with {like.title()}"
    return _best(found, index, limit).loc[:, _COLUMNS]


def follow(like: Feature, index: IndexFolder, sites: Sequence[str]) -> pd.DataFrame:
    """The latent of every other site that points most nearly as `like`: site, layer, latent, label, cosine.

    A row each of `sites` that writes to the same width and whose dictionary is here, but for its own.
    """
    rows = []
    for site, cosine in _cosines(like, index, sites):
        if not (site == like.site.name and _ITSELF in cosine):
            latent = int(cosine.argmax())
            label = index.labels_of(site, [latent])[0] if (index.root / site).is_dir() else ""
            rows.append((site, layer_of(site), latent, label, float(cosine[latent])))
    return pd.DataFrame(rows, columns=["site", "layer", "latent", "label", "cosine"])


def duplicates(sites: Mapping[str, Site], cosine: float) -> pd.DataFrame:
    """Pairs of latents of a site whose decoder rows have at least this cosine, as `Run.duplicates` says."""
    rows = []
    for name, site in sites.items():
        related = site.tables.all_cosines
        chosen = related["value"] >= cosine
        pairs = np.sort(np.stack([related["latent"][chosen], related["other"][chosen]], axis=1), axis=1)
        for (latent, other), value in dict(
            zip(map(tuple, pairs.tolist()), related["value"][chosen].tolist(), strict=True)
        ).items():
            a, b = (site.tables.firings.latent(n)[0] for n in (latent, other))
            both = len(np.intersect1d(a, b, assume_unique=True))
            either = len(a) + len(b) - both
            rows.append((name, latent, other, value, both / either if either else 0.0))
    frame = pd.DataFrame(rows, columns=["site", "latent", "other", "cosine", "jaccard"])
    return frame.sort_values("cosine", ascending=False, kind="stable", ignore_index=True)


def _cosines(
    like: Feature, index: IndexFolder, sites: Sequence[str]
) -> Iterator[tuple[str, Float[np.ndarray, " latent"]]]:
    """Each site's decoder cosines with `like`; of itself _ITSELF. Sites of another width are left out."""
    direction = like.direction()
    direction = direction / direction.norm().clamp_min(1e-30)
    home = index.root.resolve() == like.site.index.root.resolve()
    for site in sites:
        W_dec = index.decoder(site)
        if W_dec.shape[1] == len(direction):
            cosine = (W_dec @ direction / index.decoder_norm(site)).numpy()
            if home and site == like.site.name:
                cosine[like.latent] = _ITSELF
            yield site, cosine


def _driven(
    drivers: Mapping[str, np.ndarray], wanted: Int[np.ndarray, " token"], occurrences: int
) -> dict[str, np.ndarray]:
    """The latents of a site that any of the tokens drives, in order, with the numbers of `find_token`."""
    # looked through, not looked up: a first search would wait longer for the sorting than for the file
    here = np.flatnonzero(np.isin(drivers["token"], wanted))
    # a token may be there by activation and by lift
    pair = drivers["latent"][here].astype(np.int64) << 32 | drivers["token"][here]
    here = here[np.unique(pair, return_index=True)[1]]
    # and several tokens may read the same
    latent, start = np.unique(drivers["latent"][here], return_index=True)
    count, share, mean, lift = (
        drivers[name][here].astype(np.float64) for name in ("count", "share", "mean", "lift")
    )
    total, share = np.add.reduceat(count, start), np.add.reduceat(share, start)
    coverage = total / occurrences
    return {
        "latent": latent,
        "share": share,
        "coverage": coverage,
        "score": 2 * share * coverage / (share + coverage),
        "lift": np.maximum.reduceat(lift, start),
        "count": total.astype(np.int64),
        "mean": np.add.reduceat(mean * count, start) / total,
    }


def _proof(
    tables: SiteTables, own: dict[int, str], words: Sequence[_Word]
) -> Float64[np.ndarray, "word proof latent"]:
    """What each latent of a site has of each word, in the order of _PROOFS. `own` is people's labels."""
    proof = np.zeros((len(words), len(_PROOFS), tables.n_latents))
    for found, word in zip(proof, words, strict=True):
        _in_labels(found[0], tables, own, word.stem)
        if len(word.tokens):
            _in_evidence(found, tables, word)
    return np.minimum(proof, 1.0, out=proof)


def _in_labels(
    proof: Float64[np.ndarray, " latent"], tables: SiteTables, own: dict[int, str], word: str
) -> None:
    # first the labels that have a word's beginning, since its plural may end otherwise
    begins = tables.labelled(word.removesuffix("y"))
    some = {latent: tables.automatic_labels[latent] for latent in begins} | own
    for latent, label in some.items():
        if latent < tables.n_latents and any(stem(found) == word for found in re.findall(r"\w+", label)):
            proof[latent] = _IN_LABEL


def _in_evidence(proof: Float64[np.ndarray, "proof latent"], tables: SiteTables, word: _Word) -> None:
    drivers = tables.all_drivers
    hit = tables.drivers_of.of(word.tokens)
    # a token may be there by activation and by lift
    pair = drivers["latent"][hit].astype(np.int64) << 32 | drivers["token"][hit]
    hit = hit[np.unique(pair, return_index=True)[1]]
    np.add.at(proof[1], drivers["latent"][hit], drivers["share"][hit])
    near_by = tables.top_examples["latent"][tables.examples_at.of(word.context)]
    number = np.bincount(near_by, minlength=tables.n_latents)
    np.divide(_IN_CONTEXT * number, tables.n_top_examples, out=proof[2], where=number > 0)
    raised = tables.raised
    hit = tables.raised_by.of(word.tokens)
    np.maximum.at(proof[3], raised["latent"][hit], _IN_LOGITS / (1 + raised["rank"][hit]))


def _why(words: list[str], proof: Float[np.ndarray, "word proof"]) -> str:
    parts = []
    for word, (label, drivers, context, logits) in zip(words, proof.tolist(), strict=True):
        said = ["label"] if label else []
        said += [f"{percent(drivers)} of its activation"] if drivers else []
        said += [f"near {percent(context / _IN_CONTEXT)} of its examples"] if context else []
        said += ["raised"] if logits else []
        parts += [f"{word}: {', '.join(said)}"] if said else []
    return "; ".join(parts)


def _best(found: pd.DataFrame, index: IndexFolder, limit: int) -> pd.DataFrame:
    """The best `limit` rows, with layer and label. Ties keep the order of sites and latents."""
    best = found.sort_values("score", ascending=False, kind="stable").head(limit).reset_index(drop=True)
    best["layer"] = [layer_of(site) for site in best["site"]]
    # filled as an array: a frame takes a millisecond for every site's part
    sites, latents = best["site"].to_numpy(), best["latent"].to_numpy()
    labels = np.full(len(best), "", object)
    named = sorted(set(sites) & set(index.sites()))
    some = index.each(named, lambda site: index.labels_of(site, latents[sites == site].tolist()))
    for site, found_labels in zip(named, some, strict=True):
        labels[sites == site] = found_labels
    best["label"] = labels
    return best


def _token_hint(token: str | int, index: IndexFolder) -> str:
    if not isinstance(token, str):
        return "give a token's text, such as ' Paris', or another number"
    # tokens that are named for their logits alone are no help here
    read = np.intersect1d(index.strings.by_word.get(stem(token), []), index.texts.tokens[index.texts.keep])
    near_by = index.strings.of(read[:_HINTS])
    known = ", ".join(repr(text) for text in near_by)
    return (
        f"the text has {known}" if known else "a token is often a piece of a word: look for words with text="
    )
