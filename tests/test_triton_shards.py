"""The Triton step made by shards of a dictionary, against the reference of the whole."""

import math

import pytest
import torch
from shard_fakes import Meeting, divided, joined
from test_triton_step import DEVICE, assert_close, begin, interpreter, moved, options, rows_of  # noqa: F401

from sae.kernels.reference import reference_step
from sae.kernels.triton_step import TritonKernel
from sae.losses import Sparsity


def check(state, settings, batches, count=2, tolerance=1e-4):
    """As `test_triton_step.check`: steps of both; then every tensor and the last figures must agree."""
    meeting, exact = Meeting(count), moved(state)
    states = divided(moved(state, torch.float32, DEVICE), meeting)

    def work(index):
        kernel = TritonKernel()
        made = [kernel.step(states[index], x, y, settings) for x, y in batches]
        kernel.settle(states[index])
        return made

    made = meeting.run(work)
    for step, (x, y) in enumerate(batches):
        whole, figures = joined(states, [each[step] for each in made])
        expected = reference_step(exact, x.cpu(), y.cpu(), settings)
        assert bool(figures.finite)
        assert figures.l0.tolist() == expected.l0.tolist()
        assert figures.fired.tolist() == expected.fired.tolist()
    assert whole.steps == exact.steps
    for (name, found), (_, wanted) in zip(whole.tensors(), exact.tensors(), strict=True):
        assert_close(found, wanted, tolerance, name)
    for name in vars(figures):
        assert_close(getattr(figures, name), getattr(expected, name), tolerance, name)
    return expected


@pytest.mark.parametrize(("kind", "count"), [("quadratic", 4), ("frequency", 2)])
def test_shards_make_the_step_of_the_whole(kind, count):
    state = begin(7, 7, 21, tied=True)
    check(state, options(sparsity=Sparsity(kind=kind)), [rows_of(state)], count)


def test_twenty_steps():
    state = begin(5, 5, 8, tied=True)
    check(state, options(l0_wanted=3.0), [rows_of(state, seed=seed) for seed in range(20)], tolerance=1e-3)


@pytest.mark.parametrize("support", ["topk", "batchtopk"])
def test_largest(support, monkeypatch):
    """Over several blocks of rows; then with equal latents in both shards."""
    monkeypatch.setattr("sae.kernels.triton_largest._ROWS", 32)
    state = begin(d_sae=9)
    seen = check(state, options(support=support, k=2), [rows_of(state, 70), rows_of(state, 5)], 3)
    assert seen.l0.sum() == 10
    for name in ("W_enc_t", "b_enc"):
        getattr(state.weights, name)[1:] = getattr(state.weights, name)[:1]
    x, y = (rows[:1].expand(4, -1).contiguous() for rows in rows_of(state))
    state.weights.b_enc += 10
    seen = check(state, options(support=support, k=5), [(x, y)])
    assert seen.l0.tolist() == ([5] * 4 if support == "topk" else [9, 9, 2, 0])


@pytest.mark.parametrize("where", ["x", "y", "W_enc_t"])
def test_shards_refuse_alike_what_is_not_finite(where):
    state, meeting = begin(), Meeting(2)
    states = divided(moved(state, torch.float32, DEVICE), meeting)
    x, y = rows_of(state)
    bad = {"x": x, "y": y, "W_enc_t": states[1].weights.W_enc_t}[where]
    bad[3, 2] = math.nan
    before = [moved(each, torch.float32) for each in states]

    def work(index):
        kernel = TritonKernel()
        figures = kernel.step(states[index], x, y, options())
        kernel.settle(states[index])
        return bool(figures.finite)

    assert meeting.run(work) == [False, False]
    for found, good in zip(states, before, strict=True):
        assert found.steps == good.steps == 0
        for (name, one), (_, other) in zip(found.tensors(), good.tensors(), strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), name
