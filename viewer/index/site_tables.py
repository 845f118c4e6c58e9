"""The tables of one site's index, from the evidence of its firings and from its weights."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32, Int

from activations.int8 import HasUnembedding
from sae import Dictionary
from viewer.index.adjacent import Between, adjacent_sites
from viewer.index.evidence import Evidence
from viewer.index.geometry import (
    Alignment,
    Duplicates,
    Neighbours,
    duplicates,
    encoder_decoder,
    neighbours,
    neuron_alignment,
)
from viewer.index.labels import make_labels
from viewer.index.lens import TokenLogits, Vocabulary, logit_histogram_edges, top_logits
from viewer.index.storage import (
    DRIVERS,
    EXAMPLES,
    LATENTS,
    RELATED,
    SCHEMAS,
    make_lists,
    make_table,
    make_words,
)
from viewer.index.words import Reading

LOGITS = 10
Logits = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Columns of `LATENTS`, and what the manifest says of them."""
_RESIDUAL_KINDS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def lowest_activation(dictionary: Dictionary) -> Float32[np.ndarray, " latent"]:
    """What each latent's activation is above where it fires."""
    threshold = dictionary.firing_threshold
    if threshold is None:
        return np.zeros(dictionary.cfg.d_sae, np.float32)
    return threshold.detach().float().clamp(min=0).cpu().numpy()


