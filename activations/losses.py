"""Losses of the next token for several runs of the same text, without ever holding all logits."""

import itertools
import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from activations.int8 import Int8Vocabulary
from activations.models import LanguageModel
from sae.kernels.int8 import int8_is_fast, int8_products
from sae.kernels.workers import workers_for

_LOG2_E = math.log2(math.e)
# with fewer rows, turning the vocabulary into integers costs more than it saves
_INT8_MIN_ROWS = 4096
# a tile of integer products that a core's cache holds, and the product is still busy
_INT8_ROWS, _INT8_COLUMNS = 1024, 2048
# a tile of logits of the clean run alone
_CLEAN_ROWS, _CLEAN_COLUMNS = 256, 8192


def loss_vocabulary(model: LanguageModel, n_rows: int) -> Int8Vocabulary | None:
    """What makes `next_token_losses` fast for so many rows of all variants; None where it would not.

    Only for models in bfloat16, whose own rounding is larger than that of the integers, and that do not cap
    their logits: sums over a vocabulary are then products with hidden states.
    """
    if n_rows < _INT8_MIN_ROWS or model.dtype != torch.bfloat16 or _logit_scale(model) is None:
        return None
    if not int8_is_fast(model.device):
        return None
    return Int8Vocabulary.of(model)


@torch.inference_mode()
def next_token_losses(
    model: LanguageModel,
    finals: Float[Tensor, "variant row d_model"],
    targets: Int[Tensor, " row"],
    *,
    vocab_chunk: int | None = None,
    vocabulary: Int8Vocabulary | None = None,
) -> tuple[Float[Tensor, "variant row"], Float[Tensor, "variant row"]]:
    """Cross-entropy of the next token and KL(clean || variant) in nats, fp32; variant 0 is the clean run.

    `finals` are hidden states after the final norm. Logits are computed in the model's dtype, some rows of
    all variants and `vocab_chunk` tokens at a time, and summed in fp32: they are never held all together.
    With a `vocabulary` of `loss_vocabulary` most of them are computed in 8-bit integers instead.
    """
    n_variants, n_rows, _ = finals.shape
    hidden = finals.to(device=model.device, dtype=model.dtype)
    targets = targets.to(model.device).long()
    if vocabulary is not None:
        ce, lse = _int8_ce(model, vocabulary, hidden, targets)
        return ce, _kl(model, hidden, lse)
    rows, columns = _tile(n_variants, model, vocab_chunk)
    hidden = hidden.transpose(0, 1)
    ce = torch.empty(n_rows, n_variants, device=model.device)
    kl = torch.empty_like(ce)
    for start in range(0, n_rows, rows):
        part = slice(start, start + rows)
        ce[part], kl[part] = _tile_losses(model, hidden[part], targets[part], columns)
    return ce.T, kl.T


@torch.inference_mode()
def next_token_ce(
    model: LanguageModel,
    finals: Float[Tensor, "variant row d_model"],
    targets: Int[Tensor, " row"],
    *,
    vocabulary: Int8Vocabulary | None = None,
) -> Float[Tensor, "variant row"]:
    """The cross-entropy of `next_token_losses` alone, of variants none of which need be the clean run."""
    if vocabulary is None:
        return next_token_losses(model, finals, targets)[0]
    return _int8_ce(model, vocabulary, finals.to(model.dtype), targets.long())[0]


