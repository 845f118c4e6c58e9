"""What a site's firings say about each latent: counts, examples, driving tokens, what fires with it.

Everything follows from all firings on all the text, so it is exact, and the same however the text was cut.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int, Int32, Int64

from sae.kernels.workers import workers_for
from viewer.index.firings import Firings, RowLists, Texts
from viewer.index.histogram import N_BINS, histogram_bin
from viewer.index.storage import make_lists, make_words

BANDS, EXAMPLES_PER_BAND = 5, 5
DRIVERS, COFIRING = 10, 10
# with fewer firings on a token, or tokens in common, lift and phi are mostly luck
LIFT_FIRINGS, COFIRING_ROWS = 2, 3
DENSE = 0.1
"""A latent that fires on more of the tokens than this is dense."""
# latents worked on together, and the fewest parts to share out among the cores
_LATENTS, _PARTS = 256, 8
# rows on which more of the latents fire than this are counted as bits: all pairs of latents on 512 rows cost
# about as much as the pairs that fire on one such row
_CROWDED = 1 / 32
# latents counted together, whose bits are then read once
_TOGETHER = 8


class TextRows:
    """What the loops read of the texts, by row; made once for all sites."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.place = texts.place
        block, document = self.place // texts.tokens.shape[1], texts.document.reshape(-1)[self.place]
        new = (np.diff(block, prepend=-1) != 0) | (np.diff(document, prepend=-1) != 0)
        self.unit: Int32[np.ndarray, " row"] = np.cumsum(new).astype(np.int32)
        """Numbers the documents within each block."""
        ids, token, rows = np.unique(
            texts.tokens.reshape(-1)[self.place], return_inverse=True, return_counts=True
        )
        self.token: Int32[np.ndarray, " row"] = token.astype(np.int32)
        """Each row's token, as its place in `token_ids`."""
        self.token_ids: Int32[np.ndarray, " token"] = ids
        self.token_rows: Int64[np.ndarray, " token"] = rows

    def __len__(self) -> int:
        """Rows."""
        return len(self.place)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Columns for the tables of `storage`, but for what follows from weights alone."""

    firings: Firings
    latents: dict[str, Any]
    examples: dict[str, Any]
    drivers: dict[str, Any]
    cofiring: dict[str, Any]


def gather_evidence(
    lists: RowLists, rows: TextRows, *, lowest: Float32[np.ndarray, " latent"], examples: int = 20
) -> Generator[None, None, Evidence]:
    """All that follows from a site's firings on some texts; yields where it can be left, between long steps.

    `lowest` is what a latent's activations must be above: its threshold, or 0. It is the lower end of the
    range that is cut into bands. `examples` are kept of the highest.
    """
    d_sae = len(lowest)
    firings = Firings.by_latent(lists, d_sae)
    yield
    counted = _count(firings)
    edges = band_edges(counted.maximum, lowest)
    number = firings.starts[1:] - firings.starts[:-1]
    density = number / len(rows)
    with np.errstate(divide="ignore"):
        log_density = np.log10(density)
    state = np.where(number == 0, "silent", np.where(density > DENSE, "dense", "live"))
    first, lengths, counts = _trimmed(counted.histogram)
    latents = {
        "latent": np.arange(d_sae, dtype=np.int32),
        "state": state,
        "firings": number,
        "density": density,
        "log10_density": np.ma.masked_where(number == 0, log_density.astype(np.float32)),
        "mean": (counted.total / np.maximum(number, 1)).astype(np.float32),
        "max": counted.maximum,
        "histogram_first": first,
        "histogram": make_lists(lengths, counts),
        "quantiles": edges,
    }
    yield
    chosen = _examples(firings, rows, edges, examples)
    yield
    drivers = _drivers(firings, rows, counted.total)
    yield
    cofiring = _cofiring(firings, lists)
    return Evidence(firings=firings, latents=latents, examples=chosen, drivers=drivers, cofiring=cofiring)


def band_edges(
    maximum: Float32[np.ndarray, " latent"], lowest: Float32[np.ndarray, " latent"]
) -> Float32[np.ndarray, "latent band"]:
    """The lower edges of bands that cut the range from `lowest` to `maximum` in equal parts, falling."""
    low, high = np.minimum(lowest, maximum).astype(np.float64), maximum.astype(np.float64)
    steps = np.arange(1, BANDS + 1) / BANDS
    return (high[:, None] * (1 - steps) + low[:, None] * steps).astype(np.float32)


@dataclass(frozen=True)
class _Counted:
    total: np.ndarray
    maximum: np.ndarray
    histogram: np.ndarray


def _count(firings: Firings) -> _Counted:
    from viewer.index.evidence_loops import count_activations  # late: numba takes a second to import

    d_sae = len(firings)
    found = _Counted(np.zeros(d_sae), np.zeros(d_sae, np.float32), np.zeros((d_sae, N_BINS), np.int32))

    def count(part: range) -> None:
        span = slice(firings.starts[part.start], firings.starts[part.stop])
        bins = histogram_bin(firings.activation[span])
        count_activations(
            part.start, part.stop, firings.starts, firings.activation, bins,
            found.total, found.maximum, found.histogram,
        )  # fmt: skip

    _over(d_sae, count)
    return found


def _examples(
    firings: Firings, rows: TextRows, edges: Float32[np.ndarray, "latent band"], examples: int
) -> dict[str, np.ndarray]:
    from viewer.index.evidence_loops import choose_examples

    d_sae, texts = len(firings), rows.texts
    top, top_found = np.zeros((d_sae, examples), np.int32), np.zeros(d_sae, np.int32)
    banded = np.zeros((d_sae, BANDS, EXAMPLES_PER_BAND), np.int32)
    banded_found = np.zeros((d_sae, BANDS), np.int32)

    def choose(part: range) -> None:
        choose_examples(
            part.start, part.stop, firings.starts, firings.row, firings.activation,
            firings.activation.view(np.int32), rows.unit, rows.place,
            texts.tokens, texts.document, texts.position, edges,
            top, top_found, banded, banded_found,
            np.empty((1 + BANDS, max(examples, EXAMPLES_PER_BAND)), np.uint64),
        )  # fmt: skip

    _over(d_sae, choose)
    inside = np.arange(examples) < top_found[:, None]
    latent, rank = np.nonzero(inside)
    in_band = np.arange(EXAMPLES_PER_BAND) < banded_found[:, :, None]
    latent_b, band_b, rank_b = np.nonzero(in_band)
    chosen = {
        "latent": np.concatenate([latent, latent_b]).astype(np.int32),
        "band": np.concatenate([np.zeros_like(latent), 1 + band_b]).astype(np.int32),
        "rank": np.concatenate([rank, rank_b]).astype(np.int32),
    }
    row = np.concatenate([top[inside], banded[in_band]])
    # both halves are sorted by latent already: a stable sort puts each latent's bands behind its best
    order = np.argsort(chosen["latent"], kind="stable")
    chosen, row = {name: column[order] for name, column in chosen.items()}, row[order]
    block, peak = np.divmod(rows.place[row], texts.tokens.shape[1])
    return {
        **chosen,
        "block": block.astype(np.int32),
        "peak": peak.astype(np.int32),
        "activation": _activation_at(firings, chosen["latent"], row),
        "token": texts.tokens[block, peak],
    }


def _activation_at(
    firings: Firings, latent: Int32[np.ndarray, " n"], row: Int32[np.ndarray, " n"]
) -> Float32[np.ndarray, " n"]:
    """The activation of a latent on a row on which it fires, for many."""
    from viewer.index.evidence_loops import find_activations

    found = np.zeros(len(row), np.float32)
    find_activations(latent, row, firings.starts, firings.row, firings.activation, found)
    return found


def _drivers(firings: Firings, rows: TextRows, total: np.ndarray) -> dict[str, np.ndarray]:
    from viewer.index.evidence_loops import find_drivers

    d_sae, n_tokens = len(firings), len(rows.token_ids)
    tokens = np.full((2, d_sae, DRIVERS), -1, np.int32)
    counts, sums = np.zeros((d_sae, 2, DRIVERS), np.int64), np.zeros((d_sae, 2, DRIVERS))

    def find(part: range) -> None:
        room = (np.zeros(n_tokens, np.int32), np.zeros(n_tokens), np.zeros(n_tokens, np.int32))
        find_drivers(
            part.start, part.stop, firings.starts, firings.row, firings.activation,
            rows.token, rows.token_rows, LIFT_FIRINGS,
            tokens[0], tokens[1], counts, sums, *room, np.empty(DRIVERS),
        )  # fmt: skip

    _over(d_sae, find)
    by_latent = tokens.swapaxes(0, 1)
    latent, order, rank = where = np.nonzero(by_latent >= 0)
    token, count, activation = by_latent[where], counts[where], sums[where]
    number = (firings.starts[1:] - firings.starts[:-1])[latent]
    return {
        "latent": latent.astype(np.int32),
        "order": make_words(order, ("activation", "lift")),
        "rank": rank.astype(np.int32),
        "token": rows.token_ids[token],
        "count": count,
        "mean": (activation / count).astype(np.float32),
        "share": (activation / total[latent]).astype(np.float32),
        "lift": ((count / number) / (rows.token_rows[token] / len(rows))).astype(np.float32),
    }


def _cofiring(firings: Firings, lists: RowLists) -> dict[str, np.ndarray]:
    from viewer.index.evidence_loops import WORDS, find_cofiring, set_bits

    d_sae, n_rows = len(firings), len(lists)
    crowded = np.flatnonzero(np.diff(lists.starts) > _CROWDED * d_sae)
    bits = np.zeros((-(-len(crowded) // (32 * WORDS)) * WORDS, d_sae), np.uint32)
    set_bits(crowded, lists.starts, lists.latent, bits)
    ends = lists.starts[1:].copy()
    ends[crowded] = lists.starts[crowded]
    # half as much to fetch
    latent = lists.latent.astype(np.uint16) if d_sae <= 2**16 else lists.latent
    number = (firings.starts[1:] - firings.starts[:-1]).astype(np.float64)
    variance = number * (n_rows - number)
    spread = np.where(variance > 0, 1 / np.sqrt(np.maximum(variance, 1)), 0)
    others = np.full((d_sae, COFIRING), -1, np.int32)
    phi, together = np.zeros((d_sae, COFIRING), np.float32), np.zeros((d_sae, COFIRING), np.int64)

    def find(part: range) -> None:
        find_cofiring(
            part.start, part.stop, firings.starts, firings.row, lists.starts, ends, latent, bits, spread,
            n_rows, COFIRING_ROWS, others, phi, together,
            np.zeros((_TOGETHER, d_sae), np.int32), np.empty(d_sae), np.empty(COFIRING),
        )  # fmt: skip

    _over(d_sae, find)
    which, rank = where = np.nonzero(others >= 0)
    return {
        "latent": which.astype(np.int32),
        "rank": rank.astype(np.int32),
        "other": others[where],
        "value": phi[where],
        "count": together[where],
    }


def _over(d_sae: int, work: Callable[[range], None]) -> None:
    """Does `work` on ranges of latents that make up all of them, on every core."""
    size = min(_LATENTS, max(1, -(-d_sae // _PARTS)))
    parts = [range(first, min(first + size, d_sae)) for first in range(0, d_sae, size)]
    workers_for(torch.get_num_threads()).run(work, parts)


def _trimmed(
    histogram: Int[np.ndarray, "latent bin"],
) -> tuple[Int32[np.ndarray, " latent"], Int[np.ndarray, " latent"], Int[np.ndarray, " filled"]]:
    """Each row from its first to its last filled bin: first bins, lengths, and all counts in one array."""
    filled = histogram > 0
    some = filled.any(1)
    first = np.where(some, filled.argmax(1), 0)
    last = np.where(some, histogram.shape[1] - filled[:, ::-1].argmax(1), 0)
    bins = np.arange(histogram.shape[1])
    return first.astype(np.int32), last - first, histogram[(bins >= first[:, None]) & (bins < last[:, None])]
