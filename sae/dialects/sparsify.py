"""sparsify (EleutherAI): cfg.json and sae.safetensors in a folder named after the module that is read."""

import re
from pathlib import Path

from sae.dialects.archives import read_config
from sae.dialects.found import Found, Values
from sae.dialects.parts import Parts, cannot, make_parts, shift_input, transposed, wrong
from sae.files import write_json
from sae.tensor_files import save_tensors

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
_MODULE = re.compile(r"(?:layers|h)\.(\d{1,4})(?:\.(.+))?")


def matches(found: Found) -> bool:
    """Whether the arrays are named as sparsify names them."""
    return found.kind == "safetensors" and {"encoder.weight", "W_dec"} <= set(found.tensors)


def read(found: Found) -> Parts:
    """The dictionary, its input bias folded in. Raises UserError for other activations than topk."""
    if found.config is None:
        raise wrong(found.label, f"{CONFIG} must lie beside the weights", "none")
    values = Values(found.config, f"{found.path.parent / CONFIG}")
    values.one_of("activation", {"topk"}, "topk")
    if values.flag("signed", False):
        raise wrong(values.source, "latents must not be signed", "signed")
    if set(found.tensors) - {"W_skip"} != set(_NAMES):
        raise wrong(found.label, f"the arrays must be {', '.join(_NAMES)}", ", ".join(sorted(found.tensors)))
    tensors = dict(found.tensors)
    tensors |= {"W_enc": tensors.pop("encoder.weight"), "b_enc": tensors.pop("encoder.bias")}
    for name in ("W_enc", "W_skip"):
        if name in tensors:
            tensors[name] = transposed(tensors[name], name, found.label)
    transcode = values.flag("transcode", False)
    notes = ["contexts began with the end-of-text token, as sparsify packs them"]
    if not transcode:
        tensors = shift_input(tensors, -1, found.label)
        notes.append("b_dec was subtracted from the input: folded into the encoder's bias")
    above = found.path.parents[1] / "config.json"
    about = Values(read_config(above) if above.is_file() else {}, f"{above}")
    site_in, site_out = _sites(Path(found.label).name, transcode=transcode)
    if not site_in:
        notes.append("the folder's name is no module whose site is known")
    return make_parts(
        "topk",
        tensors,
        source=found.label,
        dialect=NAME,
        declared={
            name: values.whole(theirs) for name, theirs in (("d_in", "d_in"), ("d_sae", "num_latents"))
        },
        notes=tuple(notes),
        k=values.whole("k"),
        site_in=site_in,
        site_out=site_out,
        model=about.text("model"),
        corpus=about.text("dataset"),
        context=about.whole("ctx_len"),
        prepend_bos=False,
    )


def write(parts: Parts, folder: Path) -> list[str]:
    """Writes the folder; returns the names of its files. Raises UserError for other gates than topk."""
    cfg = parts.cfg
    if cfg["architecture"] != "topk":
        raise cannot(parts, NAME, "holds topk gates only")
    if cfg["d_in"] != cfg["d_out"]:
        raise cannot(parts, NAME, "writes as many numbers as it reads")
    transcode = cfg["site_in"] != cfg["site_out"]
    tensors = dict(parts.tensors)
    if not transcode:
        tensors = shift_input(tensors, 1, parts.source)
    arrays = {
        "encoder.weight": tensors["W_enc"].T,
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    if cfg["skip"]:
        arrays["W_skip"] = tensors["W_skip"].T
    values = {
        "activation": "topk",
        "expansion_factor": max(1, cfg["d_sae"] // cfg["d_in"]),
        "normalize_decoder": False,
        "num_latents": cfg["d_sae"],
        "k": cfg["k"],
        "multi_topk": False,
        "skip_connection": cfg["skip"],
        "transcode": transcode,
        "d_in": cfg["d_in"],
    }
    save_tensors(folder / WEIGHTS, arrays)
    write_json(folder / CONFIG, values)
    return [CONFIG, WEIGHTS]


def _sites(module: str, *, transcode: bool) -> tuple[str, str]:
    if module == "embed_tokens":
        return "hook_embed", "hook_embed"
    match = _MODULE.search(module)
    if match is None:
        return "", ""
    at, inner = f"blocks.{match[1]}.", match[2] or ""
    reads, writes = {
        "": ("hook_resid_pre", "hook_resid_post"),
        "mlp": ("mlp.hook_in", "hook_mlp_out"),
        "attention": ("", "hook_attn_out"),
        "self_attn": ("", "hook_attn_out"),
        "attn": ("", "hook_attn_out"),
    }.get(inner, ("", ""))
    read = reads if transcode else writes
    return (at + read, at + writes) if read else ("", "")
