"""Which tokens a decoder direction speaks for, read straight through final norm and unembedding."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from activations.int8 import HasUnembedding, Int8Vocabulary, int8_is_fast, int8_products, mean_column
from sae.kernels.workers import workers_for

_GROUP = 64
_VOCAB_CHUNK = 32768
_LATENT_CHUNK = 1024
# with fewer, turning the vocabulary into integers costs more than it saves
_MIN_DIRECTIONS = 4096
# candidates of the search in integers, in multiples of the tokens wanted
_INT8_CANDIDATES = 4
# a tile of products that a core's cache holds, and the product is still busy
_INT8_TILE_ROWS, _INT8_TILE_COLUMNS = 512, 4096


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


def search_vocabulary(model: HasUnembedding, n_directions: int) -> Int8Vocabulary | None:
    """What makes `top_logits` fast for so many directions; None where it would not."""
    if n_directions < _MIN_DIRECTIONS or model.W_U.shape[1] < _VOCAB_CHUNK:
        return None
    return Int8Vocabulary.of(model) if int8_is_fast(model.W_U.device) else None


@torch.inference_mode()
def top_logits(
    model: HasUnembedding,
    directions: Float[Tensor, "latent d_model"],
    *,
    count: int = 10,
    vocabulary: Int8Vocabulary | None = None,
) -> tuple[Int[Tensor, "latent two_count"], Float[Tensor, "latent two_count"]]:
    """The `count` tokens a direction raises most, best first, then the `count` it lowers most, lowest first.

        logit[v] = <gamma * (d - c mean(d)), W_U[:, v] - mean_v W_U[:, v]>

    with d a row of W_dec as it stands, gamma and c as in `linear_part`: the change in the logits, centred
    over the vocabulary, per unit of activation, for a residual whose root mean square is 1 and ignoring the
    layers between and any soft cap. Products are searched in W_U's own dtype, a chunk of the vocabulary at
    a time; three times as many candidates as are wanted are then computed in fp32 and ranked by that. With a
    `vocabulary` of `search_vocabulary` they are searched in 8-bit integers, for more candidates; a direction
    whose last candidate comes near the tokens found, by the error seen in them, is searched again.
    Returns token ids and fp32 logits.
    """
    unembed = model.W_U
    count = min(count, unembed.shape[1] // 2)
    read = linear_part(model.final_norm, directions.to(unembed.device).float(), unembed.dtype)
    if vocabulary is None:
        ids, logits = _top(read, unembed, mean_column(unembed), count)
    else:
        ids, logits, doubtful = _top_by_int8(read, unembed, vocabulary, count)
        if doubtful.any():
            ids[doubtful], logits[doubtful] = _top(read[doubtful], unembed, vocabulary.mean, count)
    return ids.cpu().to(torch.int32), logits.cpu()


def _top(
    read: Float[Tensor, "latent d_model"], unembed: Tensor, mean: Tensor, count: int
) -> tuple[Int[Tensor, "latent two_count"], Float[Tensor, "latent two_count"]]:
    """Ids and centred logits by a search in the vocabulary's own dtype; `mean` is its mean column."""
    found = []
    for rows in read.split(_LATENT_CHUNK):
        sides = [
            _ranked(ids, _exact(rows, unembed, mean, ids), sign, count)
            for sign, ids in _search(rows, unembed, 3 * count)
        ]
        found.append([torch.cat([side[n] for side in sides], 1) for n in range(2)])
    return torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])


def _top_by_int8(
    read: Float[Tensor, "latent d_model"],
    unembed: Tensor,
    vocabulary: Int8Vocabulary,
    count: int,
) -> tuple[Int[Tensor, "latent two_count"], Float[Tensor, "latent two_count"], Bool[Tensor, " latent"]]:
    """The same, and the directions for which this search may have missed a token."""
    # what the mean column adds to every token's logit is what centring takes away
    left, scale, _ = vocabulary.left(read)
    scores, ids = _search_int8(left, vocabulary, _INT8_CANDIDATES * count)
    sides, doubtful = [], torch.zeros(len(read), dtype=torch.bool)
    for side, sign in enumerate((1, -1)):
        exact = _exact(read, unembed, vocabulary.mean, ids[:, side])
        searched = sign * scores[:, side] * scale[:, None]
        error = (exact - searched).abs().amax(1)
        sides.append(_ranked(ids[:, side], exact, sign, count))
        # what was left out scored no higher than the last candidate
        sure = sign * (sides[-1][1][:, -1] - searched[:, -1]) > 2 * error
        doubtful |= ~sure
    ids_found, logits = (torch.cat([side[n] for side in sides], 1) for n in range(2))
    return ids_found, logits, doubtful


def _search_int8(
    left: Int8[Tensor, "latent d_model"], vocabulary: Int8Vocabulary, count: int
) -> tuple[Float[Tensor, "latent 2 count"], Int[Tensor, "latent 2 count"]]:
    """The `count` largest integer products with the vocabulary, times its scale, and the largest negated."""
    from viewer.loops import keep_extremes  # late: numba takes a second to import

    scores = torch.full((len(left), 2, count), -torch.inf)
    ids = torch.zeros(scores.shape, dtype=torch.int64)

    def search(start: int) -> None:
        part = slice(start, start + _INT8_TILE_ROWS)
        values, places = scores[part].numpy(), ids[part].numpy()
        held = torch.empty(len(values) * _INT8_TILE_COLUMNS, dtype=torch.int32)
        for first in range(0, len(vocabulary.rows), _INT8_TILE_COLUMNS):
            span = slice(first, first + _INT8_TILE_COLUMNS)
            size = vocabulary.scale[span].numpy()
            products = int8_products(left[part], vocabulary.rows[span], held)
            keep_extremes(products.numpy(), size, first, values, places, np.empty_like(size))

    workers_for(torch.get_num_threads()).run(search, range(0, len(left), _INT8_TILE_ROWS))
    return scores, ids


def _search(read: Tensor, unembed: Tensor, count: int) -> list[tuple[int, Int[Tensor, "latent count"]]]:
    """Ids of about the `count` largest (sign 1) and smallest (sign -1) logits of each row."""
    low = read.to(unembed.dtype)
    best: dict[int, tuple[Tensor, Tensor] | None] = {1: None, -1: None}
    for start in range(0, unembed.shape[1], _VOCAB_CHUNK):
        chunk = low @ unembed[:, start : start + _VOCAB_CHUNK]
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
    offset = read @ mean
    exact = torch.empty(ids.shape, device=read.device)
    for part in range(0, len(ids), 256):
        span = slice(part, part + 256)
        columns = unembed.T[ids[span]].float()
        exact[span] = torch.einsum("ld,lcd->lc", read[span], columns) - offset[span, None]
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
