"""The threads that share a kernel's work."""

import pytest
import torch

from sae.kernels.workers import Workers


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", [False, True])
def test_work_is_done_in_the_mode_of_its_caller(threads, mode):
    with torch.inference_mode(mode):
        held = torch.zeros(8)

        def work(part):
            held[part] = torch.is_inference_mode_enabled()  # refused outside of it, if born in it

        Workers(threads).run(work, range(8))
    assert held.tolist() == [mode] * 8


def test_what_a_part_raises_is_raised():
    def work(part):
        if part == 3:
            raise ValueError("part 3")

    with pytest.raises(ValueError, match="part 3"):
        Workers(2).run(work, range(5))
