"""What a dictionary's weights say without any text: neighbours, copies, coordinates, encoder and decoder."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32
from torch import Tensor

from sae import Dictionary
from sae.kernels.int8 import int8_is_fast, quantised
from sae.kernels.workers import workers_for
from viewer.index.firings import Firings
from viewer.index.nearest import Candidates, Integers, candidates_of_both

DUPLICATE_COSINE, DUPLICATE_JACCARD = 0.95, 0.5
"""Above both, two latents count as one thing learned twice."""

# candidates of the search, in multiples of the neighbours wanted
_CANDIDATES = 3
# rows made ready at once, and searched by one thread
_ROWS = 512
# rows computed again at once
_EXACT_ROWS = 128


class Neighbours(NamedTuple):
    """The nearest latents of each, nearest first."""

    ids: Int32[np.ndarray, "latent rank"]
    """-1 where there are no more, and for a decoder row of zeros, which is nobody's neighbour."""
    cosine: Float32[np.ndarray, "latent rank"]
    """0 where there is none."""


class Duplicates(NamedTuple):
    """Pairs of latents of one site that look like one thing learned twice, sorted by both numbers."""

    latent: Int32[np.ndarray, " pair"]
    other: Int32[np.ndarray, " pair"]
    """Larger than `latent`."""
    cosine: Float32[np.ndarray, " pair"]
    jaccard: Float32[np.ndarray, " pair"]
    """Tokens on which both fire, over tokens on which either does."""


class Alignment(NamedTuple):
    """The parts of the space that each decoder row lies along most."""

    ids: Int32[np.ndarray, "latent rank"]
    """Coordinates; heads where the site is the heads' outputs side by side."""
    values: Float32[np.ndarray, "latent rank"]
    """The row's coordinate, with its sign; the norm of the row's part in the head."""
    share: Float32[np.ndarray, "latent rank"]
    """Its share of the sum of all values without their signs; 0 for a row of zeros."""


class _Prepared(NamedTuple):
    """A dictionary's decoder rows, for the search."""

    unit: Float32[Tensor, "latent d_out"]
    """Of norm 1, or 0."""
    there: Int[Tensor, " other"]
    """The numbers of those that are not zeros, and these themselves:"""
    vectors: Float32[Tensor, "other d_out"]
    integers: Integers | None
    """The same in 8-bit integers, where those are fast."""


def neighbours(
    rows: Float[Tensor, "latent d_out"],
    others: Float[Tensor, "other d_out"],
    *,
    count: int = 10,
    same: bool = False,
) -> Neighbours:
    """The `count` of `others` that have the largest cosine with each of `rows`, all of them decoder rows.

    With `same` both are one dictionary's, and no latent is its own neighbour. Cosines are computed in fp32,
    and equal ones stand in the order of their numbers. No [latent, other] is held: tiles of it are searched
    for three times as many candidates as are wanted, in 8-bit integers where those are fast, and the
    candidates computed again. A row whose last candidate comes near the neighbours found, by the error seen
    in its candidates, is searched again in fp32. Nothing depends on the number of threads.
    """
    left = _prepared(rows)
    right = left if same else _prepared(others)
    found = None
    if left.integers is not None and right.integers is not None:
        kept = _kept(count, right)
        found, _ = candidates_of_both(left.integers, right.integers, of_left=kept)
    return _nearest(left, right, found, count, same=same)


def neighbours_of_both(
    rows: Float[Tensor, "latent d_out"], others: Float[Tensor, "other d_out"], *, count: int = 10
) -> tuple[Neighbours, Neighbours]:
    """`neighbours(rows, others)` and `neighbours(others, rows)`; integers are multiplied once for both."""
    left, right = _prepared(rows), _prepared(others)
    ahead = behind = None
    if left.integers is not None and right.integers is not None:
        kept = {"of_left": _kept(count, right), "of_right": _kept(count, left)}
        ahead, behind = candidates_of_both(left.integers, right.integers, **kept)
    return _nearest(left, right, ahead, count), _nearest(right, left, behind, count)


