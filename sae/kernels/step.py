"""What every training step takes and gives, whichever kernel computes it."""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.losses import Sparsity


@dataclasses.dataclass
class StepWeights:
    """The parameters in training, in the scaled units of the trainer (E||y - mean||^2 = 1), all fp32.

    The encoder is kept transposed, one row a latent, so that everything a latent owns lies together.
    """

    W_enc_t: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_in: Float[Tensor, " d_in"]
    """Subtracted from the input. An SAE passes its `b_dec` here, and both uses add to one gradient."""
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"]


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What one step aims at."""

    bandwidth: float
    """eps: the width of the window around the threshold within which the gate has a gradient."""
    sparsity: Sparsity
    l0_target: float
    product_dtype: torch.dtype = torch.float32
    """The dtype of the encoder's product; everything after it is fp32."""


@dataclasses.dataclass
class StepResult:
    """Gradients and figures of one batch."""

    W_enc_t: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_in: Float[Tensor, " d_in"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"]
    squared_error: Float[Tensor, " batch"]
    """||reconstruction - y||^2 of each row."""
    l0: Float[Tensor, " batch"]
    """Firing latents of each row."""
    fired: Int[Tensor, " d_sae"]
    """Rows of the batch on which each latent fired."""
    sparsity: Float[Tensor, ""]
    """The sparsity term's value."""
