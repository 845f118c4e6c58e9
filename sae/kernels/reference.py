"""The training step in plain torch with autograd: the definition that every other kernel is tested against.

With rect(u) = [|u| < 1/2] and eps the bandwidth (arXiv 2407.14435, eqs. 11 and 12):

    d acts / d pre := [active]        d acts / d threshold := -(threshold / eps) rect((pre - threshold) / eps)
    d [pre > threshold] / d threshold := -(1 / eps) rect((pre - threshold) / eps), and 0 to pre

Adam as in arXiv 1412.6980, in the order of operations of torch.optim.Adam.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.kernels.shards import Shard, largest_of_all
from sae.kernels.step import TRAINED, Job, StepFigures, StepSettings, StepState, StepWeights
from sae.losses import sparsity_value


class _JumpReLU(torch.autograd.Function):
    """acts = pre * [pre > threshold]."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):  # type: ignore[override]
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        window = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        return grad * (pre > threshold), -(threshold / ctx.bandwidth) * (window * grad).sum(0), None


class _Gate(torch.autograd.Function):
    """[pre > threshold], which only the threshold feels."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):  # type: ignore[override]
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        window = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        return None, -(window * grad).sum(0) / ctx.bandwidth, None


class _Whole(torch.autograd.Function):
    """The sum of all shards' parts, whose gradient is every part's."""

    @staticmethod
    def forward(ctx, part, shard):  # type: ignore[override]
        whole = part.clone()
        shard.add(whole)
        return whole

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad, None


class ReferenceKernel:
    """`reference_step` as a kernel: for any device, dense."""

    name = "reference"

    def step(
        self,
        state: StepState,
        rows_in: Float[Tensor, "batch d_in"],
        rows_out: Float[Tensor, "batch d_out"],
        settings: StepSettings,
    ) -> StepFigures:
        """One step of the definition."""
        return reference_step(state, rows_in, rows_out, settings)

    def steps(self, jobs: Sequence[Job]) -> list[StepFigures]:
        """One after another."""
        return [reference_step(*job) for job in jobs]

    def refresh(self, state: StepState) -> None:
        """Nothing: only the weights are read."""


def reference_step(
    state: StepState,
    rows_in: Float[Tensor, "batch d_in"],
    rows_out: Float[Tensor, "batch d_out"],
    settings: StepSettings,
) -> StepFigures:
    """Changes `state` by one step from raw rows. Dense, and in the weights' own dtype throughout:
    `settings.product_dtype` is not read.
    """
    dtype = state.weights.threshold.dtype
    x, y = rows_in.to(dtype) / state.scale_in, rows_out.to(dtype) / state.scale_out
    found = reference_gradients(state.weights, x, y, settings, state.l0_shift, state.shard)
    gradients, figures, least = found
    if figures.finite:
        _update(state, gradients, figures, least, settings)
    return figures


def reference_gradients(
    weights: StepWeights,
    x: Float[Tensor, "batch d_in"],
    y: Float[Tensor, "batch d_out"],
    settings: StepSettings,
    l0_shift: Float[Tensor, ""] | float = 0.0,
    shard: Shard | None = None,
) -> tuple[dict[str, Tensor], StepFigures, Float[Tensor, ""]]:
    """Gradients of the trained parameters by autograd, the figures, and the least activation.

    A tied `b_in` adds its own gradient to `b_dec`'s.
    """

    def whole(part: Tensor) -> Tensor:
        return part if shard is None else _Whole.apply(part, shard)

    leaves = {name: getattr(weights, name).detach().requires_grad_(True) for name in TRAINED}
    leaves["b_in"] = weights.b_in.detach().requires_grad_(weights.tied)
    pre = (x - leaves["b_in"]) @ leaves["W_enc_t"].T + leaves["b_enc"]
    if settings.support == "jumprelu":
        acts = _JumpReLU.apply(pre, leaves["threshold"], settings.bandwidth)
        gate = _Gate.apply(pre, leaves["threshold"], settings.bandwidth)
        l0, target = whole(gate.sum(1)), settings.l0_wanted + l0_shift
        sparsity = sparsity_value(settings.sparsity, l0, gate.mean(0), target)
    else:
        gate = _largest_positive(pre.detach(), settings, shard).to(pre.dtype)
        acts, l0, sparsity = pre * gate, whole(gate.sum(1)), pre.new_zeros(())
    squared_error = ((whole(acts @ leaves["W_dec"]) + leaves["b_dec"] - y) ** 2).sum(1)
    loss = squared_error.mean() + sparsity
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    gradients, gate = dict(zip(wanted, found, strict=True)), gate.detach()
    if weights.tied:
        gradients["b_dec"] = gradients["b_dec"] + whole(gradients.pop("b_in"))
    finite, least = torch.isfinite(loss.detach() + x.sum() + y.sum()), _least(pre.detach(), gate)
    if shard is not None:
        finite, least = shard.all(finite), shard.gather(least).amin()
        if settings.sparsity.kind == "frequency":
            sparsity = whole(sparsity)
    figures = StepFigures(
        squared_error=squared_error.detach(),
        l0=l0.detach(),
        fired=gate.sum(0).long(),
        sparsity=sparsity.detach(),
        y_sum=y.sum(0),
        y_square=(y**2).sum(),
        finite=finite,
    )
    return gradients, figures, least


def _least(pre: Float[Tensor, "batch d_sae"], gate: Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
    return torch.where(gate > 0, pre, torch.inf).amin()


def _largest_positive(
    pre: Float[Tensor, "batch d_sae"], settings: StepSettings, shard: Shard | None
) -> Bool[Tensor, "batch d_sae"]:
    """What topk and batchtopk make active."""
    positive, by_row = pre > 0, settings.support == "topk"
    if shard is None:
        return largest(pre, settings.k, by_row=by_row) & positive
    rows, values = positive.nonzero()[:, 0], pre[positive]
    chosen = largest_of_all(rows, values, settings.k, len(pre), by_row, shard)
    return torch.zeros_like(positive).masked_scatter_(positive, chosen)


def largest(pre: Float[Tensor, "batch d_sae"], k: int, *, by_row: bool) -> Bool[Tensor, "batch d_sae"]:
    """Where the k largest of each row are, or the k a row largest of the batch; ties to the first."""
    values = pre if by_row else pre.reshape(1, -1)
    count = min(values.shape[1], k if by_row else k * len(pre))
    chosen = values.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True).view_as(pre)


def _update(
    state: StepState,
    gradients: dict[str, Tensor],
    figures: StepFigures,
    least: Float[Tensor, ""],
    settings: StepSettings,
) -> None:
    """Everything that follows from the gradients, written as plainly as it can be."""
    w, state.steps = state.weights, state.steps + 1
    w_grad = gradients["W_dec"]
    gradients["W_dec"] = w_grad - (w_grad * w.W_dec).sum(1, keepdim=True) * w.W_dec
    jumprelu = settings.support == "jumprelu"
    for name in TRAINED:
        if name != "threshold" or jumprelu:
            _adam(state, name, gradients[name], settings)
    w.W_dec /= w.W_dec.norm(dim=1, keepdim=True)
    if settings.pull_after is not None:
        silent = (state.silent_for >= settings.pull_after).to(w.b_enc.dtype)
        w.b_enc += settings.lr * silent
        if jumprelu:
            w.threshold -= settings.threshold_lr * silent
    if settings.support == "batchtopk" and torch.isfinite(least):
        share = settings.threshold_lr if state.steps > 1 else 1.0
        w.threshold += share * (least - w.threshold)
    w.threshold.clamp_(min=0)
    state.silent_for += len(figures.l0)
    state.silent_for[figures.fired > 0] = 0
    wanted = settings.l0_wanted
    missed = (wanted - figures.l0.mean()).clamp(-wanted / 4, wanted / 4)
    state.l0_shift.add_(settings.l0_gain * missed).clamp_(-wanted / 2, wanted / 2)


def _adam(state: StepState, name: str, gradient: Tensor, settings: StepSettings) -> None:
    beta1, beta2 = settings.beta1, settings.beta2
    second = getattr(state.second, name)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    mean = gradient
    if state.first is not None:
        mean = getattr(state.first, name).lerp_(gradient, 1 - beta1)
    rate = settings.threshold_lr if name == "threshold" else settings.lr
    size = rate / (1 - beta1**state.steps)
    root = second.sqrt() / (1 - beta2**state.steps) ** 0.5 + settings.epsilon
    getattr(state.weights, name).sub_(size * mean / root)
