"""The Triton step as a CUDA graph: captured on a GPU only."""

import pytest
import torch
from test_triton_step import COMPILED, DEVICE, begin, moved, options, rows_of

from sae.errors import UserError
from sae.kernels.triton_step import TritonKernel


def test_a_graph_needs_a_gpu_and_a_step():
    state = moved(begin(), torch.float32, DEVICE)
    with pytest.raises(UserError, match="no step"):
        TritonKernel().capture(state, *rows_of(state), options())


@pytest.mark.skipif(not COMPILED, reason="graphs are captured on a GPU only")
def test_a_captured_step_is_the_step():
    start = moved(begin(), torch.float32, DEVICE)
    kernel, twin = TritonKernel(), moved(start, torch.float32, DEVICE)
    for state in (start, twin):
        kernel.step(state, *rows_of(state), options())
    captured = kernel.capture(start, *rows_of(start), options())
    for seed in range(3):
        settings = options(lr=1e-2 / (1 + seed))
        found = captured.replay(*rows_of(start, seed=seed), settings)
        expected = kernel.step(twin, *rows_of(twin, seed=seed), settings)
        assert torch.equal(found.squared_error, expected.squared_error)
    assert start.steps == twin.steps
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(start.tensors(), twin.tensors(), strict=True))
    with pytest.raises(UserError, match="capture another"):
        captured.replay(*rows_of(start), options(bandwidth=0.1))