def products_at(
    rows: Float[Tensor, "row d_out"], right: Float[Tensor, "other d_out"], places: Int[Tensor, "row some"]
) -> Float[Tensor, "row some"]:
    """Each fp32 row's products with the vectors of `right` at its places, summed in fp32."""
    in_loop = right.device.type == "cpu" and right.dtype in (torch.float32, torch.bfloat16)
    if not (in_loop and right.is_contiguous()):
        return torch.einsum("rd,rcd->rc", rows, right[places].float())
    from viewer.index.loops import multiply_at  # late: numba takes a second to import

    exact = torch.empty(places.shape)
    plain = right.view(torch.uint16) if right.dtype == torch.bfloat16 else right
    multiply_at(rows.numpy(), plain.numpy(), places.numpy(), exact.numpy())
    return exact


def duplicates(near: Neighbours, firings: Firings) -> Duplicates:
    """The pairs among a site's own neighbours whose decoder rows and firings are nearly the same.

    They are looked for among the neighbours given, so of a large crowd of copies not every pair is named.
    """
    from viewer.index.loops import count_common  # late: numba takes a second to import

    latent, rank = np.nonzero((near.ids >= 0) & (near.cosine >= DUPLICATE_COSINE))
    other = near.ids[latent, rank]
    pairs, first = np.unique(
        np.stack([np.minimum(latent, other), np.maximum(latent, other)], 1), axis=0, return_index=True
    )
    cosine = near.cosine[latent, rank][first]
    counts = np.diff(firings.starts)[pairs]
    common = np.zeros(len(pairs), np.int64)
    count_common(firings.starts, firings.row, pairs, common)
    jaccard = (common / np.maximum(counts.sum(1) - common, 1)).astype(np.float32)
    alike = jaccard >= DUPLICATE_JACCARD
    pairs = pairs[alike].astype(np.int32)
    return Duplicates(pairs[:, 0], pairs[:, 1], cosine[alike], jaccard[alike])


@torch.inference_mode()
def neuron_alignment(
    rows: Float[Tensor, "latent d_out"], *, count: int = 3, head_width: int = 0
) -> Alignment:
    """The coordinates in which decoder rows are largest, whatever their sign.

    With a `head_width` the rows are the outputs of heads of that width side by side, whose own coordinates
    mean nothing: it is then the heads in which they are largest.
    """

    def align(some: Tensor) -> tuple[Tensor, ...]:
        values = some.float()
        if head_width:
            values = values.unflatten(1, (-1, head_width)).norm(dim=2)
        size, ids = values.abs().sort(dim=1, descending=True, stable=True)
        ids, total = ids[:, :count], size.sum(1, keepdim=True)
        share = torch.where(total > 0, size[:, :count] / total, 0)
        return ids.int(), values.gather(1, ids), share

    return Alignment(*(t.cpu().numpy() for t in _by_rows(align, rows)))


@torch.inference_mode()
def encoder_decoder(
    dictionary: Dictionary,
) -> tuple[Float32[np.ndarray, " latent"], Float32[np.ndarray, " latent"] | None]:
    """The norm of each decoder row, and its cosine with the latent's encoder column.

    A vector of zeros has cosine 0. None for a transcoder: what it reads and what it writes are not one space.
    """
    decoder = dictionary.W_dec
    (norm,) = _by_rows(lambda rows: (rows.float().norm(dim=1),), decoder)
    if dictionary.cfg.transcoder:
        return norm.cpu().numpy(), None
    (cosine,) = _by_rows(
        lambda rows, columns: ((_unit(rows) * _unit(columns)).sum(1),), decoder, dictionary.W_enc.T
    )
    return norm.cpu().numpy(), cosine.cpu().numpy()


def _by_rows(work: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> list[Tensor]:
    """What `work` makes of tensors that have a row a latent, some rows at a time on every core."""
    n = len(inputs[0])
    made: list[tuple[Tensor, ...]] = [()] * len(range(0, n, _ROWS))

    def some(number: int) -> None:
        part = slice(number * _ROWS, (number + 1) * _ROWS)
        made[number] = work(*(whole[part] for whole in inputs))

    workers_for(torch.get_num_threads()).run(some, range(len(made)))
    return [torch.cat(parts) for parts in zip(*made, strict=True)]


def _unit(rows: Float[Tensor, "row d_out"]) -> Float[Tensor, "row d_out"]:
    """Rows of norm 1, or 0, in fp32."""
    rows = rows.detach().float()
    # by the largest entry first, so that no square leaves the range of fp32
    rows = rows / rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    norm = rows.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, rows / norm, 0)


