"""A dictionary's step made by shards against the step of the whole: by threads that meet to add up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_fakes import Meeting, divided, joined
from step_problems import (
    VARIANTS,
    assert_close,
    assert_identical,
    copied,
    errors,
    grid_bandwidth,
    grid_problem,
    options,
    problem,
)

from sae.errors import UserError
from sae.kernels.cpu import CpuKernel
from sae.kernels.reference import ReferenceKernel, largest, reference_step
from sae.kernels.shards import Shard, largest_of_all, nth_largest
from sae.kernels.step import Job, StepState

KERNELS = {"reference": ReferenceKernel, "cpu": CpuKernel}


def by_shards(kernel, state, x, y, told, count, steps=1):
    """The whole state after some steps made by shards, and the last figures."""
    meeting = Meeting(count)
    states = divided(state, meeting)

    def work(index):
        own = KERNELS[kernel]()
        for _ in range(steps):
            figures = own.step(states[index], x, y, told)
        return figures

    figures = meeting.run(work)
    assert len(set(meeting.seen)) == 1
    return joined(states, figures)


def by_reference(state, x, y, told, steps=1):
    for _ in range(steps):
        figures = reference_step(state, x, y, told)
    return state, figures


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_shards_make_the_step_of_the_whole(kernel, variant, count):
    """In float64, after a step and after twenty; sizes are odd, and 601 latents divide by neither number."""
    tied, beta1 = VARIANTS.index(variant) % 2 == 0, 0.0 if variant in ("linear", "topk") else 0.9
    weights, x, y = problem(57, 9, 601, d_out=None if tied else 11)
    state = StepState.begin(weights, beta1=beta1, scale_in=1.3, scale_out=1.3 if tied else 0.7)
    told = options(variant, beta1=beta1, pull_after=100)
    for steps in (1, 20):
        found = by_shards(kernel, state, x, y, told, count, steps)
        assert_close(found, by_reference(copied(state), x, y, told, steps))


@pytest.mark.parametrize("variant", ["quadratic_token", "frequency", "topk", "batchtopk"])
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_in_fp32_shards_round_but_do_not_stray(product, variant):
    """Against the whole reference in float64, within what the whole kernel is held to."""
    weights, x, y = grid_problem(100, 63, 501)
    state = StepState.begin(weights, beta1=0.9, scale_in=2.0, scale_out=2.0)
    told = options(variant, bandwidth=4 * grid_bandwidth(63), product_dtype=product, pull_after=400)
    for steps, bound in ((1, 1e-5), (20, 1e-3)):
        found = by_shards("cpu", state, x, y, told, 3, steps)
        exact = by_reference(copied(state, torch.float64), x, y, told, steps)
        assert found[0].weights.W_dec.dtype == torch.float32
        assert max(errors(found, exact).values()) < bound


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", ["quadratic", "topk", "batchtopk"])
def test_every_latent_active_and_a_shard_with_none(variant, kernel):
    weights, x, y = problem(20, 5, 47)
    told = options(variant, k=60, l0_wanted=60.0, pull_after=0)
    for bias in (torch.full((47,), 100.0), torch.where(torch.arange(47) < 15, -100.0, 0.0)):
        state = StepState.begin(copied(StepState.begin(weights, beta1=0.9)).weights, beta1=0.9)
        state.weights.b_enc += bias.double()
        found = by_shards(kernel, state, x, y, told, 3, 2)
        silent = int((found[1].fired == 0).sum())
        assert (silent == 0) == (bias.min() > 0) and (found[1].fired[:15].sum() == 0) == (silent > 0)
        assert_close(found, by_reference(state, x, y, told, 2))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", ["frequency", "topk", "batchtopk"])
@pytest.mark.parametrize("where", ["x", "y", "W_dec"])
def test_shards_refuse_alike_what_is_not_finite(kernel, variant, where):
    """Also where one shard alone has the weight that is no number; a good batch is then stepped as ever."""
    weights, x, y = problem(30, 5, 300, d_out=5)
    told, meeting = options(variant, pull_after=20), Meeting(3)
    weights.b_enc[250] += 5
    states = divided(StepState.begin(weights, beta1=0.9), meeting)
    bad_x, bad_y = x.clone(), y.clone()
    if where in "xy":
        {"x": bad_x, "y": bad_y}[where][3, 2] = math.inf
    else:
        states[2].weights.W_dec[50, 1] = math.nan
    before = [copied(state) for state in states]

    def work(index):
        kept = KERNELS[kernel]()
        return kept.step(states[index], bad_x, bad_y, told), kept

    made = meeting.run(work)
    assert [bool(figures.finite) for figures, _ in made] == [False] * 3
    for state, good in zip(states, before, strict=True):
        assert_identical(_without_nan(state), _without_nan(good))
    if where in "xy":
        figures = meeting.run(lambda index: made[index][1].step(states[index], x, y, told))
        state = StepState.begin(problem(30, 5, 300, d_out=5)[0], beta1=0.9)
        state.weights.b_enc[250] += 5
        assert_close(joined(states, figures), by_reference(state, x, y, told))


def _without_nan(state):
    for _, tensor in state.tensors():
        tensor.nan_to_num_(7.0)
    return state


@pytest.mark.parametrize("threads", [1, 2])
def test_many_divided_states_meet_in_the_order_of_the_jobs(threads):
    before, meeting = torch.get_num_threads(), Meeting(2)
    problems = [problem(30, 9, 300 + 10 * i, seed=i) for i in range(9)]
    wholes = [StepState.begin(weights, beta1=0.9) for weights, _, _ in problems]
    states = [divided(whole, meeting) for whole in wholes]
    told = options()

    def work(index):
        jobs = [Job(pair[index], x, y, told) for pair, (_, x, y) in zip(states, problems, strict=True)]
        return CpuKernel().steps(jobs)

    try:
        torch.set_num_threads(threads)
        figures = meeting.run(work)
    finally:
        torch.set_num_threads(before)
    for i, (whole, (_, x, y)) in enumerate(zip(wholes, problems, strict=True)):
        found = joined(states[i], [each[i] for each in figures])
        assert_close(found, by_reference(whole, x, y, told))


def test_only_reconstructions_and_small_things_cross():
    """The numbers that a shard adds up in a step: [batch, d_out + 1], [d_in], and little else."""
    crossed, batch, d_in, d_sae = {}, 64, 32, 2000
    for variant in ("quadratic", "topk", "batchtopk"):
        weights, x, y = problem(batch, d_in, d_sae)
        crossed[variant] = []
        shard = Shard(1, 2, d_sae, lambda tensor, seen=crossed[variant]: seen.append(tensor.numel()))
        whole = StepState.begin(weights, beta1=0.9)
        state = divided(whole, Meeting(2))[1]
        state.shard = shard
        CpuKernel().step(state, x, y, options(variant, k=5))
    assert crossed["quadratic"] == [batch * (d_in + 1), 1, d_in]
    assert sum(crossed["topk"]) == sum(crossed["quadratic"]) + 2 * batch * 5
    assert sum(crossed["batchtopk"]) == sum(crossed["quadratic"]) + 6 * 2048 + 2 * batch + 2


@settings(max_examples=60)
@given(
    batch=st.integers(1, 6),
    d_sae=st.integers(3, 12),
    k=st.integers(0, 14),
    by_row=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_the_largest_of_all_are_the_largest_with_many_ties(batch, d_sae, k, by_row, dtype, seed):
    """Few values, some below zero, some infinite: nearly all are tied. Each shard gives what is positive."""
    g = torch.Generator().manual_seed(seed)
    pre = torch.randint(-1, 4, (batch, d_sae), generator=g).to(dtype)
    pre[pre == 3] = torch.tensor([1 + 1e-7, 5e-40, math.inf])[seed % 3].to(dtype)
    meeting = Meeting(3)

    def work(index):
        shard = meeting.shard(index, d_sae)
        mine = pre[:, shard.latents]
        rows, latents = (mine > 0).nonzero().unbind(1)
        kept = largest_of_all(rows, mine[rows, latents], k, batch, by_row, shard)
        return torch.zeros_like(mine, dtype=torch.bool).index_put_(
            (rows[kept], latents[kept]), torch.tensor(True)
        )

    assert torch.equal(torch.cat(meeting.run(work), 1), largest(pre, k, by_row=by_row) & (pre > 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nth_largest_of_all_shards(dtype):
    g = torch.Generator().manual_seed(0)
    values, meeting = torch.rand(30, generator=g).to(dtype).round(decimals=1), Meeting(2)
    for n, expected in [(n, values.sort(descending=True).values[n - 1]) for n in (1, 7, 29, 30)] + [(31, 0)]:
        found = meeting.run(lambda i, n=n: nth_largest(values[11 * i : 11 + 19 * i], n, meeting.shard(i, 2)))
        assert found[0] == found[1] == expected


def test_what_is_gathered_keeps_its_bits():
    meeting = Meeting(2)
    for mine in (torch.tensor([-0.0, math.nan, -math.inf]), torch.tensor([-(2**62), 3])):
        everyone = meeting.run(lambda i, mine=mine: meeting.shard(i, 2).gather(mine if i else -mine))
        whole = torch.stack([-mine, mine])
        kind = {4: torch.int32, 8: torch.int64}[mine.itemsize]
        assert all(torch.equal(found.view(kind), whole.view(kind)) for found in everyone)


def test_ranges_are_even_and_a_shard_without_a_latent_is_refused():
    ranges = [Shard(i, 4, 10, lambda tensor: None).latents for i in range(4)]
    assert [(part.start, part.stop) for part in ranges] == [(0, 2), (2, 5), (5, 7), (7, 10)]
    with pytest.raises(UserError, match="shard 0 of 3, 2 latents"):
        Shard(0, 3, 2, lambda tensor: None)
