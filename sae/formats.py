"""Dictionaries on disk, in the layout of SAELens 6: cfg.json beside sae_weights.safetensors."""

from pathlib import Path
from typing import Any

from sae.errors import UserError
from sae.files import load_tensors, make_folder, read_json, save_tensors, write_json
from sae.jumprelu import DictionaryConfig, JumpReLU, parameter_shapes

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# Readers of this layout take a folder without a version, or below 6, for the older layout.
_LAYOUT_VERSION = "6.0.0"


def save(dictionary: JumpReLU, path: Path | str) -> None:
    """Writes a dictionary's folder: each file whole or absent, the config last."""
    folder = make_folder(path)
    save_tensors(folder / WEIGHTS, dictionary.state_dict(), {"format": "jumpscope"})
    write_json(folder / CONFIG, _to_saelens(dictionary))


def load(path: Path | str, *, device: str = "cpu") -> JumpReLU:
    """Reads a folder that `save` or SAELens wrote. Raises UserError when files are missing, torn or do not
    fit each other.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"a dictionary's folder must hold {CONFIG} and {WEIGHTS}",
            f"no {CONFIG} in {folder}",
            "give the folder of one site, such as runs/NAME/sites/SITE",
        )
    cfg = _from_saelens(read_json(folder / CONFIG), folder)
    tensors = load_tensors(folder / WEIGHTS, device)
    for name, shape in parameter_shapes(cfg).items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise UserError(
                f"{name} in {folder / WEIGHTS} must have shape {shape}",
                f"{found}",
                "the config and the weights do not belong together; save the dictionary again",
            )
    dictionary = JumpReLU(cfg, dtype=tensors["W_enc"].dtype, device=device)
    dictionary.load_state_dict({name: tensors[name] for name in parameter_shapes(cfg)})
    return dictionary.requires_grad_(False)


def _to_saelens(dictionary: JumpReLU) -> dict[str, Any]:
    cfg = dictionary.cfg
    transcoder = cfg.site_in != cfg.site_out
    values: dict[str, Any] = {
        "architecture": "jumprelu_transcoder" if transcoder else "jumprelu",
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
    if transcoder:
        values["d_out"] = cfg.d_out
        values["metadata"]["hook_name_out"] = cfg.site_out
    elif cfg.site_in.endswith("hook_z"):
        values["reshape_activations"] = "hook_z"
    return values


def _from_saelens(values: dict[str, Any], folder: Path) -> DictionaryConfig:
    metadata = values.get("metadata") or {}
    if "jumpscope" in metadata:
        return DictionaryConfig.from_dict(metadata["jumpscope"])
    must_be = {
        "architecture": ("jumprelu", "jumprelu_transcoder"),
        "apply_b_dec_to_input": (False,),
        "normalize_activations": ("none",),
    }
    for key, allowed in must_be.items():
        if values.get(key) not in allowed:
            raise UserError(
                f"{key} must be {' or '.join(map(repr, allowed))} to be read here",
                f"{values.get(key)!r} in {folder / CONFIG}",
                "fold the dictionary with SAELens first",
            )
    return DictionaryConfig(
        d_in=values["d_in"],
        d_sae=values["d_sae"],
        d_out=values.get("d_out") or 0,
        site_in=metadata.get("hook_name") or "",
        site_out=metadata.get("hook_name_out") or "",
        model=metadata.get("model_name") or "",
        corpus=metadata.get("dataset_path") or "",
        context=metadata.get("context_size") or 0,
        prepend_bos=bool(metadata.get("prepend_bos", True)),
    )
