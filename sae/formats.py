"""Dictionaries on disk, in the layout of SAELens 6: cfg.json beside sae_weights.safetensors."""

import dataclasses
import logging
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from sae.architectures import build
from sae.dictionary import Dictionary, DictionaryConfig
from sae.errors import UserError
from sae.files import load_tensors, make_folder, read_json, save_tensors, write_json

_log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_AGAIN = "save the dictionary again, or take another copy"
# Readers of this layout take a folder without a version, or below 6, for the older layout.
_LAYOUT_VERSION = "6.0.0"
# SAELens's names: of an SAE, a transcoder, a transcoder with a skip. It uses a batchtopk dictionary as a
# jumprelu one, and refuses the names that it does not know: "topk_transcoder" and the like.
_NAMES = {
    "jumprelu": ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
    "batchtopk": ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
    "relu": ("standard", "transcoder", "skip_transcoder"),
    "topk": ("topk", "topk_transcoder", "topk_skip_transcoder"),
    "gated": ("gated", "gated_transcoder", "gated_skip_transcoder"),
}


def save(dictionary: Dictionary, path: Path | str) -> None:
    """Writes a dictionary's folder: each file whole or absent, the config last."""
    folder = make_folder(path)
    save_tensors(folder / WEIGHTS, turned(dictionary.state_dict()), {"format": "jumpscope"})
    write_json(folder / CONFIG, saelens_config(dictionary))


def load(path: Path | str, *, device: str = "cpu") -> Dictionary:
    """Opens a dictionary: a folder that `save` wrote, or any that `sae.dialects` reads, by path or hub id.

    On a CPU the weights of our own folders, and of SAELens's plain ones, are the file itself, mapped into
    memory: what is not used takes none. Raises UserError when files are missing, torn, unsafe or do not fit
    each other, and when a value is not finite.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file() or _is_foreign(read_json(folder / CONFIG)):
        return _from_dialect(path, device)
    cfg = _read_config(folder / CONFIG)
    tensors = load_tensors(folder / WEIGHTS, device)
    return build(cfg, turned(tensors), source=str(folder / WEIGHTS))


def _is_foreign(config: Any) -> bool:
    """Whether a config is neither ours nor one of SAELens's that needs nothing folded."""
    if not isinstance(config, dict) or "metadata" not in config:
        return isinstance(config, dict)
    metadata = config["metadata"]
    theirs = isinstance(metadata, dict) and "jumpscope" not in metadata
    return theirs and config.get("normalize_activations") != "none"


def _from_dialect(path: Path | str, device: str) -> Dictionary:
    from sae import dialects  # late: few dictionaries need them

    parts = dialects.read(path)
    for note in parts.notes:
        _log.info("%s: %s", parts.source, note)
    tensors = {name: tensor.to(device) for name, tensor in parts.tensors.items()}
    return build(DictionaryConfig(**parts.cfg), tensors, source=parts.source)


def turned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SAELens keeps `W_skip` as [d_out, d_in]; both ways."""
    return {name: tensor.T if name == "W_skip" else tensor for name, tensor in tensors.items()}


def saelens_config(dictionary: Dictionary) -> dict[str, Any]:
    """cfg.json: SAELens's keys and names, and all of ours under metadata.jumpscope."""
    cfg = dictionary.cfg
    values: dict[str, Any] = {
        "architecture": _NAMES[cfg.architecture][cfg.transcoder + cfg.skip],
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


def _read_config(path: Path) -> DictionaryConfig:
    values = read_json(path)
    metadata = (values.get("metadata") or {}) if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(metadata, dict):
        raise UserError(f"{path} must hold a config and its metadata", f"{values!r:.60}", _AGAIN)
    own = metadata["jumpscope"] if "jumpscope" in metadata else _from_saelens(values, metadata, path)
    if not isinstance(own, dict):
        raise UserError(f"{path} must hold a config", f"{own!r:.60}", _AGAIN)
    for field in dataclasses.fields(DictionaryConfig):
        kinds = (int, float, NoneType) if field.name == "l0_target" else (field.type,)
        value = own.get(field.name, None if field.default is dataclasses.MISSING else field.default)
        # not isinstance: true is no number here
        if type(value) not in kinds:
            raise UserError(
                f"{field.name} in {path} must be {getattr(field.type, '__name__', field.type)}",
                f"{value!r:.60}",
                _AGAIN,
            )
    return DictionaryConfig.from_dict(own)


def _from_saelens(values: dict[str, Any], metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    kinds = {
        name: (ours, "skip" in name)
        for ours, names in _NAMES.items()
        if ours != "batchtopk"
        for name in names
    }
    must_be = {
        "architecture": tuple(kinds),
        "apply_b_dec_to_input": (False,),
        "normalize_activations": ("none",),
        "rescale_acts_by_decoder_norm": (False, None),
    }
    for key, allowed in must_be.items():
        if values.get(key) not in allowed:
            raise UserError(
                f"{key} must be {' or '.join(map(repr, allowed))} to be read here",
                f"{values.get(key)!r} in {path}",
                "fold the dictionary with SAELens first",
            )
    architecture, skip = kinds[values["architecture"]]
    return {
        "architecture": architecture,
        "skip": skip,
        "k": values.get("k") or 0,
        "d_in": values.get("d_in"),
        "d_sae": values.get("d_sae"),
        "d_out": values.get("d_out") or 0,
        "site_in": metadata.get("hook_name") or "",
        "site_out": metadata.get("hook_name_out") or "",
        "model": metadata.get("model_name") or "",
        "corpus": metadata.get("dataset_path") or "",
        "context": metadata.get("context_size") or 0,
        "prepend_bos": bool(metadata.get("prepend_bos", True)),
    }
