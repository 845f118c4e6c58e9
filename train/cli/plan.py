"""`jumpscope plan`, and the plans that the other verbs print before they begin."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from activations.collector import resting_collector
from activations.ranks import Ranks, alone
from activations.shapes import model_shape
from activations.sources import ready_folder
from sae.numbers import format_count, format_size, format_time
from train.cli.console import note, say, stdout, table
from train.cli.parsing import parse
from train.config import TrainConfig
from train.plan import Plan, make_plan, rows_to_train
from train.room import crowded, missing_memory, rank_facts
from train.times import Speeds, basis, evaluation_seconds, index_seconds
from train.together import together

if TYPE_CHECKING:
    from activations.models import LanguageModel

# larger models are not loaded for a plan alone
_SMALL_MODEL = 4 * 2**30


def run(argv: list[str]) -> None:
    """Prints what a training run with these flags would take; trains nothing."""
    examples = ["plan --width 16k --tokens 10M --memory 8G", "plan --config runs/gemma/run.json --layers 9"]
    config = parse(TrainConfig, argv, verb="plan", examples=examples, from_dict=TrainConfig.from_dict)
    plan = make_plan(config, world=config.shard_latents)
    if config.store or _at_hand(config.model):
        with resting_collector():  # late: a mistake above should not wait for transformers
            from train.cli import work

        plan = show(config, None if config.store else work.load(config), world=config.shard_latents)
    else:
        _print_training(config, plan)
        note("the model is not at hand yet: it is measured once it has been downloaded or converted")
    if config.shard_latents > 1:
        note(f"memory is that of each of {config.shard_latents} ranks, which share every dictionary")
    if error := missing_memory(plan, config):
        note(f"this machine would refuse it now: {error}")


def check(config: TrainConfig, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """A rank's facts by what can be known before its model is loaded. Raises UserError when it cannot fit."""
    plan = make_plan(config, rank=rank, world=world)
    if error := missing_memory(plan, config):
        raise error
    return rank_facts(plan, config)


def show(
    config: TrainConfig,
    model: "LanguageModel | None",
    *,
    eval_tokens: int = 0,
    loss_tokens: int = 0,
    index_tokens: int = 0,
    ranks: Ranks | None = None,
    world: int = 1,
) -> Plan:
    """Measures for some seconds, with the model of the run, or None for a store; prints the plan.

    Of several ranks each measures, and the first prints what each will take; without them the plan is that
    of the first rank of a `world`. Raises UserError, on all, when the run does not fit --memory, the disk, or
    a machine with all its ranks.
    """
    from train.measure import measure

    ranks = ranks or alone()
    _, sites, _, _ = rows_to_train(config)
    if model is not None:
        model.check_sites(list(sites))
    plans: list[Plan] = []

    def own() -> dict[str, Any]:
        plan = make_plan(
            config,
            measured=measure(config, list(sites), model),
            eval_tokens=eval_tokens,
            loss_tokens=loss_tokens,
            index_tokens=index_tokens,
            rank=ranks.rank,
            world=max(world, ranks.world),
        )
        plans.append(plan)
        return rank_facts(plan, config)

    facts = together(ranks, "the plan", own)
    _print_training(config, plans[0])
    if ranks.world > 1:
        _print_ranks(facts)
        if error := crowded(facts):
            raise error
    return plans[0]


def tell_time(
    config: TrainConfig,
    sites: Mapping[str, int],
    model: "LanguageModel",
    *,
    eval_tokens: int = 0,
    loss_tokens: int = 0,
    index_tokens: int = 0,
) -> None:
    """Says how long an evaluation or an index of a run's sites will take, from a matrix product."""
    shape, speeds = model_shape(config.model), Speeds.of(model.device, model.dtype)
    seconds = 0.0
    if eval_tokens + loss_tokens:
        seconds += evaluation_seconds(shape, sites, config.width, speeds, eval_tokens, loss_tokens)
    if index_tokens:
        seconds += index_seconds(shape, sites, config.width, speeds, index_tokens)
    note(f"{_many(len(sites), 'site', 'sites')}, about {format_time(seconds)}: {basis(speeds)}")


def _print_training(config: TrainConfig, plan: Plan) -> None:
    text = f"rows of {config.store}" if config.store else f"tokens of {config.corpus}"
    many = _many(len(plan.sites), "dictionary", "dictionaries")
    say(
        f"{config.model}: {many} of {config.width:,} latents, L0 {config.l0:g}, "
        f"{format_count(config.tokens)} {text}, {config.steps:,} steps on {plan.device} in {plan.dtype}"
    )
    print_plan(plan)
    note(f"memory is limited by --memory {format_size(config.memory)}")


def _print_ranks(facts: Sequence[Mapping[str, Any]]) -> None:
    rows = table(
        ">rank",
        "machine",
        ">sites",
        ">ring",
        ">exchange",
        ">total",
        title="Memory of each rank; the plan above is that of rank 0.",
    )
    for rank, row in enumerate(facts):
        sizes = (format_size(row[name]) for name in ("ring", "exchange", "total"))
        rows.add_row(str(rank), row["host"], str(row["sites"]), *sizes)
    stdout.print(rows)


def print_plan(plan: Plan) -> None:
    """The table of a plan, and the rates that its times follow from."""
    rows = table("memory", ">", "disk", ">", "time, roughly", ">")
    columns = (
        [(name, format_size(n)) for name, n in plan.memory.items()],
        [(name, format_size(n)) for name, n in plan.disk.items()],
        [(name, format_time(s)) for name, s in plan.seconds.items()],
    )
    for i in range(max(map(len, columns))):
        rows.add_row(*(cell for column in columns for cell in (column[i] if i < len(column) else ("", ""))))
    rows.add_section()
    totals = (format_size(plan.memory_total), format_size(plan.disk_total), format_time(plan.seconds_total))
    rows.add_row(*(cell for total in totals for cell in ("total", total)), style="bold")
    stdout.print(rows)
    rates = ", ".join(f"{phase} {format_count(rate)} tokens/s" for phase, rate in plan.rates.items())
    say(f"{rates} ({_many(len(plan.sites), 'site', 'sites')}), {plan.basis}")
    if plan.host_memory:
        say(f"beside the GPU's memory: {format_size(plan.host_memory)} of the machine's")
    if plan.loading > (plan.host_memory or plan.memory_total):
        note(f"loading the model took {format_size(plan.loading)} at its peak, more than what is to come")


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _at_hand(model: str) -> bool:
    folder = ready_folder(model)
    return folder is not None and sum(f.stat().st_size for f in folder.glob("*.safetensors")) <= _SMALL_MODEL
