"""SAELens: cfg.json beside sae_weights.safetensors, in the layout of version 6 and in the flat one before it.

Our own folders are of the newer layout, with all of a dictionary's config under metadata.jumpscope, and the
probe beside the weights: `write_folder` is what writes both them and exports.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.dialects.found import Found, Values
from sae.dialects.parts import Parts, cannot, make_parts, shift_input, transposed, widened, wrong
from sae.dictionary import Dictionary, DictionaryConfig
from sae.errors import UserError
from sae.files import write_json
from sae.probe import Probe, check
from sae.probe_file import PROBE, read_probe, write_probe
from sae.tensor_files import save_tensors

NAME = "saelens"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# readers take a folder without a version, or below 6, for the older layout
_LAYOUT_VERSION = "6.0.0"
_NEWEST_MAJOR = 6

_GATES = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
    # SAELens knows none of these, so it refuses them
    "topk_transcoder": "topk",
    "topk_skip_transcoder": "topk",
    "gated_transcoder": "gated",
    "gated_skip_transcoder": "gated",
}
_WHY_NOT_FOLDED = {
    "layer_norm": "each row is divided by its own deviation, which no weights can do",
    "constant_norm_rescale": "each row is divided by its own norm, which no weights can do",
    "covariance_whitening": "the whitening's matrices are not in the folder",
}


def matches(found: Found) -> bool:
    """Whether the arrays are named as SAELens names them."""
    return found.kind == "safetensors" and {"W_enc", "W_dec"} <= set(found.tensors)


def read(found: Found) -> Parts:
    """The dictionary, with its input bias, scales and decoder norms folded in; its probe, if it has one.

    Raises UserError for a newer version, another architecture, a normalisation that cannot be folded, and
    a probe that does not hold.
    """
    if found.config is None:
        raise wrong(found.label, f"{CONFIG} must lie beside the weights", "none")
    values = Values(found.config, f"{found.path.parent / CONFIG}")
    about = values.part("metadata")
    version = about.text("sae_lens_version") or values.text("sae_lens_version")
    if (major := _major(version)) > _NEWEST_MAJOR:
        raise UserError(
            f"SAELens's layout must be of version {_NEWEST_MAJOR} at most",
            f"{version} in {values.source}",
            "update jumpscope, or save the dictionary with an older SAELens",
        )
    ours = _ours(about.part("jumpscope")) if "jumpscope" in about.values else {}
    old = major < _NEWEST_MAJOR and not ours
    activation = values.text("activation_fn", "activation_fn_str") or "relu"
    is_topk = old and activation.lower() == "topk"
    name = "topk" if is_topk else values.one_of("architecture", _GATES, "standard" if old else "")
    if activation.lower() not in ("relu", "topk"):
        raise wrong(values.source, "the activation must be relu or topk", repr(activation))
    about = values if old else about
    if about.number("hook_head_index", "hook_point_head_index") is not None:
        raise wrong(values.source, "the hook must be read whole", "hook_head_index: one head of it")
    tensors, notes = _fold(dict(found.tensors), values, name, old=old, transcoder="transcoder" in name)
    gate = _GATES[name]
    if gate in ("jumprelu", "batchtopk"):
        tensors["threshold"] = _threshold(tensors, values.source)
    k = values.whole("k") or values.part("activation_fn_kwargs").whole("k")
    fields = {
        "architecture": gate,
        "site_in": about.text("hook_name", "hook_point"),
        "site_out": about.text("hook_name_out"),
        "model": about.text("model_name"),
        "corpus": about.text("dataset_path"),
        "context": about.whole("context_size"),
        "prepend_bos": about.flag("prepend_bos", True),
        "k": k if gate in ("topk", "batchtopk") else 0,
        "skip": "skip" in name,
        **{size: values.whole(size) for size in _SIZES},
        **ours,
    }
    if (said := fields["architecture"]) != gate and {said, gate} != {"batchtopk", "jumprelu"}:
        raise wrong(values.source, f"the architecture must be one: {gate}", repr(said))
    declared = {size: fields.pop(size) for size in _SIZES}
    parts = make_parts(
        tensors=tensors, source=found.label, dialect=NAME, declared=declared, notes=notes, **fields
    )
    if (probe := read_probe(found.path.parent)) is not None:
        check(parts.dictionary, probe, source=found.label)
        parts.dictionary.probe = probe
    return parts


def write(parts: Parts, folder: Path) -> list[str]:
    """Writes the folder; returns the names of its files. UserError for what SAELens has no class for."""
    cfg = parts.dictionary.cfg
    if cfg.transcoder and cfg.architecture in ("topk", "gated"):
        raise cannot(parts, NAME, "has transcoders with relu and jumprelu gates only")
    return write_folder(parts.dictionary, folder, parts.dictionary.probe)


def write_folder(dictionary: Dictionary, folder: Path, probe: Probe | None) -> list[str]:
    """Writes a dictionary of any architecture; returns the names of the files.

    Each is whole or absent, the config comes last, and at no time does a probe lie beside weights of
    another dictionary.
    """
    (folder / PROBE).unlink(missing_ok=True)
    save_tensors(folder / WEIGHTS, tensors_of(dictionary), {"format": "jumpscope"})
    if probe is not None:
        write_probe(folder, probe)
    write_json(folder / CONFIG, config_of(dictionary))
    return [CONFIG, WEIGHTS, *([PROBE] if probe is not None else [])]


def tensors_of(dictionary: Dictionary) -> dict[str, Tensor]:
    """The dictionary's own tensors as SAELens has them: its skip stands on the left of the activation."""
    return {name: t.T if name == "W_skip" else t for name, t in dictionary.state_dict().items()}


