"""The form that every dialect is read into and written from: a dictionary, and nothing left to fold."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import build
from sae.dictionary import Dictionary, DictionaryConfig
from sae.errors import UserError

_COLUMNS = 4096
"""Latents whose encoder rows are held in fp64 at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """A dictionary, and how it was read."""

    dictionary: Dictionary
    notes: tuple[str, ...] = ()
    """What was folded, assumed or left aside on reading."""
    source: str = ""
    """Where it was read, for errors."""
    dialect: str = ""
    """The format that it was read from."""

    @property
    def cfg(self) -> dict[str, Any]:
        """The keys of `DictionaryConfig`, all of them, as plain values."""
        return self.dictionary.cfg.to_dict()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The dictionary's tensors by name; they are its own memory."""
        return dict(self.dictionary.state_dict())

    @property
    def transcoder(self) -> bool:
        """Whether it writes something else than a reconstruction of what it reads."""
        return self.dictionary.cfg.transcoder


def make_parts(
    architecture: str,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    dialect: str,
    declared: Mapping[str, int] | None = None,
    notes: tuple[str, ...] = (),
    **fields: Any,
) -> Parts:
    """Checks what a dialect has read and builds it.

    Sizes come from the arrays; `declared` are those that the file's config gives, where it gives any.
    `fields` are others of `DictionaryConfig`. Raises UserError for a tensor that is missing, of another
    shape, no float, or not finite.
    """
    for name, shape in (("W_enc", "[d_in, d_sae]"), ("W_dec", "[d_sae, d_out]")):
        if name not in tensors or tensors[name].ndim != 2:
            found = f"{tuple(tensors[name].shape)}" if name in tensors else "no such tensor"
            raise wrong(source, f"{name} must be a matrix {shape}", found)
    d_in, d_sae = tensors["W_enc"].shape
    sizes = {"d_in": d_in, "d_sae": d_sae, "d_out": tensors["W_dec"].shape[1]}
    for name, size in (declared or {}).items():
        if size and size != sizes[name]:
            raise wrong(source, f"{name} must be that of the arrays, {sizes[name]}", f"{size} in the config")
    try:
        cfg = DictionaryConfig(architecture=architecture, **sizes, **{"skip": "W_skip" in tensors, **fields})
    except UserError as error:
        raise wrong(source, error.must, error.found) from error
    made, cast = _one_dtype(tensors, source)
    dictionary = build(cfg, made, source=source)
    return Parts(dictionary=dictionary, notes=(*notes, *cast), source=source, dialect=dialect)


def wrong(source: str, must: str, found: str) -> UserError:
    """The error for a file that is not what it should be."""
    do = "take another copy of it, or correct its config"
    return UserError(must, f"{found} in {source}", do)


def shift_input(tensors: dict[str, Tensor], bias: Float[Tensor, " d_in"]) -> dict[str, Tensor]:
    """The encoder that reads x as the given one reads x + bias.

    Pass minus an input bias to fold it away, plus one to bring it back. Sums are taken in fp64; weights
    narrower than fp32 become fp32, so that the new bias keeps its digits. A bias of zeros changes no bit.
    """
    if not bias.any():
        return tensors
    made = widened(tensors)
    wide = made["W_enc"].dtype
    exact = bias.double()
    moved = torch.cat([exact @ part.double() for part in made["W_enc"].split(_COLUMNS, dim=1)])
    if "r_mag" in made:
        made["b_gate"] = (made["b_gate"].double() + moved).to(wide)
        made["b_mag"] = (made["b_mag"].double() + made["r_mag"].double().exp() * moved).to(wide)
    else:
        made["b_enc"] = (made["b_enc"].double() + moved).to(wide)
    return made


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in fp32 at least, for arithmetic that must not lose digits."""
    wide = torch.promote_types(tensors["W_enc"].dtype, torch.float32)
    return {name: tensor.to(wide) for name, tensor in tensors.items()}


def as_thresholds(parts: Parts, target: str) -> Float[Tensor, " d_sae"]:
    """The thresholds of a dictionary whose gate is JumpReLU's; raises UserError for the others."""
    if parts.cfg["architecture"] in ("jumprelu", "batchtopk"):
        return parts.tensors["threshold"]
    if parts.cfg["architecture"] == "relu":
        return torch.zeros_like(parts.tensors["b_enc"])
    raise cannot(parts, target, "holds JumpReLU gates only")


def cannot(parts: Parts, target: str, reason: str, do: str = "") -> UserError:
    """The error for a dictionary that a format cannot express."""
    cfg = parts.cfg
    what = f"{cfg['architecture']}{' with a skip' if cfg['skip'] else ''}"
    where = cfg["site_in"] if cfg["site_in"] == cfg["site_out"] else f"{cfg['site_in']} -> {cfg['site_out']}"
    return UserError(
        f"the dictionary must be one that {target} can express: it {reason}",
        f"{what}, {where or 'no site'}, {cfg['d_in']} -> {cfg['d_sae']} -> {cfg['d_out']}",
        do or "choose another format: saelens expresses the most",
    )


def _one_dtype(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    widest = tensors["W_enc"].dtype
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise wrong(source, f"{name} must be float16, bfloat16, float32 or float64", str(tensor.dtype))
        widest = torch.promote_types(widest, tensor.dtype)
    mixed = {tensor.dtype for tensor in tensors.values()} != {widest}
    made = {name: tensor.detach().to(widest).contiguous() for name, tensor in tensors.items()}
    return made, (f"tensors of several dtypes: all are {widest} now",) if mixed else ()
