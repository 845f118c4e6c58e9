"""A probe: what a dictionary must compute on a few real activations, in a small file beside its weights.

The numbers are computed in fp64 from the weights and rows as they are stored. There both convert exactly, so
what the dictionary's dtype would have rounded does not matter, and two sums of n terms in whatever order, on
whatever machine, differ by no more than 2 n 2^-53 of the sum of the terms' magnitudes. `check` allows that
much: some 1e-13 to 1e-12, where one more or less in the last place of a single fp32 weight makes about 1e-10.
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from sae.architectures import Gated, build
from sae.dictionary import Dictionary, DictionaryConfig
from sae.errors import UserError

ROWS = 8
_FIRING = 1024
"""Firing latents that are sampled at most: reading their columns and rows is what a check costs."""
_QUIET = 32
"""Latents that do not fire: this many of those nearest to firing, and as many spread over all."""
LATENTS = _FIRING + 2 * _QUIET
"""Latents of a probe at most."""
_COLUMNS = 4096
"""Latents whose encoder columns are held in fp64 at a time."""
_CONVENTIONS = (
    "architecture",
    "d_in",
    "d_sae",
    "d_out",
    "site_in",
    "site_out",
    "model",
    "context",
    "prepend_bos",
    "k",
    "skip",
)
SHAPING = ("d_in", "d_sae", "d_out", "skip")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A few rows, and what a dictionary makes of them: on the CPU, and in fp64 but for the rows."""

    conventions: dict[str, Any]
    """The fields of the dictionary's config that decide what it computes, and on what."""
    rows_in: Float[Tensor, "row d_in"]
    """Raw activations at `site_in`, in the dtype they came in."""
    rows_out: Float[Tensor, "row d_out"] | None = None
    """A transcoder's: the activations at `site_out` that belong to them."""
    l0: Int64[Tensor, " row"]
    """Latents that fire on each row, of all there are."""
    latents: Int64[Tensor, " sampled"]
    """The latents that fire on the rows, as many as `make_probe` takes, and some that do not; rising."""
    pre: Float64[Tensor, "row sampled"]
    """Their pre-activations, and below their activations and thresholds."""
    activations: Float64[Tensor, "row sampled"]
    threshold: Float64[Tensor, " sampled"] | None = None
    decoded: Float64[Tensor, "row d_out"]
    """What these activations write, with b_dec and without the skip."""
    b_dec: Float64[Tensor, " d_out"]
    skipped: Float64[Tensor, "row d_out"] | None = None
    """What the skip adds."""
    magnitudes: Float64[Tensor, "row 4"]
    """What rounding is measured by: the largest sum of a row with the terms' magnitudes for the terms, among
    its pre-activations, its activations, `decoded` and `skipped`.
    """

    @property
    def reconstruction(self) -> Float64[Tensor, "row d_out"]:
        """The output through the sampled latents; the whole output where `complete`."""
        return self.decoded if self.skipped is None else self.decoded + self.skipped

    @property
    def complete(self) -> bool:
        """Whether every latent that fires on the rows is sampled."""
        return torch.equal((self.activations > 0).sum(1), self.l0)

    @property
    def fvu(self) -> float | None:
        """Squared error over variance on these few rows; None where it cannot be had."""
        is_sae = self.conventions["site_in"] == self.conventions["site_out"] and self.skipped is None
        target = self.rows_in if is_sae and self.rows_out is None else self.rows_out
        if target is None or target.shape != self.decoded.shape or not self.complete:
            return None
        exact = target.double()
        spread = float((exact - exact.mean(0)).square().sum())
        return float((exact - self.reconstruction).square().sum()) / spread if spread > 0 else None


def make_probe(
    dictionary: Dictionary,
    rows_in: Float[Tensor, "row d_in"],
    rows_out: Float[Tensor, "row_out d_out"] | None = None,
) -> Probe:
    """What the dictionary computes on a few of the rows, spread over all that are given.

    Raw activations; `rows_out` are those at a transcoder's `site_out`. Eight rows are taken, or as many as
    keep their firing latents within 1,024; of a single row with more of them, the strongest are sampled.
    Raises UserError for rows of another width, none, or some that are not finite.
    """
    cfg = dictionary.cfg
    x = _picked("rows_in", rows_in, cfg.d_in)
    y = None if rows_out is None else _picked("rows_out", rows_out, cfg.d_out)
    if rows_out is not None and not (cfg.transcoder and len(rows_out) == len(rows_in)):
        raise UserError(
            "rows_out must be a transcoder's, one for each of rows_in",
            f"{len(rows_out)} and {len(rows_in)} rows, {'a' if cfg.transcoder else 'no'} transcoder",
            "give the activations of both sites at the same tokens",
        )
    pre, acts = _encode(dictionary, x)
    rows, latents = _sample(pre, acts)
    x, part = x[:rows], _part(dictionary, latents)
    exact = x.double()
    activations = part.encode(exact)
    skipped = part.skip(exact)
    return Probe(
        conventions=_conventions(cfg),
        rows_in=x,
        rows_out=None if y is None else y[:rows],
        l0=(acts[:rows] > 0).sum(1),
        latents=latents,
        pre=part.pre_activations(exact),
        activations=activations,
        threshold=_threshold(part),
        decoded=part.decode(activations),
        b_dec=part.b_dec.detach(),
        skipped=skipped if isinstance(skipped, Tensor) else None,
        magnitudes=_magnitudes(part, exact, activations),
    )


