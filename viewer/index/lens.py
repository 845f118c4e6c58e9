"""Which tokens a decoder direction speaks for, read straight through final norm and unembedding."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from activations.int8 import HasUnembedding, mean_column
from sae.kernels.int8 import int8_is_fast, quantised
from sae.kernels.workers import workers_for
from viewer.index.extremes import SearchedVocabulary
from viewer.index.geometry import products_at

_GROUP = 64
_VOCAB_CHUNK = 32768
_LATENT_CHUNK = 1024
# with fewer, turning the vocabulary into integers costs more than it saves
_MIN_DIRECTIONS = 4096
# candidates of the search in integers, in multiples of the tokens wanted
_INT8_CANDIDATES = 3
# directions whose candidates are computed again at once
_EXACT_ROWS = 256
# columns of the vocabulary multiplied into its covariance at once, and products held until they are summed
_GRAM_COLUMNS, _GRAM_PRODUCTS = 4096, 8
# directions whose standard deviations are worked out at once
_STD_ROWS = 1024
_BINS, _BINS_PER_STD = 41, 2
# the histogram counts every nth span of tokens, n such that this many are counted at least: the shape of the
# distribution, at a quarter of the price where the vocabulary has 262,144
_SPAN, _COUNTED = 128, 65536


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TokenLogits:
    """What some directions do to the logits of all tokens, per unit of activation (`top_logits`)."""

    ids: Int[np.ndarray, "latent two_count"]
    """The `count` tokens raised most, best first, then the `count` lowered most, lowest first."""
    logits: Float[np.ndarray, "latent two_count"]
    """Theirs, in fp32, centred over the vocabulary."""
    mean: Float[np.ndarray, " latent"]
    """What centring took away: the mean over all tokens. No softmax sees it."""
    std: Float[np.ndarray, " latent"]
    """Standard deviation over all tokens."""
    skew: Float[np.ndarray, " latent"]
    """Third central moment over std^3, over all tokens; 0 where std is. Far above 0: speaks for a few.

    With a `Vocabulary` for many directions an estimate (`top_logits`)."""
    histogram: Int[np.ndarray, "latent bin"]
    """Tokens between each two of `logit_histogram_edges`, in spans of tokens spread evenly over the ids."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Vocabulary:
    """What is asked of an unembedding for every direction, worked out once."""

    mean: Float[Tensor, " d_model"]
    covariance: Float64[Tensor, "d_model d_model"]
    """Over the tokens."""
    int8: SearchedVocabulary | None
    """What makes a search for many directions fast; None where it would not."""

    @classmethod
    @torch.inference_mode()
    def of(cls, model: HasUnembedding, n_directions: int = 0) -> "Vocabulary":
        """For about so many directions."""
        unembed = model.W_U
        d_model, d_vocab = unembed.shape
        mean = mean_column(unembed)
        covariance = _gram(unembed) / d_vocab - torch.outer(mean, mean)
        if n_directions < _MIN_DIRECTIONS or d_vocab < _VOCAB_CHUNK or not int8_is_fast(unembed.device):
            return cls(mean=mean, covariance=covariance, int8=None)
        # directions are as likely to point one way as another, before the norm weighs them
        each = linear_part(model.final_norm, torch.eye(d_model), unembed.dtype).double()
        int8 = SearchedVocabulary.of(
            unembed, mean, each.T @ each, covariance, _counted(d_vocab).nonzero()[:, 0]
        )
        return cls(mean=mean, covariance=covariance, int8=int8)


def logit_histogram_edges() -> Float[np.ndarray, "edge"]:
    """The 42 edges of the histograms, in standard deviations; the end bins also hold what lies beyond."""
    return (np.arange(_BINS + 1) - _BINS / 2) / _BINS_PER_STD


