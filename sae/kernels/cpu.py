"""The step on a CPU: torch's product over blocks of latents, numba for all else.

A product in 8-bit integers, or in bfloat16, only screens. A pair of row and latent that it cannot rule out,
by a bound on its rounding error, gets its true pre-activation in the weights' own precision; so the step is
the fp32 step, whichever dtype the product has. Blocks of latents are multiplied, screened and sorted while
they are in a core's cache; nothing of the size [batch, d_sae] and no gradient is ever stored.

    by blocks of latents: product, screen, exact pre-activations of what passed, in lists by latent
    by rows: the lists transposed, reconstruction, g = d loss / d reconstruction
    by blocks of latents: s = <W_dec, g>, both gradients, projection, Adam, norm, threshold, bias; one pass
"""

import logging
import threading
import weakref
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.cpu_forward import PLANNED, Buffers, Screens, screens_for
from sae.kernels.cpu_step import Step
from sae.kernels.step import Job, StepFigures, StepSettings, StepState
from sae.kernels.workers import workers_for

_log = logging.getLogger(__name__)

# from so many jobs a thread on, whole steps side by side keep all threads busy to the end
_SIDE_BY_SIDE = 4


class CpuKernel:
    """Makes steps. Each thread has buffers of its own, which serve every state in turn."""

    name = "cpu"

    def __init__(self) -> None:
        self._screens: weakref.WeakKeyDictionary[StepState, Screens] = weakref.WeakKeyDictionary()
        self._of_thread = threading.local()
        self._said = False

    def refresh(self, state: StepState) -> None:
        """Forgets what was derived from the weights; for whoever changed them between two steps."""
        self._screens.pop(state, None)

    def steps(self, jobs: Sequence[Job]) -> list[StepFigures]:
        """A step of each of several states, the same as one after another.

        Where there are many, every thread makes whole steps by itself: none waits for another.
        """
        workers = workers_for(torch.get_num_threads())
        # shards must meet in the order of the jobs
        if len(jobs) < _SIDE_BY_SIDE * workers.threads or any(job.state.shard for job in jobs):
            return [self.step(*job) for job in jobs]
        figures: dict[int, StepFigures] = {}

        def make(index: int) -> None:
            figures[index] = self.step(*jobs[index])

        workers.run(make, range(len(jobs)))
        return [figures[index] for index in range(len(jobs))]

    def step(
        self,
        state: StepState,
        rows_in: Float[Tensor, "batch d_in"],
        rows_out: Float[Tensor, "batch d_out"],
        settings: StepSettings,
    ) -> StepFigures:
        """The same change of `state` as `reference_step` makes."""
        workers = workers_for(torch.get_num_threads())
        weights = state.weights.W_enc_t
        screens = screens_for(self._screens.get(state), weights, settings.product_dtype, workers)
        self._screens[state] = screens
        step = Step(state, screens, settings, self._buffers, workers)
        figures = step.run(rows_in, rows_out)
        if step.grown and not self._said:
            self._said = True
            _log.info(
                "a step's buffers have grown: planned for %.0f candidates a row, it met %.0f",
                PLANNED * step.l0_planned,
                step.candidates.sum() / len(rows_in),
            )
        return figures

    @property
    def _buffers(self) -> Buffers:
        if not hasattr(self._of_thread, "buffers"):
            self._of_thread.buffers = Buffers()
        return self._of_thread.buffers
