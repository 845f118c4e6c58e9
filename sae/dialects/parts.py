"""The form that every dialect is read into and written from: config, tensors, and nothing left to fold.

Architectures: `jumprelu`, `batchtopk` (relu(pre) where pre > threshold), `topk`, `relu`, and `gated`, which
has b_gate, b_mag and r_mag in place of b_enc. Raw activations go in and come out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import UserError

DEFAULTS: dict[str, Any] = {
    "d_out": 0,
    "site_in": "",
    "site_out": "",
    "model": "",
    "corpus": "",
    "context": 0,
    "prepend_bos": True,
    "l0_target": None,
    "k": 0,
    "skip": False,
}
"""The keys of `Parts.cfg` beside architecture, d_in and d_sae, with their values where a file is silent."""

_OWN: dict[str, tuple[str, ...]] = {
    "jumprelu": ("b_enc", "threshold"),
    "batchtopk": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "relu": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
_COUNTS = ("k", "group_sizes")
"""What dictionary_learning keeps among the arrays, and is none of them."""
_COLUMNS = 4096
"""Latents whose encoder rows are held in fp64 at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """A dictionary in canonical form."""

    cfg: dict[str, Any]
    """The keys of `DictionaryConfig`, all of them, as plain values."""
    tensors: dict[str, Tensor]
    """W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_dec [d_out], what the architecture adds, and with `skip`
    W_skip [d_in, d_out]; one floating-point dtype."""
    notes: tuple[str, ...] = ()
    """What was folded, assumed or left aside on reading."""
    source: str = ""
    """Where it was read, for errors."""
    dialect: str = ""
    """The format that it was read from."""

    @property
    def transcoder(self) -> bool:
        """Whether it writes something else than a reconstruction of what it reads."""
        cfg = self.cfg
        return cfg["site_in"] != cfg["site_out"] or cfg["d_in"] != cfg["d_out"] or cfg["skip"]


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
    """Checks what a dialect has read and completes it.

    Sizes come from the arrays; `declared` are those that the file's config gives, where it gives any.
    Raises UserError for a tensor that is missing, of another shape, no float, or not finite.
    """
    made = {name: tensor.detach() for name, tensor in tensors.items()}
    if "W_enc" not in made or made["W_enc"].ndim != 2:
        raise wrong(source, "W_enc must be a matrix [d_in, d_sae]", _shape(made.get("W_enc")))
    if "W_dec" not in made or made["W_dec"].ndim != 2:
        raise wrong(source, "W_dec must be a matrix [d_sae, d_out]", _shape(made.get("W_dec")))
    d_in, d_sae = made["W_enc"].shape
    cfg = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, **DEFAULTS, **fields}
    cfg["d_out"] = made["W_dec"].shape[1]
    cfg["site_out"] = cfg["site_out"] or cfg["site_in"]
    cfg["skip"] = "W_skip" in made
    for name, size in (declared or {}).items():
        if size and size != cfg[name]:
            raise wrong(source, f"{name} must be that of the arrays, {cfg[name]}", f"{size} in the config")
    least, most = architecture == "topk", d_sae if architecture in ("topk", "batchtopk") else 0
    if not least <= cfg["k"] <= most:
        raise wrong(source, f"k must be from {least:d} to {most}", f"k = {cfg['k']}")
    expected = shapes(cfg)
    for name, shape in expected.items():
        if name not in made or tuple(made[name].shape) != shape:
            raise wrong(source, f"{name} must have shape {shape}", _shape(made.get(name)))
    if unknown := sorted(set(made) - set(expected)):
        raise wrong(source, f"a {architecture} dictionary has {', '.join(expected)} only", ", ".join(unknown))
    made, cast = _one_dtype(made, source)
    for name, tensor in made.items():
        check_finite(name, tensor, source)
    return Parts(cfg=cfg, tensors=made, notes=(*notes, *cast), source=source, dialect=dialect)


def shapes(cfg: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a dictionary and their shapes, by name."""
    d_in, d_sae, d_out = cfg["d_in"], cfg["d_sae"], cfg["d_out"]
    return {
        "W_enc": (d_in, d_sae),
        **dict.fromkeys(_OWN[cfg["architecture"]], (d_sae,)),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
        **({"W_skip": (d_in, d_out)} if cfg["skip"] else {}),
    }


def wrong(source: str, must: str, found: str) -> UserError:
    """The error for a file that is not what it should be."""
    do = "take another copy of it, or correct its config"
    return UserError(must, f"{found} in {source}", do)


def check_dtype(name: str, tensor: Tensor, source: str) -> None:
    """Raises UserError for a tensor that is no plain floating-point one; counts may be whole numbers."""
    is_plain = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if not is_plain and name not in _COUNTS:
        raise wrong(source, f"{name} must be float16, bfloat16, float32 or float64", str(tensor.dtype))


def check_finite(name: str, tensor: Tensor, source: str) -> None:
    """Raises UserError for NaN and infinity."""
    # the extremes show both, and need no second array of the tensor's size
    if tensor.numel():
        low, high = tensor.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            count = int((~torch.isfinite(tensor)).sum())
            raise wrong(source, f"{name} must be finite", f"{count:,} values that are NaN or infinite")


def shift_input(tensors: dict[str, Tensor], sign: int, source: str) -> dict[str, Tensor]:
    """The encoder that reads x as the given one reads x + sign * b_dec.

    -1 folds away that b_dec is subtracted from the input, 1 brings it back. Sums are taken in fp64; weights
    narrower than fp32 become fp32, so that the new bias keeps its digits. A b_dec of zeros changes no bit.
    Raises UserError for tensors that do not fit each other.
    """
    W_enc = tensors["W_enc"]
    if W_enc.ndim != 2 or tensors["b_dec"].shape != W_enc.shape[:1]:
        found = f"{tuple(tensors['b_dec'].shape)}, {tuple(W_enc.shape)}"
        raise wrong(source, "b_dec must be as wide as W_enc", found)
    # a bias of one number would be spread over all latents here, and fit afterwards
    for name in ("b_gate", "b_mag", "r_mag") if "r_mag" in tensors else ("b_enc",):
        if name not in tensors or tensors[name].shape != W_enc.shape[1:]:
            must = f"{name} must have shape {tuple(W_enc.shape[1:])}"
            raise wrong(source, must, _shape(tensors.get(name)))
    bias = sign * tensors["b_dec"]
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


def transposed(matrix: Tensor, name: str, source: str) -> Tensor:
    """A matrix that others keep the other way round. Raises UserError for what is no matrix."""
    if matrix.ndim != 2:
        raise wrong(source, f"{name} must be a matrix", _shape(matrix))
    return matrix.T.contiguous()


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


def _one_dtype(tensors: dict[str, Tensor], source: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    widest = tensors["W_enc"].dtype
    for name, tensor in tensors.items():
        check_dtype(name, tensor, source)
        widest = torch.promote_types(widest, tensor.dtype)
    mixed = {tensor.dtype for tensor in tensors.values()} != {widest}
    made = {name: tensor.to(widest).contiguous() for name, tensor in tensors.items()}
    return made, (f"tensors of several dtypes: all are {widest} now",) if mixed else ()


def _shape(tensor: Tensor | None) -> str:
    return "no such tensor" if tensor is None else f"{tuple(tensor.shape)}"
