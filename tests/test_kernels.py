"""The training step: its definition in `reference` against arithmetic and finite differences, and the CPU's
kernel against the definition.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_problems import (
    KINDS,
    VARIANTS,
    as_weights,
    assert_close,
    copied,
    errors,
    grid_bandwidth,
    grid_problem,
    options,
    problem,
    run,
)

from sae.errors import UserError
from sae.kernels.cpu import CpuKernel
from sae.kernels.reference import largest, reference_gradients, reference_step
from sae.kernels.step import TRAINED, StepState
from sae.losses import Sparsity, sparsity_gradient, sparsity_value

SHAPES = [
    (1, 1, 1),
    (7, 63, 1000),
    (2048, 1, 7),
    (7, 640, 300),
    (33, 2304, 130),
    (1, 5, 16384),
    (257, 17, 513),
]
# every other variant at each shape, so that each is met at shapes of all kinds
SHAPES_AND_VARIANTS = [(shape, variant) for i, shape in enumerate(SHAPES) for variant in VARIANTS[i % 2 :: 2]]


def eye_weights(threshold: float, dtype=torch.float64):
    """Three latents, each of which reads and writes one coordinate; no bias."""
    zero, eye = torch.zeros(3), torch.eye(3)
    level = torch.full((3,), threshold)
    return as_weights(
        W_enc_t=eye, b_enc=zero, W_dec=eye.clone(), b_in=zero, b_dec=zero, threshold=level, dtype=dtype
    )


@pytest.mark.parametrize("beta1", [0.9, 0.0])
@pytest.mark.parametrize("d_out", [None, 4])
def test_the_reference_moves_parameters_as_torchs_adam_does(beta1, d_out):
    weights, x, y = problem(20, 5, 11, d_out)
    state = StepState.begin(weights, beta1=beta1, scale_in=1.5, scale_out=1.5)
    by_hand = copied(state).weights
    told = options(beta1=beta1, beta2=0.98, lr=0.01, threshold_lr=0.02, l0_gain=0.0)
    parameters = {name: getattr(by_hand, name) for name in TRAINED}
    level = parameters.pop("threshold")
    groups = [{"params": list(parameters.values())}, {"params": [level], "lr": 0.02}]
    adam = torch.optim.Adam(groups, lr=0.01, betas=(beta1, 0.98))
    for _ in range(6):
        gradients, _, _ = reference_gradients(by_hand, x / 1.5, y / 1.5, told)
        along = torch.linalg.vecdot(gradients["W_dec"], by_hand.W_dec)
        gradients["W_dec"] = gradients["W_dec"] - along[:, None] * by_hand.W_dec
        for name in TRAINED:
            getattr(by_hand, name).grad = gradients[name]
        adam.step()
        by_hand.W_dec /= by_hand.W_dec.norm(dim=1, keepdim=True)
        reference_step(state, x, y, told)
    for name in TRAINED:
        torch.testing.assert_close(getattr(state.weights, name), getattr(by_hand, name).detach())
        assert not torch.equal(getattr(state.weights, name), getattr(problem(20, 5, 11, d_out)[0], name)), (
            name
        )


def test_silent_latents_are_pulled_and_counted():
    weights, x, y = problem(10, 5, 40, level=1.5)
    state = StepState.begin(weights, beta1=0.9)
    state.silent_for[20:] = 30
    still, told = copied(state), options(pull_after=30, lr=0.01, threshold_lr=0.02)
    fired = reference_step(state, x, y, told).fired > 0
    reference_step(still, x, y, dataclasses.replace(told, pull_after=None))
    pulled = (torch.arange(40) >= 20).double()
    assert 0 < int(fired.sum()) < 40
    torch.testing.assert_close(state.weights.b_enc, still.weights.b_enc + 0.01 * pulled)
    torch.testing.assert_close(state.weights.threshold, still.weights.threshold - 0.02 * pulled)
    assert state.silent_for.tolist() == [
        0 if on else 10 + 30 * (i >= 20) for i, on in enumerate(fired.tolist())
    ]
    torch.testing.assert_close(state.second.b_enc, still.second.b_enc, rtol=0, atol=0)


def test_l0_is_steered_by_a_share_of_what_was_missed():
    weights, x, y = problem(10, 5, 40)
    state = StepState.begin(weights, beta1=0.9)
    l0 = float(reference_step(state, x, y, options(l0_wanted=20.0, l0_gain=0.1)).l0.mean())
    assert l0 < 20
    assert float(state.l0_shift) == pytest.approx(0.1 * min(20 - l0, 5))
    reference_step(state, x, y, options(l0_wanted=20.0, l0_gain=1e3))
    assert float(state.l0_shift) == 10


def test_batchtopks_threshold_follows_the_least_activation_kept():
    weights, x, y = problem(10, 5, 40)
    state = StepState.begin(weights, beta1=0.9)
    told = options("batchtopk", threshold_lr=0.1)
    pre = (x - weights.b_in) @ weights.W_enc_t.T + weights.b_enc
    least = pre.flatten().sort(descending=True).values[3 * 10 - 1]
    reference_step(state, x, y, told)
    torch.testing.assert_close(state.weights.threshold, least.expand(40))
    reference_step(state, 1.1 * x, 1.1 * y, told)
    moved = state.weights.threshold / least - 1
    assert float(moved.amin()) == pytest.approx(float(moved.amax()))
    assert 0 < float(moved.mean()) < 0.03  # a tenth of the way to about 1.1 times the first


def test_equal_values_go_to_the_earlier_row_and_the_lower_latent():
    pre = torch.tensor([[1.0, 2.0, 2.0, 1.0], [2.0, 1.0, 1.0, 2.0]])
    assert largest(pre, 3, by_row=True).int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 1]]
    assert largest(pre, 3, by_row=False).int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 1]]


def test_threshold_gradient_is_that_of_the_smoothed_objective():
    """Averaged over thresholds a bandwidth wide, the pseudo-gradient equals the true change of the loss.

    The expected loss over a threshold drawn uniformly within the window is differentiable, and the
    straight-through window is its derivative's estimator (arXiv 2407.14435, section 4): the mean over many
    rows of the pseudo-derivative must match the finite difference of the loss over a change of the
    threshold, when pre-activations are dense around it.
    """
    # the estimate is off by eps / 4, and by a row at each end of the window, which holds 2000
    n, level, eps = 20_001, 1.0, 0.002
    pre = torch.linspace(level - 0.01, level + 0.01, n, dtype=torch.float64).unsqueeze(1)
    y = torch.full((n, 1), 0.3, dtype=torch.float64)
    told = options(
        bandwidth=eps, l0_wanted=1.0, sparsity=Sparsity(kind="linear", coefficient=0.7), l0_gain=0.0
    )

    def state(threshold: float) -> StepState:
        one, zero = torch.ones(1, 1), torch.zeros(1)
        level = torch.tensor([threshold], dtype=torch.float64)
        weights = as_weights(
            W_enc_t=one, b_enc=zero, W_dec=one, b_in=zero, b_dec=zero, threshold=level, dtype=torch.float64
        )
        return StepState.begin(weights, beta1=0.9)

    def loss(threshold: float) -> float:
        _, figures, _ = reference_gradients(state(threshold).weights, pre, y, told)
        return float(figures.squared_error.mean() + figures.sparsity)

    difference = (loss(level + eps / 2) - loss(level - eps / 2)) / eps
    # with one firing latent the reference's s uses the loss at each row's own activation: 2 (pre - y) for
    # firing rows and 2 (0 - y) for silent ones, whose mean over the window is the change of the squared error
    for kernel in (None, CpuKernel()):
        after, _ = run(kernel, state(level), pre, y, told)
        assert float(after.first.threshold[0]) / (1 - 0.9) == pytest.approx(difference, rel=2e-3)


@pytest.mark.parametrize("d_out", [None, 3])
def test_other_gradients_are_finite_differences(d_out):
    """Away from the window every parameter but the threshold has a true gradient."""
    weights, x, y = problem(6, 4, 5, d_out, level=0.3)
    told = options("linear", bandwidth=1e-9, l0_wanted=2.0)
    gradients, figures, _ = reference_gradients(weights, x, y, told)
    assert 0 < int(figures.l0.sum()) < 30
    for name in ("W_enc_t", "b_enc", "W_dec", "b_dec"):
        parameter, gradient = getattr(weights, name).view(-1), gradients[name].reshape(-1)
        for i in range(len(parameter)):
            at, h, losses = float(parameter[i]), 1e-6, []
            for value in (at + h, at - h):
                parameter[i] = value
                losses.append(float(reference_gradients(weights, x, y, told)[1].squared_error.mean()))
            parameter[i] = at
            assert float(gradient[i]) == pytest.approx(
                (losses[0] - losses[1]) / (2 * h), rel=1e-5, abs=1e-7
            ), name


@pytest.mark.parametrize("kernel", [None, CpuKernel()], ids=["reference", "cpu"])
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_the_gate_is_strict_and_the_window_open(kernel, product):
    """A pre-activation exactly at the threshold does not fire; one exactly half a bandwidth away has no
    gradient.
    """
    x = torch.tensor([[1.0, 1.25, 0.75]])
    linear = Sparsity(kind="linear", coefficient=1.0)
    told = options(bandwidth=0.5, sparsity=linear, l0_wanted=1.0, beta1=0.5, product_dtype=product)
    state = StepState.begin(eye_weights(1.0, torch.float32), beta1=0.5)
    state, figures = run(kernel, state, x, x, told)
    assert figures.fired.tolist() == [0, 1, 0]
    # at the threshold: s = 2 (0 - 1) = -2, so -(1/eps)(threshold s + c) = -2 (-2 + 1) = 2
    assert state.first.threshold.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(("shape", "variant"), SHAPES_AND_VARIANTS, ids=str)
def test_the_cpu_kernel_is_the_reference(shape, variant):
    """In float64, after a step and after twenty: weights, moments, counters and figures."""
    tied = (SHAPES.index(shape) + VARIANTS.index(variant) // 2) % 2 == 0
    beta1 = 0.0 if variant in ("linear", "topk") else 0.9
    batch, d_in, d_sae = shape
    weights, x, y = problem(*shape, d_out=None if tied else d_in + 2)
    state = StepState.begin(weights, beta1=beta1, scale_in=1.3, scale_out=1.3 if tied else 0.7)
    assert weights.tied == tied
    told = options(variant, k=min(d_sae, 3), beta1=beta1, pull_after=2 * batch)
    kernel, mine, definition = CpuKernel(), copied(state), state
    for steps in (1, 19):
        found = run(kernel, mine, x, y, told, steps)
        assert_close(found, run(None, definition, x, y, told, steps))
    assert found[0].steps == 20


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 20),
    d_in=st.integers(1, 9),
    d_sae=st.integers(1, 600),
    d_out=st.none() | st.integers(1, 9),
    level=st.floats(-6, 6),
    bandwidth=st.floats(-3, 1).map(lambda power: 10**power),
    variant=st.sampled_from(VARIANTS),
    k=st.integers(0, 700),
    beta1=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 2**16),
)
def test_the_cpu_kernel_is_the_reference_whatever_the_sizes(
    batch, d_in, d_sae, d_out, level, bandwidth, variant, k, beta1, seed
):
    """Levels from far below every pre-activation (all fire) to far above (none does)."""
    weights, x, y = problem(batch, d_in, d_sae, d_out, seed=seed, level=level)
    state = StepState.begin(weights, beta1=beta1)
    told = options(variant, bandwidth=bandwidth, k=k, beta1=beta1, pull_after=batch)
    found = run(CpuKernel(), copied(state), x, y, told, 2)
    assert_close(found, run(None, state, x, y, told, 2))


PRECISIONS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize("variant", ["quadratic_token", "frequency", "batchtopk"])
@pytest.mark.parametrize(("rows", "product"), PRECISIONS, ids=str)
def test_in_fp32_the_kernel_rounds_but_does_not_stray(rows, product, variant):
    """Against the reference in float64; a bfloat16 product costs nothing of fp32's precision."""
    weights, x, y = grid_problem(200, 63, 700)
    state = StepState.begin(weights, beta1=0.9, scale_in=2.0, scale_out=2.0)
    exact = copied(state, torch.float64)
    told = options(variant, bandwidth=4 * grid_bandwidth(63), product_dtype=product, pull_after=400)
    kernel = CpuKernel()
    found = run(kernel, state, x.to(rows), y.to(rows), told)
    assert found[1].fired.sum() > 200
    assert found[0].weights.W_enc_t.dtype == torch.float32
    assert max(errors(found, run(None, exact, x, y, told)).values()) < 1e-5
    found = run(kernel, state, x.to(rows), y.to(rows), told, 19)
    assert max(errors(found, run(None, exact, x, y, told, 19)).values()) < 1e-3


def test_a_step_of_the_size_that_runs_have():
    weights, x, y = grid_problem(2048, 640, 16384, level=2.6)
    state = StepState.begin(weights, beta1=0.9, scale_in=2.0, scale_out=2.0)
    # dense in float64 would take long; on a grid the gates of fp32 are exact
    dense = copied(state)
    told = options(l0_wanted=60.0, bandwidth=4 * grid_bandwidth(640), product_dtype=torch.bfloat16)
    found = run(CpuKernel(), state, x, y, told)
    assert 30 < found[1].l0.mean() < 200
    assert max(errors(found, run(None, dense, x, y, told)).values()) < 1e-5


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
