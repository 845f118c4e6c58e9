"""`jumpscope info [PATH]`: what a run, a dictionary, a store or this machine is."""

import dataclasses
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import tyro

from sae.errors import UserError
from sae.numbers import format_size
from train.cli.console import note, say, stdout, table
from train.cli.parsing import parse
from train.cli.progress import progress
from train.cli.tables import eval_caption, eval_summary, training_summary
from train.run_folder import RUN, RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from activations.store import Store
    from sae.probe import Probe


_HUB = "https://huggingface.co/"
_LISTED = 40
"""Folders that are no Gemma Scope's, and are named all the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Say what something is: a run folder, a dictionary, a store of activations, or this machine.

    A dictionary may be a folder or a file of any format that `jumpscope import` reads, or an id of the hub. A
    repository of the hub is listed: its layers, widths and L0s.
    """

    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]] = ""
    """The folder, a store's URL, or an id. Without one: this machine, and what a run would use on it."""
    verify: bool = False
    """Read every byte of a store and name each shard that is missing or torn."""


def run(argv: list[str]) -> None:
    """Finds out what the path is and describes it."""
    options = parse(
        InfoOptions,
        argv,
        verb="info",
        examples=[
            "info",
            "info runs/gemma",
            "info runs/gemma/sites/blocks.9.hook_resid_post",
            "info stores/all --verify",
            "info google/gemma-scope-2b-pt-res",
        ],
    )
    path = Path(options.path)
    is_store = ("://" in options.path and not options.path.startswith(_HUB)) or (
        bool(options.path) and (path / "manifest.json").is_file()
    )
    if options.verify and not is_store:
        raise UserError("--verify is for a store", f"no manifest.json in {options.path!r}", "Check the path")
    if not options.path:
        _machine()
    elif (path / RUN).is_file():
        _run(RunFolder.open(path))
    elif is_store:
        _store(options.path, verify=options.verify)
    elif not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", options.path):
        _repository(options.path)
    elif path.is_dir() and not any(path.glob("*.*")):
        raise UserError(
            "the path must be a run folder, a dictionary or a store",
            f"none of run.json, manifest.json and weights in {path}",
            "check the path",
        )
    else:
        _dictionary(options.path)


def _machine() -> None:
    import torch

    from activations.precision import pick_device, pick_dtype
    from sae.kernels.dispatch import choose_kernel, screen_dtype

    device = pick_device("auto")
    kernel = choose_kernel(device)
    product = str(screen_dtype(device, kernel.name)).removeprefix("torch.")
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    memory = psutil.virtual_memory()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    packages = ("jumpscope", "torch", "transformers", "transformer-lens", "streamlit")
    _pairs(
        {
            "cores": f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}",
            "memory": f"{format_size(memory.total)}, {format_size(memory.available)} free",
            "gpu": ", ".join(f"{gpu.name} ({format_size(gpu.total_memory)})" for gpu in gpus) or "none",
            "a run would use": f"{device}, the model in {dtype}",
            "training steps": f"the {kernel.name} kernel ({kernel.reason}), screened by a {product} product",
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        }
    )
    note("jumpscope models and corpora list what can be loaded; jumpscope plan says what a run takes")


def _run(folder: RunFolder) -> None:
    from viewer.index.storage import is_whole  # late: it imports torch and pyarrow

    record = folder.record()
    indexed = [site for site in folder.sites() if is_whole(folder.index_dir(site))]
    _pairs(
        {
            "run": str(folder.path),
            "state": folder.state(),
            **{
                name: value
                for name, value in record.items()
                if name not in ("format", "config", "sites", "state")
            },
            "config": record["config"],
            "indexed": f"{len(indexed)} of {len(folder.sites())} sites",
        }
    )
    if metrics := folder.eval_table():
        stdout.print(eval_summary(metrics))
        note(eval_caption(metrics))
    else:
        stdout.print(training_summary(folder.metrics()))
        say(f"Not evaluated yet: jumpscope eval {folder.path}")