def _prepared(rows: Float[Tensor, "latent d_out"]) -> _Prepared:
    unit = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    as_int = int8_is_fast(rows.device)
    values, scale = torch.empty(rows.shape if as_int else (0, 0), dtype=torch.int8), torch.empty(len(rows))

    def fill(start: int) -> None:
        part = slice(start, start + _ROWS)
        unit[part] = some = _unit(rows[part])
        if as_int:
            values[part], scale[part] = quantised(some)

    workers_for(torch.get_num_threads()).run(fill, range(0, len(rows), _ROWS))
    there = unit.any(1).nonzero()[:, 0]
    if len(there) == len(unit):
        return _Prepared(unit, there, unit, Integers(values, scale) if as_int else None)
    return _Prepared(unit, there, unit[there], Integers(values[there], scale[there]) if as_int else None)


def _kept(count: int, others: _Prepared) -> int:
    """How many candidates there are for `count` neighbours."""
    return min(_CANDIDATES * count, len(others.there))


def _nearest(
    left: _Prepared, right: _Prepared, candidates: Candidates | None, count: int, *, same: bool = False
) -> Neighbours:
    """`neighbours`, from the candidates of those vectors on the left that are there; None: from products."""
    n, kept = len(left.unit), _kept(count, right)
    ids, cosine = torch.full((n, count), -1, dtype=torch.int32), torch.zeros(n, count)
    if candidates is not None:
        candidates = _of_all(candidates, left)

    def search(start: int) -> None:
        part = slice(start, start + _ROWS)
        if candidates is None:
            scores, found = (left.unit[part] @ right.vectors.T).topk(kept, dim=1)
        else:
            scores, found = candidates.scores[part], candidates.places[part]
        numbers = torch.arange(start, start + len(found), device=left.unit.device)
        own = numbers if same else torch.full_like(numbers, -1)
        for first in range(0, len(found), _EXACT_ROWS):
            piece = slice(first, first + _EXACT_ROWS)
            row, mine = left.unit[part][piece], own[piece]
            best, value, sure = _ranked(row, right, mine, found[piece], scores[piece], count)
            if not sure.all():
                everything = row[~sure] @ right.vectors.T
                again = _by_cosine(everything, right.there.expand(everything.shape), mine[~sure], count)
                best[~sure], value[~sure] = again
            place = slice(start + first, start + first + len(best))
            ids[place, : best.shape[1]], cosine[place, : best.shape[1]] = best.int().cpu(), value.cpu()

    if kept:
        workers_for(torch.get_num_threads()).run(search, range(0, n, _ROWS))
    ids[~left.unit.any(1).cpu()] = -1
    return Neighbours(ids.numpy(), torch.where(ids >= 0, cosine, 0).numpy())


def _of_all(candidates: Candidates, side: _Prepared) -> Candidates:
    """Candidates of all vectors from those of the ones that are there; a row of zeros has any, at 0."""
    if len(side.there) == len(side.unit):
        return candidates
    shape = len(side.unit), candidates.places.shape[1]
    scores, places = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    scores[side.there], places[side.there] = candidates
    return Candidates(scores, places)


def _ranked(
    rows: Float[Tensor, "row d_out"],
    right: _Prepared,
    own: Int[Tensor, " row"],
    places: Int[Tensor, "row candidate"],
    scores: Float[Tensor, "row candidate"],
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of each row's candidates: numbers and cosines [row, count], and whether none is missing."""
    exact = products_at(rows, right.vectors, places)
    ids, cosine = _by_cosine(exact, right.there[places], own, count)
    if places.shape[1] == len(right.there):
        return ids, cosine, torch.ones_like(own, dtype=torch.bool)
    # what was left out scored no higher than the last candidate
    error = (exact - scores).abs().amax(1)
    return ids, cosine, cosine[:, -1] - scores.amin(1) > 2 * error


def _by_cosine(
    cosine: Float[Tensor, "row some"], ids: Int[Tensor, "row some"], own: Int[Tensor, " row"], count: int
) -> tuple[Int[Tensor, "row count"], Float[Tensor, "row count"]]:
    """The `count` largest of each row, of equal ones the smaller number first; `own` counts as -1, last."""
    ids, order = ids.sort(1)
    alone = ids == own[:, None]
    cosine = torch.where(alone, -torch.inf, cosine.gather(1, order))
    order = cosine.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.where(alone, -1, ids).gather(1, order), cosine.gather(1, order)
