"""What every dictionary is: its config, its tensors by name, and the base of the architectures."""

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.config import Config
from sae.errors import UserError

if TYPE_CHECKING:
    from sae.probe import Probe

ARCHITECTURES = ("jumprelu", "topk", "batchtopk", "gated", "relu")
"""The kinds of gate; see sae/architectures.py."""

_WITH_K = ("topk", "batchtopk")


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
    """The kind of gate, one of ARCHITECTURES."""
    k: int = 0
    """Latents that fire on a row: topk. The same on average in training: batchtopk, where 0 means unknown."""
    skip: bool = False
    """Whether the input, through `W_skip`, is added to the output."""

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
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"the architecture must be one of {', '.join(ARCHITECTURES)}",
                repr(self.architecture),
                "choose one of them",
            )
        self._check_k()

    def _check_k(self) -> None:
        least, most = (self.architecture == "topk", self.d_sae if self.architecture in _WITH_K else 0)
        if not least <= self.k <= most:
            raise UserError(
                f"a {self.architecture} dictionary's k must be from {least:d} to {most}",
                f"k = {self.k}",
                "give the number of latents that fire on a row; only topk and batchtopk have one",
            )

    @property
    def transcoder(self) -> bool:
        """Whether it writes something else than a reconstruction of what it reads."""
        return self.site_in != self.site_out or self.d_in != self.d_out or self.skip


class Dictionary(nn.Module, ABC):
    """Raw activations in, sparse latents, raw activations out: the model's own units at both ends.

        acts = encode(x);  output = acts W_dec + b_dec (+ x W_skip)

    W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_dec [d_out], and what the architecture adds
    (`parameter_shapes`). Only `encode` differs between architectures. A transcoder is no class of its own:
    writing to another site, and the skip, are in the config, so every architecture may have them and its
    tensors keep their names.
    """

    gate_bias: ClassVar[str] = "b_enc"
    """The bias within the pre-activations."""
    probe: "Probe | None" = None
    """What it must compute on a few rows, as it came with its file."""
    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(
        self, cfg: DictionaryConfig, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        """All zeros; `sae.build` makes one of given tensors."""
        super().__init__()
        self.cfg = cfg
        for name, shape in parameter_shapes(cfg).items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)))

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """What the gate looks at: the encoder's product and bias, in the dictionary's dtype."""
        return x.to(self.W_enc.dtype) @ self.W_enc + self.get_parameter(self.gate_bias)

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations; zero where the gate is shut."""

    @property
    def firing_threshold(self) -> Float[Tensor, " d_sae"] | None:
        """The pre-activation above which each latent fires; None where that alone does not decide."""
        return None

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """What a set of latent activations writes, without the skip."""
        return acts @ self.W_dec + self.b_dec

    def skip(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | float:
        """What the skip adds to the output, in the dictionary's dtype; 0 where there is none."""
        return x.to(self.W_enc) @ self.get_parameter("W_skip") if self.cfg.skip else 0.0

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Reconstructs activations, in their own dtype."""
        return (self.decode(self.encode(x)) + self.skip(x)).to(x.dtype)

    def to_saelens(self) -> Any:
        """The same dictionary as a live object of the package sae-lens; see `sae.saelens_object`."""
        from sae.saelens_object import to_saelens  # late: that module needs this one

        return to_saelens(self)

    def extra_repr(self) -> str:
        cfg = self.cfg
        where = cfg.site_in if cfg.site_in == cfg.site_out else f"{cfg.site_in} -> {cfg.site_out}"
        unusual = {"d_out": cfg.d_out != cfg.d_in, "k": cfg.k > 0, "skip": cfg.skip}
        shown = ["d_in", "d_sae", *(name for name, there in unusual.items() if there)]
        return f"{cfg.model} {where}, {', '.join(f'{n}={getattr(cfg, n)}' for n in shown)}".strip()


def parameter_shapes(cfg: DictionaryConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a dictionary and their shapes, by name."""
    own = {
        "jumprelu": ("b_enc", "threshold"),
        "batchtopk": ("b_enc", "threshold"),
        "topk": ("b_enc",),
        "relu": ("b_enc",),
        "gated": ("b_gate", "b_mag", "r_mag"),
    }
    return {
        "W_enc": (cfg.d_in, cfg.d_sae),
        **dict.fromkeys(own[cfg.architecture], (cfg.d_sae,)),
        "W_dec": (cfg.d_sae, cfg.d_out),
        "b_dec": (cfg.d_out,),
        **({"W_skip": (cfg.d_in, cfg.d_out)} if cfg.skip else {}),
    }