def _dictionary(path: str) -> None:
    from sae import dialects

    parts = dialects.read(path)
    tensors, probe = parts.tensors, parts.dictionary.probe
    norms = tensors["W_dec"].norm(dim=1)
    thresholds = "0" if parts.cfg["architecture"] == "relu" else "none"
    if "threshold" in tensors:
        thresholds = _range(tensors["threshold"])
    _pairs(
        {
            "dictionary": path,
            "format": parts.dialect,
            **parts.cfg,
            "dtype": str(tensors["W_enc"].dtype).removeprefix("torch."),
            "parameters": f"{sum(tensor.numel() for tensor in tensors.values()):,}",
            "decoder row norms": _range(norms),
            "thresholds": thresholds,
            "probe": "none" if probe is None else _probe(probe),
        }
    )
    for line in parts.notes:
        note(line)


def _probe(probe: "Probe") -> str:
    # reading it has checked it
    fvu = "" if probe.fvu is None else f", FVU {probe.fvu:.3g}"
    l0 = float(probe.l0.double().mean())
    return f"held: {len(probe.rows_in)} rows, {len(probe.latents)} latents, L0 {l0:.1f}{fvu}"


def _repository(repo: str) -> None:
    from sae.dialects import hub, ids

    folders = hub.list_folders(repo)
    known = {folder: found for folder in folders if (found := ids.parse_folder(folder))}
    widths = sorted({found.width for found in known.values()}, key=_latents)
    if known:
        rows = table("layer", *widths, title=f"{repo}: L0s by layer and width")
        places = sorted({(found.group, found.layer) for found in known.values()})
        for group, layer in places:
            here = [found for found in known.values() if (found.group, found.layer) == (group, layer)]
            cells = (sorted((f.l0 for f in here if f.width == w), key=_by_size) for w in widths)
            rows.add_row(f"{group} {layer}".strip(), *(", ".join(cell) or "-" for cell in cells))
        stdout.print(rows)
    others = [folder for folder in folders if folder not in known]
    for folder in others[:_LISTED]:
        say(f"{repo}/{folder}")
    if len(others) > _LISTED:
        note(f"and {len(others) - _LISTED:,} more")
    if folders:
        note(f"for instance: jumpscope import {repo}/{folders[0]} --out dictionaries/one")


def _latents(width: str) -> int:
    digits, unit = width.rstrip("kmKM"), width[-1:].lower()
    return (int(digits) if digits.isdecimal() else 0) * {"k": 2**10, "m": 2**20}.get(unit, 1)


def _by_size(l0: str) -> tuple[int, int, str]:
    size = l0.partition("_")[0]
    words = ("small", "medium", "big")
    return int(l0) if l0.isdecimal() else 0, words.index(size) if size in words else len(words), l0


def _range(values: "Tensor") -> str:
    return f"{float(values.min()):.3g} to {float(values.max()):.3g}"


def _store(path: str, *, verify: bool) -> None:
    from activations.store import open_store

    store = open_store(path, check_sizes=not verify)
    about = store.manifest
    shown = ("model", "tokenizer_hash", "corpus", "split", "context", "seed", "model_batch")
    read_as = "" if about["dtype"] == about["rows_dtype"] else f", read as {about['rows_dtype']}"
    state = "the whole of the split" if about["corpus_ended"] else "as many rows as asked for"
    _pairs(
        {
            "store": path,
            **{name: about[name] for name in shown},
            "rows": f"{store.rows:,}",
            "dtype": about["dtype"] + read_as,
            "size": f"{format_size(store.bytes)} in {len(about['shards'])} shards",
            "complete": f"yes, {state}" if store.complete else "no: the same harvest command goes on with it",
            "versions": about["versions"],
        }
    )
    sites = table("site", ">width", ">scale", ">|mean|")
    for site, moments in store.statistics.items():
        sites.add_row(
            site, str(store.widths[site]), f"{moments.scale:.4g}", f"{float(moments.mean.norm()):.4g}"
        )
    stdout.print(sites)
    if verify:
        _verify(store)


def _verify(store: "Store") -> None:
    with progress(unit="B") as report:
        problems = store.verify(lambda done: report("verify", done, store.bytes))
    for name, found in problems.items():
        say(f"{name}: {found}")
    if problems:
        raise UserError(
            f"every shard of {store.place} must be whole",
            f"{len(problems)} of {len(store.manifest['shards'])} missing or torn: {', '.join(problems)}",
            "Restore them from a copy, or harvest again",
        )
    say(f"Every shard is whole: {store.bytes:,} bytes read, all checksums right.")


def _pairs(values: Mapping[str, Any]) -> None:
    rows = table("", "")
    rows.show_header = False
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items() if item not in ("", None))
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        rows.add_row(name.replace("_", " "), str(value))
    stdout.print(rows)
