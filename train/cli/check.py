"""`jumpscope check ID`: does a dictionary fit its model, and if not, why."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sae.errors import UserError
from train.cli.console import figure, note, say, stdout, table
from train.cli.options import Dtype
from train.cli.parsing import parse
from train.cli.progress import progress
from train.config import Count
from train.run_folder import RUN, RunFolder

if TYPE_CHECKING:
    from rich.table import Table

    from activations.models import LanguageModel
    from sae.dictionary import Dictionary
    from train.diagnosis import Diagnosis
    from train.search import Published, Tried

MISFIT = 1
"""The exit code when a dictionary does not fit."""
# rows of the table of what was tried
_SHOWN = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Say whether a dictionary fits the model: whether L0, FVU and the loss look as published.

    If they do not, the usual causes are tried, one at a time and in pairs: another hook, BOS, a scale on the
    activations, b_dec at the input, the gate, folded norms, transposed weights. The one that explains it is
    named, with the numbers before and after and what puts it right. Exit code 0: it fits (of a run: they
    all do); 1: it does not; 2: it could not be checked.
    """

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="ID")]]
    """A dictionary's folder or file in any format that `jumpscope import` reads, an id of the hub, or a run
    folder, of which all dictionaries are checked."""
    model: str = ""
    """Language model. Empty: the one that the dictionary names."""
    corpus: str = ""
    """Text; its held-out tenth is used. Empty: a run's own corpus, otherwise wiki-leads."""
    tokens: Count = 4000
    """Held-out tokens for L0 and FVU; a part of them compares the causes."""
    loss_tokens: Count = 512
    """Tokens, of these, for the loss with the dictionary in the model."""
    context: Count = 256
    """Tokens in a block, BOS included."""
    site: str = ""
    """Where it reads, in TransformerLens's names, when its files do not say or are wrong."""
    site_out: str = ""
    """Where it writes, for a transcoder. Empty: what its files say, or `--site`."""
    out: str = ""
    """A folder for the dictionary in our format with a probe, put right where a cause is found. Of a run: a
    folder in it for each."""
    dtype: Dtype = "auto"
    """The model's dtype. auto: bfloat16 where the hardware has it."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is to be checked and on what."""

    dictionaries: dict[str, "Dictionary"]
    model: str
    corpus: str
    published: "dict[str, Published]"


def run(argv: list[str]) -> int:
    """Checks, prints the table, and for each that does not fit what explains it; 1 when one does not."""
    examples = [
        "check runs/gemma",
        "check google/gemma-scope-2-270m-pt/resid_post_all/layer_9_width_16k_l0_small --model gemma-3-270m",
        "check downloads/params.npz --site blocks.20.hook_resid_post --model gemma-2-2b --out mine",
    ]
    options = parse(CheckOptions, argv, verb="check", examples=examples)
    asked = _of_run(options) if (Path(options.source) / RUN).is_file() else _of_one(options)
    from activations.blocks import iter_blocks  # late: a mistake above should not wait for transformers
    from activations.corpora import load_corpus
    from train.diagnosis import check_all

    model = _model(asked.model, options)
    corpus = load_corpus(asked.corpus)
    blocks = iter_blocks(
        model,
        corpus,
        split="held_out",
        context=min(options.context, model.max_context),
        max_tokens=options.tokens,
    )
    with progress(unit="steps") as report:
        found = check_all(
            asked.dictionaries,
            model,
            blocks,
            published=asked.published,
            tokens=options.tokens,
            loss_tokens=options.loss_tokens,
            progress=report,
        )
    _tell(found, asked, options)
    return 0 if all(one.verdict == "fits" for one in found.values()) else MISFIT


def _of_run(options: CheckOptions) -> _Asked:
    if options.site or options.site_out:
        raise UserError(
            "--site is for one dictionary", f"the run {options.source}", "name a folder in sites/"
        )
    import sae
    from train.diagnosis import published_l0

    folder = RunFolder.open(options.source)
    config = folder.config()
    saved = [site for site in folder.sites() if (folder.site_dir(site) / "cfg.json").is_file()]
    if not saved:
        raise UserError("the run must hold a trained dictionary", f"none in {folder.path}", "train it first")
    dictionaries = {site: sae.load(folder.site_dir(site)) for site in saved}
    said = {site: published_l0(dictionary.cfg) for site, dictionary in dictionaries.items()}
    return _Asked(
        dictionaries=dictionaries,
        model=options.model or config["model"],
        corpus=options.corpus or config["corpus"],
        published={site: one for site, one in said.items() if one},
    )