def spread_rows(rows: Float[Tensor, "row width"]) -> Float[Tensor, "picked width"]:
    """The rows that `make_probe` takes: up to eight, evenly apart; a copy."""
    return rows[_spread(len(rows), ROWS).to(rows.device)]


def check(dictionary: Dictionary, probe: Probe, *, source: str = "") -> None:
    """Raises UserError, saying what differs, when a dictionary does not compute what its probe says.

    Reads the sampled latents' columns and rows only. `source` names where the dictionary is from.
    """
    if found := differences(dictionary, probe):
        raise UserError(
            "the dictionary must compute what its probe says",
            "; ".join(found) + (f"; in {source}" if source else ""),
            "take another copy of the folder, or delete the probe's file if the change is meant",
        )


def differences(dictionary: Dictionary, probe: Probe) -> list[str]:
    """What a dictionary computes otherwise than its probe says, beyond rounding: a phrase each, with numbers.

    Each begins with what differs: config, encoder, threshold, gate, decoder, b_dec or W_skip.
    """
    now, was = _conventions(dictionary.cfg), probe.conventions
    changed = [name for name in now if now[name] != was.get(name)]
    found: list[str | None] = [
        f"config: {name} is {now[name]!r}, and {was.get(name)!r} in the probe" for name in changed
    ]
    if set(changed) & set(SHAPING):
        return [phrase for phrase in found if phrase]
    part, x, acts = _part(dictionary, probe.latents), probe.rows_in.double(), probe.activations
    d_in, sampled = part.cfg.d_in, len(probe.latents)
    terms = torch.tensor([d_in, d_in, sampled, d_in])
    slack = (_rounding(terms) * probe.magnitudes).T.unsqueeze(-1)
    pre, threshold = part.pre_activations(x), _threshold(part)
    encodes = [
        _differing("encoder: pre-activations", pre, probe.pre, slack[0]),
        _differing("threshold: thresholds", threshold, probe.threshold),
    ]
    if not any(encodes):
        # rounding may decide a gate that stands at its edge
        made = torch.where((pre - _edge(part, acts)).abs() <= slack[0], acts, part.encode(x))
        encodes.append(_differing("gate: activations", made, acts, slack[1]))
    shift, skipped = part.b_dec - probe.b_dec, part.skip(x)
    found += [
        *encodes,
        _differing("decoder: reconstructions", part.decode(acts) - shift, probe.decoded, slack[2]),
        _differing("b_dec: values", part.b_dec, probe.b_dec),
    ]
    if isinstance(skipped, Tensor):
        found.append(_differing("W_skip: what the skip adds", skipped, probe.skipped, slack[3]))
    return [phrase for phrase in found if phrase]


def _conventions(cfg: DictionaryConfig) -> dict[str, Any]:
    return {name: getattr(cfg, name) for name in _CONVENTIONS}


def _picked(name: str, rows: Float[Tensor, "row width"], width: int) -> Float[Tensor, "picked width"]:
    """A few of the rows, on the CPU. Raises UserError for rows that no dictionary of that width can read."""
    picked = spread_rows(rows.detach()).cpu()
    if not len(picked) or picked.shape[1] != width or not torch.isfinite(picked).all():
        finite = "" if torch.isfinite(picked).all() else ", not all finite"
        do = "give real activations of the dictionary's site"
        raise UserError(f"{name} must be finite rows of width {width}", f"{tuple(rows.shape)}{finite}", do)
    return picked


def _spread(n: int, count: int) -> Int64[Tensor, " chosen"]:
    """Up to `count` places among n, evenly apart."""
    chosen = min(n, count)
    return torch.arange(chosen) * n // max(chosen, 1)


def _part(dictionary: Dictionary, latents: Int64[Tensor, " sampled"]) -> Dictionary:
    """Some of the latents as a dictionary of their own, on the CPU and in fp64."""
    tensors = {name: tensor.detach() for name, tensor in dictionary.named_parameters()}
    where, whole = latents.to(tensors["b_dec"].device), ("b_dec", "W_skip")
    # not tensor[:, where]: that takes three times as long
    taken = {n: t if n in whole else t.index_select(int(n == "W_enc"), where) for n, t in tensors.items()}
    return _of_size(dictionary.cfg, len(latents), taken)


