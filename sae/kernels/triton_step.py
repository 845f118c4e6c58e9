"""The step on a GPU: the product on tensor cores, all else in Triton over the few pairs that matter.

The product, in bfloat16 say, only screens. A pair of row and latent that it cannot rule out, by a bound on
its rounding error, gets its true pre-activation in fp32; so the step is the fp32 step, whichever dtype the
product has.

    x = rows / scale - b_in, and its rounded copy
    the copies' product, which leaves one bit a pair: in a mask by rows and in one by latents
    a mask's bits counted, the counts summed up, the bits listed
    a program a row: exact pre-activations of its list, reconstruction, g = d loss / d reconstruction
    a program for 4 latents: pre-activations of their rows again, gradients, Adam, norm, rounded copy
    biases, thresholds, rows of silence, l0_shift

Neither pre-activations nor a matrix's gradient are ever stored, and no launch waits for the host: a bad
batch is found and left out on the device. Lists share `pairs_per_row` entries a row of the batch; a list
that does not fit is found by walking its mask, slower and no less right. Sums are made in the same order
every time, so two runs give equal bits.

On paper, for d_in 640, d_sae 16,384, 4,096 rows, 75 candidates a row of which 50 active, on a card with 800
TFLOP/s in bfloat16, 60 in fp32, 3.3 TB/s and 50 MB of L2 that gives about 5.5 TB/s. No card has run it yet.

    floor of operations   0.11 ms: the product's 86 GFLOP; the pairs' 2.2, on other units, are 0.04 ms
    floor of bytes        0.17 ms: matrices and moments read and written, 503 MB, and about 50 MB of rows
                          and rounded copies (0.12 ms with beta1 = 0: 336 MB)
    product and masks     0.2 ms: blocks of 128 x 256 read 1.0 GB from L2, and 10 steps of 64 along d_in are
                          few to hide an epilogue behind
    lists                 0.03 ms: four passes over 8 MB
    rows                  0.3 ms: 1.3 GB of weights, about half of them missed by L2 (84 MB of tables)
    latents               0.3 to 0.4 ms: 1.4 GB of x and g from L2 (they are 21 MB), and Adam's 503 MB
    between               0.05 ms: some 50 small launches of torch, in a graph

Together about 1.0 ms, 6 times the floor of bytes: what is gathered from L2 is what is left to gain. A latent
active on every row keeps its program busy for 0.5 ms or so; such latents would have to be split.
"""

import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae.errors import UserError
from sae.kernels.step import TRAINED, Job, StepFigures, StepSettings, StepState
from sae.kernels.triton_launch import Buffers, Screens, Step

# a program holds whole rows in registers
_WIDEST = 8192


class TritonKernel:
    """Makes steps; its buffers serve every state in turn, one step at a time, on one stream."""

    name = "triton"

    def __init__(self, *, pairs_per_row: int = 256) -> None:
        try:
            from sae.kernels import triton_loops, triton_update
        except ImportError as error:
            raise UserError("the triton step needs triton", str(error), "install it") from error
        self._loops: Any = triton_loops
        self._update: Any = triton_update
        self._pairs_per_row = pairs_per_row
        self._screens: weakref.WeakKeyDictionary[StepState, Screens] = weakref.WeakKeyDictionary()
        self._buffers = Buffers()

    def refresh(self, state: StepState) -> None:
        """Forgets what was derived from the state; for whoever changed its weights or `steps` by hand."""
        self._screens.pop(state, None)

    def settle(self, state: StepState) -> None:
        """Waits for the device and takes refused steps out of `state.steps`, as every step on a CPU does."""
        if state in self._screens:
            state.steps = int(self._screens[state].steps)

    def step(
        self,
        state: StepState,
        rows_in: Float[Tensor, "batch d_in"],
        rows_out: Float[Tensor, "batch d_out"],
        settings: StepSettings,
    ) -> StepFigures:
        """The same change of `state` as `reference_step` makes; a GPU's refused steps count until `settle`.

        The state is in fp32, rows of any float dtype.
        """
        given = _given(settings).to(rows_in.device, non_blocking=True)
        figures = self.launch(state, rows_in.contiguous(), rows_out.contiguous(), given, settings)
        state.steps += 1
        if not rows_in.is_cuda:
            self.settle(state)
        return figures

    def steps(self, jobs: Sequence[Job]) -> list[StepFigures]:
        """One after another on the stream; none waits for the host."""
        return [self.step(*job) for job in jobs]

    def capture(
        self,
        state: StepState,
        rows_in: Float[Tensor, "batch d_in"],
        rows_out: Float[Tensor, "batch d_out"],
        settings: StepSettings,
    ) -> "CapturedStep":
        """One step of this state as a CUDA graph, for rows shaped as these. The state stays as it is.

        Not yet run on a card. A `step` of this state with the same shapes and settings must have been made,
        so that all is compiled and allocated.
        """
        if state not in self._screens or not rows_in.is_cuda:
            raise UserError(
                "only a state on a GPU that has made a step can be captured",
                f"{'a' if state in self._screens else 'no'} step, on {rows_in.device}",
                "call step with the same shapes and settings first",
            )
        return CapturedStep(self, state, rows_in, rows_out, settings)

    def launch(
        self,
        state: StepState,
        rows_in: Float[Tensor, "batch d_in"],
        rows_out: Float[Tensor, "batch d_out"],
        given: Float64[Tensor, "12"],
        settings: StepSettings,
    ) -> StepFigures:
        """A step but for `state.steps`, from contiguous rows and `_given` on their device. Never waits."""
        screens = self._screens.get(state)
        if screens is None or screens.dtype != settings.product_dtype:
            _check(state, rows_in)
            screens = self._screens[state] = Screens.of(state, settings.product_dtype)
        kernels = self._loops, self._update
        step = Step(kernels, self._buffers, self._pairs_per_row, state, screens, settings, given)
        return step.run(rows_in, rows_out)

    def held(self, state: StepState) -> list[Any]:
        """All memory that a step of this state works on, besides the state's own."""
        return [*self._buffers.held(), self._screens[state]]


