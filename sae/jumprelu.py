"""The JumpReLU dictionary: raw activations in, sparse latents, raw activations out."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.config import Config
from sae.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DictionaryConfig(Config):
    """What a dictionary is and where it belongs."""

    d_in: int
    """Width of the activations it reads."""
    d_sae: int
    """Number of latents."""
    d_out: int = 0
    """Width of the activations it writes; 0 means the same as `d_in`."""
    site_in: str = ""
    """Where it reads, in TransformerLens's names: `blocks.9.hook_resid_post`."""
    site_out: str = ""
    """Where it writes: the same site for an SAE, another for a transcoder; empty means the same."""
    model: str = ""
    """The language model's name."""
    corpus: str = ""
    """The text it was trained on."""
    context: int = 0
    """Tokens in a context during training; 0 means unknown."""
    prepend_bos: bool = True
    """Whether contexts began with BOS."""
    l0_target: float | None = None
    """The L0 that training aimed at."""
    architecture: str = "jumprelu"
    """The kind of gate. Only `jumprelu` is known here."""

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"{name} must be at least 1", f"{name} = {getattr(self, name)}", "give a positive number"
                )
        if self.d_out == 0:
            object.__setattr__(self, "d_out", self.d_in)
        if self.site_out == "":
            object.__setattr__(self, "site_out", self.site_in)
        if self.architecture != "jumprelu":
            raise UserError("the architecture must be jumprelu", repr(self.architecture), "choose jumprelu")


class JumpReLU(nn.Module):
    """A JumpReLU dictionary with everything folded in (arXiv 2407.14435, eq. 2).

        pre = x W_enc + b_enc;  acts = pre * [pre > threshold];  reconstruction = acts W_dec + b_dec

    W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out], threshold [d_sae].
    The gate is strict. Activations go in and come out in the model's own units.
    """

    def __init__(
        self, cfg: DictionaryConfig, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__()
        self.cfg = cfg
        shapes = parameter_shapes(cfg)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)))

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: nn.Parameter

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The encoder's product before the gate, in the dictionary's dtype."""
        return x.to(self.W_enc.dtype) @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations; zero where the gate is shut."""
        pre = self.pre_activations(x)
        return torch.where(pre > self.threshold, torch.relu(pre), 0)

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of a set of latent activations."""
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Reconstructs activations, in their own dtype."""
        return self.decode(self.encode(x)).to(x.dtype)

    def extra_repr(self) -> str:
        where = (
            self.cfg.site_in
            if self.cfg.site_in == self.cfg.site_out
            else f"{self.cfg.site_in} -> {self.cfg.site_out}"
        )
        return f"{self.cfg.model} {where}, d_in={self.cfg.d_in}, d_sae={self.cfg.d_sae}".strip()


def parameter_shapes(cfg: DictionaryConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a dictionary and their shapes, by name."""
    return {
        "W_enc": (cfg.d_in, cfg.d_sae),
        "b_enc": (cfg.d_sae,),
        "W_dec": (cfg.d_sae, cfg.d_out),
        "b_dec": (cfg.d_out,),
        "threshold": (cfg.d_sae,),
    }
