"""Bit masks of the largest pre-activations, for the Triton step: plain torch, by blocks of rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from sae.kernels.shards import Shard, largest_of_all

# rows whose pre-activations are held at once; a multiple of 32, so that no word of a mask spans two blocks
_ROWS = 256


def mask_largest(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    by_batch: bool,
    by_row: Int32[Tensor, "batch words"],
    by_latent: Int32[Tensor, "d_sae row_words"],
    shard: Shard | None = None,
) -> None:
    """Fills both masks with the k largest of each row, or the k a row largest of the batch.

    Ties go to the earlier row, then to the lower latent. Whether a pre-activation is positive is not asked,
    but of a shard: its own largest are then held against those of the others.
    """
    chosen = None
    if by_batch or shard is not None:
        chosen, values = (_largest_of_batch if by_batch else _largest_of_rows)(x, encoder, b_enc, k)
        if shard is not None:
            chosen, order = chosen.sort()
            rows = chosen // len(encoder)
            kept = largest_of_all(rows, values[order], k, len(x), not by_batch, shard)
            chosen = torch.where(kept, chosen, -1)
    for start in range(0, len(x), _ROWS):
        rows = x[start : start + _ROWS]
        if chosen is None:
            pre = torch.addmm(b_enc, rows, encoder.T)
            best = pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
            among = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, best, True)
        else:
            among = _where(chosen - start * len(encoder), len(rows), len(encoder))
        by_row[start : start + _ROWS] = _packed(among)
        words = _packed(among.T)
        by_latent[:, start // 32 : start // 32 + words.shape[1]] = words


def _largest_of_batch(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Int64[Tensor, " chosen"], Float[Tensor, " chosen"]]:
    """Places of the largest in the flattened batch, kept in order from block to block because of ties; and
    their values.
    """
    best, places = x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
    for start in range(0, len(x), _ROWS):
        pre = torch.addmm(b_enc, x[start : start + _ROWS], encoder.T).view(-1)
        here = torch.arange(len(pre), device=x.device) + start * len(encoder)
        best, order = torch.cat([best, pre]).sort(descending=True, stable=True)
        best, places = best[: k * len(x)], torch.cat([places, here])[order[: k * len(x)]]
    return places, best


def _largest_of_rows(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
) -> tuple[Int64[Tensor, " chosen"], Float[Tensor, " chosen"]]:
    """The same of every row's largest."""
    places, values = [], []
    for start in range(0, len(x), _ROWS):
        pre = torch.addmm(b_enc, x[start : start + _ROWS], encoder.T)
        best, latents = pre.sort(dim=1, descending=True, stable=True)
        here = torch.arange(start, start + len(pre), device=x.device).unsqueeze(1) * len(encoder)
        places.append((here + latents)[:, :k].flatten())
        values.append(best[:, :k].flatten())
    return torch.cat(places), torch.cat(values)


def _where(places: Int64[Tensor, " chosen"], rows: int, latents: int) -> Bool[Tensor, "rows latents"]:
    """True at the places that lie within a block; the others fall on a place behind it."""
    size = rows * latents
    among = torch.zeros(size + 1, dtype=torch.bool, device=places.device)
    among.index_fill_(0, torch.where((places >= 0) & (places < size), places, size), True)
    return among[:size].view(rows, latents)


def _packed(bits: Bool[Tensor, "row column"]) -> Int32[Tensor, "row words"]:
    """32 columns to a word, the first in its lowest bit."""
    whole = F.pad(bits, (0, -bits.shape[1] % 32)).reshape(len(bits), -1, 32)
    return (whole.long() << torch.arange(32, device=bits.device)).sum(2).to(torch.int32)
