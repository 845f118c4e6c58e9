"""Which kernel makes the steps, and why: chosen once from the device, or as told."""

import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import UserError
from sae.kernels.int8 import int8_is_fast
from sae.kernels.step import Job, StepFigures, StepSettings, StepState

_log = logging.getLogger(__name__)

KernelName = Literal["cpu", "triton", "reference"]
KERNELS: tuple[KernelName, ...] = ("cpu", "triton", "reference")
VARIABLE = "JUMPSCOPE_KERNEL"
"""The environment variable that forces a kernel where no argument does."""


@runtime_checkable
class StepKernel(Protocol):
    """Makes training steps, of many states in turn."""

    name: str

    def step(
        self,
        state: StepState,
        rows_in: Float[Tensor, "batch d_in"],
        rows_out: Float[Tensor, "batch d_out"],
        settings: StepSettings,
    ) -> StepFigures:
        """Changes the state by one step from a batch of raw rows."""
        ...

    def steps(self, jobs: Sequence[Job]) -> list[StepFigures]:
        """A step of each of several states, with the same results as one after another."""
        ...

    def refresh(self, state: StepState) -> None:
        """To be called after the weights were changed by other hands than `step`."""
        ...


class Choice(NamedTuple):
    """A kernel and the reason for it, in words for people."""

    name: KernelName
    reason: str


def choose_kernel(device: torch.device, forced: str = "auto") -> Choice:
    """The kernel for a device: `forced`, else the environment's, else what is fastest there.

    Raises UserError for a name that is no kernel and for a kernel that cannot run on the device.
    """
    source, name = "asked for", forced
    if forced == "auto":
        source, name = f"{VARIABLE} asks for it", os.environ.get(VARIABLE) or "auto"
    if name != "auto":
        return _checked(device, name, source)
    if device.type == "cpu":
        return Choice("cpu", "the device is a CPU: compiled by numba")
    if device.type == "cuda" and _has_triton():
        return Choice("triton", "the device is a GPU and triton is installed")
    missing = (
        "triton is not installed" if device.type == "cuda" else f"no kernel is written for {device.type}"
    )
    return Choice("reference", f"{missing}: plain torch, slow and dense")


def make_kernel(choice: Choice) -> StepKernel:
    """The kernel itself; what it needs is imported only now. Says in the log which it is."""
    _log.info("training steps by the %s kernel: %s", choice.name, choice.reason)
    if choice.name == "cpu":
        from sae.kernels.cpu import CpuKernel

        return CpuKernel()
    if choice.name == "triton":
        from sae.kernels.triton_step import TritonKernel

        return TritonKernel()
    from sae.kernels.reference import ReferenceKernel

    return ReferenceKernel()


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else fp32."""
    if device.type == "cuda":
        # not by emulation: cards before Ampere are faster in fp32
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    elif device.type == "cpu":
        # private functions of torch: absent in some builds, where the safe answer is fp32
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, check, bool)() for check in checks)
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def screen_dtype(device: torch.device, kernel: str = "cpu") -> torch.dtype:
    """What a kernel screens by: 8-bit integers on a CPU that multiplies them fast, else `product_dtype`."""
    return torch.int8 if kernel == "cpu" and int8_is_fast(device) else product_dtype(device)


def _checked(device: torch.device, name: str, source: str) -> Choice:
    if name not in KERNELS:
        raise UserError(f"the kernel must be auto, {' or '.join(KERNELS)}", repr(name), "choose one of them")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    wrong = ""
    if name == "cpu" and device.type != "cpu":
        wrong = "the device is no CPU"
    elif name == "triton" and not (device.type == "cuda" or interpreted):
        wrong = "the device is no GPU"
    elif name == "triton" and not _has_triton():
        wrong = "triton is not installed"
    if wrong:
        raise UserError(f"the {name} kernel must be able to run here", wrong, "leave it at auto")
    return Choice(name, source)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
