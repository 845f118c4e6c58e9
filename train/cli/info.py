"""`jumpscope info [PATH]`: what a run, a dictionary, a store or this machine is."""

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import psutil
import tyro

from sae.errors import UserError
from sae.numbers import format_size
from train.cli.console import note, say, stdout, table
from train.cli.parsing import parse
from train.cli.tables import eval_caption, eval_summary, training_summary
from train.run_folder import RUN, RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Say what something is: a run folder, a dictionary's folder, a store of activations, or this machine."""

    path: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]] = ""
    """The folder. Without one: this machine, and what a run would use on it."""


def run(argv: list[str]) -> None:
    """Finds out what the path is and describes it."""
    options = parse(
        InfoOptions,
        argv,
        verb="info",
        examples=["info", "info runs/gemma", "info runs/gemma/sites/blocks.9.hook_resid_post"],
    )
    path = Path(options.path)
    if not options.path:
        _machine()
    elif (path / RUN).is_file():
        _run(RunFolder.open(path))
    elif (path / "cfg.json").is_file():
        _dictionary(path)
    elif (path / "manifest.json").is_file():
        _store(path)
    else:
        raise UserError(
            "the path must be a run folder, a dictionary's folder or a store",
            f"none of run.json, cfg.json and manifest.json in {path}",
            "Check the path",
        )


def _machine() -> None:
    import torch

    from activations.precision import pick_device, pick_dtype
    from sae.kernels.dispatch import choose_kernel, product_dtype

    device = pick_device("auto")
    kernel, product = choose_kernel(device), str(product_dtype(device)).removeprefix("torch.")
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
    record = folder.record()
    indexed = [site for site in folder.sites() if folder.index_dir(site).is_dir()]
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


def _dictionary(path: Path) -> None:
    import sae

    dictionary = sae.load(path)
    norms, thresholds = dictionary.W_dec.norm(dim=1), dictionary.threshold
    _pairs(
        {
            "dictionary": str(path),
            **dictionary.cfg.to_dict(),
            "dtype": str(dictionary.W_enc.dtype).removeprefix("torch."),
            "parameters": f"{sum(p.numel() for p in dictionary.parameters()):,}",
            "decoder row norms": f"{float(norms.min()):.3g} to {float(norms.max()):.3g}",
            "thresholds": f"{float(thresholds.min()):.3g} to {float(thresholds.max()):.3g}",
        }
    )


def _store(path: Path) -> None:
    from activations.store import open_store

    store = open_store(path)
    shown = {
        name: value
        for name, value in store.manifest.items()
        if name not in ("files", "format", "version", "widths")
    }
    size = store.rows * sum(store.widths.values()) * store.dtype.itemsize
    _pairs(
        {"store": str(path), **shown, "size": f"{format_size(size)} in {len(store.manifest['files'])} files"}
    )


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
