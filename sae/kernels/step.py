"""What every training step takes, changes and gives, whichever kernel computes it.

One step, in the trainer's units: rows are divided by the state's scale, so that E||y - mean||^2 is about 1.

    pre = (x - b_in) W_enc + b_enc          acts = pre on the support, 0 elsewhere
    loss = mean_b ||acts W_dec + b_dec - y||^2 + sparsity, its gradients as `reference` has them
    W_dec's gradient loses its part along each row, which would only change the norm
    Adam moves every parameter; rows of W_dec are brought back to norm 1
    latents silent for `pull_after` rows are drawn towards firing; thresholds stay >= 0
    the L0 that the sparsity term aims at moves by `l0_gain` times what was missed

A step whose input or error is not finite changes nothing and says so in its figures. Shards of a dictionary
(`shards`) together make the step of the whole one, to rounding.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.kernels.shards import Shard
from sae.losses import Sparsity

Support = Literal["jumprelu", "topk", "batchtopk"]
"""Which latents are active: those above their threshold; the k largest of each row (of the batch, k a row),
where positive. Equal values go to the earlier row, then to the lower latent."""

TRAINED = ("W_enc_t", "b_enc", "W_dec", "b_dec", "threshold")
"""Names of the parameters that Adam moves."""

PER_LATENT = ("W_enc_t", "b_enc", "W_dec", "threshold")
"""Those of which each latent has a row: a shard has its own latents' only."""


@dataclasses.dataclass
class StepWeights:
    """The parameters in training, in the trainer's scaled units, fp32 but in tests.

    The encoder is kept transposed, one row a latent, so that everything a latent owns lies together.
    """

    W_enc_t: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_in: Float[Tensor, " d_in"]
    """Subtracted from the input. An SAE has its `b_dec` here, the same tensor, and both uses add to one
    gradient; any other tensor is a constant."""
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"]

    @property
    def tied(self) -> bool:
        """Whether the input's bias is the decoder's."""
        return self.b_in is self.b_dec


@dataclasses.dataclass
class Moments:
    """Adam's running means, one tensor a trained parameter."""

    W_enc_t: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"]

    @classmethod
    def zeros_for(cls, weights: StepWeights) -> "Moments":
        """Zeros shaped as the weights."""
        return cls(**{name: torch.zeros_like(getattr(weights, name)) for name in TRAINED})


@dataclasses.dataclass(eq=False)
class StepState:
    """Everything of one dictionary in training that a step reads and changes."""

    weights: StepWeights
    first: Moments | None
    """None where beta1 is 0: the gradient itself is the first moment."""
    second: Moments
    silent_for: Int[Tensor, " d_sae"]
    """Rows since each latent last fired."""
    l0_shift: Float[Tensor, ""]
    """Added to the L0 wanted to get the one that the sparsity term aims at."""
    scale_in: float = 1.0
    scale_out: float = 1.0
    steps: int = 0
    """Steps made. One that was refused is not counted."""
    shard: Shard | None = None
    """Set where the state has some of a dictionary's latents and other states have the rest. They make their
    steps together, from the same rows, and all have the same b_dec, l0_shift and b_in."""

    @classmethod
    def begin(
        cls,
        weights: StepWeights,
        *,
        beta1: float,
        scale_in: float = 1.0,
        scale_out: float = 1.0,
        shard: Shard | None = None,
    ) -> "StepState":
        """The state before the first step."""
        threshold = weights.threshold
        return cls(
            weights=weights,
            first=Moments.zeros_for(weights) if beta1 else None,
            second=Moments.zeros_for(weights),
            silent_for=torch.zeros(len(threshold), dtype=torch.long, device=threshold.device),
            l0_shift=torch.zeros((), dtype=threshold.dtype, device=threshold.device),
            scale_in=scale_in,
            scale_out=scale_out,
            shard=shard,
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, for checkpoints and comparisons; `b_in` only where it is its own."""
        for name in TRAINED:
            yield name, getattr(self.weights, name)
            for which, moments in (("first", self.first), ("second", self.second)):
                if moments is not None:
                    yield f"{which}.{name}", getattr(moments, name)
        if not self.weights.tied:
            yield "b_in", self.weights.b_in
        yield "silent_for", self.silent_for
        yield "l0_shift", self.l0_shift


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What one step aims at and how far it goes."""

    bandwidth: float
    """eps: the width of the window around the threshold within which the gate has a gradient."""
    sparsity: Sparsity
    l0_wanted: float
    l0_gain: float = 0.0
    """Share of the L0 missed by which `l0_shift` moves; at most a quarter of `l0_wanted` counts as missed,
    and the shift stays within half of it."""
    lr: float = 1e-3
    threshold_lr: float = 1e-3
    """Of the thresholds. With batchtopk: the share by which they follow the least activation kept."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    pull_after: int | None = None
    """Rows of silence after which a latent's bias rises by `lr` and its threshold falls by `threshold_lr` a
    step. It is Adam's step under a pre-activation loss on silent latents alone, made by hand so that it
    leaves no trace in the moments. None: no pull."""
    support: Support = "jumprelu"
    k: int = 0
    """Active latents a row, for topk and batchtopk. They have no sparsity term and no window."""
    product_dtype: torch.dtype = torch.float32
    """The dtype of the encoder's product, where a kernel makes it apart from the weights' own."""


class Job(NamedTuple):
    """One step to make: the arguments of a kernel's `step`."""

    state: StepState
    rows_in: Float[Tensor, "batch d_in"]
    rows_out: Float[Tensor, "batch d_out"]
    settings: StepSettings


@dataclasses.dataclass
class StepFigures:
    """What a step saw, on the state's device. The state is as it was if `finite` is false.

    Shards see what the whole dictionary does, but for `fired`, which is of their own latents.
    """

    squared_error: Float[Tensor, " batch"]
    """||reconstruction - y||^2 of each row."""
    l0: Float[Tensor, " batch"]
    """Active latents of each row."""
    fired: Int[Tensor, " d_sae"]
    """Rows of the batch on which each latent was active."""
    sparsity: Float[Tensor, ""]
    """The sparsity term's value."""
    y_sum: Float[Tensor, " d_out"]
    """Sum of the scaled targets over the batch."""
    y_square: Float[Tensor, ""]
    """Sum of their squares."""
    finite: Bool[Tensor, ""]
