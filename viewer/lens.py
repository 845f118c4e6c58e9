"""Which tokens a decoder direction speaks for, read straight through final norm and unembedding."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GROUP = 64
_VOCAB_CHUNK = 32768
_LATENT_CHUNK = 1024


@runtime_checkable
class Unembedding(Protocol):
    """The end of a language model."""

    @property
    def W_U(self) -> Tensor:
        """The unembedding, [d_model, d_vocab]."""
        ...

    def final_norm(self, resid: Tensor) -> Tensor:
        """The norm before it, [..., d_model] to [..., d_model]."""
        ...


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
    model: Unembedding, directions: Float[Tensor, "latent d_model"], *, count: int = 10
) -> tuple[Int[Tensor, "latent two_count"], Float[Tensor, "latent two_count"]]:
    """The `count` tokens a direction raises most, best first, then the `count` it lowers most, lowest first.

        logit[v] = <gamma * (d - c mean(d)), W_U[:, v] - mean_v W_U[:, v]>

    with d a row of W_dec as it stands, gamma and c as in `linear_part`: the change in the logits, centred
    over the vocabulary, per unit of activation, for a residual whose root mean square is 1 and ignoring the
    layers between and any soft cap. Products are searched in W_U's own dtype, a chunk of the vocabulary at
    a time; half as many candidates again as are wanted are then computed in fp32 and ranked by that.
    Returns token ids and fp32 logits.
    """
    unembed = model.W_U
    d_vocab, device = unembed.shape[1], unembed.device
    count = min(count, d_vocab // 2)
    mean = torch.zeros(unembed.shape[0], dtype=torch.float64, device=device)
    for start in range(0, d_vocab, _VOCAB_CHUNK):
        mean += unembed[:, start : start + _VOCAB_CHUNK].sum(1, dtype=torch.float64)
    mean = (mean / d_vocab).float()
    ids, logits = [], []
    for rows in directions.split(_LATENT_CHUNK):
        read = linear_part(model.final_norm, rows.to(device).float(), unembed.dtype)
        sides = [
            _refine(read, unembed, mean, side, count, sign)
            for sign, side in _search(read, unembed, 3 * count // 2)
        ]
        ids.append(torch.cat([side[0] for side in sides], 1).cpu())
        logits.append(torch.cat([side[1] for side in sides], 1).cpu())
    return torch.cat(ids).to(torch.int32), torch.cat(logits)


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


def _refine(
    read: Tensor, unembed: Tensor, mean: Tensor, ids: Tensor, count: int, sign: int
) -> tuple[Tensor, Tensor]:
    """The candidates' centred logits in fp32, the `count` most extreme first."""
    offset = read @ mean
    exact = torch.empty(ids.shape, device=read.device)
    for part in range(0, len(ids), 256):
        span = slice(part, part + 256)
        columns = unembed.T[ids[span]].float()
        exact[span] = torch.einsum("ld,lcd->lc", read[span], columns) - offset[span, None]
    # ties go to the smaller id, so that the order depends on nothing but the numbers
    ids, order = ids.sort(1)
    exact = exact.gather(1, order)
    order = (-sign * exact).argsort(dim=1, stable=True)[:, :count]
    return ids.gather(1, order), exact.gather(1, order)
