"""The feature index against the plain harvest of the same tokens and their bare encoder products, in turns.

Per round, on the same text: the forward passes and the rows they leave; one bfloat16 product of the rows with
each encoder (nothing is read of it); and a whole index, pass and writing, with and without the search for
logits (every decoder row through the whole vocabulary). Dictionaries are those of `--run`, or made here, of
random rows, with thresholds at which each latent fires on about l0 / width of the tokens. Seconds are the
machine's and, in brackets, all processors' together: where others compute too, only those mean much. `ratio`
is the median over rounds of index over harvest plus products. The last line is JSON.

    python benchmarks/index_speed.py [--run RUN | --layers 0,6,12,17 --width 16384] [--tokens 8192]
                                     [--rounds 1] [--other FOLDER] [--features 256]

`--other` is a folder into which `pip install --target` put SAEDashboard 0.8: the last site's dictionary is
then given to it too, with the same text and the first `--features` of its latents (its default minibatch),
once with the activations still to be computed and once with them in its cache; times are given per latent.
"""

import argparse
import copy
import json
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from activations.blocks import Cursor, TokenBlocks, iter_blocks
from activations.corpora import load_corpus
from activations.harvest import harvest_rows
from activations.models import LanguageModel, load_model
from activations.sites import layer_of
from sae import Dictionary, DictionaryConfig, JumpReLU
from train.cli.work import load_run
from viewer.index import site_tables
from viewer.index.build import build_index

_SAMPLE = 4096


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The feature index against harvest and encoder products.")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--corpus", default="wiki-leads")
    parser.add_argument("--run", default="", help="a run folder whose dictionaries are indexed")
    parser.add_argument("--kind", default="hook_resid_post")
    parser.add_argument("--layers", default="0,6,12,17")
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--l0", type=float, default=50)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--parts", default="harvest,products,index,bare", help="which to time")
    parser.add_argument("--other", default="", help="a folder that holds SAEDashboard")
    parser.add_argument("--features", type=int, default=256, help="latents that SAEDashboard is asked for")
    return parser.parse_args()


class Text:
    """The tokens that everything reads."""

    def __init__(self, model: LanguageModel, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.facts = {"corpus": args.corpus, "context": args.context, "tokens": args.tokens}

    def blocks(self, start: Cursor, tokens: int | None = None) -> Iterator[TokenBlocks]:
        """The text from a place on."""
        corpus = load_corpus(self.args.corpus)
        wanted = tokens or self.args.tokens
        return iter_blocks(
            self.model, corpus, split="train", context=self.args.context, max_tokens=wanted, start=start
        )


def make_dictionaries(text: Text, sites: tuple[str, ...], args: argparse.Namespace) -> dict[str, JumpReLU]:
    """Random rows of norm 1, used both ways, and thresholds from some rows of the text."""
    batches = list(harvest_rows(text.model, text.blocks(Cursor(), _SAMPLE), sites))
    made = {}
    for number, site in enumerate(sites):
        rows = torch.cat([batch.rows[site] for batch in batches]).float()
        generator = torch.Generator().manual_seed(number)
        cfg = DictionaryConfig(d_in=rows.shape[1], d_sae=args.width, site_in=site, model=args.model)
        dictionary = JumpReLU(cfg).requires_grad_(False).to(rows.device)
        directions = torch.randn(args.width, rows.shape[1], generator=generator).to(rows.device)
        dictionary.W_dec.copy_(torch.nn.functional.normalize(directions, dim=1))
        dictionary.W_enc.copy_(dictionary.W_dec.T)
        dictionary.b_dec.copy_(rows.mean(0))
        dictionary.b_enc.copy_(-dictionary.b_dec @ dictionary.W_enc)
        wanted = max(1, round(args.l0 / args.width * len(rows)))
        for part in range(0, args.width, 1024):
            span = slice(part, part + 1024)
            pre = rows @ dictionary.W_enc[:, span] + dictionary.b_enc[span]
            dictionary.threshold[span] = pre.topk(wanted + 1, dim=0).values[-1].clamp(min=1e-3)
        made[site] = dictionary
    return made


def run_dictionaries(args: argparse.Namespace, model: LanguageModel) -> dict[str, Dictionary]:
    """Those of `--run`; what is printed then says their layers and width."""
    dictionaries = load_run(args.run, model=model).dictionaries
    args.layers = ",".join(str(layer_of(site)) for site in dictionaries)
    args.width = next(iter(dictionaries.values())).cfg.d_sae
    return dictionaries


def harvest(text: Text, sites: tuple[str, ...]) -> None:
    """The forward passes and the kept rows, of which nothing is kept."""
    for _ in harvest_rows(text.model, text.blocks(Cursor()), sites):
        pass


def products(rows: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], tokens: int) -> None:
    """Every token's encoder product at every site in bfloat16: one batch's rows, over and over."""
    for site, part in rows.items():
        out = torch.empty(len(part), weights[site].shape[1], dtype=torch.bfloat16, device=part.device)
        for first in range(0, tokens, len(part)):
            count = min(len(part), tokens - first)
            torch.mm(part[:count], weights[site], out=out[:count])


