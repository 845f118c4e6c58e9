"""A dictionary's step made by shards against the step of the whole: by threads that meet to add up."""

import dataclasses
import math

import pytest
import torch
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


