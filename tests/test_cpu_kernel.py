"""What the CPU's kernel promises beyond being the reference: bits that depend on nothing else, refusals that
leave no trace, memory that stays small.
"""

import dataclasses
import logging
import math
import tracemalloc

import pytest
import torch
from step_problems import (
    VARIANTS,
    as_weights,
    assert_close,
    assert_identical,
    copied,
    errors,
    grid_bandwidth,
    grid_problem,
    options,
    problem,
    run,
)

from sae.kernels.cpu import CpuKernel
from sae.kernels.step import Job, StepState

LOW, FULL = torch.bfloat16, torch.float32


def begin(weights, **fields) -> StepState:
    return StepState.begin(weights, **{"beta1": 0.9, **fields})


def poison(kernel: CpuKernel) -> None:
    """Fills all that the kernel keeps from step to step with NaN, and whole numbers with -1."""
    assert kernel._buffers._held
    for held in kernel._buffers._held.values():
        held.view("uint8").fill(255)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_do_not_depend_on_threads_nor_on_what_buffers_held(variant):
    weights, x, y = problem(300, 17, 700, d_out=9, dtype=FULL)
    told = options(variant, product_dtype=LOW)
    expected, _ = run(CpuKernel(), copied(begin(weights)), x, y, told, 3)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            state, kernel = copied(begin(weights)), CpuKernel()
            for _ in range(3):
                run(kernel, state, x, y, told)
                poison(kernel)
            assert_identical(state, expected)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)


def test_one_kernel_serves_states_and_batches_of_all_sizes_in_turn():
    shared, states, alone = CpuKernel(), [], []
    makers = [(300, 17, 700, None), (40, 63, 130, 9), (1, 5, 300, None)]
    told = [options("frequency"), options("topk", product_dtype=LOW), options("linear", product_dtype=LOW)]
    for seed, shape in enumerate(makers):
        states.append(begin(problem(*shape, dtype=FULL, seed=seed)[0]))
        alone.append((copied(states[-1]), CpuKernel()))
    for turn in range(3):
        for seed, (batch, *sizes) in enumerate(makers):
            _, x, y = problem(batch + 100 * (turn % 2), *sizes, dtype=FULL, seed=10 * turn + seed)
            run(shared, states[seed], x, y, told[seed])
            state, kernel = alone[seed]
            run(kernel, state, x, y, told[seed])
            assert_identical(states[seed], state)
    # and another precision of the same state
    run(
        shared,
        states[0],
        *problem(*makers[0], dtype=FULL)[1:],
        dataclasses.replace(told[0], product_dtype=LOW),
    )
    run(alone[0][1], alone[0][0], *problem(*makers[0], dtype=FULL)[1:], told[0])
    assert_identical(states[0], alone[0][0])


@pytest.mark.parametrize("threads", [1, 2])
def test_many_states_at_once_are_the_same_as_one_after_another(threads):
    """With two threads whole steps are made side by side. One batch is bad, which no other state notices."""
    before, shapes = torch.get_num_threads(), [(60, 9, 300 + 40 * i, None if i % 2 else 7) for i in range(9)]
    problems = [problem(*shape, dtype=FULL, seed=i) for i, shape in enumerate(shapes)]
    problems[3][1][5, 2] = math.nan
    together, alone = CpuKernel(), [CpuKernel() for _ in problems]
    states = [begin(weights) for weights, _, _ in problems]
    others, told = [copied(state) for state in states], options(product_dtype=LOW, pull_after=60)
    try:
        torch.set_num_threads(threads)
        for _ in range(3):
            jobs = [Job(state, x, y, told) for state, (_, x, y) in zip(states, problems, strict=True)]
            found = together.steps(jobs)
            for i, (_, x, y) in enumerate(problems):
                _, expected = run(alone[i], others[i], x, y, told)
                assert torch.equal(found[i].fired, expected.fired)
                assert_identical(states[i], others[i])
        assert [bool(figures.finite) for figures in found] == [i != 3 for i in range(9)]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_figures_are_the_callers_to_keep():
    weights, x, y = problem(30, 17, 300, dtype=FULL)
    state, kernel = begin(weights), CpuKernel()
    _, figures = run(kernel, state, x, y, options())
    before = {name: value.clone() for name, value in vars(figures).items()}
    run(kernel, state, -x, -y, options())
    poison(kernel)
    assert all(torch.equal(value, before[name]) for name, value in vars(figures).items())


@pytest.mark.parametrize("variant", ["quadratic_token", "batchtopk"])
def test_no_latent_active(variant):
    weights, x, y = problem(20, 5, 300)
    weights.b_enc -= 100
    state = begin(weights)
    found = run(CpuKernel(), copied(state), x, y, options(variant, pull_after=0), 2)
    assert found[1].l0.sum() == 0
    assert_close(found, run(None, state, x, y, options(variant, pull_after=0), 2))


def test_more_candidates_than_planned_are_served_and_told_once(caplog):
    caplog.set_level(logging.INFO, logger="sae.kernels.cpu")
    weights, x, y = problem(300, 5, 300)
    weights.b_enc += 100
    state, kernel = begin(weights), CpuKernel()
    told = options(l0_wanted=1.0)
    found = run(kernel, copied(state), x, y, told, 3)
    assert found[1].l0.tolist() == [300] * 300
    assert_close(found, run(None, state, x, y, told, 3))
    run(kernel, copied(state), torch.cat([x, x]), torch.cat([y, y]), told)
    (line,) = caplog.records
    assert "planned for 4 candidates a row, it met 300" in line.getMessage()
    caplog.clear()
    run(CpuKernel(), state, x, y, options(l0_wanted=300.0))
    assert not caplog.records


