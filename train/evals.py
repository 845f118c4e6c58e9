"""How good dictionaries are on held-out text: what they keep, and what the model loses with them in it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from activations.blocks import TokenBlocks
from activations.int8 import Int8Vocabulary
from activations.losses import loss_vocabulary, next_token_ce, next_token_losses
from activations.models import LanguageModel
from activations.splice import CleanRun, clean_run, spliced_final
from sae.dictionary import Dictionary
from sae.errors import UserError
from sae.sparse import SparseEncoder, SparseLatents

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, tokens done, tokens in all)."""

Watch = Callable[[str, TokenBlocks, SparseLatents], None]
"""Called with (site, a batch of blocks, the latents at its kept positions in reading order)."""

# edges of the histogram of log10(density); silent latents lie below all of them and are counted as dead
DENSITY_EDGES = [-6 + 0.25 * i for i in range(25)]
_LOSSES = "loss with each dictionary in the model"


@torch.inference_mode()
def evaluate(
    model: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    blocks: Iterable[TokenBlocks],
    *,
    tokens: int = 16_384,
    loss_tokens: int = 2_048,
    baseline_tokens: int = 240,
    watch: Watch | None = None,
    progress: Progress | None = None,
    together: int = 0,
) -> dict[str, dict[str, Any]]:
    """Measures every dictionary on the same held-out blocks; one dict of plain JSON values per site.

    Two passes. The first, over `tokens` rows, needs only the model's body: `l0`, `fvu` and its standard
    error, `dead` (the share of latents silent on all those rows), `density` (histogram of log10 firing
    rates) and the mean activation. The second splices each reconstruction into the model for the first
    `loss_tokens` rows: `ce_clean`, `ce_spliced`, their difference `delta_ce` and its standard error
    (paired, by block), and `kl`, the divergence KL(clean || spliced). All losses are in nats per token.

    Only kept positions are replaced (special tokens stay as the model made them), and only kept positions
    whose next token is kept are scored. FVU is about the mean of the rows of the first pass, and that same
    mean is what mean ablation puts in. The ablations run on the first `baseline_tokens` only: their losses
    are so large that their error is nothing beside them. `ce_mean` and `ce_zero` are `ce_clean` plus the
    difference found there, and CE recovered is 1 - delta_ce / (ce_ablated - ce_clean). A number that cannot
    be had (one block has no standard error) is None.

    A site's numbers depend on the others by their number alone: `together`, where some are elsewhere.
    `watch` is shown what the first pass finds, for others who want it too (the feature index).

    Raises UserError when the blocks hold no token that could be scored.
    """
    if not dictionaries:
        raise UserError("there must be a dictionary to evaluate", "none", "give at least one site")
    report = progress or (lambda what, done, total: None)
    sites = _sites_read(dictionaries)
    encoders = {site: SparseEncoder(dictionary) for site, dictionary in dictionaries.items()}
    statistics = {site: _RowStatistics(encoder) for site, encoder in encoders.items()}
    kept_for_losses: list[TokenBlocks] = []
    wanted = max(loss_tokens, baseline_tokens)
    held = done = 0
    for batch in first_tokens(blocks, max(tokens, wanted)):
        if held < wanted:
            kept_for_losses.extend(_first_blocks(batch, wanted - held))
            held = sum(int(part.keep.sum()) for part in kept_for_losses)
        acts = model.activations(batch.tokens.to(model.device), sites)
        for site, statistic in statistics.items():
            latents = statistic.add(acts, batch.keep)
            if watch:
                watch(site, batch, latents)
        done += int(batch.keep.sum())
        report("reconstruction on held-out text", min(done, tokens), tokens)
    if not done:
        raise _no_text("no token")
    words = loss_vocabulary(model, held * (1 + (together or len(dictionaries))))
    losses = _spliced_losses(model, encoders, statistics, kept_for_losses, baseline_tokens, report, words)
    return {site: statistics[site].summary() | losses[site] for site in dictionaries}