def config_of(dictionary: Dictionary) -> dict[str, Any]:
    """What cfg.json says of a dictionary: SAELens's keys, and ours under metadata.jumpscope."""
    cfg = dictionary.cfg
    values: dict[str, Any] = {
        "architecture": _name(cfg),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": str(dictionary.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        # activations reach a dictionary with their heads already concatenated
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _LAYOUT_VERSION,
            "sae_lens_training_version": None,
            "model_name": cfg.model,
            "hook_name": cfg.site_in,
            "hook_head_index": None,
            "context_size": cfg.context or None,
            "prepend_bos": cfg.prepend_bos,
            "dataset_path": cfg.corpus,
            "jumpscope": cfg.to_dict(),
        },
    }
    if cfg.architecture == "topk":
        values |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    if cfg.transcoder:
        values["d_out"] = cfg.d_out
        values["metadata"]["hook_name_out"] = cfg.site_out
    elif cfg.site_in.endswith("hook_z"):
        values["reshape_activations"] = "hook_z"
    return values


_SIZES = ("d_in", "d_sae", "d_out")


def _name(cfg: DictionaryConfig) -> str:
    # at inference SAELens itself keeps a batchtopk dictionary as jumprelu
    gate = {"relu": "standard", "batchtopk": "jumprelu"}.get(cfg.architecture, cfg.architecture)
    if not cfg.transcoder:
        return gate
    kind = "skip_transcoder" if cfg.skip else "transcoder"
    return kind if gate == "standard" else f"{gate}_{kind}"


def _ours(values: Values) -> dict[str, Any]:
    """The fields of `DictionaryConfig` that metadata.jumpscope gives, each of its type."""
    known = {field.name: field for field in dataclasses.fields(DictionaryConfig)}
    if unknown := sorted(set(values.values) - set(known)):
        raise UserError(
            "metadata.jumpscope must hold keys that this version knows",
            f"{', '.join(unknown)} in {values.source}",
            "update jumpscope: a newer one may have written it",
        )
    readers: dict[Any, Callable[[str], Any]] = {
        str: values.text,
        int: values.whole,
        bool: lambda name: values.flag(name, bool(known[name].default)),
        float | None: values.number,
    }
    return {name: readers[known[name].type](name) for name in values.values}


def _fold(
    tensors: dict[str, Tensor], values: Values, name: str, *, old: bool, transcoder: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes: list[str] = []
    for needed in ("W_enc", "W_dec", "b_dec"):
        if needed not in tensors:
            raise wrong(values.source, f"a {name} dictionary has {needed}", f"{', '.join(sorted(tensors))}")
    if "W_skip" in tensors:
        tensors["W_skip"] = transposed(tensors["W_skip"], "W_skip", values.source)
    if (scale := tensors.pop("scaling_factor", None)) is not None and not bool((scale == 1).all()):
        if not values.flag("finetuning_scaling_factor", False) or scale.shape != tensors["W_dec"].shape[:1]:
            raise wrong(
                values.source, "finetuning_scaling_factor must be true to be applied", "scales, and false"
            )
        tensors = widened(tensors)
        tensors["W_dec"] = tensors["W_dec"] * scale[:, None]
        notes.append("scaling_factor is folded into W_dec")
    norm = values.values.get("normalize_activations") or "none"
    norm = "expected_average_only_in" if norm is True else norm
    if norm == "expected_average_only_in":
        tensors = _fold_scale(tensors, values)
        notes.append(f"activations were scaled by {values.number('norm_scaling_factor'):g}: folded")
    elif norm != "none":
        why = _WHY_NOT_FOLDED.get(str(norm), "this normalisation is not known here")
        raise wrong(
            values.source, f"normalize_activations must be one that can be folded ({why})", repr(norm)
        )
    if values.flag("rescale_acts_by_decoder_norm", False):
        if name not in ("topk", "batchtopk", "matryoshka_batchtopk"):
            raise wrong(values.source, f"rescale_acts_by_decoder_norm must be false for {name}", "true")
        tensors = widened(tensors)
        norms = tensors["W_dec"].norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        tensors |= {"W_enc": tensors["W_enc"] * norms, "W_dec": tensors["W_dec"] / norms[:, None]}
        tensors["b_enc"] = tensors["b_enc"] * norms
        notes.append("decoder norms are folded into the encoder")
    if not transcoder and values.flag("apply_b_dec_to_input", True):
        tensors = shift_input(tensors, -1, values.source)
        notes.append("b_dec was subtracted from the input: folded into the encoder's bias")
    return tensors, tuple(notes)


def _fold_scale(tensors: dict[str, Tensor], values: Values) -> dict[str, Tensor]:
    scale = values.number("norm_scaling_factor")
    if not scale or not 0 < scale < float("inf"):
        raise UserError(
            "a dictionary of scaled activations must say the scale, or have it folded in",
            f"expected_average_only_in, and no norm_scaling_factor in {values.source}",
            "add norm_scaling_factor to the config, or fold it with SAELens",
        )
    tensors = widened(tensors)
    return tensors | {
        "W_enc": tensors["W_enc"] * scale,
        "W_dec": tensors["W_dec"] / scale,
        "b_dec": tensors["b_dec"] / scale,
    }


def _threshold(tensors: dict[str, Tensor], source: str) -> Tensor:
    found = tensors.pop("threshold", tensors.pop("topk_threshold", None))
    if found is None:
        raise wrong(source, "a dictionary with this gate has a threshold", f"{', '.join(sorted(tensors))}")
    return found.to(tensors["W_enc"].dtype).expand(tensors["W_enc"].shape[-1:]) if found.ndim == 0 else found


def _major(version: str) -> int:
    number = version.partition(".")[0]
    return int(number) if number.isdecimal() else 0
