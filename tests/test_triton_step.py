"""The Triton step against the reference: by Triton's interpreter, or compiled where there is a GPU."""

import copy
import dataclasses
import os
import re
import sys

import pytest
import torch

import sae.kernels
from sae.errors import UserError
from sae.kernels.reference import reference_step
from sae.kernels.step import StepSettings, StepState, StepWeights
from sae.kernels.triton_step import TritonKernel
from sae.losses import Sparsity

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if COMPILED else "cpu"
OURS = ("triton_loops", "triton_update")


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """Triton decides at import what its functions become, its own too: the variable must be set by then."""
    pytest.importorskip("triton")
    if COMPILED:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # other tests may have imported it to compile; its C++ part cannot be imported twice, and need not
        for name in [name for name in sys.modules if re.match(r"triton(\.(?!_C)|$)", name)]:
            patch.delitem(sys.modules, name)
        forget_ours(patch)
        from triton.runtime import interpreter

        met = set()

        def call(self, *args, **kwargs):
            # as it is, but that it patches Triton's language at every call, which is half of the time
            if self.fn.__module__ not in met:
                met.add(self.fn.__module__)
                interpreter._patch_lang(self.fn)
            return self.rewrite()(*args, **kwargs)

        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
    for name in OURS:
        sys.modules.pop(f"sae.kernels.{name}", None)
        vars(sae.kernels).pop(name, None)


def forget_ours(patch):
    for name in OURS:
        patch.delitem(sys.modules, f"sae.kernels.{name}", raising=False)
        patch.delattr(sae.kernels, name, raising=False)


def begin(d_in=9, d_out=7, d_sae=20, *, tied=False, beta1=0.9, seed=0, threshold=0.6, scales=(1.5, 2.0)):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    b_dec = 0.1 * normal(d_out)
    weights = StepWeights(
        W_enc_t=normal(d_sae, d_in) / d_in**0.5,
        b_enc=0.1 * normal(d_sae),
        W_dec=torch.nn.functional.normalize(normal(d_sae, d_out)),
        b_in=b_dec if tied else 0.1 * normal(d_in),
        b_dec=b_dec,
        threshold=threshold * (1 + torch.rand(d_sae, generator=g)),
    )
    state = StepState.begin(weights, beta1=beta1, scale_in=scales[0], scale_out=scales[1])
    state.silent_for.random_(0, 60, generator=g)
    return state


def moved(state, dtype=torch.float64, device="cpu"):
    """A copy in another dtype; a tied bias stays tied."""
    twin = copy.deepcopy(state)
    for part in (twin.weights, twin.second, *([twin.first] if twin.first else [])):
        for name, tensor in vars(part).items():
            setattr(part, name, tensor.to(device, dtype))
    if state.weights.tied:
        twin.weights.b_in = twin.weights.b_dec
    twin.l0_shift, twin.silent_for = twin.l0_shift.to(device, dtype), twin.silent_for.to(device)
    return twin


