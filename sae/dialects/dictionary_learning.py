"""dictionary_learning (Marks, Karvonen): ae.pt, which torch.save wrote, and the trainer's config.json."""

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.dialects.found import Found, Values
from sae.dialects.parts import Parts, cannot, make_parts, shift_input, transposed, widened, wrong
from sae.files import atomic_write, write_json

NAME = "dictionary-learning"
CONFIG, WEIGHTS = "config.json", "ae.pt"

_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
_ARRAYS: dict[str, tuple[str, ...]] = {
    "AutoEncoder": (*_LINEAR, "bias"),
    "AutoEncoderNew": (*_LINEAR, "decoder.bias"),
    "GatedAutoEncoder": (
        "encoder.weight",
        "decoder.weight",
        "decoder_bias",
        "r_mag",
        "gate_bias",
        "mag_bias",
    ),
    "JumpReluAutoEncoder": (*_PLAIN, "threshold"),
    "AutoEncoderTopK": (*_LINEAR, "b_dec", "k"),
    "BatchTopKSAE": (*_LINEAR, "b_dec", "k", "threshold"),
    "MatryoshkaBatchTopKSAE": (*_PLAIN, "k", "threshold", "group_sizes"),
}
"""What each of their classes keeps."""
_GATES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
}
_RENAMED = {
    "encoder.bias": "b_enc",
    "bias": "b_dec",
    "decoder.bias": "b_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}
_NO_INPUT_BIAS = ("AutoEncoderNew", "JumpReluAutoEncoder")
_SUBMODULES = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "attention_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}
_SUBMODULE = re.compile(r"(\w+)_layer_(\d{1,4})")


def matches(found: Found) -> bool:
    """Whether torch.save wrote the file, and it holds an encoder."""
    return found.kind == "pt" and bool({"encoder.weight", "W_enc"} & set(found.tensors))


def read(found: Found) -> Parts:
    """The dictionary, its input bias folded in. Raises UserError for arrays that are not its class's."""
    values = Values(found.config or {}, f"{found.path.parent / CONFIG}")
    trainer = values.part("trainer")
    name = _class_of(found, trainer)
    # older files lack the threshold that AutoEncoderTopK keeps and does not use
    needed = set(_ARRAYS[name])
    if set(found.tensors) - {"threshold"} != needed - {"threshold"} or needed & {"threshold"} - set(
        found.tensors
    ):
        there = ", ".join(sorted(found.tensors))
        raise wrong(found.label, f"{name} must hold {', '.join(sorted(needed))}", there)
    tensors = dict(found.tensors)
    for theirs, ours in (("encoder.weight", "W_enc"), ("decoder.weight", "W_dec")):
        if theirs in tensors:
            tensors[ours] = transposed(tensors.pop(theirs), theirs, found.label)
    tensors = {_RENAMED.get(theirs, theirs): tensor for theirs, tensor in tensors.items()}
    notes: list[str] = []
    tensors.pop("group_sizes", None)
    k = _k(tensors.pop("k", None), trainer.whole("k"), found.label)
    if _GATES[name] == "topk":
        tensors.pop("threshold", None)
    elif _GATES[name] == "batchtopk":
        tensors["threshold"] = _threshold(tensors, found.label)
        if bool((tensors["threshold"] < 0).any()):
            notes.append("its threshold was never set: every positive pre-activation fires")
    if name == "AutoEncoder":
        tensors = _normalised(tensors, notes, found.label)
    if name not in _NO_INPUT_BIAS:
        tensors = shift_input(tensors, -1, found.label)
        notes.append("the decoder's bias was subtracted from the input: folded into the encoder's bias")
    site, assumed = _site(trainer)
    return make_parts(
        _GATES[name],
        tensors,
        source=found.label,
        dialect=NAME,
        declared={"d_in": trainer.whole("activation_dim"), "d_sae": trainer.whole("dict_size")},
        notes=(*notes, *assumed),
        k=k,
        site_in=site,
        model=trainer.text("lm_name"),
        context=values.part("buffer").whole("ctx_len"),
        l0_target=trainer.number("target_l0"),
    )


def write(parts: Parts, folder: Path) -> list[str]:
    """Writes the folder; returns the names of its files. Raises UserError for transcoders."""
    if parts.transcoder:
        raise cannot(parts, NAME, "has no transcoders")
    name, arrays = _arrays(parts)
    cfg = parts.cfg
    site = re.fullmatch(r"blocks\.(\d+)\.(.+)", cfg["site_in"])
    kinds = {hook: kind for kind, hook in reversed(_SUBMODULES.items())}
    if cfg["site_in"] and (site is None or site[2] not in kinds):
        raise cannot(parts, NAME, f"knows the sites {', '.join(kinds)} of a layer only")
    layer = int(site[1]) if site else None
    trainer: dict[str, Any] = {
        "dict_class": name,
        "activation_dim": cfg["d_in"],
        "dict_size": cfg["d_sae"],
        "layer": layer,
        "lm_name": cfg["model"],
        "submodule_name": f"{kinds[site[2]]}_layer_{layer}" if site else None,
    }
    if cfg["k"]:
        trainer["k"] = cfg["k"]
    if cfg["l0_target"] is not None:
        trainer["target_l0"] = cfg["l0_target"]
    buffer = io.BytesIO()
    torch.save({theirs: array.clone().contiguous() for theirs, array in arrays.items()}, buffer)
    atomic_write(folder / WEIGHTS, buffer.getvalue())
    write_json(folder / CONFIG, {"trainer": trainer, "buffer": {"ctx_len": cfg["context"] or None}})
    return [CONFIG, WEIGHTS]


def _arrays(parts: Parts) -> tuple[str, dict[str, Tensor]]:
    tensors, gate = parts.tensors, parts.cfg["architecture"]
    if gate == "jumprelu":
        return "JumpReluAutoEncoder", {name: tensors[name] for name in _ARRAYS["JumpReluAutoEncoder"]}
    if gate != "relu":
        # their classes subtract the decoder's bias; the encoder's has to bring it back
        tensors = shift_input(tensors, 1, parts.source)
    linear = {"encoder.weight": tensors["W_enc"].T, "decoder.weight": tensors["W_dec"].T}
    if gate == "gated":
        biases = {theirs: tensors[_RENAMED[theirs]] for theirs in ("decoder_bias", "gate_bias", "mag_bias")}
        return "GatedAutoEncoder", linear | biases | {"r_mag": tensors["r_mag"]}
    linear["encoder.bias"] = tensors["b_enc"]
    if gate == "relu":
        # the one of their two that subtracts nothing, so that no bit changes
        return "AutoEncoderNew", linear | {"decoder.bias": tensors["b_dec"]}
    linear |= {"b_dec": tensors["b_dec"], "k": torch.tensor(parts.cfg["k"], dtype=torch.int)}
    if gate == "topk":
        return "AutoEncoderTopK", linear | {"threshold": torch.tensor(-1.0)}
    threshold = tensors["threshold"].float().unique()
    if len(threshold) != 1 or parts.cfg["k"] < 1:
        raise cannot(parts, NAME, "has one threshold for all latents of a batchtopk dictionary, and a k")
    return "BatchTopKSAE", linear | {"threshold": threshold[0]}


def _normalised(tensors: dict[str, Tensor], notes: list[str], label: str) -> dict[str, Tensor]:
    """Their loader brings this class's decoder to norm 1, so its latents have that scale."""
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    if W_enc.ndim != 2 or W_dec.shape != W_enc.shape[::-1] or tensors["b_enc"].shape != W_dec.shape[:1]:
        raise wrong(label, "encoder and decoder must fit each other", f"{_sizes(tensors)}")
    norms = W_dec.float().norm(dim=1)
    if torch.allclose(norms, torch.ones_like(norms)):  # theirs leaves them alone then, and so does this
        return tensors
    notes.append("decoder norms are folded into the encoder, as its own loader does")
    tensors = widened(tensors)
    norms = torch.where(norms > 0, norms, 1).to(tensors["W_dec"])
    return tensors | {
        "W_enc": tensors["W_enc"] * norms,
        "W_dec": tensors["W_dec"] / norms[:, None],
        "b_enc": tensors["b_enc"] * norms,
    }


def _sizes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())


