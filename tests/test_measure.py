"""What a plan's times rest on: real steps, timed once everything they call is compiled."""

import time

import torch

from sae.kernels.cpu import CpuKernel
from train.config import TrainConfig
from train.measure import _one_site


class Compiling(CpuKernel):
    """Takes long over its first two steps, as numba does where the second takes another product."""

    made = 0

    def step(self, *job):
        self.made += 1
        if self.made <= 2:
            time.sleep(1)
        return super().step(*job)


def test_compiling_is_not_counted():
    config = TrainConfig(model="none", width=64, l0=4.0, batch=32, tokens=1000)
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    assert _one_site(config, "blocks.0.hook_resid_post", rows, Compiling()) < 0.25