class _RowStatistics:
    """Sums over rows, in fp64, from which one dictionary's L0, FVU and densities follow. Does not grow with
    the rows.
    """

    def __init__(self, encoder: SparseEncoder) -> None:
        self.encoder = encoder
        self.cfg, device = encoder.dictionary.cfg, encoder.dictionary.W_dec.device
        cfg = self.cfg
        self.n = 0
        self.fired = torch.zeros(cfg.d_sae, dtype=torch.int64, device=device)
        # sums are about the mean of the first batch, so that a large mean costs no digits; FVU is then
        # moved to the mean of all rows exactly, its standard error keeps the scatter about this one
        self.origin: Tensor | None = None
        self.sum = torch.zeros(cfg.d_out, dtype=torch.float64, device=device)
        self.blocks = _RatioSums()

    def add(self, acts: Mapping[str, Tensor], keep: Bool[Tensor, "block pos"]) -> SparseLatents:
        """Takes in one batch of blocks; returns the latents of its kept positions."""
        device = self.sum.device
        keep = keep.to(device)
        x_in, x_out = (acts[site].to(device)[keep] for site in (self.cfg.site_in, self.cfg.site_out))
        latents = self.encoder.encode(x_in)
        if not len(x_in):
            return latents
        x_out = x_out.float()
        if self.origin is None:
            self.origin = x_out.double().mean(0)
        self.fired += torch.bincount(latents.latent, minlength=self.cfg.d_sae)
        error = (self.encoder.decode(latents, x_in) - x_out).double().square().sum(1)
        centred = x_out.double() - self.origin
        self.n += len(x_in)
        self.sum += centred.sum(0)
        self.blocks.add(_sum_by_block(error, keep), _sum_by_block(centred.square().sum(1), keep))
        return latents

    @property
    def mean(self) -> Float[Tensor, " d_out"]:
        """The mean activation at the site written to, over the rows so far, in fp64."""
        assert self.origin is not None, "no rows"
        return self.origin + self.sum / self.n

    def summary(self) -> dict[str, Any]:
        """The numbers of `evaluate` that need no loss."""
        # sum |x - mean|^2 = sum |x - origin|^2 - |sum (x - origin)|^2 / n
        variance = self.blocks.denominator - float(self.sum.square().sum()) / self.n
        rate = self.fired.double() / self.n
        firing = rate[rate > 0].log10().cpu()
        # the few latents rarer than the first edge are counted in the first bin
        counts = torch.histogram(
            firing.clamp(min=DENSITY_EDGES[0]), torch.tensor(DENSITY_EDGES, dtype=torch.float64)
        )
        return {
            "n_tokens": self.n,
            "l0": int(self.fired.sum()) / self.n,
            "l0_target": self.cfg.l0_target,
            "fvu": _ratio(self.blocks.numerator, variance),
            "fvu_se": self.blocks.standard_error(),
            "dead": float((self.fired == 0).double().mean()),
            "density": {"log10_edges": DENSITY_EDGES, "latents": [int(count) for count in counts.hist]},
        }


class _RatioSums:
    """A ratio of sums over blocks, and its standard error with the block as the unit of sampling.

    Tokens of one block share their text, so the error is taken over blocks: for r = sum(a) / sum(b) it is
    sqrt(B / (B - 1) * sum((a - r b)^2)) / sum(b).
    """

    def __init__(self) -> None:
        self.n = 0
        self.numerator = self.denominator = 0.0
        self._aa = self._ab = self._bb = 0.0

    def add(self, numerators: Float[Tensor, " block"], denominators: Float[Tensor, " block"]) -> None:
        a, b = numerators.double(), denominators.double()
        used = b > 0
        a, b = a[used], b[used]
        self.n += len(a)
        self.numerator += float(a.sum())
        self.denominator += float(b.sum())
        self._aa += float(a @ a)
        self._ab += float(a @ b)
        self._bb += float(b @ b)

    @property
    def value(self) -> float | None:
        return _ratio(self.numerator, self.denominator)

    def standard_error(self) -> float | None:
        ratio = self.value
        if ratio is None or self.n < 2:
            return None
        # rounding can leave a tiny negative where every block agrees
        squares = max(0.0, self._aa - 2 * ratio * self._ab + ratio**2 * self._bb)
        return _finite(math.sqrt(self.n / (self.n - 1) * squares) / abs(self.denominator))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SiteLosses:
    """Sums of losses over scored tokens for one site; denominators are counts of tokens."""

    spliced: _RatioSums
    delta: _RatioSums
    kl: _RatioSums
    delta_mean: _RatioSums
    delta_zero: _RatioSums


