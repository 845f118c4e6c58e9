"""Gemma Scope 1: params.npz alone. The repository's name says model and kind, the folder's the layer."""

import math
import re
from pathlib import Path
from typing import Any

import torch

from sae.dialects.archives import write_npz
from sae.dialects.found import Found, layer_in
from sae.dialects.parts import Parts, as_thresholds, cannot, make_parts, wrong
from sae.files import atomic_write

NAME = "gemma-scope"
WEIGHTS = "params.npz"
_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")
_TENSORS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")


def matches(found: Found) -> bool:
    """Whether the arrays are an .npz with an encoder and a decoder."""
    return found.kind == "npz" and {"w_enc", "w_dec"} <= {name.lower() for name in found.tensors}


def read(found: Found) -> Parts:
    """The dictionary; what the path says of model and site. Raises UserError for arrays that do not fit."""
    tensors = {"W" + name[1:] if name[:2] == "w_" else name: array for name, array in found.tensors.items()}
    scale = tensors.pop("scaling_factor", None)
    if scale is not None and not bool((scale == 1).all()):
        raise wrong(found.label, "scaling_factor must be 1: its meaning is not published", "another")
    fields, notes = _place(found.label)
    if fields.get("site_in") == "hook_embed" and {"W_enc", "W_dec"} <= set(tensors):
        root = math.sqrt(tensors["W_dec"].shape[-1])
        tensors |= {"W_enc": tensors["W_enc"] / root, "W_dec": tensors["W_dec"] * root}
        notes.append("trained on embeddings times sqrt(d_in): folded")
    return make_parts("jumprelu", tensors, source=found.label, dialect=NAME, notes=tuple(notes), **fields)


def write(parts: Parts, folder: Path) -> list[str]:
    """Writes params.npz; returns its name. Raises UserError for what five arrays cannot express."""
    if parts.cfg["skip"]:
        raise cannot(parts, NAME, "has no skip", "export it to gemma-scope-2 or saelens")
    if parts.tensors["W_enc"].dtype == torch.float64:
        raise cannot(parts, NAME, "holds float32", "export it to saelens")
    tensors = parts.tensors | {"threshold": as_thresholds(parts, NAME)}
    arrays = {name: tensors[name].float() for name in _TENSORS}
    atomic_write(folder / WEIGHTS, lambda path: write_npz(path, arrays))
    return [WEIGHTS]


def _place(label: str) -> tuple[dict[str, Any], list[str]]:
    known = {"corpus": "monology/pile-uncopyrighted", "context": 1024, "prepend_bos": True}
    repository, layer = _REPOSITORY.search(label), layer_in(label)
    average = re.search(r"average_l0_(\d+)", label)
    if average:
        known["l0_target"] = float(average[1])
    if repository is None:
        return {}, ["params.npz names no model and no site, and neither does its path"]
    size, tuned, kind = repository.groups()
    known["model"] = f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}"
    if "/embedding/" in label and kind == "res":
        return known | {"site_in": "hook_embed"}, []
    if layer is None:
        return known, ["the path names no layer, so the site is not known"]
    at = f"blocks.{layer}."
    if kind == "transcoders":
        # what the norm gives before its learned weight, which is folded into the model's own MLP
        sites = {"site_in": f"{at}ln2.hook_normalized", "site_out": f"{at}hook_mlp_out"}
    else:
        sites = {
            "site_in": at + {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}[kind]
        }
    return known | sites, ["model and site are those of the path"]
