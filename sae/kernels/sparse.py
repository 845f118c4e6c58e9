"""The training step with explicit gradients: dense only in the encoder's product, sparse in all that follows.

With g_b = 2 (reconstruction_b - y_b) / B, s_bi = <W_dec[i], g_b>, A = {pre > threshold}, W = {|pre -
threshold| < eps/2}
and gamma_bi the sparsity term's derivative by the gate:

    dW_dec[i] = sum_A acts_bi g_b        dpre_bi = [A] s_bi            dW_enc[i] = sum_b dpre_bi (x_b - b_in)
    db_enc[i] = sum_b dpre_bi            db_dec = sum_b g_b            db_in = -sum_i db_enc[i] W_enc[i]
    dthreshold_i = -(1/eps) sum_W (threshold_i s_bi + gamma_bi)

Only pairs in A or W matter, and A or W together are {pre > threshold - eps/2}: the candidates. A row's
candidates are a bag,
so the sums are torch's embedding_bag, once by rows and once by latents.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from sae.kernels.step import StepResult, StepSettings, StepWeights
from sae.losses import sparsity_gradient, sparsity_value


def sparse_step(
    weights: StepWeights,
    x: Float[Tensor, "batch d_in"],
    y: Float[Tensor, "batch d_out"],
    settings: StepSettings,
) -> StepResult:
    """The same result as `reference_step`, for the cost of the encoder's product and of the candidates."""
    batch, d_sae = len(x), len(weights.threshold)
    centred = x - weights.b_in
    pre = encoder_product(weights, centred, settings.product_dtype)
    row, latent, value = _candidates(pre, weights.threshold - settings.bandwidth / 2)
    threshold = weights.threshold.index_select(0, latent)
    active = value > threshold
    acts = value * active

    by_row = _bounds(row, batch)
    acts_leaf = acts.requires_grad_(True)
    decoded = F.embedding_bag(latent, weights.W_dec, by_row[:-1], mode="sum", per_sample_weights=acts_leaf)
    error = decoded.detach() + weights.b_dec - y
    g = error * (2 / batch)
    (s,) = torch.autograd.grad(decoded, acts_leaf, g)
    acts = acts.detach()

    # stable: rows keep their order within a latent, so sums do not depend on the sort
    order = torch.argsort(latent, stable=True)
    rows, by_latent = row[order], _bounds(latent[order], d_sae)
    l0 = _segment_sum(active, by_row).to(x.dtype)
    fired = _segment_sum(active[order], by_latent)
    rate = (fired / batch).to(x.dtype)
    gate_rows, gate_latents = sparsity_gradient(settings.sparsity, l0, rate, settings.l0_target)
    # strict on both sides, as the reference has it
    in_window = (value - threshold).abs() < settings.bandwidth / 2
    d_gate = in_window * (
        threshold * s + gate_rows.index_select(0, row) + gate_latents.index_select(0, latent)
    )

    d_pre = (s * active)[order]
    d_b_enc = _segment_sum(d_pre, by_latent).to(x.dtype)
    return StepResult(
        W_enc_t=_bag_sum(rows, centred, by_latent, d_pre),
        b_enc=d_b_enc,
        W_dec=_bag_sum(rows, g, by_latent, acts[order]),
        b_in=-(d_b_enc @ weights.W_enc_t),
        b_dec=g.sum(0),
        threshold=(_segment_sum(d_gate[order], by_latent) / -settings.bandwidth).to(x.dtype),
        squared_error=(error**2).sum(1),
        l0=l0,
        fired=fired.long(),
        sparsity=sparsity_value(settings.sparsity, l0, rate, settings.l0_target),
    )


def encoder_product(
    weights: StepWeights, centred: Float[Tensor, "batch d_in"], product_dtype: torch.dtype
) -> Float[Tensor, "batch d_sae"]:
    """Pre-activations; the product in `product_dtype`, the bias added in the input's own dtype."""
    low = product_dtype if product_dtype != torch.float32 else centred.dtype
    pre = (centred.to(low) @ weights.W_enc_t.to(low).T).to(centred.dtype)
    return pre.add_(weights.b_enc)


def _candidates(
    pre: Float[Tensor, "batch d_sae"], bound: Float[Tensor, " d_sae"]
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Float[Tensor, " pair"]]:
    """Row, latent and value of every pre-activation above its latent's bound, in row order."""
    flat = (pre > bound).view(-1).nonzero().squeeze(1)
    return flat // pre.shape[1], flat % pre.shape[1], pre.view(-1)[flat]


def _bounds(sorted_keys: Int[Tensor, " pair"], n_keys: int) -> Int[Tensor, " bound"]:
    """Where each key's pairs begin in a sorted list, and the list's length."""
    return torch.searchsorted(sorted_keys, torch.arange(n_keys + 1, device=sorted_keys.device))


def _segment_sum(values: Shaped[Tensor, " pair"], bounds: Int[Tensor, " bound"]) -> Float64[Tensor, " key"]:
    """Sums between bounds, as differences of one running sum in float64."""
    running = F.pad(values.double().cumsum(0), (1, 0))[bounds]
    return running[1:] - running[:-1]


def _bag_sum(
    index: Int[Tensor, " pair"],
    table: Float[Tensor, "row width"],
    bounds: Int[Tensor, " bound"],
    weight: Float[Tensor, " pair"],
) -> Float[Tensor, "key width"]:
    """sum over each key's pairs of weight * table[index]; a key without pairs gives zeros."""
    return F.embedding_bag(index, table, bounds[:-1], mode="sum", per_sample_weights=weight)