def _class_of(found: Found, trainer: Values) -> str:
    if said := trainer.text("dict_class"):
        return trainer.one_of("dict_class", _ARRAYS) if said else said
    names = set(found.tensors)
    fitting = [name for name, arrays in _ARRAYS.items() if set(arrays) == names]
    # a file of AutoEncoderTopK may hold a threshold as well, and then it is one of two
    if len(fitting) != 1 or fitting[0] == "BatchTopKSAE":
        raise wrong(
            found.label,
            f"{CONFIG} must say trainer.dict_class, for the arrays do not",
            ", ".join(sorted(names)),
        )
    return fitting[0]


def _k(array: Tensor | None, said: int, label: str) -> int:
    if array is None:
        return 0
    if array.numel() != 1 or array.is_floating_point() or array.is_complex():
        raise wrong(label, "k must be one whole number", f"{array.dtype} {tuple(array.shape)}")
    k = int(array)
    if said and k != said:
        raise wrong(label, f"k must be that of the arrays, {k}", f"{said} in the config")
    return k


def _threshold(tensors: dict[str, Tensor], label: str) -> Tensor:
    one = tensors["threshold"]
    if one.numel() != 1 or not one.is_floating_point():
        raise wrong(label, "this gate has one threshold", f"{one.dtype} {tuple(one.shape)}")
    return one.reshape(1).expand(tensors["W_enc"].shape[-1:]).to(tensors["W_enc"].dtype)


def _site(trainer: Values) -> tuple[str, tuple[str, ...]]:
    name = trainer.text("submodule_name")
    if match := _SUBMODULE.fullmatch(name):
        hook = _SUBMODULES.get(match[1])
        if hook is not None:
            return f"blocks.{int(match[2])}.{hook}", ()
    if name or trainer.values.get("layer") is None:
        return "", (f"the site is not known (submodule_name {name!r})",)
    return f"blocks.{trainer.whole('layer')}.hook_resid_post", (
        "the config names a layer only: resid_post taken",
    )
