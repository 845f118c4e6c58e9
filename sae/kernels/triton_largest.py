"""Bit masks of the largest pre-activations, for the Triton step: plain torch, by blocks of rows."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

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
) -> None:
    """Fills both masks with the k largest of each row, or the k a row largest of the batch.

    Ties go to the earlier row, then to the lower latent. Whether a pre-activation is positive is not asked.
    """
    chosen = _largest_of_batch(x, encoder, b_enc, k) if by_batch else None
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
) -> Int64[Tensor, " chosen"]:
    """Places of the largest in the flattened batch, kept in order from block to block because of ties."""
    best, places = x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
    for start in range(0, len(x), _ROWS):
        pre = torch.addmm(b_enc, x[start : start + _ROWS], encoder.T).view(-1)
        here = torch.arange(len(pre), device=x.device) + start * len(encoder)
        best, order = torch.cat([best, pre]).sort(descending=True, stable=True)
        best, places = best[: k * len(x)], torch.cat([places, here])[order[: k * len(x)]]
    return places


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