def _tile(n_variants: int, model: LanguageModel, vocab_chunk: int | None) -> tuple[int, int]:
    # small enough for a processor's caches, large enough to keep the matrix product busy
    rows_of_all, columns = (512, 4096) if model.device.type == "cpu" else (4096, 16_384)
    return max(1, rows_of_all // n_variants), min(vocab_chunk or columns, model.d_vocab)


def _tile_losses(
    model: LanguageModel,
    hidden: Float[Tensor, "row variant d_model"],
    targets: Int[Tensor, " row"],
    columns: int,
) -> tuple[Float[Tensor, "row variant"], Float[Tensor, "row variant"]]:
    n_rows, n_variants, d_model = hidden.shape
    flat = hidden.reshape(-1, d_model)
    unembedding, bias = model.W_U.T, model.b_U
    top = torch.full((n_rows, n_variants), -torch.inf, device=hidden.device)
    total = torch.zeros_like(top)  # sum of exp(logit - top)
    mean = torch.zeros_like(top)  # sum of exp(clean logit - clean top) times the variant's logit
    wanted = torch.zeros_like(top)
    for start in range(0, model.d_vocab, columns):
        stop = min(start + columns, model.d_vocab)
        raw = torch.nn.functional.linear(
            flat, unembedding[start:stop], None if bias is None else bias[start:stop]
        )
        logits = model.cap_logits(raw.float()).view(n_rows, n_variants, -1)
        here = (targets >= start) & (targets < stop)
        index = (targets - start).clamp(0, stop - start - 1)[:, None, None].expand(-1, n_variants, 1)
        wanted = torch.where(here[:, None], logits.gather(2, index)[..., 0], wanted)
        higher = torch.maximum(top, logits.amax(-1))
        shrink = torch.exp(top - higher)
        weights = torch.exp2((logits[:, 0] - higher[:, :1]) * _LOG2_E)
        mean = mean * shrink[:, :1] + torch.bmm(weights[:, None], logits.transpose(1, 2))[:, 0]
        # exp2 since torch's exp takes thirty times as long where it underflows, as most of a vocabulary does
        total = total * shrink + logits.sub_(higher[..., None]).mul_(_LOG2_E).exp2_().sum(-1)
        top = higher
    log_total = top + total.log()
    mean = mean / total[:, :1]
    return log_total - wanted, (mean[:, :1] - log_total[:, :1]) - (mean - log_total)


def _logit_scale(model: LanguageModel) -> float | None:
    """What the model multiplies raw logits by; None when it does more to them than that."""
    low, high = model.cap_logits(torch.tensor([1.0, 1000.0])).tolist()
    return low if math.isclose(high, 1000 * low, rel_tol=1e-6) else None


def _int8_ce(
    model: LanguageModel,
    vocabulary: Int8Vocabulary,
    hidden: Float[Tensor, "variant row d_model"],
    targets: Int[Tensor, " row"],
) -> tuple[Float[Tensor, "variant row"], Float[Tensor, "variant row"]]:
    """Cross-entropy, lse - logit[target], by products in integers, and lse: the log of the sum of all
    exponentials, which alone needs every logit.
    """
    lse = _log_sums(model, vocabulary, hidden, _scale(model))
    columns = model.W_U.T[targets].float()
    wanted = torch.stack([(variant.float() * columns).sum(-1) for variant in hidden])
    if model.b_U is not None:
        wanted += model.b_U[targets].float()
    return lse - wanted * _scale(model), lse


def _kl(
    model: LanguageModel,
    hidden: Float[Tensor, "variant row d_model"],
    lse: Float[Tensor, "variant row"],
) -> Float[Tensor, "variant row"]:
    """KL(variant 0 || variant), for which no logit of any but variant 0 is needed.

    kl = <sum_v p_clean[v] W_U[:, v], h_clean - h> - lse_clean + lse
    """
    expected = _expected_unembedding(model, hidden[0])
    clean = hidden[0].float()
    further = torch.stack([((clean - variant.float()) * expected).sum(-1) for variant in hidden])
    return further * _scale(model) - lse[0] + lse


def _scale(model: LanguageModel) -> float:
    scale = _logit_scale(model)
    assert scale is not None, "a soft cap"
    return scale


def _log_sums(
    model: LanguageModel,
    vocabulary: Int8Vocabulary,
    hidden: Float[Tensor, "variant row d_model"],
    scale: float,
) -> Float[Tensor, "variant row"]:
    """log sum_v exp(logit[v]) of every row, in fp32.

    Each variant's mean hidden state is multiplied in fp32, so that integers stand for what differs from it;
    and of each row the largest logit, which the sum leans on most, is put right in fp32.
    """
    from activations.loss_loops import add_tile  # late: numba takes a second to import

    n_variants, n_rows, _ = hidden.shape
    unembedding, bias = model.W_U.T, model.b_U
    # integers do not hold what is not finite, and one such row would spoil its variant's mean
    finite = hidden.isfinite().all(-1)
    hidden = torch.where(finite[..., None], hidden, 0)
    centre = torch.stack([variant.float().mean(0) for variant in hidden])
    left = [vocabulary.left(variant.float() - c) for variant, c in zip(hidden, centre, strict=True)]
    top, total = torch.full((n_variants, n_rows), -torch.inf), torch.zeros(n_variants, n_rows)
    best = torch.zeros(n_variants, n_rows, dtype=torch.int64)

    def add(part: tuple[int, int]) -> None:
        variant, rows = part[0], slice(part[1], part[1] + _INT8_ROWS)
        ints, size = left[variant][0][rows], (left[variant][1][rows] * scale).numpy()
        sums = [x[variant, rows].numpy() for x in (top, total, best)]
        held = torch.empty(len(ints) * _INT8_COLUMNS, dtype=torch.int32)
        for first in range(0, model.d_vocab, _INT8_COLUMNS):
            span = slice(first, first + _INT8_COLUMNS)
            column_size, shift = vocabulary.scale[span].numpy(), offset[variant, span].numpy()
            products = int8_products(ints, vocabulary.rows[span], held)
            room = np.empty_like(shift)
            add_tile(products.numpy(), size, column_size, shift, first, *sums, room)

    parts = list(itertools.product(range(n_variants), range(0, n_rows, _INT8_ROWS)))
    offset = torch.cat([centre @ part.float().T for part in unembedding.split(_INT8_COLUMNS)], 1)
    offset = (offset if bias is None else offset + bias) * scale
    workers_for(torch.get_num_threads()).run(add, parts)
    exact = torch.stack(
        [(variant.float() * unembedding[b].float()).sum(-1) for variant, b in zip(hidden, best, strict=True)]
    )
    exact = (exact if bias is None else exact + bias[best]) * scale
    top += torch.stack([constant for _, _, constant in left]) * scale
    return torch.where(finite, top + (total - 1 + (exact - top).exp()).log(), torch.nan)


def _expected_unembedding(
    model: LanguageModel, hidden: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row d_model"]:
    """sum_v p[v] W_U[:, v] of each row, in fp32 from products in the model's dtype."""
    unembedding, found = model.W_U.T, torch.empty(hidden.shape)

    def fill(first: int) -> None:
        part = slice(first, first + _CLEAN_ROWS)
        rows = hidden[part]
        top = torch.full((len(rows), 1), -torch.inf)
        total, sums = torch.zeros_like(top), torch.zeros(rows.shape)
        for start in range(0, model.d_vocab, _CLEAN_COLUMNS):
            span = slice(start, start + _CLEAN_COLUMNS)
            bias = None if model.b_U is None else model.b_U[span]
            raw = torch.nn.functional.linear(rows, unembedding[span], bias)
            logits = model.cap_logits(raw.float())
            higher = torch.maximum(top, logits.amax(-1, keepdim=True))
            shrink = torch.exp(top - higher)
            weights = logits.sub_(higher).mul_(_LOG2_E).exp2_().to(rows.dtype)
            # of the rounded weights, so that they are a distribution
            total = total * shrink + weights.sum(-1, keepdim=True, dtype=torch.float32)
            sums = sums * shrink + weights @ unembedding[span]
            top = higher
        found[part] = sums / total

    workers_for(torch.get_num_threads()).run(fill, range(0, len(hidden), _CLEAN_ROWS))
    return found
