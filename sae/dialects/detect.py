"""Opens a dictionary of any known dialect, told by what its files hold, and writes one in any."""

import os
from pathlib import Path
from types import ModuleType

from sae.dialects import (
    archives,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    hub,
    ids,
    saelens,
    sparsify,
)
from sae.dialects.card import card
from sae.dialects.found import Found
from sae.dialects.parts import Parts
from sae.errors import UserError
from sae.files import atomic_write, make_folder
from sae.probe_file import PROBE

DIALECTS: dict[str, ModuleType] = {
    module.NAME: module for module in (saelens, gemma_scope, gemma_scope_2, dictionary_learning, sparsify)
}
"""By name: modules with `matches(found)`, `read(found) -> Parts` and `write(parts, folder) -> names`."""

_CONFIGS = ("cfg.json", "config.json")
_SUFFIXES = (".npz", ".safetensors", ".pt")
_CARD = "README.md"


def read(path_or_id: Path | str) -> Parts:
    """A dictionary from a folder, a weights file, or an id of the hub.

    Raises UserError, naming the file, for whatever is no whole and safe dictionary of a known dialect.
    """
    path = Path(path_or_id).expanduser()
    if os.path.exists(path):
        return _read(path, path.resolve().as_posix())
    folder, label = hub.fetch(ids.parse_id(str(path_or_id)))
    return _read(folder, label)


def write(parts: Parts, folder: Path | str, to: str) -> list[str]:
    """Writes a dictionary in a dialect, with a model card; returns the names of the files.

    Raises UserError for an unknown dialect and for what the dialect cannot express.
    """
    if to not in DIALECTS:
        raise UserError(f"the format must be one of {', '.join(DIALECTS)}", repr(to), "choose one of them")
    folder = make_folder(folder)
    names = DIALECTS[to].write(parts, folder)
    atomic_write(folder / _CARD, card(parts, to).encode())
    return [*names, _CARD]


def _read(path: Path, label: str) -> Parts:
    weights = path if path.is_file() else _weights_in(path)
    kind = archives.kind_of(weights)
    if kind is None:
        must = "weights must be .safetensors, .npz, or what today's torch.save writes"
        raise UserError(must, f"{weights} is none of them", "check the path")
    folder = weights.parent
    if path.is_file():
        label = label.rpartition("/")[0]
    config = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
    found = Found(
        path=weights,
        kind=kind,
        tensors=archives.read_arrays(weights, kind),
        config=None if config is None else archives.read_config(config),
        label=label,
    )
    for dialect in DIALECTS.values():
        if dialect.matches(found):
            return dialect.read(found)
    raise UserError(
        f"the arrays must be those of a dictionary in one of {', '.join(DIALECTS)}",
        f"{', '.join(sorted(found.tensors)[:12])} in {weights}",
        "check that this is the dictionary, and not something that lies beside it",
    )


def _weights_in(folder: Path) -> Path:
    """The one file of a folder that holds a dictionary."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _SUFFIXES)
    chosen = [path for path in files if path.name != PROBE and not _is_sparsity(path)]
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        names = ", ".join(path.name for path in chosen)
        raise UserError("a folder must hold one dictionary", f"{names} in {folder}", "give the file's path")
    inner = sorted({path.parent for suffix in _SUFFIXES for path in folder.glob(f"*/*{suffix}")})
    hint = f"did you mean {inner[0]}?" if inner else "check the path"
    raise UserError("a dictionary's folder must hold weights", f"no {', '.join(_SUFFIXES)} in {folder}", hint)


def _is_sparsity(path: Path) -> bool:
    # how often each latent fires: SAELens puts it beside the weights
    is_tensors = path.suffix == ".safetensors" and archives.kind_of(path) == "safetensors"
    return is_tensors and archives.tensor_names(path) == ["sparsity"]