def _spliced_losses(
    model: LanguageModel,
    encoders: Mapping[str, SparseEncoder],
    statistics: Mapping[str, _RowStatistics],
    batches: list[TokenBlocks],
    baseline_tokens: int,
    report: Progress,
    vocabulary: Int8Vocabulary | None,
) -> dict[str, dict[str, Any]]:
    """The second pass: every site's reconstruction in the model's stream, all sites' losses in one call a
    batch.
    """
    dictionaries = {site: encoder.dictionary for site, encoder in encoders.items()}
    clean = _RatioSums()
    sums = {
        site: _SiteLosses(**{f.name: _RatioSums() for f in dataclasses.fields(_SiteLosses)})
        for site in dictionaries
    }
    total = sum(int(batch.keep.sum()) for batch in batches)
    done = 0
    # the first batch takes a while: the bar should stand there before it
    report(_LOSSES, 0, total)
    for batch, n_ablated in _with_baselines(batches, baseline_tokens):
        tokens, keep = batch.tokens.to(model.device), batch.keep.to(model.device)
        run = clean_run(model, tokens, _sites_read(dictionaries))
        scored = _scored(keep)
        targets = tokens[:, 1:][scored[:, :-1]].long()
        finals, ablated, first = [run.final[scored]], [], scored[:n_ablated]
        for site, encoder in encoders.items():
            own, mean, zero = _finals(model, encoder, run, tokens, keep, statistics[site].mean, n_ablated)
            finals.append(own[scored])
            ablated += [mean[first], zero[first]]
        ce, kl = next_token_losses(model, torch.stack(finals), targets, vocabulary=vocabulary)
        n = _sum_by_block(torch.ones_like(ce[0]), scored)
        clean.add(_sum_by_block(ce[0], scored), n)
        for part, own, divergence in zip(sums.values(), ce[1:], kl[1:], strict=True):
            part.spliced.add(_sum_by_block(own, scored), n)
            part.delta.add(_sum_by_block(own - ce[0], scored), n)
            part.kl.add(_sum_by_block(divergence, scored), n)
        if n_ablated:
            known, rows = n[:n_ablated], int(first.sum())
            more = next_token_ce(model, torch.stack(ablated), targets[:rows], vocabulary=vocabulary)
            more = more - ce[0, :rows]
            for part, mean, zero in zip(sums.values(), more[::2], more[1::2], strict=True):
                part.delta_mean.add(_sum_by_block(mean, first), known)
                part.delta_zero.add(_sum_by_block(zero, first), known)
        done += int(keep.sum())
        report(_LOSSES, done, total)
    if clean.denominator == 0:
        raise _no_text("no two tokens in a row")
    return {site: _loss_summary(clean, part) for site, part in sums.items()}