def linear_part(
    final_norm: Callable[[Tensor], Tensor], direction: Float[Tensor, "latent d_model"], dtype: torch.dtype
) -> Float[Tensor, "latent d_model"]:
    """What a final norm does to a direction, but for the residual's scale: gamma * (d - c mean(d)).

    gamma is the norm's weight; c is 1 for LayerNorm, which takes the mean out, and 0 for RMSNorm. Both are
    found by asking the norm itself, so no architecture has to be named: a vector of +1 and -1 has mean 0
    and root mean square 1, and half the difference of the answers to it and to its negative is gamma
    without the bias, to the rounding of the norm's own dtype.
    """
    d_model, device = direction.shape[-1], direction.device
    signs = torch.ones(d_model, device=device)
    signs[1::2] = -1
    # far above any epsilon of the norm, and exact in every float type
    probe = torch.stack([signs, -signs, torch.ones_like(signs), -torch.ones_like(signs)]).to(dtype) * 64
    plus, minus, ones, minus_ones = final_norm(probe).float()
    gamma = (plus - minus) / 2 * signs
    centred = bool(((ones - minus_ones).abs() < 1e-3 * gamma.abs().max()).all())
    return gamma * (direction - direction.mean(-1, keepdim=True) if centred else direction)


@torch.inference_mode()
def top_logits(
    model: HasUnembedding,
    directions: Float[Tensor, "latent d_model"],
    *,
    count: int = 10,
    vocabulary: Vocabulary | None = None,
) -> TokenLogits:
    """The `count` tokens that each direction raises and lowers most, and how all tokens' logits are spread.

        logit[v] = <gamma * (d - c mean(d)), W_U[:, v] - mean_v W_U[:, v]>

    with d a row of W_dec as it stands, gamma and c as in `linear_part`: the change in the logits, centred
    over the vocabulary, per unit of activation, for a residual whose root mean square is 1 and ignoring the
    layers between and any soft cap. Mean and standard deviation follow from the vocabulary's own; skewness
    and histogram are summed while searching. Products are searched in W_U's own dtype, a chunk of the
    vocabulary at a time; three times as many candidates as are wanted are then computed in fp32 and ranked
    by that. With a `vocabulary` made for many directions they are searched in 8-bit integers, for more
    candidates; a direction for which what was left out comes near the tokens found, by the error seen in
    them, is searched again. The skewness is then an estimate: most tokens' logits count with 99 % of their
    variance, or where that holds less than nine tenths only the tokens of the histogram do (of 2,048
    latents of Gemma 3 270M 0.002 off on average, 0.025 at most).
    """
    unembed = model.W_U
    count = min(count, unembed.shape[1] // 2)
    vocabulary = vocabulary or Vocabulary.of(model)
    read = linear_part(model.final_norm, directions.to(unembed.device).float(), unembed.dtype)
    std = _std(read, vocabulary.covariance)
    spread = _Spread.empty(torch.where(std > 0, 1 / std, 0).float(), unembed.shape[1])
    if vocabulary.int8 is None:
        ids, logits = _top(read, unembed, vocabulary.mean, count, spread)
    else:
        ids, logits, doubtful = _top_by_int8(read, unembed, vocabulary.mean, vocabulary.int8, count, spread)
        if doubtful.any():
            ids[doubtful], logits[doubtful] = _top(read[doubtful], unembed, vocabulary.mean, count)
    return TokenLogits(
        ids=ids.to(torch.int32).cpu().numpy(),
        logits=logits.cpu().numpy(),
        mean=(read @ vocabulary.mean).cpu().numpy(),
        std=std.float().cpu().numpy(),
        skew=(spread.cubes / unembed.shape[1]).float().cpu().numpy(),
        histogram=spread.histogram.cpu().numpy(),
    )


def _counted(d_vocab: int) -> Bool[Tensor, " token"]:
    """Which tokens the histograms count."""
    spans = torch.arange(d_vocab) // _SPAN
    return spans % max(1, d_vocab // _COUNTED) == 0


def _gram(unembed: Float[Tensor, "d_model d_vocab"]) -> Float64[Tensor, "d_model d_model"]:
    """The sum of the products of all columns with themselves."""
    gram = torch.zeros(len(unembed), len(unembed), dtype=torch.float64, device=unembed.device)
    parts = unembed.split(_GRAM_COLUMNS, dim=1)
    products: dict[int, Tensor] = {}

    def multiply(number: int) -> None:
        # in its own dtype: many chunks of rounded sums, of which each is summed in fp32
        products[number] = parts[number] @ parts[number].T

    workers = workers_for(torch.get_num_threads())
    for first in range(0, len(parts), _GRAM_PRODUCTS):
        numbers = range(len(parts))[first : first + _GRAM_PRODUCTS]
        workers.run(multiply, numbers)
        # in order, so that the sum is the same whoever multiplied
        for number in numbers:
            gram += products.pop(number)
    return gram


def _std(
    read: Float[Tensor, "latent d_model"], covariance: Float64[Tensor, "d_model d_model"]
) -> Float64[Tensor, " latent"]:
    """The standard deviation of each direction's logits over the vocabulary."""
    std = torch.empty(len(read), dtype=torch.float64, device=read.device)
    # what fp32 takes away is less than what the vocabulary's own dtype took from the sums of its products
    moments = covariance.float()

    def fill(start: int) -> None:
        part = read[start : start + _STD_ROWS]
        variance = ((part @ moments) * part).sum(1, dtype=torch.float64)
        std[start : start + _STD_ROWS] = variance.clamp(min=0).sqrt()

    workers_for(torch.get_num_threads()).run(fill, range(0, len(read), _STD_ROWS))
    return std


@dataclasses.dataclass(frozen=True, eq=False)
class _Spread:
    """How logits are spread, summed up tile by tile, in standard deviations."""

    per_std: Float[Tensor, " latent"]
    """1 / std; 0 where that is 0."""
    counted: Bool[Tensor, " token"]
    """Which tokens go into the histogram."""
    cubes: Float64[Tensor, " latent"]
    histogram: Int[Tensor, "latent bin"]

    @classmethod
    def empty(cls, per_std: Float[Tensor, " latent"], d_vocab: int) -> "_Spread":
        histogram = torch.zeros(len(per_std), _BINS, dtype=torch.int32, device=per_std.device)
        counted = _counted(d_vocab).to(per_std.device)
        return cls(per_std, counted, torch.zeros_like(per_std).double(), histogram)

    def add(self, rows: slice, logits: Float[Tensor, "latent column"], first: int) -> None:
        """Takes in centred logits of the tokens from `first` on."""
        z = logits.float() * self.per_std[rows, None]
        self.cubes[rows] += (z * z * z).sum(1, dtype=torch.float64)
        z = z[:, self.counted[first : first + z.shape[1]]]
        bins = (z * _BINS_PER_STD + _BINS / 2).clamp_(0, _BINS - 1).long()
        ones = torch.ones(1, dtype=torch.int32, device=z.device).expand(bins.shape)
        self.histogram[rows] = self.histogram[rows].scatter_add(1, bins, ones)


def _top(
    read: Float[Tensor, "latent d_model"],
    unembed: Tensor,
    mean: Tensor,
    count: int,
    spread: _Spread | None = None,
) -> tuple[Int[Tensor, "latent two_count"], Float[Tensor, "latent two_count"]]:
    """Ids and centred logits by a search in the vocabulary's own dtype; `mean` is its mean column."""
    found = []
    for start in range(0, len(read), _LATENT_CHUNK):
        part = slice(start, start + _LATENT_CHUNK)
        rows = read[part]
        offset = (rows @ mean)[:, None]

        def watch(chunk: Tensor, first: int, part: slice = part, offset: Tensor = offset) -> None:
            if spread is not None:
                spread.add(part, chunk - offset, first)

        sides = [
            _ranked(ids, _exact(rows, unembed, mean, ids), sign, count)
            for sign, ids in _search(rows, unembed, 3 * count, watch)
        ]
        found.append([torch.cat([side[n] for side in sides], 1) for n in range(2)])
    return torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])