class TokenStrings(dict[int, str]):
    """The text of tokens, each decoded once."""

    def __init__(self, decode: Callable[[Sequence[int]], Sequence[str]]) -> None:
        super().__init__()
        self._decode = decode

    def add(self, ids: Int[np.ndarray, "..."]) -> None:
        """Decodes those of some tokens that are not known yet."""
        new = [token for token in np.unique(ids).tolist() if token not in self]
        self.update(zip(new, self._decode(new), strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class Common:
    """What all sites of an index have in common."""

    model: HasUnembedding
    dictionaries: Mapping[str, Dictionary]
    """The sites that are indexed together; neighbours in other layers are found among them."""
    vocabulary: Vocabulary
    strings: TokenStrings
    reading: Reading


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """What is known of a site before its decoder rows are read as tokens, and its latents labelled."""

    found: Evidence
    latents: Mapping[str, Any]
    related: Sequence[tuple[str, str, Mapping[str, np.ndarray]]]
    """The kind of relation, the site of the other latents, and columns."""
    facts: Mapping[str, Any]


def prepare_site(
    dictionaries: Mapping[str, Dictionary], between: Between, site: str, found: Evidence
) -> Generator[None, None, Site]:
    """What follows from a site's firings and weights; yields where it can be left, between long steps.

    The sites of an index go through it one after another, as `between` asks.
    """
    dictionary = dictionaries[site]
    threshold, (norm, cosine) = dictionary.firing_threshold, encoder_decoder(dictionary)
    latents = {
        **found.latents,
        "threshold": None if threshold is None else threshold.detach().float().cpu().numpy(),
        "decoder_norm": norm,
        "encoder_decoder_cosine": cosine,
        "neuron_alignment": _alignment_column(neuron_alignment(dictionary.W_dec)),
    }
    yield
    own = neighbours(dictionary.W_dec, dictionary.W_dec, same=True)
    yield
    copies, beside = duplicates(own, found.firings), adjacent_sites(dictionaries, site)
    latents["duplicate_of"] = _duplicate_of(copies, len(found.firings))
    related = [("cofiring", site, found.cofiring), ("cosine", site, _listed(own))]
    for kind, other in sorted(beside.items()):
        related.append((kind, other, _listed(between.neighbours(site, other))))
        yield
    return Site(
        found=found,
        latents=latents,
        related=related,
        facts={**beside, "duplicates": len(copies.latent), "logits": 0},
    )


@torch.inference_mode()
def read_logits(common: Common, site: str) -> Logits:
    """The tokens that a site's decoder rows speak for, if they go to the residual stream."""
    model, dictionary = common.model, common.dictionaries[site]
    if not _speaks(dictionary, site, model):
        none = np.zeros((dictionary.cfg.d_sae, 0), np.int32)
        return {f"{side}_{name}": none for side in ("top", "bottom") for name in ("tokens", "logits")}, {}
    found = top_logits(model, dictionary.W_dec, count=LOGITS, vocabulary=common.vocabulary)
    return _logit_columns(found), {
        "logits": LOGITS,
        "logit_histogram_edges": logit_histogram_edges().tolist(),
    }


def make_tables(common: Common, known: Site, logits: Logits) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """A table of each of `storage.SCHEMAS`, and what the manifest says of them."""
    found, latents, facts = known.found, {**known.latents, **logits[0]}, {**known.facts, **logits[1]}
    top = latents["top_tokens"] if facts["logits"] else None
    common.strings.add(latents["top_tokens"])
    common.strings.add(latents["bottom_tokens"])
    labels = make_labels(found.firings, common.reading, top_tokens=top, strings=common.strings)
    latents |= {"label": labels.text, "label_evidence": labels.evidence}
    latents |= {"label_kind": labels.kind, "label_share": labels.share}
    columns: dict[str, Any] = {LATENTS: latents, EXAMPLES: found.examples, DRIVERS: found.drivers}
    columns[RELATED] = _related(known.related)
    return {name: make_table(SCHEMAS[name], table) for name, table in columns.items()}, facts


def _listed(near: Neighbours) -> dict[str, np.ndarray]:
    """Neighbours as columns, a row a pair."""
    latent, rank = where = np.nonzero(near.ids >= 0)
    return {"latent": latent, "rank": rank, "other": near.ids[where], "value": near.cosine[where]}


def _related(near: Sequence[tuple[str, str, Mapping[str, np.ndarray]]]) -> dict[str, Any]:
    """Columns of related.parquet, from some of each kind of relation to a site."""
    order = np.argsort(np.concatenate([columns["latent"] for _, _, columns in near]), kind="stable")
    part = np.repeat(np.arange(len(near)), [len(columns["latent"]) for _, _, columns in near])[order]
    joined = {
        name: np.concatenate([columns[name] for _, _, columns in near])[order]
        for name in ("latent", "rank", "other", "value")
    }
    # only one kind of relation counts tokens
    counts = [columns.get("count", np.full(len(columns["latent"]), -1)) for _, _, columns in near]
    count = np.concatenate(counts)[order]
    return {
        **joined,
        "kind": make_words(part, [kind for kind, _, _ in near]),
        "other_site": make_words(part, [site for _, site, _ in near]),
        "count": np.ma.masked_where(count < 0, count),
    }


def _duplicate_of(copies: Duplicates, d_sae: int) -> np.ma.MaskedArray:
    """The smallest latent that each is a copy of; masked where there is none."""
    first = np.full(d_sae, d_sae, np.int32)
    np.minimum.at(first, copies.other, copies.latent)
    return np.ma.masked_where(first == d_sae, first)


def _alignment_column(found: Alignment) -> pa.ListArray:
    columns = {"neuron": found.ids, "value": found.values, "share": found.share}
    arrays = [pa.array(np.ascontiguousarray(values).reshape(-1)) for values in columns.values()]
    entries = pa.StructArray.from_arrays(arrays, names=list(columns))
    return make_lists(np.full(len(found.ids), found.ids.shape[1]), entries)


def _logit_columns(found: TokenLogits) -> dict[str, np.ndarray]:
    half = found.ids.shape[1] // 2
    sides = {
        f"{side}_{name}": values[:, span]
        for side, span in (("top", slice(0, half)), ("bottom", slice(half, None)))
        for name, values in (("tokens", found.ids), ("logits", found.logits))
    }
    spread = {"logit_mean": found.mean, "logit_std": found.std, "logit_skew": found.skew}
    return {**sides, **spread, "logit_histogram": found.histogram}


def _speaks(dictionary: Dictionary, site: str, model: HasUnembedding) -> bool:
    """Whether it writes to the residual stream, which the unembedding reads."""
    cfg = dictionary.cfg
    return (cfg.site_out or site).endswith(_RESIDUAL_KINDS) and cfg.d_out == model.W_U.shape[0]
