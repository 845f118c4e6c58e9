"""The file of a probe: a small safetensors file beside a dictionary's weights, with a checksum of its own.

Others that read the folder take no notice of it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sae.errors import UserError
from sae.files import atomic_write
from sae.numbers import format_size
from sae.probe import LATENTS, ROWS, SHAPING, Probe

PROBE = "probe.safetensors"
_VERSION = 1
_LARGEST = 64 * 2**20
_AXES: dict[str, tuple[str, ...]] = {
    "rows_in": ("row", "d_in"),
    "rows_out": ("row", "d_out"),
    "l0": ("row",),
    "latents": ("sampled",),
    "pre": ("row", "sampled"),
    "activations": ("row", "sampled"),
    "threshold": ("sampled",),
    "decoded": ("row", "d_out"),
    "b_dec": ("d_out",),
    "skipped": ("row", "d_out"),
    "magnitudes": ("row", "sums"),
}
_OPTIONAL = {"rows_out", "threshold", "skipped"}
_WHOLE = {"l0": torch.int64, "latents": torch.int64}
_ROW_KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_probe(folder: Path, probe: Probe) -> None:
    """Writes a probe's file into a dictionary's folder."""
    fields = {name: getattr(probe, name) for name in _AXES}
    tensors = {name: tensor.contiguous() for name, tensor in fields.items() if tensor is not None}
    about = {"version": _VERSION, "conventions": probe.conventions}
    about["sha256"] = _digest(about, safetensors.torch.save(tensors))
    # one entry: safetensors writes several in an order that changes
    header = {"probe": json.dumps(about, sort_keys=True)}
    atomic_write(folder / PROBE, safetensors.torch.save(tensors, header))


def read_probe(folder: Path) -> Probe | None:
    """The probe in a dictionary's folder; None where there is none. Raises UserError for a damaged one."""
    path = folder / PROBE
    if not path.exists():
        return None
    if not path.is_file() or path.stat().st_size > _LARGEST:
        raise _damaged(path, f"no file of at most {format_size(_LARGEST)}")
    try:
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        about = json.loads(json.loads(content[8 : _data_start(content)])["__metadata__"]["probe"])
        version, digest, conventions = about["version"], about.pop("sha256"), dict(about["conventions"])
    except Exception as error:  # parsers of hostile bytes raise nearly anything
        raise _damaged(path, f"{type(error).__name__}: {error}".split("\n")[0][:200]) from error
    if version != _VERSION:
        do = "update jumpscope, or delete the file: the dictionary opens without it"
        raise UserError(f"{path} must be of version {_VERSION}", f"{version!r:.20}", do)
    if digest != _digest(about, content):
        raise _damaged(path, "numbers that are not those it was written with")
    _check_tensors(path, tensors, conventions)
    return Probe(conventions=conventions, **tensors)


def _check_tensors(path: Path, tensors: dict[str, Tensor], conventions: dict[str, Any]) -> None:
    if not set(_AXES) - _OPTIONAL <= set(tensors) <= set(_AXES):
        raise _damaged(path, f"the tensors {', '.join(sorted(tensors))}")
    sizes: dict[str, Any] = {name: conventions.get(name) for name in SHAPING}
    if [type(size) for size in sizes.values()] != [int, int, int, bool]:
        raise _damaged(path, f"the sizes {sizes}"[:200])
    sizes |= {"row": tensors["l0"].numel(), "sampled": tensors["latents"].numel(), "sums": 4}
    # those that give sizes first, since a reader hands them over in any order
    for name in sorted(tensors, key=lambda name: (name not in ("l0", "latents"), name)):
        tensor = tensors[name]
        kinds = _ROW_KINDS if name.startswith("rows") else (_WHOLE.get(name, torch.float64),)
        shape = tuple(sizes[axis] for axis in _AXES[name])
        if tensor.dtype not in kinds or tuple(tensor.shape) != shape:
            raise _damaged(path, f"{name} of {tensor.dtype} and shape {tuple(tensor.shape)}")
        if not torch.isfinite(tensor).all():
            raise _damaged(path, f"values of {name} that are NaN or infinite")
    latents = tensors["latents"]
    # few, and each there once: together no larger than the dictionary itself
    rising = bool((latents.diff() > 0).all()) and 0 < len(latents) <= LATENTS
    if not rising or latents[0] < 0 or latents[-1] >= sizes["d_sae"] or not 0 < sizes["row"] <= ROWS:
        raise _damaged(path, f"{sizes['row']} rows and {len(latents)} latents, not all within the dictionary")
    if sizes["skip"] != ("skipped" in tensors):
        raise _damaged(path, f"the tensors {', '.join(sorted(tensors))}")


def _damaged(path: Path, found: str) -> UserError:
    do = "take another copy of the folder, or delete the file: the dictionary opens without it"
    return UserError(f"{path} must be a whole probe", found, do)


def _digest(about: dict[str, Any], content: bytes) -> str:
    """Of the conventions and of a safetensors file's data, whatever its header says beside them."""
    words = json.dumps(about, sort_keys=True).encode()
    return hashlib.sha256(words + content[_data_start(content) :]).hexdigest()


def _data_start(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")