def _top_by_int8(
    read: Float[Tensor, "latent d_model"],
    unembed: Tensor,
    mean: Tensor,
    vocabulary: SearchedVocabulary,
    count: int,
    spread: _Spread,
) -> tuple[Int[Tensor, "latent two_count"], Float[Tensor, "latent two_count"], Bool[Tensor, " latent"]]:
    """The same, and the directions for which this search may have missed a token."""
    # what the mean column adds to every token's logit is what centring takes away
    ints, scale = quantised(read @ vocabulary.turn)
    per_std = scale * spread.per_std
    found = vocabulary.search(ints, _INT8_CANDIDATES * count, per_std, _BINS_PER_STD, _BINS)
    spread.histogram.copy_(found.histogram)
    spread.cubes.copy_(found.cubes)
    sides, doubtful = [], torch.zeros(len(read), dtype=torch.bool)
    for side, sign in enumerate((1, -1)):
        searched, limit = found.scores[:, side] * scale[:, None], found.limits[:, side] * scale
        exact = sign * _exact(read, unembed, mean, found.ids[:, side])
        there = searched.isfinite()
        error = torch.where(there, (exact - searched).abs(), 0).amax(1)
        exact = torch.where(there, exact, -torch.inf)
        sides.append(_ranked(found.ids[:, side], sign * exact, sign, count))
        sure = sign * sides[-1][1][:, -1] - limit > 2 * error
        doubtful |= ~sure
    ids_found, logits = (torch.cat([side[n] for side in sides], 1) for n in range(2))
    return ids_found, logits, doubtful


