"""Problems for the tests of the training step, and ways to compare what kernels make of them."""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.kernels.cpu import CpuKernel
from sae.kernels.reference import reference_step
from sae.kernels.step import StepFigures, StepSettings, StepState, StepWeights
from sae.losses import Sparsity

KINDS = ("quadratic", "quadratic_token", "linear", "frequency")
VARIANTS = (*KINDS, "topk", "batchtopk")
"""Everything that decides which latents are active and what they pay."""
ZERO = torch.tensor(0.0, dtype=torch.float64)


def problem(
    batch: int,
    d_in: int,
    d_sae: int,
    d_out: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    level: float = 1.0,
) -> tuple[StepWeights, Tensor, Tensor]:
    """Weights and rows of normal numbers; tied, with targets that are the inputs, unless `d_out` is given.

    Pre-activations have a standard deviation of about 1, thresholds lie within half of one above `level`.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, b_dec = normal(batch, d_in), 0.3 * normal(d_out or d_in)
    weights = as_weights(
        W_enc_t=F.normalize(normal(d_sae, d_in), dim=1),
        b_enc=0.1 * normal(d_sae),
        W_dec=F.normalize(normal(d_sae, d_out or d_in), dim=1),
        b_in=None if d_out is None else 0.3 * normal(d_in),
        b_dec=b_dec,
        threshold=level + 0.5 * torch.rand(d_sae, generator=g, dtype=torch.float64),
        dtype=dtype,
    )
    x = x.to(dtype)
    return weights, x, x if d_out is None else normal(batch, d_out).to(dtype)


def grid_problem(
    batch: int, d_in: int, d_sae: int, d_out: int | None = None, *, seed: int = 0, level: float = 2.0
) -> tuple[StepWeights, Tensor, Tensor]:
    """The same in fp32, with pre-activations and thresholds on grids that never meet, also not half a
    bandwidth apart if the bandwidth is a whole multiple of `grid_bandwidth(d_in)`.

    Rows are small whole numbers, to be divided by a scale of 2. `level` is in standard deviations.
    """
    g = torch.Generator().manual_seed(seed)

    def whole(most: int, *shape: int) -> Tensor:
        return torch.randint(-most, most + 1, shape, generator=g).float()

    mesh = grid_bandwidth(d_in) / 2
    x, b_dec = whole(2, batch, d_in), whole(1, d_out or d_in) / 2
    weights = as_weights(
        W_enc_t=whole(1, d_sae, d_in) * 2 * mesh,
        b_enc=whole(2, d_sae) * mesh,
        W_dec=F.normalize(torch.randn(d_sae, d_out or d_in, generator=g), dim=1),
        b_in=None if d_out is None else whole(1, d_in) / 2,
        b_dec=b_dec,
        # a standard deviation is about 1.4 sqrt(d_in) steps of the mesh
        threshold=(round(level * 1.4 * d_in**0.5) + whole(3, d_sae).clamp(min=-1) + 0.5) * mesh,
        dtype=torch.float32,
    )
    return weights, x, x if d_out is None else whole(2, batch, d_out)


def grid_bandwidth(d_in: int) -> float:
    """Two steps of the grid that `grid_problem` puts pre-activations on."""
    return 2.0 ** -round(torch.tensor(float(d_in)).log2().item() / 2)


def as_weights(*, b_in: Tensor | None, dtype: torch.dtype, **tensors: Tensor) -> StepWeights:
    """StepWeights in that dtype, tied where `b_in` is None."""
    cast = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    return StepWeights(b_in=cast["b_dec"] if b_in is None else b_in.to(dtype), **cast)


def options(variant: str = "quadratic", **fields: object) -> StepSettings:
    """Settings under which everything moves: a sparsity kind, or topk or batchtopk."""
    support = variant if variant in ("topk", "batchtopk") else "jumprelu"
    kind = variant if support == "jumprelu" else "quadratic"
    usual = {"bandwidth": 0.4, "l0_wanted": 3.0, "l0_gain": 0.1, "k": 3}
    return StepSettings(**{**usual, "sparsity": Sparsity(kind=kind), "support": support, **fields})


def copied(state: StepState, dtype: torch.dtype | None = None) -> StepState:
    """A copy that shares nothing, in another dtype if asked for; tied stays tied."""
    new = copy.deepcopy(state)
    for group in (new.weights, new.first, new.second):
        if dtype is not None and group is not None:
            tied = group is new.weights and new.weights.tied
            for field in dataclasses.fields(group):
                setattr(group, field.name, getattr(group, field.name).to(dtype))
            if tied:
                new.weights.b_in = new.weights.b_dec
    if dtype is not None:
        new.l0_shift = new.l0_shift.to(dtype)
    return new


def assert_close(
    found: tuple[StepState, StepFigures],
    expected: tuple[StepState, StepFigures],
    *,
    rtol: float = 1e-8,
    atol: float = 1e-10,
) -> None:
    """Every tensor of two states and every figure."""
    for (name, one), (_, other) in zip(_named(*found), _named(*expected), strict=True):
        torch.testing.assert_close(
            one, other, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert found[0].steps == expected[0].steps


def assert_identical(found: StepState, expected: StepState) -> None:
    """Equal to the last bit."""
    assert found.steps == expected.steps
    pairs = zip(found.tensors(), expected.tensors(), strict=True)
    assert [name for (name, one), (_, other) in pairs if not torch.equal(one, other)] == []


def errors(found: tuple[StepState, StepFigures], expected: tuple[StepState, StepFigures]) -> dict[str, float]:
    """||found - expected|| / ||expected|| of every tensor and figure, taken in float64."""
    shares = {}
    for (name, one), (_, other) in zip(_named(*found), _named(*expected), strict=True):
        missed, size = (one.double() - other.double()).norm(), other.double().norm()
        shares[name] = float(missed / size if size > 0 else missed)
    return shares


def run(
    kernel: CpuKernel | None,
    state: StepState,
    rows_in: Tensor,
    rows_out: Tensor,
    settings: StepSettings,
    steps: int = 1,
) -> tuple[StepState, StepFigures]:
    """The state, changed by some steps on the same rows, and the last figures; None: by the reference."""
    step = kernel.step if kernel else reference_step
    for _ in range(steps):
        figures = step(state, rows_in, rows_out, settings)
    return state, figures


def _named(state: StepState, figures: StepFigures) -> list[tuple[str, Tensor]]:
    return [*state.tensors(), *((f"figures.{name}", value) for name, value in vars(figures).items())]