def _finals(
    model: LanguageModel,
    encoder: SparseEncoder,
    run: CleanRun,
    tokens: Int[Tensor, "block pos"],
    keep: Bool[Tensor, "block pos"],
    mean: Float[Tensor, " d_out"],
    n_ablated: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Final hidden states [block, pos, d_model] with the reconstruction at the site, and of the first
    `n_ablated` blocks with the mean and with zero there: all from one pass.
    """
    cfg = encoder.dictionary.cfg
    rows = rearrange(run.acts[cfg.site_in], "block pos d_in -> (block pos) d_in")
    stream = run.acts[cfg.site_out]
    # rounded first to what the dictionary reads, then to what the model goes on with
    flat = encoder.decode(encoder.encode(rows), rows).to(rows.dtype).to(stream)
    own = rearrange(flat, "(block pos) d_out -> block pos d_out", pos=stream.shape[1])
    ablated = stream[:n_ablated]
    replacement = torch.cat([own, mean.to(stream).expand_as(ablated), torch.zeros_like(ablated)])
    every = torch.arange(len(tokens), device=tokens.device)
    blocks = torch.cat([every, every[:n_ablated], every[:n_ablated]])
    mixed = torch.where(keep[blocks][..., None], replacement, stream[blocks])
    final = spliced_final(model, tokens[blocks], run.at(cfg.site_out, blocks), cfg.site_out, mixed)
    own, mean, zero = final.split([len(tokens), n_ablated, n_ablated])
    return own, mean, zero


def _loss_summary(clean: _RatioSums, part: _SiteLosses) -> dict[str, Any]:
    ce_clean, delta = clean.value, part.delta.value
    values = {
        "n_loss_tokens": int(part.delta.denominator),
        "n_baseline_tokens": int(part.delta_mean.denominator),
        "ce_clean": ce_clean,
        "ce_spliced": part.spliced.value,
        "delta_ce": delta,
        "delta_ce_se": part.delta.standard_error(),
        "kl": part.kl.value,
    }
    for name, baseline in (("mean", part.delta_mean.value), ("zero", part.delta_zero.value)):
        ablated = None if ce_clean is None or baseline is None else ce_clean + baseline
        values[f"ce_{name}"] = None if ablated is None else _finite(ablated)
        lost = _ratio(delta, baseline)
        values[f"ce_recovered_{name}"] = None if lost is None else 1 - lost
    return values


def _no_text(found: str) -> UserError:
    must = "there must be held-out text to evaluate on"
    return UserError(must, found, "Choose a larger corpus or a longer context")


def _sites_read(dictionaries: Mapping[str, Dictionary]) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(site for d in dictionaries.values() for site in (d.cfg.site_in, d.cfg.site_out))
    )


def _scored(keep: Bool[Tensor, "block pos"]) -> Bool[Tensor, "block pos"]:
    """Positions whose own token and next token are both kept; never the last one of a block."""
    scored = torch.zeros_like(keep)
    scored[:, :-1] = keep[:, :-1] & keep[:, 1:]
    return scored


def _sum_by_block(
    values: Float[Tensor, " row"], chosen: Bool[Tensor, "block pos"]
) -> Float[Tensor, " block"]:
    """Sums values of the chosen positions, given in reading order, over each block, in fp64."""
    block = torch.arange(len(chosen), device=chosen.device).repeat_interleave(chosen.sum(1)).to(values.device)
    return torch.zeros(len(chosen), dtype=torch.float64, device=values.device).index_add_(
        0, block, values.double()
    )


def first_tokens(blocks: Iterable[TokenBlocks], tokens: int) -> Iterator[TokenBlocks]:
    """Batches of blocks up to the block in which that many kept tokens are reached."""
    left = tokens
    for batch in blocks:
        for part in _first_blocks(batch, left):
            yield part
            left -= int(part.keep.sum())
        if left <= 0:
            return


def _first_blocks(batch: TokenBlocks, tokens: int) -> list[TokenBlocks]:
    """The whole blocks, from the first, that hold `tokens` kept tokens: a list of one batch, or of none."""
    held = batch.keep.sum(1).cumsum(0)
    n = min(len(held), int((held < tokens).sum()) + 1) if tokens > 0 else 0
    return [_slice(batch, 0, n)] if n else []


def _with_baselines(batches: list[TokenBlocks], tokens: int) -> Iterator[tuple[TokenBlocks, int]]:
    """The batches, each with the number of its blocks among the first that hold `tokens` kept tokens."""
    left = tokens
    for batch in batches:
        part = _first_blocks(batch, left)
        yield batch, sum(len(first.tokens) for first in part)
        left -= sum(int(first.keep.sum()) for first in part)


def _slice(batch: TokenBlocks, start: int, stop: int) -> TokenBlocks:
    names = ("tokens", "document", "position", "keep")
    return TokenBlocks(**{name: getattr(batch, name)[start:stop] for name in names})


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    if numerator is None or not denominator:
        return None
    return _finite(numerator / denominator)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