def _search(
    read: Tensor, unembed: Tensor, count: int, watch: Callable[[Tensor, int], None]
) -> list[tuple[int, Int[Tensor, "latent count"]]]:
    """Ids of about the `count` largest (sign 1) and smallest (sign -1) logits of each row.

    `watch` is shown every chunk of logits and its first token.
    """
    low = read.to(unembed.dtype)
    best: dict[int, tuple[Tensor, Tensor] | None] = {1: None, -1: None}
    for start in range(0, unembed.shape[1], _VOCAB_CHUNK):
        chunk = low @ unembed[:, start : start + _VOCAB_CHUNK]
        watch(chunk, start)
        for sign, held in best.items():
            values, ids = _top_of_chunk(chunk, count, sign)
            ids += start
            if held is not None:
                values, ids = torch.cat([held[0], values], 1), torch.cat([held[1], ids], 1)
                values, order = values.topk(min(count, values.shape[1]), dim=1)
                ids = ids.gather(1, order)
            best[sign] = values, ids
    return [(sign, held[1]) for sign, held in best.items() if held is not None]


def _top_of_chunk(chunk: Tensor, count: int, sign: int) -> tuple[Tensor, Tensor]:
    """Exact top `count` of each row of sign * chunk: values and columns.

    The largest `count` elements lie in the `count` groups with the largest maxima, so only those are sorted.
    """
    rows, width = chunk.shape
    groups = width // _GROUP
    if width % _GROUP or groups <= count:
        return (chunk * sign).topk(min(count, width), dim=1)
    # a group is every groups-th column: its maximum is then taken over contiguous memory
    view = chunk.view(rows, _GROUP, groups)
    peaks = view.amax(1) if sign > 0 else -view.amin(1)
    chosen = peaks.topk(count, dim=1).indices
    columns = (chosen[:, None, :] + groups * torch.arange(_GROUP, device=chunk.device)[:, None]).reshape(
        rows, -1
    )
    values, order = (chunk.gather(1, columns) * sign).topk(count, dim=1)
    return values, columns.gather(1, order)


def _exact(
    read: Float[Tensor, "latent d_model"], unembed: Tensor, mean: Tensor, ids: Int[Tensor, "latent some"]
) -> Float[Tensor, "latent some"]:
    """The centred logits of these tokens, in fp32."""
    tokens, offset = unembed.T, (read @ mean)[:, None]
    exact = torch.empty(ids.shape, device=read.device)

    def fill(start: int) -> None:
        part = slice(start, start + _EXACT_ROWS)
        exact[part] = products_at(read[part], tokens, ids[part]) - offset[part]

    workers_for(torch.get_num_threads()).run(fill, range(0, len(ids), _EXACT_ROWS))
    return exact


def _ranked(
    ids: Int[Tensor, "latent some"], exact: Float[Tensor, "latent some"], sign: int, count: int
) -> tuple[Int[Tensor, "latent count"], Float[Tensor, "latent count"]]:
    """The `count` most extreme of these tokens first."""
    # ties go to the smaller id, so that the order depends on nothing but the numbers
    ids, order = ids.sort(1)
    exact = exact.gather(1, order)
    order = (-sign * exact).argsort(dim=1, stable=True)[:, :count]
    return ids.gather(1, order), exact.gather(1, order)
