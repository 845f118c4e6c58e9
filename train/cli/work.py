"""The work behind the verbs that run a model: harvest, train, eval and index.

This module imports transformers, which takes seconds; the verbs import it only once their words are read
and checked.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sae
from activations.blocks import Cursor, TokenBlocks, iter_blocks
from activations.corpora import load_corpus
from activations.exchange import owners
from activations.harvest import RowBatch, Wanted, harvest_rows
from activations.models import LanguageModel, load_model
from activations.precision import pick_dtype
from activations.ranks import Ranks, alone
from activations.shapes import model_shape
from activations.sites import expand_sites, kind_of, layer_of, parse_layers, site_label
from activations.store import Store
from activations.store_writer import StoreFacts, write_store
from sae import Dictionary, UserError
from train.cli import plan
from train.cli.console import note
from train.cli.options import EvalOptions, HarvestOptions
from train.cli.progress import progress
from train.config import TrainConfig
from train.evals import evaluate
from train.measure import measure_harvest
from train.plan import Plan, plan_harvest
from train.room import crowded, missing_memory, rank_facts
from train.rows import own_device
from train.run_folder import RUN, RunFolder, hold
from train.together import together
from train.trainer import train_run
from viewer.index.build import IndexBuilder


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A run folder with its dictionaries in memory and the language model they belong to."""

    folder: RunFolder
    config: TrainConfig
    model: LanguageModel
    dictionaries: dict[str, Dictionary]
    owner: Mapping[str, int]
    """The rank that each site belongs to, in the order of the run; those of others may not be in memory."""

    @property
    def widths(self) -> dict[str, int]:
        """Sites and their d_in."""
        return {site: dictionary.cfg.d_in for site, dictionary in self.dictionaries.items()}

    def text(self, tokens: int, corpus: str = "") -> dict[str, Any]:
        """What decides which tokens `held_out` gives, in plain values."""
        config = self.config
        return {
            "corpus": corpus or config.corpus,
            "split": "held_out",
            "context": config.context,
            "model_batch": config.model_batch,
            "seed": config.seed,
            "tokens": tokens,
        }

    def held_out(self, tokens: int, corpus: str = "") -> Iterator[TokenBlocks]:
        """Blocks of documents that training never saw, in the run's own context, up to `tokens` kept
        tokens.
        """
        return iter_blocks(
            self.model,
            load_corpus(corpus or self.config.corpus),
            split="held_out",
            context=self.config.context,
            blocks_per_batch=self.config.model_batch,
            seed=self.config.seed,
            max_tokens=tokens,
        )


def load_run(
    path: Path | str,
    *,
    layers: str = "all",
    dtype: str = "auto",
    device: str = "auto",
    model: LanguageModel | None = None,
    ranks: Ranks | None = None,
    others: bool = False,
) -> LoadedRun:
    """Opens a run and loads its model, unless that is given.

    Of several `ranks` each loads the dictionaries of its own sites, or with `others` maps all of them.
    Raises UserError when the folder holds no run or no dictionary to use.
    """
    folder = RunFolder.open(path)
    config = TrainConfig.from_dict(folder.config())
    saved = [site for site in folder.sites() if (folder.site_dir(site) / "cfg.json").is_file()]
    if not saved:
        raise UserError(
            "the run must hold a trained dictionary",
            f"none in {folder.path}, state: {folder.state()}",
            "train it first",
        )
    if folder.state() != "done":
        note(
            f"{folder.path} is not a finished run ({folder.state()}); its dictionaries are used as they stand"
        )
    wanted = set(parse_layers(layers, 1 + max(map(layer_of, saved))))
    chosen = [site for site in saved if layer_of(site) in wanted]
    if not chosen:
        raise UserError(
            "--layers must name a layer of the run",
            repr(layers),
            f"the run has {', '.join(map(site_label, saved))}",
        )
    ranks = ranks or alone()
    with ranks.busy("loading the model and its dictionaries"):
        if model is None:
            note(f"loading {config.model}")
            where = str(own_device(device, ranks))
            model = load_model(config.model, dtype=config.dtype if dtype == "auto" else dtype, device=where)
        model.check_sites(chosen)
        owner = owners(_costs(config.model, chosen), ranks.world)
        where = "cpu" if others and ranks.world > 1 else str(model.device)
        dictionaries = {
            site: sae.load(folder.site_dir(site), device=where)
            for site in chosen
            if others or owner[site] == ranks.rank
        }
    return LoadedRun(folder=folder, config=config, model=model, dictionaries=dictionaries, owner=owner)


