"""The training step in plain torch with autograd: the definition that every other kernel is tested against.

With rect(u) = [|u| < 1/2] and eps the bandwidth (arXiv 2407.14435, eqs. 11 and 12):

    d acts / d pre := [pre > threshold]        d acts / d threshold := -(threshold / eps) rect((pre -
    threshold) / eps)
    d [pre > threshold] / d threshold := -(1 / eps) rect((pre - threshold) / eps), and 0 to pre
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.step import StepResult, StepSettings, StepWeights
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


def reference_step(
    weights: StepWeights,
    x: Float[Tensor, "batch d_in"],
    y: Float[Tensor, "batch d_out"],
    settings: StepSettings,
) -> StepResult:
    """Loss = mean_b ||reconstruction_b - y_b||^2 + sparsity, differentiated by autograd.

    Everything, the encoder's product too, is in the weights' own dtype: `settings.product_dtype` is not read.
    """
    leaves = {
        f.name: getattr(weights, f.name).detach().requires_grad_(True) for f in dataclasses.fields(weights)
    }
    centred = x - leaves["b_in"]
    pre = centred @ leaves["W_enc_t"].T + leaves["b_enc"]
    acts = _JumpReLU.apply(pre, leaves["threshold"], settings.bandwidth)
    gate = _Gate.apply(pre, leaves["threshold"], settings.bandwidth)
    squared_error = ((acts @ leaves["W_dec"] + leaves["b_dec"] - y) ** 2).sum(1)
    sparsity = sparsity_value(settings.sparsity, gate.sum(1), gate.mean(0), settings.l0_target)
    gradients = torch.autograd.grad(squared_error.mean() + sparsity, list(leaves.values()))
    gate = gate.detach()
    return StepResult(
        **dict(zip(leaves, gradients, strict=True)),
        squared_error=squared_error.detach(),
        l0=gate.sum(1),
        fired=gate.sum(0).long(),
        sparsity=sparsity.detach(),
    )
