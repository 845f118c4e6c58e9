"""What one pass leaves behind for each latent: exact counts, and the best token of its best documents."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.sparse import SparseLatents

# A histogram bin is an eighth of an octave, cut at 2^e (1 + m/8): exponent and three leading mantissa bits
# of the fp32 value, so binning is a shift, exact on every machine, and the same bins serve every latent of
# every site.
BINS_PER_OCTAVE = 8
_LOWEST_EXPONENT, _OCTAVES = -16, 40
N_BINS = BINS_PER_OCTAVE * _OCTAVES
_MANTISSA_SHIFT = 20
_FIRST_CODE = (127 + _LOWEST_EXPONENT) * BINS_PER_OCTAVE


def histogram_edges() -> Float[np.ndarray, "edge"]:
    """The N_BINS + 1 edges shared by all latents; the end bins also hold what lies beyond them."""
    octave, part = np.divmod(np.arange(N_BINS + 1), BINS_PER_OCTAVE)
    return np.ldexp(1 + part / BINS_PER_OCTAVE, octave + _LOWEST_EXPONENT)


def histogram_bin(values: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The bin of each positive value: `edges[bin] <= value < edges[bin + 1]`, clipped to the end bins."""
    code = np.ascontiguousarray(values, dtype=np.float32).view(np.int32) >> _MANTISSA_SHIFT
    return np.clip(code.astype(np.int64) - _FIRST_CODE, 0, N_BINS - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some whole token blocks and the latents that fire at one site on the positions that count."""

    latents: SparseLatents
    """A row for each position kept, in reading order."""
    tokens: Int[Tensor, "block pos"]
    document: Int[Tensor, "block pos"]
    position: Int[Tensor, "block pos"]
    keep: Bool[Tensor, "block pos"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """Places where a latent fired, one an element. `slot` is -1 while its window is not stored."""

    latent: np.ndarray
    document: np.ndarray
    position: np.ndarray
    activation: np.ndarray
    row: np.ndarray
    slot: np.ndarray

    def take(self, which: np.ndarray) -> "Candidates":
        """The elements that an index or a mask picks."""
        return Candidates(**{f.name: getattr(self, f.name)[which] for f in dataclasses.fields(self)})

    def join(self, other: "Candidates") -> "Candidates":
        """Both, one after the other."""
        return Candidates(
            **{
                f.name: np.concatenate([getattr(self, f.name), getattr(other, f.name)])
                for f in dataclasses.fields(self)
            }
        )


class SiteAccumulator:
    """Streaming statistics and top examples of one site's latents.

    The result does not depend on how the text is cut into chunks: counts are integers, and the top examples
    are the `examples` best documents of each latent under the total order (activation down, document up,
    position up), each document standing for its best token. A new firing below the activation of a full
    list's last entry cannot enter it, whichever document it is from, so it is dropped before anything is
    sorted; the rest is merged by document.
    """

    def __init__(self, d_sae: int, *, examples: int, context_tokens: int) -> None:
        self.d_sae, self.examples, self.context_tokens = d_sae, examples, context_tokens
        self.tokens_seen = 0
        self.firings = np.zeros(d_sae, np.int64)
        self.total = np.zeros(d_sae, np.float64)
        self.maximum = np.zeros(d_sae, np.float32)
        self.histogram = np.zeros((d_sae, N_BINS), np.int32)
        shape, width = (d_sae, examples), 2 * context_tokens + 1
        self.activation = np.zeros(shape, np.float32)
        self.document = np.full(shape, -1, np.int64)
        self.position = np.zeros(shape, np.int32)
        # an entry keeps its window's slot while its rank changes, so windows are written once and never
        # moved; empty arrays take no memory until a slot is filled
        self._slot = np.full(shape, -1, np.int32)
        self._window_tokens = np.empty((*shape, width), np.int32)
        self._window_values = np.empty((*shape, width), np.float32)

    def add(self, chunk: Chunk) -> None:
        """Counts every firing of a chunk and lets the best of them into the examples."""
        from viewer.loops import count_firings  # late: numba takes a second to import

        place = chunk.keep.flatten().nonzero()[:, 0].cpu().numpy()
        self.tokens_seen += len(place)
        latents = chunk.latents
        latent, activation = latents.latent.cpu().numpy(), latents.activation.float().cpu().numpy()
        sums = (self.firings, self.total, self.maximum, self.histogram)
        count_firings(latent, activation, histogram_bin(activation), *sums)
        worth = np.flatnonzero(activation >= self.activation[latent, -1])
        row, latent = place[latents.row.cpu().numpy()[worth]], latent[worth].astype(np.int64)
        new = Candidates(
            latent=latent,
            document=chunk.document.reshape(-1).cpu().numpy().astype(np.int64)[row],
            position=chunk.position.reshape(-1).cpu().numpy().astype(np.int32)[row],
            activation=activation[worth],
            row=row,
            slot=np.full(len(row), -1, np.int32),
        )
        if len(row):
            self._merge(new, chunk)

    def windows(self, latents: slice) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and values [latent, rank, 2 context_tokens + 1] around each example; token -1 for none.

        Ranks that hold no example (document -1) hold nothing of meaning.
        """
        index = np.maximum(self._slot[latents], 0)[:, :, None]
        return (
            np.take_along_axis(self._window_tokens[latents], index, axis=1),
            np.take_along_axis(self._window_values[latents], index, axis=1),
        )

    def _merge(self, new: Candidates, chunk: Chunk) -> None:
        best = self._best(new.join(self._present(np.unique(new.latent))))
        start = np.flatnonzero(np.diff(best.latent, prepend=-1))
        rank = np.arange(len(best.latent)) - np.repeat(start, np.diff(start, append=len(best.latent)))
        best, rank = best.take(rank < self.examples), rank[rank < self.examples]
        slot = best.slot.copy()
        fresh = np.flatnonzero(slot < 0)
        slot[fresh] = self._free_slots(best, fresh)
        where = (best.latent, rank)
        self.activation[where], self._slot[where] = best.activation, slot
        self.document[where], self.position[where] = best.document, best.position
        if len(fresh):
            self._store_windows(best.take(fresh), slot[fresh], chunk)

    def _present(self, latents: np.ndarray) -> Candidates:
        """The examples held now for these latents."""
        index, rank = np.nonzero(self.document[latents] >= 0)
        where = (latents[index], rank)
        return Candidates(
            latent=where[0],
            document=self.document[where],
            position=self.position[where],
            activation=self.activation[where],
            row=np.full(len(rank), -1),
            slot=self._slot[where],
        )

    @staticmethod
    def _best(places: Candidates) -> Candidates:
        """The best place of each (latent, document), sorted by latent and then best first."""
        # two numbers a word, since sorting is most of the work; a positive float's bits order as it does
        falling = (0x7FFFFFFF - places.activation.view(np.int32).astype(np.int64)) << 32
        group = (places.latent << 32) | places.document
        order = np.lexsort((falling | places.position, group))
        order = order[np.diff(group[order], prepend=-1) != 0]
        # stable, so that equal activations stay in the order of their documents
        second = (places.latent[order] << 32) | (falling[order] >> 32)
        return places.take(order[np.argsort(second, kind="stable")])

    def _free_slots(self, best: Candidates, fresh: np.ndarray) -> np.ndarray:
        """A slot for each fresh entry that no surviving entry of its latent holds."""
        latents, index = np.unique(best.latent, return_inverse=True)
        used = np.zeros((len(latents), self.examples), bool)
        kept = np.flatnonzero(best.slot >= 0)
        used[index[kept], best.slot[kept]] = True
        free_first = np.argsort(used, axis=1, kind="stable")
        start = np.flatnonzero(np.diff(index[fresh], prepend=-1))
        turn = np.arange(len(fresh)) - np.repeat(start, np.diff(start, append=len(fresh)))
        return free_first[index[fresh], turn].astype(np.int32)

    def _store_windows(self, entries: Candidates, slot: np.ndarray, chunk: Chunk) -> None:
        from viewer.loops import copy_windows

        tokens, document, keep = (part.cpu().numpy() for part in (chunk.tokens, chunk.document, chunk.keep))
        # the row of each position's latents; -1 where there is none
        row = np.where(keep, np.cumsum(keep).reshape(keep.shape) - 1, -1)
        lists = (
            chunk.latents.starts.cpu().numpy(),
            chunk.latents.latent.cpu().numpy(),
            chunk.latents.activation.float().cpu().numpy(),
        )
        copy_windows(
            entries.row, entries.latent, slot, tokens, document, row, *lists,
            self._window_tokens, self._window_values,
        )  # fmt: skip