@pytest.mark.parametrize("product", [LOW, FULL])
def test_ties_at_the_gate_and_at_the_windows_ends(product):
    """Many pre-activations equal to a threshold, or half a bandwidth from it: all on one grid."""
    weights, x, y = grid_problem(200, 63, 300, level=1.5)
    mesh = grid_bandwidth(63) / 2
    weights.threshold += mesh / 2
    pre = (x / 2 - weights.b_in) @ weights.W_enc_t.T + weights.b_enc - weights.threshold
    assert ((pre == 0).sum() > 100) and ((pre.abs() == 3 * mesh).sum() > 100)
    state = begin(weights, scale_in=2.0, scale_out=2.0)
    exact, told = copied(state, torch.float64), options(bandwidth=6 * mesh, product_dtype=product)
    found = run(CpuKernel(), state, x, y, told)
    assert max(errors(found, run(None, exact, x, y, told)).values()) < 1e-5


def test_rows_that_come_twice_count_twice():
    weights, x, y = problem(40, 5, 300)
    once, twice = begin(weights), copied(begin(weights))
    _, one = run(CpuKernel(), once, x, y, options())
    _, two = run(CpuKernel(), twice, torch.cat([x, x]), torch.cat([y, y]), options())
    assert two.fired.tolist() == (2 * one.fired).tolist()
    twice.silent_for[:] = once.silent_for
    torch.testing.assert_close(dict(twice.tensors()), dict(once.tensors()))


@pytest.mark.parametrize("product", [LOW, FULL])
def test_equal_pre_activations_go_to_the_earlier_row_and_the_lower_latent(product):
    one = torch.ones(3, 1)
    weights = as_weights(
        W_enc_t=one,
        b_enc=torch.zeros(3),
        W_dec=one,
        b_in=torch.zeros(1),
        b_dec=torch.zeros(1),
        threshold=torch.zeros(3),
        dtype=FULL,
    )
    for variant, k, l0, fired in (("topk", 2, [2, 2], [2, 2, 0]), ("batchtopk", 2, [3, 1], [2, 1, 1])):
        told = options(variant, k=k, product_dtype=product)
        _, figures = run(CpuKernel(), copied(begin(weights)), torch.ones(2, 1), torch.ones(2, 1), told)
        assert figures.l0.tolist() == l0
        assert figures.fired.tolist() == fired


@pytest.mark.parametrize("variant", ["quadratic", "topk", "batchtopk"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_leaves_no_trace(value, variant):
    weights, x, y = problem(40, 5, 300, d_out=3, dtype=FULL)
    told, kernel, state = options(variant, pull_after=30, product_dtype=LOW), CpuKernel(), begin(weights)
    run(kernel, state, x, y, told)
    good = copied(state)
    for side in (0, 1):
        bad = [x.clone(), y.clone()]
        bad[side][17, 2] = value
        _, figures = run(kernel, state, *bad, told)
        assert not figures.finite
        assert_identical(state, good)
    assert state.steps == 1
    _, figures = run(kernel, state, x, y, told)
    run(CpuKernel(), good, x, y, told)
    assert figures.finite
    assert_identical(state, good)


def test_weights_changed_by_hand_need_a_refresh():
    weights, x, y = problem(100, 17, 300, dtype=FULL)
    told, states, kernels = options(product_dtype=LOW), [], []
    for told_of_it in (True, False):
        states.append(copied(begin(weights)))
        kernels.append(CpuKernel())
        run(kernels[-1], states[-1], x, y, told)
        states[-1].weights.W_enc_t.mul_(-3)
        if told_of_it:
            kernels[-1].refresh(states[-1])
    expected = copied(states[0])
    run(CpuKernel(), expected, x, y, told)
    for kernel, state in zip(kernels, states, strict=True):
        run(kernel, state, x, y, told)
    assert_identical(states[0], expected)
    assert not torch.equal(states[1].weights.W_dec, expected.weights.W_dec)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_without_a_first_moment_none_is_kept(beta1):
    state = begin(problem(4, 3, 5)[0], beta1=beta1)
    names = [name for name, _ in state.tensors()]
    assert (state.first is None) == (beta1 == 0) == ("first.W_dec" not in names)
    assert len(names) == len(set(names)) == (12 if beta1 == 0 else 17)


@pytest.mark.parametrize("variant", ["quadratic", "batchtopk"])
def test_nothing_as_large_as_all_pre_activations_is_held(variant):
    batch, d_sae = 2048, 16384
    weights, x, y = problem(batch, 64, d_sae, dtype=FULL, level=2.5)
    state, kernel = begin(weights), CpuKernel()
    told = options(variant, l0_wanted=60.0, k=60, product_dtype=LOW)
    tracemalloc.start()
    try:
        _, figures = run(kernel, state, x, y, told)
        # numpy's memory; torch's is not seen, and torch makes one block of the product at a time
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 30 < figures.l0.mean() < 300
    assert sum(held.nbytes for held in kernel._buffers._held.values()) < batch * d_sae * 4 / 4
    assert peak < batch * d_sae * 4 / 2
