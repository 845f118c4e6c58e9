"""Shards of one dictionary as threads of one process, which meet at a barrier to add up; and their states put
together again.
"""

import copy
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from step_problems import copied
from torch import Tensor

from sae.kernels.shards import Shard
from sae.kernels.step import PER_LATENT, TRAINED, Moments, StepFigures, StepState, StepWeights


class Meeting:
    """Where so many threads add up tensors. Between two meetings one runs at a time: Triton's interpreter
    takes no two. A thread that fails breaks the others' wait.
    """

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, [0] * count
        """How many tensors each has added."""
        self._given: list[Tensor] = [torch.empty(0)] * count
        self._barrier = threading.Barrier(count, timeout=600)
        self._turn = threading.Lock()

    def shard(self, index: int, d_sae: int) -> Shard:
        """One of the shards."""

        def add(tensor: Tensor) -> None:
            assert tensor.is_contiguous()
            self._given[index] = tensor.clone()
            self.seen[index] += 1
            self._meet()
            shapes = {(each.shape, each.dtype) for each in self._given}
            total = torch.zeros_like(tensor)
            for each in self._given:
                total += each
            self._meet()
            assert len(shapes) == 1, shapes
            tensor.copy_(total)

        return Shard(index, self.count, d_sae, add)

    def _meet(self) -> None:
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work(index)` returns in a thread for each shard."""

        def tell(index: int) -> Any:
            try:
                with self._turn:
                    return work(index)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            waiting = [pool.submit(tell, index) for index in range(self.count)]
        failed = [f.exception() for f in waiting if f.exception() is not None]
        # the one that broke the meeting, not those that waited for it
        for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in waiting]


def divided(state: StepState, meeting: Meeting) -> list[StepState]:
    """The shards of a state; they share nothing with it."""
    return [_part(copied(state), meeting.shard(i, len(state.silent_for))) for i in range(meeting.count)]


def joined(states: list[StepState], figures: list[StepFigures]) -> tuple[StepState, StepFigures]:
    """The whole state and its figures. What every shard has must be the same on all, to the last bit."""
    first = states[0]
    for other in states[1:]:
        for name in ("b_dec", "b_in"):
            assert torch.equal(getattr(first.weights, name), getattr(other.weights, name)), name
        assert torch.equal(first.second.b_dec, other.second.b_dec)
        assert torch.equal(first.l0_shift, other.l0_shift)
        assert first.steps == other.steps
    for name, value in vars(figures[0]).items():
        if name != "fired":
            assert all(torch.equal(value, getattr(other, name)) for other in figures), name
    whole = copy.copy(first)
    whole.shard = None
    whole.weights, whole.second = _together(states, "weights"), _together(states, "second")
    if first.weights.tied:
        whole.weights.b_in = whole.weights.b_dec
    whole.first = None if first.first is None else _together(states, "first")
    whole.silent_for = torch.cat([state.silent_for for state in states])
    fired = torch.cat([each.fired for each in figures])
    return whole, dataclasses.replace(figures[0], fired=fired)


def _part(state: StepState, shard: Shard) -> StepState:
    tied = state.weights.tied
    for group in (state.weights, state.first, state.second):
        for name in PER_LATENT if group is not None else ():
            setattr(group, name, getattr(group, name)[shard.latents].clone())
    if tied:
        state.weights.b_in = state.weights.b_dec
    state.silent_for = state.silent_for[shard.latents].clone()
    state.shard = shard
    return state


def _together(states: list[StepState], group: str) -> Any:
    parts = [getattr(state, group) for state in states]
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts])
        if name in PER_LATENT
        else getattr(parts[0], name)
        for name in TRAINED
    }
    if group == "weights":
        return StepWeights(**tensors, b_in=parts[0].b_in)
    return Moments(**tensors)