def index(text: Text, dictionaries: Mapping[str, Dictionary], *, logits: bool) -> int:
    """A whole index; returns its bytes."""
    speaks = site_tables._speaks
    if not logits:
        site_tables._speaks = lambda *_: False
    folder = Path(tempfile.mkdtemp(prefix="index_speed"))
    try:
        build_index(text.model, dictionaries, text.blocks, folder, text=text.facts, resume=True)
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    finally:
        site_tables._speaks = speaks
        shutil.rmtree(folder)


def dashboard(text: Text, site: str, dictionary: Dictionary, cache: Path) -> None:
    """SAEDashboard's data for some latents of one site; what it computed of the model stays in `cache`."""
    sys.path.append(text.args.other)
    from sae_dashboard.sae_vis_data import (  # pyright: ignore[reportMissingImports]
        SaeVisConfig,
    )
    from sae_dashboard.sae_vis_runner import (  # pyright: ignore[reportMissingImports]
        SaeVisRunner,
    )

    tokens = torch.cat([batch.tokens for batch in text.blocks(Cursor())]).long()
    cfg = SaeVisConfig(
        hook_point=site, features=range(text.args.features), device=str(text.model.device), cache_dir=cache
    )
    # it folds norms in place
    SaeVisRunner(cfg).run(
        encoder=copy.deepcopy(dictionary).to_saelens(), model=text.model.bridge, tokens=tokens
    )


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, float, Any]:
    """Seconds of the clock, of all processors, and what the work returned."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    clock, processors = time.perf_counter(), time.process_time()
    found = work()
    wait()
    return time.perf_counter() - clock, time.process_time() - processors, found


def in_turns(
    work: dict[str, Callable[[], Any]], args: argparse.Namespace
) -> tuple[dict[str, list[tuple[float, float]]], int]:
    """Seconds of each kind of work, round after round, and the bytes of the last index."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    n_bytes = 0
    for _ in range(args.rounds):
        for name, taken in seconds.items():
            clock, processors, found = timed(work[name], torch.device(args.device))
            taken.append((clock, processors))
            n_bytes = found or n_bytes
            print(f"{name:9} {clock:8.1f} s ({processors:8.1f})", flush=True)
    return seconds, n_bytes


def beside(text: Text, site: str, dictionary: Dictionary) -> dict[str, list[tuple[float, float]]]:
    """Seconds of SAEDashboard, without a cache and with one."""
    seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("dashboard", "dashboard_cached"):
            clock, processors, _ = timed(
                lambda: dashboard(text, site, dictionary, Path(cache)), text.model.device
            )
            seconds[name] = [(clock, processors)]
            print(f"{name:9} {clock:8.1f} s ({processors:8.1f})", flush=True)
    return seconds


def main() -> None:
    args = parse()
    model = load_model(args.model, device=args.device, progress=False)
    args.device = str(model.device)
    text = Text(model, args)
    if args.run:
        dictionaries = run_dictionaries(args, model)
    else:
        sites = tuple(f"blocks.{layer}.{args.kind}" for layer in args.layers.split(","))
        with torch.inference_mode():
            dictionaries = make_dictionaries(text, sites, args)
    sites = tuple(dictionaries)
    first = next(harvest_rows(model, text.blocks(Cursor()), sites))
    rows = {site: first.rows[site].bfloat16() for site in sites}
    weights = {site: dictionary.W_enc.bfloat16() for site, dictionary in dictionaries.items()}
    small = Text(model, argparse.Namespace(**{**vars(args), "tokens": 512}))
    index(small, {sites[0]: dictionaries[sites[0]]}, logits=True)  # what is compiled and set up once
    work: dict[str, Callable[[], Any]] = {
        "harvest": lambda: harvest(text, sites),
        "products": lambda: products(rows, weights, args.tokens),
        "bare": lambda: index(text, dictionaries, logits=False),
        "index": lambda: index(text, dictionaries, logits=True),
    }
    seconds, n_bytes = in_turns({name: work[name] for name in work if name in args.parts.split(",")}, args)
    if args.other:
        seconds |= beside(text, sites[-1], dictionaries[sites[-1]])
    medians = {
        name: [statistics.median(pair[n] for pair in taken) for n in range(2)]
        for name, taken in seconds.items()
    }
    result = {
        "benchmark": "index_speed",
        "trained": bool(args.run),
        **{name: getattr(args, name) for name in ("model", "layers", "width", "l0", "tokens", "rounds")},
        **{f"{name}_s": round(pair[0], 2) for name, pair in medians.items()},
        **{f"{name}_cpu_s": round(pair[1], 2) for name, pair in medians.items()},
        "index_mb": round(n_bytes / 1e6, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "machine": platform.machine(),
    }
    latents = {
        "index": args.width * len(sites),
        "dashboard": args.features,
        "dashboard_cached": args.features,
    }
    for name in medians.keys() & latents.keys():
        result[f"{name}_cpu_ms_per_latent"] = round(1e3 * medians[name][1] / latents[name], 2)
    if {"harvest", "products"} <= medians.keys():
        for n, unit in enumerate(("s", "cpu_s")):
            whole = medians["harvest"][n] + medians["products"][n]
            for name in medians.keys() & {"index", "bare"}:
                result[f"ratio_{name}_{unit}"] = round(medians[name][n] / whole, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