def _encoder(dictionary: Dictionary, latents: slice) -> Dictionary:
    """Some of the latents as `_part` has them, that write nothing."""
    tensors = {name: tensor.detach() for name, tensor in dictionary.named_parameters() if name != "W_skip"}
    one = tensors["b_dec"][:1].cpu()
    taken = {n: t[:, latents] if n == "W_enc" else t[latents] for n, t in tensors.items()}
    n = taken["W_enc"].shape[1]
    cfg = dataclasses.replace(dictionary.cfg, skip=False, d_out=1)
    return _of_size(cfg, n, taken | {"W_dec": one.expand(n, 1), "b_dec": one})


def _of_size(cfg: DictionaryConfig, n: int, tensors: dict[str, Tensor]) -> Dictionary:
    cfg = dataclasses.replace(cfg, d_sae=n, k=min(cfg.k, n))
    return build(cfg, {name: tensor.cpu() for name, tensor in tensors.items()}).double()


def _magnitudes(
    part: Dictionary, x: Float64[Tensor, "row d_in"], acts: Float64[Tensor, "row sampled"]
) -> Float64[Tensor, "row 4"]:
    tensors = {n: t if n == "r_mag" else t.abs() for n, t in part.named_parameters()}
    sizes = build(part.cfg, tensors)
    pre, skipped = sizes.pre_activations(x.abs()), sizes.skip(x.abs())
    sums = [pre, sizes.encode(x.abs()) if isinstance(part, Gated) else pre, sizes.decode(acts)]
    sums.append(skipped if isinstance(skipped, Tensor) else torch.zeros_like(pre))
    return torch.stack([each.amax(1) for each in sums], dim=1)


def _encode(
    dictionary: Dictionary, x: Float[Tensor, "row d_in"]
) -> tuple[Float64[Tensor, "row d_sae"], Float64[Tensor, "row d_sae"]]:
    """Of all latents: margins over the threshold where there is one, else pre-activations; activations."""
    margins, acts = [], []
    for start in range(0, dictionary.cfg.d_sae, _COLUMNS):
        part = _encoder(dictionary, slice(start, start + _COLUMNS))
        pre, threshold = part.pre_activations(x.double()), _threshold(part)
        margins.append(pre if threshold is None else pre - threshold)
        acts.append(part.encode(x.double()))
    every = torch.cat(acts, dim=1)
    if dictionary.cfg.architecture == "topk":
        # each part kept its own k largest
        values, latents = every.topk(dictionary.cfg.k)
        every = torch.zeros_like(every).scatter(1, latents, values)
    return torch.cat(margins, dim=1), every


def _sample(
    margins: Float64[Tensor, "row d_sae"], acts: Float64[Tensor, "row d_sae"]
) -> tuple[int, Int64[Tensor, " sampled"]]:
    """How many of the rows are kept, and the latents that are looked at."""
    seen = (acts > 0).cumsum(0) > 0
    rows = max(1, int((seen.sum(1) <= _FIRING).sum()))
    firing = seen[rows - 1]
    latents = firing.nonzero()[:, 0]
    if len(latents) > _FIRING:
        return rows, acts[0].topk(_FIRING).indices.sort().values
    quiet = (~firing).nonzero()[:, 0]
    nearest = margins[:rows, quiet].amax(0).topk(min(_QUIET, len(quiet))).indices
    spread = _spread(len(quiet), _QUIET)
    return rows, torch.cat([latents, quiet[nearest], quiet[spread]]).unique()


def _threshold(part: Dictionary) -> Float64[Tensor, " sampled"] | None:
    threshold = part.firing_threshold
    return None if threshold is None else threshold.detach()


def _edge(part: Dictionary, acts: Float64[Tensor, "row sampled"]) -> Float64[Tensor, "..."] | float:
    """The pre-activation about which a latent's gate opens."""
    if part.firing_threshold is not None:
        return part.firing_threshold
    # topk: the least that is kept of a row. Gated: zero
    return 0.0 if isinstance(part, Gated) else torch.where(acts > 0, acts, torch.inf).amin(1, keepdim=True)


def _rounding(terms: Int64[Tensor, " sums"]) -> Float64[Tensor, " sums"]:
    """By how much of their magnitudes two sums of so many terms may differ; the eight are what is done before
    and after them.
    """
    return 2 * (terms.double() + 8) * 2.0**-53


def _differing(
    what: str,
    found: Float64[Tensor, "*shape"] | None,
    expected: Float64[Tensor, "*shape"] | None,
    allowed: Float64[Tensor, "row 1"] | None = None,
) -> str | None:
    """A phrase about values that differ by more than is allowed: by default, at all."""
    if found is None or expected is None:
        return None
    gap = (found - expected).abs()
    bounds = torch.zeros_like(gap) if allowed is None else allowed.expand_as(gap)
    wrong = gap > bounds
    if not wrong.any():
        return None
    worst = int((gap - bounds).argmax())
    bound = float(bounds.flatten()[worst])
    here, there, off = (float(tensor.flatten()[worst]) for tensor in (found, expected, gap))
    return (
        f"{what} differ in {int(wrong.sum()):,} of {wrong.numel():,}, by up to {off:.3g} where rounding "
        f"explains {bound:.1g} ({here:.5g} in place of {there:.5g})"
    )