def _costs(model: str, sites: Sequence[str]) -> dict[str, float]:
    """What evaluating each site costs: the model's layers above it, and the vocabulary."""
    shape = model_shape(model)
    layer = shape.body_params / shape.n_layers
    return {site: shape.vocab_params + layer * (shape.n_layers - layer_of(site)) for site in sites}


def harvest(options: HarvestOptions, ranks: Ranks | None = None) -> Store:
    """Writes a store of activations, or goes on with one; `ranks` do it together."""
    ranks = ranks or alone()
    corpus = load_corpus(options.corpus)
    _refuse_crowded(options, ranks)
    note(f"loading {options.model}")
    with ranks.busy("loading the model"):
        model = load_model(options.model, dtype=options.dtype, device=str(own_device(options.device, ranks)))
    sites = expand_sites(options.sites, options.layers, model.n_layers)
    model.check_sites(sites)
    facts = StoreFacts(
        model=model.name,
        tokenizer_hash=model.tokenizer_hash,
        corpus=options.corpus,
        split=options.split,
        context=options.context,
        seed=options.seed,
        model_batch=options.model_batch,
        model_dtype=str(model.dtype).removeprefix("torch."),
        widths={site: model.site_width(site) for site in sites},
    )

    def source(start: Cursor, wanted: Wanted | None = None) -> Iterator[RowBatch]:
        blocks = iter_blocks(
            model,
            corpus,
            split=options.split,
            context=options.context,
            blocks_per_batch=options.model_batch,
            seed=options.seed,
            max_tokens=options.tokens,
            start=start,
        )
        return harvest_rows(model, blocks, sites, wanted)

    with ranks.busy("measuring the model"):
        _plan_harvest(options, model, sites, source(Cursor()), ranks)
    with progress() as report:
        return write_store(
            options.out,
            source,
            facts,
            wanted_rows=options.tokens,
            dtype=options.store_dtype,
            on_rows=lambda n: report("harvest", n, options.tokens),
            ranks=ranks,
        )


def _refuse_crowded(options: HarvestOptions, ranks: Ranks) -> None:
    """Raises UserError, on all ranks, when a machine has no room for all of its own: before one loads."""
    if ranks.world == 1:
        return

    def own() -> dict[str, Any]:
        shape, device = model_shape(options.model), own_device(options.device, ranks)
        sites = expand_sites(options.sites, options.layers, shape.n_layers)
        planned = plan_harvest(
            shape,
            {site: shape.widths[kind_of(site)] for site in sites},
            pick_dtype(options.dtype, device),
            device=device,
            tokens=options.tokens,
            context=options.context,
            model_batch=options.model_batch,
            out=options.out,
        )
        return rank_facts(planned)

    remedy = "start fewer ranks there, or give a smaller --model-batch or --context, or fewer --layers"
    if error := crowded(together(ranks, "the plan", own), remedy):
        raise error


def _plan_harvest(
    options: HarvestOptions,
    model: LanguageModel,
    sites: tuple[str, ...],
    rows: Iterator[RowBatch],
    ranks: Ranks,
) -> None:
    """Prints a rank's memory and the time of all. Raises UserError when the memory is not free."""
    measured = measure_harvest(model, rows, sites, options.context)
    assert measured.harvest_rate is not None
    planned = plan_harvest(
        model_shape(options.model),
        {site: model.site_width(site) for site in sites},
        model.dtype,
        dataclasses.replace(measured, harvest_rate=measured.harvest_rate * ranks.world),
        device=model.device,
        tokens=options.tokens,
        context=options.context,
        model_batch=options.model_batch,
        out=options.out,
    )
    plan.print_plan(planned)
    if error := missing_memory(planned):
        raise error


