"""The architectures, and how one is made of tensors."""

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.dictionary import Dictionary, DictionaryConfig, parameter_shapes
from sae.errors import UserError

# elements that are looked at together when a tensor is searched for what is not finite
_LOOKED_AT = 2**24


@final
class JumpReLU(Dictionary):
    """Latents above their own threshold (arXiv 2407.14435, eq. 2). The gate is strict.

    pre = x W_enc + b_enc;  acts = relu(pre) * [pre > threshold]
    """

    b_enc: nn.Parameter
    threshold: nn.Parameter

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations; zero where the gate is shut."""
        return _above(self.pre_activations(x), self.threshold)

    @property
    def firing_threshold(self) -> Float[Tensor, " d_sae"]:
        """The threshold."""
        return self.threshold


@final
class BatchTopK(Dictionary):
    """Trained with the k largest a row of each batch (arXiv 2412.06410), used with one threshold for all.

    So a row's latents do not depend on the other rows: acts = relu(pre) * [pre > threshold].
    """

    b_enc: nn.Parameter
    threshold: nn.Parameter

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations; zero where the gate is shut."""
        return _above(self.pre_activations(x), self.threshold)

    @property
    def firing_threshold(self) -> Float[Tensor, " d_sae"]:
        """The threshold."""
        return self.threshold


@final
class TopK(Dictionary):
    """The k largest pre-activations of each row, where positive (arXiv 2406.04093)."""

    b_enc: nn.Parameter

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations; zero but for the k largest."""
        pre = self.pre_activations(x)
        values, latents = pre.topk(self.cfg.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, latents, values.relu())


@final
class Gated(Dictionary):
    """One encoder with two biases: whether a latent fires, and how strongly (arXiv 2404.16014).

    pre = x W_enc + b_gate;  acts = [pre > 0] * relu((x W_enc) * exp(r_mag) + b_mag)
    """

    gate_bias = "b_gate"
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations; zero where the gate is shut."""
        product = x.to(self.W_enc.dtype) @ self.W_enc
        magnitude = torch.relu(product * self.r_mag.exp() + self.b_mag)
        return torch.where(product + self.b_gate > 0, magnitude, 0)


@final
class ReLU(Dictionary):
    """Whatever is positive: acts = relu(x W_enc + b_enc). Others call it standard."""

    b_enc: nn.Parameter

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations; zero where the gate is shut."""
        return torch.relu(self.pre_activations(x))

    @property
    def firing_threshold(self) -> Float[Tensor, " d_sae"]:
        """Zeros."""
        return torch.zeros_like(self.b_enc)


_CLASSES: dict[str, type[Dictionary]] = {
    "jumprelu": JumpReLU,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "gated": Gated,
    "relu": ReLU,
}


def build(cfg: DictionaryConfig, tensors: Mapping[str, Tensor], *, source: str = "") -> Dictionary:
    """The dictionary of a config and its tensors, which it takes as they are, without a copy.

    `source` names where they are from, for the errors. Raises UserError naming the tensor that is missing,
    too many, of another shape or dtype, or not finite. One with gradients off comes back.
    """
    where = f" in {source}" if source else ""
    shapes = parameter_shapes(cfg)
    if unknown := sorted(set(tensors) - set(shapes)):
        raise UserError(
            f"a {cfg.architecture} dictionary has the tensors {', '.join(shapes)}",
            f"{', '.join(unknown)}{where}",
            "check the architecture, or leave out what it does not use",
        )
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise UserError(
                f"{name}{where} must have shape {shape}",
                "no such tensor" if found is None else f"{found}",
                "the config and the weights do not belong together; save the dictionary again",
            )
    _check_values(tensors, where)
    made = _CLASSES[cfg.architecture](cfg, device="meta")
    made.load_state_dict(dict(tensors), assign=True)
    return made.requires_grad_(False)


def _check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    dtype = tensors["W_enc"].dtype
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or not dtype.is_floating_point:
            raise UserError(
                "the tensors of a dictionary must have one floating-point dtype",
                f"{name} is {tensor.dtype} and W_enc is {dtype}{where}",
                "convert them to the widest of their dtypes",
            )
        if wrong := _not_finite(tensor):
            raise UserError(
                f"{name} must be finite",
                f"{wrong:,} of {tensor.numel():,} values are NaN or infinite{where}",
                "take another copy of the dictionary; such weights are no use",
            )


def _not_finite(tensor: Tensor) -> int:
    """Values that are NaN or infinite."""
    # in the order of memory, and without a copy: the tensor may be a file that is mapped
    longest = max(range(tensor.ndim), key=lambda axis: (tensor.stride(axis), tensor.shape[axis]))
    step = max(1, _LOOKED_AT * tensor.shape[longest] // max(1, tensor.numel()))
    wrong = 0
    for part in tensor.detach().split(step, dim=longest):
        # a sum is the quickest look: NaN and infinity never leave it
        if not torch.isfinite(part.sum()):
            wrong += int((~torch.isfinite(part)).sum())
    return wrong


def _above(
    pre: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"]
) -> Float[Tensor, "*batch d_sae"]:
    return torch.where(pre > threshold, torch.relu(pre), 0)