def _of_one(options: CheckOptions) -> _Asked:
    import sae
    from sae import dialects
    from train.diagnosis import published_l0

    parts = dialects.read(options.source)
    for line in parts.notes:
        note(line)
    cfg = dict(parts.cfg)
    if options.site:
        cfg |= {"site_in": options.site, "site_out": options.site}
    cfg["site_out"] = options.site_out or cfg["site_out"]
    dictionary = sae.build(sae.DictionaryConfig(**cfg), parts.tensors, source=parts.source)
    name = options.model or _known_name(dictionary.cfg.model)
    if not name:
        found = f"no model in {parts.source}"
        raise UserError("the dictionary's language model must be known", found, "name it with --model")
    said = published_l0(dictionary.cfg, parts.source)
    label = dictionary.cfg.site_in or Path(options.source).name
    return _Asked(
        dictionaries={label: dictionary},
        model=name,
        corpus=options.corpus or "wiki-leads",
        published={label: said} if said else {},
    )


def _known_name(said: str) -> str:
    """The model that a config names, by the name under which it can be had here."""
    from activations.sources import known_models

    short = said.rpartition("/")[2].lower()
    here = {str(model["name"]) for model in known_models() if model["available"]}
    others = {"gpt2-small": "gpt2"}
    return short if short in here else others.get(short, said)


def _model(name: str, options: CheckOptions) -> "LanguageModel":
    from activations.models import load_model

    note(f"loading {name}")
    return load_model(name, dtype=options.dtype, device=options.device)


def _tell(found: Mapping[str, "Diagnosis"], asked: _Asked, options: CheckOptions) -> None:
    stdout.print(_summary(found))
    for name, one in found.items():
        if one.verdict == "fits":
            if options.out:
                _write(name, one, options, alone=len(found) == 1)
            continue
        say("")
        say(f"{name} {one.summary}.")
        for line in one.wrong:
            say(f"  wrong: {line}.")
        if one.cause is not None:
            say(f"  what to do: {one.cause.candidate.remedy}.")
        elif one.losses.get("changed"):
            note("  the closest change is shown above; it explains too little to be believed")
        _write(name, one, options, alone=len(found) == 1)
        stdout.print(_tried(one))
    note(
        f"L0 and FVU over {options.tokens:,} held-out tokens of {asked.corpus}; those of what was tried over "
        "the first 768, FVU without rows of massive activations; losses in nats per token over "
        f"{options.loss_tokens:,}; CE recovered is 1 - delta CE / what mean ablation adds"
    )


def _write(name: str, one: "Diagnosis", options: CheckOptions, *, alone: bool) -> None:
    """Writes the dictionary put right, or says how to have it written."""
    import sae

    if (right := one.dictionary) is None:
        if one.cause is not None:
            say("  no weights can make that change, so there is nothing to write.")
    elif options.out:
        folder = Path(options.out) if alone else Path(options.out) / name
        sae.save(right, folder)
        how = "with a probe" if one.verdict == "fits" else "put right, with a probe,"
        say(f"  {how} it is in {folder}.")
    else:
        model = f" --model {options.model}" if options.model else ""
        say(f"  jumpscope check {options.source}{model} --out DIR writes it put right.")


def _summary(found: Mapping[str, "Diagnosis"]) -> "Table":
    made = table("dictionary", ">L0", ">of", ">FVU", ">delta CE", ">CE rec.\nmean", "verdict")
    for name, one in found.items():
        verdict = one.verdict
        if one.cause is not None:
            verdict = f"does not fit: {' + '.join(one.cause.candidate.causes)}"
        elif verdict == "unexplained":
            verdict = "does not fit: unexplained"
        label = _label(name)
        of = "-" if one.published is None else str(one.published)
        if one.claimed is None:
            made.add_row(label, "-", of, "-", "-", "-", verdict)
        for what, tried, losses in one.rows():
            first = tried is one.claimed
            l0, fvu = losses.get("l0", tried.fit.l0), losses.get("fvu", tried.fit.fvu)
            cells = (figure(l0, 1), of if first else "", figure(fvu, 4), *_loss_cells(losses))
            made.add_row(label if first else f"  {what.partition(':')[0]}", *cells, verdict if first else "")
    return made


def _label(name: str) -> str:
    """A site in short, where the name is one."""
    from activations.sites import site_label

    try:
        return site_label(name)
    except UserError:
        return name


def _loss_cells(losses: Mapping[str, Any]) -> tuple[str, str]:
    delta, error = losses.get("delta_ce"), losses.get("delta_ce_se")
    spread = "" if error is None else f"±{figure(error)}"
    return figure(delta) + spread, figure(losses.get("ce_recovered_mean"))


def _tried(one: "Diagnosis") -> "Table":
    """The best of each kind of change that was tried."""
    best: dict[tuple[str, ...], Tried] = {}
    for tried in sorted(one.tried, key=lambda tried: tried.fit.fvu):
        best.setdefault(tried.candidate.causes, tried)
    made = table("tried", "change", ">L0", ">FVU")
    chosen = sorted(best.values(), key=lambda tried: (len(tried.candidate.causes), tried.fit.fvu))
    for tried in chosen[:_SHOWN]:
        causes = " + ".join(tried.candidate.causes) or "none"
        made.add_row(causes, tried.candidate.what, figure(tried.fit.l0, 1), figure(tried.fit.fvu, 4))
    return made
