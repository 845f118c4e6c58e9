"""The sparse step against the reference, and the reference against finite differences of a smoothed
objective.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.errors import UserError
from sae.kernels.reference import reference_step
from sae.kernels.sparse import sparse_step
from sae.kernels.step import StepResult, StepSettings, StepWeights
from sae.losses import Sparsity, sparsity_gradient, sparsity_value

KINDS = ("quadratic", "quadratic_token", "linear", "frequency")
FIELDS = [field.name for field in dataclasses.fields(StepResult)]


def problem(batch=7, d_in=5, d_sae=11, d_out=None, dtype=torch.float64, seed=0, threshold=0.5):
    g = torch.Generator().manual_seed(seed)
    d_out = d_out or d_in

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    weights = StepWeights(
        W_enc_t=normal(d_sae, d_in),
        b_enc=normal(d_sae) * 0.1,
        W_dec=normal(d_sae, d_out),
        b_in=normal(d_in),
        b_dec=normal(d_out),
        threshold=threshold + torch.rand(d_sae, generator=g, dtype=dtype),
    )
    return weights, normal(batch, d_in), normal(batch, d_out)


def assert_same(found: StepResult, expected: StepResult, rtol: float, atol: float) -> None:
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(found, name),
            getattr(expected, name),
            rtol=rtol,
            atol=atol,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 11), (64, 63, 130), (33, 8, 1)])
def test_sparse_equals_reference(kind, shape):
    weights, x, y = problem(*shape)
    options = StepSettings(bandwidth=0.4, sparsity=Sparsity(kind=kind), l0_target=3.0)
    assert_same(sparse_step(weights, x, y, options), reference_step(weights, x, y, options), 1e-10, 1e-10)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 20),
    d_in=st.integers(1, 9),
    d_sae=st.integers(1, 30),
    d_out=st.integers(1, 9),
    level=st.floats(-5, 5),
    bandwidth=st.floats(1e-3, 10),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
)
def test_sparse_equals_reference_whatever_the_sizes(batch, d_in, d_sae, d_out, level, bandwidth, kind, seed):
    """Levels from far below every pre-activation (all fire) to far above (none does)."""
    weights, x, y = problem(batch, d_in, d_sae, d_out, seed=seed, threshold=level)
    options = StepSettings(bandwidth=bandwidth, sparsity=Sparsity(kind=kind), l0_target=2.0)
    assert_same(sparse_step(weights, x, y, options), reference_step(weights, x, y, options), 1e-9, 1e-9)


@pytest.mark.parametrize(("threshold", "l0"), [(-100.0, 11), (100.0, 0)])
def test_all_latents_and_none(threshold, l0):
    weights, x, y = problem(threshold=threshold)
    options = StepSettings(bandwidth=0.1, sparsity=Sparsity(), l0_target=3.0)
    result = sparse_step(weights, x, y, options)
    assert result.l0.tolist() == [l0] * 7
    assert_same(result, reference_step(weights, x, y, options), 1e-10, 1e-10)


def test_the_gate_is_strict_and_the_window_open():
    """A pre-activation exactly at the threshold does not fire; one exactly half a bandwidth away has no
    gradient.
    """
    eye = torch.eye(3, dtype=torch.float64)
    weights = StepWeights(
        W_enc_t=eye,
        b_enc=torch.zeros(3, dtype=torch.float64),
        W_dec=eye.clone(),
        b_in=torch.zeros(3, dtype=torch.float64),
        b_dec=torch.zeros(3, dtype=torch.float64),
        threshold=torch.ones(3, dtype=torch.float64),
    )
    x = torch.tensor([[1.0, 1.25, 0.75]], dtype=torch.float64)
    options = StepSettings(bandwidth=0.5, sparsity=Sparsity(kind="linear", coefficient=1.0), l0_target=1.0)
    for step in (reference_step, sparse_step):
        result = step(weights, x, x, options)
        assert result.fired.tolist() == [0, 1, 0]
        # at the threshold: s = 2 (0 - 1) = -2, so -(1/eps)(threshold s + c) = -2 (-2 + 1) = 2
        assert result.threshold.tolist() == [2.0, 0.0, 0.0]


def test_duplicate_rows_count_twice():
    weights, x, y = problem(batch=4)
    twice = StepSettings(bandwidth=0.4, sparsity=Sparsity(), l0_target=3.0)
    once = sparse_step(weights, x, y, twice)
    doubled = sparse_step(weights, torch.cat([x, x]), torch.cat([y, y]), twice)
    for name in ("W_enc_t", "b_enc", "W_dec", "b_dec", "threshold", "sparsity"):
        torch.testing.assert_close(getattr(doubled, name), getattr(once, name), rtol=1e-10, atol=1e-12)
    assert doubled.fired.tolist() == (2 * once.fired).tolist()


def test_threshold_gradient_is_that_of_the_smoothed_objective():
    """Averaged over thresholds a bandwidth wide, the pseudo-gradient equals the true change of the loss.

    The expected loss over a threshold drawn uniformly within the window is differentiable, and the
    straight-through window is its derivative's estimator (arXiv 2407.14435, section 4): the mean over many
    rows of the pseudo-derivative must match the finite difference of the loss over a change of the
    threshold, when pre-activations are dense around it.
    """
    n, level, eps = 2_000_001, 1.0, 0.002  # the estimate is off by eps / 4, and by a row at each end
    pre = torch.linspace(level - 0.5, level + 0.5, n, dtype=torch.float64).unsqueeze(1)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    y = torch.full((n, 1), 0.3, dtype=torch.float64)
    options = StepSettings(bandwidth=eps, sparsity=Sparsity(kind="linear", coefficient=0.7), l0_target=1.0)

    def loss(threshold: float) -> float:
        weights = StepWeights(one, zero, one, zero, zero, torch.tensor([threshold], dtype=torch.float64))
        result = reference_step(weights, pre, y, options)
        return float(result.squared_error.mean() + result.sparsity)

    difference = (loss(level + eps / 2) - loss(level - eps / 2)) / eps
    weights = StepWeights(one, zero, one, zero, zero, torch.tensor([level], dtype=torch.float64))
    # with one firing latent the reference's s uses the loss at each row's own activation: 2 (pre - y) for
    # firing rows and 2 (0 - y) for silent ones, whose mean over the window is the change of the squared error
    gradient = float(sparse_step(weights, pre, y, options).threshold[0])
    assert gradient == pytest.approx(difference, rel=2e-3)


def test_other_gradients_are_finite_differences():
    """Away from the window every parameter but the threshold has a true gradient."""
    weights, x, y = problem(batch=6, d_in=4, d_sae=5)
    options = StepSettings(bandwidth=1e-9, sparsity=Sparsity(kind="linear"), l0_target=2.0)
    result = sparse_step(weights, x, y, options)
    for name in ("W_enc_t", "b_enc", "W_dec", "b_in", "b_dec"):
        parameter, gradient = getattr(weights, name).view(-1), getattr(result, name).reshape(-1)
        for i in range(len(parameter)):
            at, h, losses = float(parameter[i]), 1e-6, []
            for value in (at + h, at - h):
                parameter[i] = value
                losses.append(float(reference_step(weights, x, y, options).squared_error.mean()))
            parameter[i] = at
            assert float(gradient[i]) == pytest.approx(
                (losses[0] - losses[1]) / (2 * h), rel=1e-5, abs=1e-7
            ), name


def test_bf16_product_stays_within_its_rounding():
    weights, x, y = problem(256, 64, 128, dtype=torch.float32, threshold=8.0)
    low = StepSettings(bandwidth=0.5, sparsity=Sparsity(), l0_target=3.0, product_dtype=torch.bfloat16)
    found, exact = sparse_step(weights, x, y, low), reference_step(weights, x, y, low)
    for name in ("W_enc_t", "b_enc", "W_dec", "b_in", "b_dec", "squared_error"):
        # bf16 keeps 8 bits of a product; a gate that flips by that adds its whole pair, so some slack beyond
        error = (getattr(found, name) - getattr(exact, name)).norm() / getattr(exact, name).norm()
        assert 0 < error < 2**-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_sparsity_gradient_is_autograds(kind):
    term = Sparsity(kind=kind, coefficient=0.3, frequency_scale=0.2)
    gate = (torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) > 0.5).double().requires_grad_(True)
    l0, rate = gate.sum(1), gate.mean(0)
    (expected,) = torch.autograd.grad(sparsity_value(term, l0, rate, 2.5), gate)
    rows, latents = sparsity_gradient(term, l0.detach(), rate.detach(), 2.5)
    torch.testing.assert_close(rows[:, None] + latents[None, :], expected)


def test_a_negative_sparsity_is_refused():
    with pytest.raises(UserError, match="negative"):
        Sparsity(coefficient=-1.0)
