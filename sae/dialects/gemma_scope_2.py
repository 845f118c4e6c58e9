"""Gemma Scope 2: params.safetensors with lower-case names, and a config.json that is sometimes missing."""

import re
from pathlib import Path
from typing import Any

from sae.dialects.found import Found, Values, layer_in
from sae.dialects.parts import Parts, as_thresholds, cannot, make_parts, wrong
from sae.files import write_json
from sae.tensor_files import save_tensors

NAME = "gemma-scope-2"
CONFIG, WEIGHTS = "config.json", "params.safetensors"
_NAMES = {
    "w_enc": "W_enc",
    "w_dec": "W_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "threshold": "threshold",
    "affine_skip_connection": "W_skip",
}
_HOOKS = {
    "output": "hook_resid_post",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
}
"""Their names within a layer, and TransformerLens's."""
_KINDS = {
    "resid_post": ("output", ""),
    "attn_out": ("self_attn.o_proj.input", ""),
    "mlp_out": ("post_feedforward_layernorm.output", ""),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
_HOOK = re.compile(r"model\.layers\.(\d{1,4})\.(.+)")


def matches(found: Found) -> bool:
    """Whether the arrays are named as Gemma Scope 2 names them."""
    return found.kind == "safetensors" and {"w_enc", "w_dec"} <= set(found.tensors)


def read(found: Found) -> Parts:
    """The dictionary; without a config, what the path says. Raises UserError for cross-layer dictionaries."""
    if any(found.tensors[name].ndim != 2 for name in ("w_enc", "w_dec")):
        must = "a dictionary must read one site and write one"
        raise wrong(found.label, must, "a cross-layer dictionary (clt or crosscoder)")
    if unknown := sorted(set(found.tensors) - set(_NAMES)):
        raise wrong(found.label, f"the arrays must be {', '.join(_NAMES)}", ", ".join(unknown))
    tensors = {_NAMES[name]: tensor for name, tensor in found.tensors.items()}
    notes = ["no config.json: model and site are those of the path"] if found.config is None else []
    values = Values(found.config or {}, found.label)
    if found.config is not None:
        values.one_of("architecture", {"jump_relu"})
        if values.flag("affine_connection", "W_skip" in tensors) != ("W_skip" in tensors):
            raise wrong(found.label, "affine_connection must be as the arrays are", f"{'W_skip' in tensors}")
    site_in, site_out = _sites(found.label, values)
    if not site_in:
        notes.append("neither config nor path names a site")
    return make_parts(
        "jumprelu",
        tensors,
        source=found.label,
        dialect=NAME,
        declared={"d_sae": values.whole("width")},
        notes=tuple(notes),
        site_in=site_in,
        site_out=site_out,
        model=_model(values.text("model_name"), found.label),
        corpus="monology/pile-uncopyrighted",
        context=1024,
        l0_target=values.number("l0"),
    )


def write(parts: Parts, folder: Path) -> list[str]:
    """Writes the folder; returns the names of its files. Raises UserError for other gates and other sites."""
    cfg, tensors = parts.cfg, dict(parts.tensors)
    tensors["threshold"] = as_thresholds(parts, NAME)
    hooks = [_hook(parts, cfg[name]) for name in ("site_in", "site_out")]
    values = {
        "architecture": "jump_relu",
        "model_name": cfg["model"],
        "hf_hook_point_in": hooks[0],
        "hf_hook_point_out": hooks[1],
        "width": cfg["d_sae"],
        "l0": cfg["l0_target"],
        "affine_connection": cfg["skip"],
        "type": "transcoder" if parts.transcoder else "sae",
    }
    theirs = {ours: name for name, ours in _NAMES.items()}
    save_tensors(folder / WEIGHTS, {theirs[name]: tensor for name, tensor in tensors.items()})
    write_json(folder / CONFIG, values)
    return [CONFIG, WEIGHTS]


def _sites(label: str, values: Values) -> tuple[str, str]:
    layer = layer_in(label)
    kind = next((kind for kind in _KINDS if re.search(rf"/{kind}(_all)?/", f"/{label}/")), "")
    hooks = [values.text("hf_hook_point_in"), values.text("hf_hook_point_out")]
    if not hooks[0] and kind and layer is not None:
        hooks = [f"model.layers.{layer}.{hook}" if hook else "" for hook in _KINDS[kind]]
    first, second = (_site(hook, values) for hook in hooks)
    return first, second or first


def _site(hook: str, values: Values) -> str:
    if not hook:
        return ""
    match = _HOOK.fullmatch(hook)
    if match is None or match[2] not in _HOOKS:
        raise wrong(
            values.source, f"a hook must be model.layers.N. and one of {', '.join(_HOOKS)}", repr(hook)
        )
    return f"blocks.{int(match[1])}.{_HOOKS[match[2]]}"


def _hook(parts: Parts, site: str) -> str:
    names: dict[str, str] = {ours: theirs for theirs, ours in _HOOKS.items()}
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", site)
    if match is None or match[2] not in names:
        raise cannot(parts, NAME, f"knows the sites {', '.join(names)} of a layer only")
    return f"model.layers.{match[1]}.{names[match[2]]}"


def _model(said: str, label: str) -> str:
    named: Any = re.search(r"gemma-scope-2-(\d+[mb])-(pt|it)", label)
    name = said or (f"google/gemma-3-{named[1]}-{named[2]}" if named else "")
    name = name.replace("gemma-v3", "gemma-3")
    if name.startswith("gemma-"):
        name = f"google/{name}"
    # the smallest base model is published without the ending that the others have
    return name.removesuffix("-pt") if "gemma-3-270m" in name else name