def rows_of(state, batch=10, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    d_in, d_out = state.weights.W_enc_t.shape[1], state.weights.W_dec.shape[1]
    x = state.scale_in * torch.randn(batch, d_in, generator=g)
    y = state.scale_out * torch.randn(batch, d_out, generator=g)
    return x.to(DEVICE, dtype), y.to(DEVICE, dtype)


def options(**changes):
    usual = StepSettings(
        bandwidth=0.3,
        sparsity=Sparsity(),
        l0_wanted=5.0,
        l0_gain=0.1,
        lr=1e-2,
        threshold_lr=3e-3,
        pull_after=30,
        product_dtype=torch.bfloat16,
    )
    return dataclasses.replace(usual, **changes)


def snapshot(state):
    return {name: tensor.clone() for name, tensor in state.tensors()} | {"steps": torch.tensor(state.steps)}


def assert_close(found, expected, tolerance, what):
    error = (found.detach().cpu().double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm(), f"{what}: off by {error} of {expected.norm()}"


def check(state, settings, batches, kernel=None, tolerance=1e-4):
    """Steps of both from one state; then every tensor, and the last step's figures, must agree."""
    kernel = kernel or TritonKernel()
    state, exact = moved(state, torch.float32, DEVICE), moved(state)
    for x, y in batches:
        figures = kernel.step(state, x, y, settings)
        expected = reference_step(exact, x.cpu(), y.cpu(), settings)
        assert bool(figures.finite)
        # to the last gate: what screens is not what decides
        assert figures.l0.tolist() == expected.l0.tolist()
        assert figures.fired.tolist() == expected.fired.tolist()
    kernel.settle(state)
    assert state.steps == exact.steps
    for (name, found), (_, wanted) in zip(state.tensors(), exact.tensors(), strict=True):
        assert_close(found, wanted, tolerance, name)
    for name in vars(figures):
        assert_close(getattr(figures, name), getattr(expected, name), tolerance, name)
    return state, expected


@pytest.mark.parametrize("kind", ["quadratic", "quadratic_token", "linear", "frequency"])
def test_sparsity_terms(kind):
    state = begin()
    _, seen = check(state, options(sparsity=Sparsity(kind=kind)), [rows_of(state)])
    assert 2 < float(seen.l0.mean()) < 10


def test_a_tied_bias():
    state = begin(7, 7, tied=True)
    state, _ = check(state, options(), [rows_of(state)])
    assert state.weights.tied


@pytest.mark.parametrize(
    ("batch", "d_in", "d_out", "d_sae"), [(1, 5, 3, 33), (7, 1, 1, 1), (70, 3, 2, 34), (33, 63, 5, 65)]
)
def test_odd_sizes(batch, d_in, d_out, d_sae):
    state = begin(d_in, d_out, d_sae)
    check(state, options(), [rows_of(state, batch)])


@pytest.mark.parametrize("rows", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product", [torch.float32, torch.float16])
def test_dtypes(rows, product):
    state = begin()
    check(state, options(product_dtype=product), [rows_of(state, dtype=rows)])


def test_twenty_steps():
    state = begin(5, 5, 8, tied=True)
    check(state, options(l0_wanted=3.0), [rows_of(state, seed=seed) for seed in range(20)], tolerance=1e-3)


def test_without_a_first_moment():
    state = begin(beta1=0.0)
    assert state.first is None
    check(state, options(beta1=0.0, pull_after=None), [rows_of(state, seed=seed) for seed in range(3)])


@pytest.mark.parametrize("support", ["topk", "batchtopk"])
def test_largest(support):
    state = begin()
    batches = [rows_of(state, seed=seed) for seed in range(3)]
    _, seen = check(state, options(support=support, k=3), batches, tolerance=1e-3)
    assert seen.l0.sum() == 30
    assert (seen.l0.unique().tolist() == [3]) == (support == "topk")


@pytest.mark.parametrize("support", ["topk", "batchtopk"])
def test_the_largest_over_several_blocks_of_rows(support, monkeypatch):
    monkeypatch.setattr("sae.kernels.triton_largest._ROWS", 32)
    state = begin(d_sae=4)
    check(state, options(support=support, k=2), [rows_of(state, 70)])


def test_equal_values_go_to_the_earlier_row_and_the_lower_latent():
    state = begin(d_sae=6)
    weights = state.weights
    for name in ("W_enc_t", "b_enc"):
        getattr(weights, name)[1:] = getattr(weights, name)[:1]
    x, y = (rows[:1].expand(4, -1).contiguous() for rows in rows_of(state))
    weights.b_enc += 10
    for support, l0 in (("topk", [2, 2, 2, 2]), ("batchtopk", [6, 2, 0, 0])):
        _, seen = check(state, options(support=support, k=2), [(x, y)])
        assert seen.l0.tolist() == l0


@pytest.mark.parametrize(("bias", "l0"), [(100.0, 40), (-100.0, 0)])
def test_all_active_and_none(bias, l0):
    state = begin(d_sae=40)
    state.weights.b_enc += bias
    _, seen = check(state, options(), [rows_of(state, 9)])
    assert seen.l0.tolist() == [l0] * 9


@pytest.mark.parametrize("pairs_per_row", [0, 4])
def test_lists_that_do_not_fit_are_walked(pairs_per_row):
    """With 4 a row some rows have a list and some have not."""
    state = begin(d_sae=33)
    _, seen = check(state, options(), [rows_of(state, 12)], TritonKernel(pairs_per_row=pairs_per_row))
    assert float(seen.l0.mean()) > 5


def test_the_gate_is_strict_and_the_window_open():
    """A pre-activation at the threshold is not active; one half a bandwidth away has no gradient."""
    state = begin(3, 3, 3, scales=(1.0, 1.0), beta1=0.0)
    weights = state.weights
    weights.W_enc_t.copy_(torch.eye(3))
    weights.W_dec.copy_(torch.eye(3))
    for name in ("b_enc", "b_in", "b_dec"):
        getattr(weights, name).zero_()
    weights.threshold.fill_(1)
    x = torch.tensor([[1.0, 1.25, 0.75]], device=DEVICE)
    term = Sparsity(kind="linear", coefficient=1.0)
    settings = options(bandwidth=0.5, sparsity=term, l0_wanted=1.0, beta1=0.0, beta2=0.0, pull_after=None)
    state, seen = check(state, settings, [(x, x)])
    assert seen.fired.tolist() == [0, 1, 0]
    # s = 2 (0 - 1) = -2, so the gradient is -(1 / eps) (threshold s + c) = 2, and its square is the moment
    assert state.second.threshold.tolist() == [4, 0, 0]


def test_rows_twice():
    state = begin()
    check(state, options(), [tuple(torch.cat([rows, rows]) for rows in rows_of(state))])


def test_the_bound_holds_where_every_rounding_goes_one_way():
    """Numbers just below the middle of two bfloat16s: the product is too low by nearly 2^-7 of itself."""
    state = begin(64, 4, 8, scales=(1.0, 1.0))
    weights, low = state.weights, 1 + 2**-8 - 2**-16
    weights.W_enc_t.fill_(low)
    weights.b_enc.zero_()
    weights.b_in.zero_()
    rounded = torch.tensor(low, dtype=torch.bfloat16).float() ** 2 * 64
    weights.threshold.fill_(low**2 * 64 * (1 - 1e-5))
    _, y = rows_of(state, 5)
    assert float(rounded) < (1 - 2**-7.1) * float(weights.threshold[0])
    _, seen = check(state, options(bandwidth=1e-3), [(torch.full((5, 64), low, device=DEVICE), y)])
    assert seen.l0.tolist() == [8] * 5


def test_the_bound_leaves_room_for_the_rounding_of_bias_and_window():
    """Rows of zeros at the window's lower end, within it by the rounding of threshold - half a bandwidth."""
    state = begin(scales=(1.0, 1.0))
    weights, half = state.weights, torch.tensor(0.15)
    weights.b_in.zero_()
    weights.threshold.copy_(torch.linspace(0.2, 7.9, 20))
    weights.b_enc.copy_(weights.threshold - half)
    inside = weights.threshold.double() - weights.b_enc.double() < half.double()
    assert 1 < inside.sum() < 19
    _, y = rows_of(state, 4)
    state, _ = check(state, options(bandwidth=2 * float(half)), [(torch.zeros(4, 9, device=DEVICE), y)])
    assert torch.equal(state.second.threshold.cpu() > 0, inside)


def test_most_pairs_are_ruled_out_by_the_product():
    state = moved(begin(64, 4, 64, threshold=1.5), torch.float32, DEVICE)
    kernel = TritonKernel()
    figures = kernel.step(state, *rows_of(state, 32), options(bandwidth=0.01))
    candidates = int(kernel._buffers.take("counts", (64,), figures.l0, torch.int32).sum())
    active = int(figures.l0.sum())
    assert 20 < active <= candidates < 1.5 * active


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["x", "y", "W_enc_t"])
def test_what_is_not_finite_changes_nothing(bad, which):
    state = begin()
    kernel, settings = TritonKernel(), options()
    if which == "W_enc_t":
        state.weights.W_enc_t[3, 4] = bad
    state = moved(state, torch.float32, DEVICE)
    x, y = rows_of(state)
    {"x": x, "y": y}.get(which, x.clone())[2, 1] = bad
    before = snapshot(state)
    figures = kernel.step(state, x, y, settings)
    kernel.settle(state)
    assert not bool(figures.finite)
    for name, tensor in snapshot(state).items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    if which != "W_enc_t":
        check(moved(state, torch.float32), settings, [rows_of(state)], kernel)


def test_buffers_serve_any_state_and_what_they_held_is_not_read():
    """Poison in every buffer, from a kernel that has served a larger state, changes no bit."""
    start = moved(begin(), torch.float32, DEVICE)
    used, twin = TritonKernel(), moved(start, torch.float32, DEVICE)
    large = moved(begin(12, 9, 40), torch.float32, DEVICE)
    used.step(large, *rows_of(large, 34), options())
    for seed in range(2):
        for buffer in used._buffers.held():
            buffer.fill_(float("nan") if buffer.is_floating_point() else -1431655766)
        found = used.step(start, *rows_of(start, seed=seed), options())
        expected = TritonKernel().step(twin, *rows_of(twin, seed=seed), options())
        for name in vars(found):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
    used.settle(start)
    for name, tensor in snapshot(start).items():
        assert name == "steps" or torch.equal(tensor, snapshot(twin)[name]), name


def test_figures_stay_when_the_next_step_is_made():
    state = moved(begin(), torch.float32, DEVICE)
    kernel = TritonKernel()
    figures = kernel.step(state, *rows_of(state), options())
    before = copy.deepcopy(vars(figures))
    kernel.step(state, *rows_of(state, seed=5), options())
    assert all(torch.equal(getattr(figures, name), before[name]) for name in before)


def test_weights_changed_by_hand_need_a_refresh():
    state = moved(begin(), torch.float32, DEVICE)
    kernel = TritonKernel()
    kernel.step(state, *rows_of(state), options())
    state.weights.W_enc_t.mul_(-3)
    state.steps = 7
    kernel.refresh(state)
    exact = moved(state)
    x, y = rows_of(state, seed=2)
    figures = kernel.step(state, x, y, options())
    assert figures.l0.tolist() == reference_step(exact, x.cpu(), y.cpu(), options()).l0.tolist()
    for (name, found), (_, wanted) in zip(state.tensors(), exact.tensors(), strict=True):
        assert_close(found, wanted, 1e-4, name)


def test_a_state_is_not_kept_alive():
    kernel, state = TritonKernel(), moved(begin(d_sae=4), torch.float32, DEVICE)
    kernel.step(state, *rows_of(state, 2), options())
    assert len(kernel._screens) == 1
    del state
    assert len(kernel._screens) == 0


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (moved(begin(), torch.float64, DEVICE), "float32"),
        (moved(begin(d_in=9000, d_sae=2), torch.float32, DEVICE), "8192 wide"),
    ],
)
def test_states_that_the_kernels_cannot_read_are_refused(state, words):
    with pytest.raises(UserError, match=words):
        TritonKernel().step(state, *rows_of(state, 2), options())


def test_strides_are_refused():
    state = moved(begin(), torch.float32, DEVICE)
    state.weights.W_dec = state.weights.W_dec.T.contiguous().T
    with pytest.raises(UserError, match="contiguous"):
        TritonKernel().step(state, *rows_of(state, 2), options())


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    state = moved(begin(), torch.float32)
    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        TritonKernel().step(state, *(rows.cpu() for rows in rows_of(state, 2)), options())


def test_without_triton_there_is_one_clear_error(monkeypatch):
    forget_ours(monkeypatch)
    monkeypatch.setitem(sys.modules, "sae.kernels.triton_loops", None)
    with pytest.raises(UserError, match="needs triton"):
        TritonKernel()