class CapturedStep:
    """A step that is replayed as one launch. Not yet run on a card."""

    def __init__(
        self,
        kernel: TritonKernel,
        state: StepState,
        rows_in: Float[Tensor, "batch d_in"],
        rows_out: Float[Tensor, "batch d_out"],
        settings: StepSettings,
    ) -> None:
        self._state, self._fixed = state, _fixed(settings)
        self._rows = rows_in.clone(), rows_out.clone()
        self._given = _given(settings).to(rows_in.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._figures = kernel.launch(state, *self._rows, self._given, settings)
        # the graph goes on using these, when the kernel has long replaced them by longer ones
        self._held = kernel.held(state)

    def replay(
        self,
        rows_in: Float[Tensor, "batch d_in"],
        rows_out: Float[Tensor, "batch d_out"],
        settings: StepSettings,
    ) -> StepFigures:
        """As `TritonKernel.step`; of the settings only what `_fixed` leaves out may have changed."""
        if _fixed(settings) != self._fixed:
            found = f"{_fixed(settings)} instead of {self._fixed}"
            raise UserError("a captured step keeps its support, sparsity and dtype", found, "capture another")
        self._given.copy_(_given(settings), non_blocking=True)
        for mine, new in zip(self._rows, (rows_in, rows_out), strict=True):
            mine.copy_(new, non_blocking=True)
        self._graph.replay()
        self._state.steps += 1
        return StepFigures(**{name: value.clone() for name, value in vars(self._figures).items()})


def _given(settings: StepSettings) -> Float64[Tensor, "12"]:
    """The settings' numbers, on the host: first the 6 `options` of `triton_update`."""
    beta1, beta2 = settings.beta1, settings.beta2
    pull = 0 if settings.pull_after is None else settings.pull_after
    options = [settings.bandwidth, 1 - beta1, beta2, 1 - beta2, settings.epsilon, pull]
    rates = [settings.lr, settings.threshold_lr, settings.l0_wanted, settings.l0_gain, beta1, beta2]
    # pinned, or the copy to the device would wait
    return torch.tensor(options + rates, dtype=torch.float64, pin_memory=torch.cuda.is_available())


def _fixed(settings: StepSettings) -> tuple[Any, ...]:
    """What of the settings is not in `_given`."""
    pulled = settings.pull_after is not None
    return settings.sparsity, settings.support, settings.k, settings.bandwidth, settings.product_dtype, pulled


def _check(state: StepState, rows_in: Float[Tensor, "batch d_in"]) -> None:
    """Raises UserError for a state that the kernels would read wrongly."""
    tensors = dict(state.tensors())
    if wrong := [name for name in TRAINED if tensors[name].dtype != torch.float32]:
        raise UserError("the triton step needs weights in float32", ", ".join(wrong), "convert the state")
    if loose := [name for name, tensor in tensors.items() if not tensor.is_contiguous()]:
        raise UserError("the triton step needs contiguous tensors", ", ".join(loose), "call contiguous()")
    widest = max(state.weights.W_enc_t.shape[1], state.weights.W_dec.shape[1])
    if widest > _WIDEST:
        raise UserError(f"the triton step takes rows up to {_WIDEST} wide", str(widest), "use another kernel")
    devices = {tensor.device for tensor in (*tensors.values(), rows_in)}
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if len(devices) > 1 or not (rows_in.is_cuda or interpreted):
        raise UserError(
            "the triton step needs its state and rows on one GPU",
            ", ".join(sorted(map(str, devices))),
            "move them there; to try it on a CPU, set TRITON_INTERPRET=1 before Python starts",
        )