def load(config: TrainConfig, ranks: Ranks | None = None) -> LanguageModel:
    """The model of a training run."""
    ranks = ranks or alone()
    note(f"loading {config.model}")
    with ranks.busy("loading the model"):
        return load_model(config.model, dtype=config.dtype, device=str(own_device(config.device, ranks)))


def train(
    config: TrainConfig,
    *,
    ranks: Ranks | None = None,
    resume: bool = False,
    model: LanguageModel | None = None,
    loss_tokens: int = 0,
    index_tokens: int = 0,
) -> RunFolder:
    """Prints the plan and trains a run, or goes on with it, with progress on the console.

    `model` spares loading the config's. The tokens given are those of what follows the training. Raises
    UserError when the memory planned is not free. When stopped, says how to go on.
    """
    ranks = ranks or alone()
    if model is None and not config.store:
        model = load(config, ranks)
    planned = plan.show(config, model, loss_tokens=loss_tokens, index_tokens=index_tokens, ranks=ranks)
    together(ranks, "the memory", lambda: _refuse_missing(planned, config))
    if config.store:
        note(f"reading {config.store}")
    try:
        with progress() as report:
            return train_run(config, model=model, on_progress=report, resume=resume)
    except KeyboardInterrupt:
        if (Path(config.out) / RUN).is_file():
            note(f"what was trained so far is in {config.out}")
            note(f"to go on: jumpscope train --resume {config.out}")
        raise


def _refuse_missing(planned: Plan, config: TrainConfig) -> None:
    if error := missing_memory(planned, config):
        raise error


def measure(
    loaded: LoadedRun, options: EvalOptions, *, index: bool = False, ranks: Ranks | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluates the run's dictionaries and merges what is found into its eval.json.

    Each of several `ranks` evaluates its own sites, and gets what all have found. With `index` the same pass
    over `options.tokens` tokens makes the feature index too, on one rank.
    """
    wanted = max(options.tokens, options.loss_tokens, options.baseline_tokens)
    root = loaded.folder.index_root
    with hold(root, "indexing into") if index else contextlib.nullcontext():
        text = loaded.text(wanted, options.corpus)
        builder = IndexBuilder(loaded.model, loaded.dictionaries, root, text=text) if index else None
        found = _measure(loaded, options, wanted, builder, ranks or alone())
        if builder:
            with progress(unit="latents") as report:
                builder.write(lambda done, total: report("feature index", done, total))
    return found


def _measure(
    loaded: LoadedRun,
    options: EvalOptions,
    wanted: int,
    builder: IndexBuilder | None,
    ranks: Ranks,
) -> dict[str, dict[str, Any]]:
    plan.tell_time(
        loaded.config,
        loaded.widths,
        loaded.model,
        eval_tokens=options.tokens,
        loss_tokens=options.loss_tokens,
    )
    with progress() as report, ranks.busy("evaluating"):
        own = (
            evaluate(
                loaded.model,
                loaded.dictionaries,
                loaded.held_out(wanted, options.corpus),
                tokens=options.tokens,
                loss_tokens=options.loss_tokens,
                baseline_tokens=options.baseline_tokens,
                watch=builder and builder.add,
                progress=report,
                together=len(loaded.owner),
            )
            if loaded.dictionaries
            else {}
        )
    shared = {site: row for part in ranks.share("the evaluation", own) for site, row in part.items()}
    corpus = options.corpus or loaded.config.corpus
    trained = loaded.folder.metrics()
    dead = {} if trained.empty else trained.groupby("site")["dead"].last().to_dict()
    found = {
        site: {**shared[site], "corpus": corpus, "dead_training": dead.get(site)} for site in loaded.owner
    }
    if ranks.first:
        merged = loaded.folder.eval_table() | found
        loaded.folder.write_eval({site: merged[site] for site in loaded.folder.sites() if site in merged})
    return found
