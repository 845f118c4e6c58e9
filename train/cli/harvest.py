"""`jumpscope harvest`."""

from activations.collector import resting_collector
from activations.ranks import Ranks, open_ranks
from activations.store_writer import begun_store
from sae.errors import UserError
from sae.numbers import format_size
from train.cli.console import note, say
from train.cli.options import HarvestOptions
from train.cli.parsing import parse


def run(argv: list[str]) -> None:
    """Writes the store or goes on with it, and says what to do next."""
    examples = [
        "harvest --layers 3-8 --tokens 1M --out stores/mid",
        "harvest --model gpt2 --corpus essays.jsonl --sites mlp_out,resid_post --out stores/gpt2",
        "harvest --layers 9 --tokens 10M --store-dtype int8 --out s3://bucket/nine",
    ]
    options = parse(HarvestOptions, argv, verb="harvest", examples=examples)
    with open_ranks() as ranks:
        _harvest(options, ranks)


def _harvest(options: HarvestOptions, ranks: Ranks) -> None:
    begun = begun_store(options.out)
    if begun is not None and begun.rows < options.tokens:
        note(f"{options.out} holds {begun.rows:,} rows: going on from there")
    with resting_collector():  # late: a mistake above should not wait for transformers
        from train.cli import work

    try:
        store = work.harvest(options, ranks)
    except (KeyboardInterrupt, UserError) as error:
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, OSError):
            note(f"the same command goes on with {options.out} after its last whole shard")
        raise
    if begun is not None and begun.complete and store.rows == begun.rows:
        say(f"Nothing to do: {options.out} holds {store.rows:,} of {options.tokens:,} rows asked for.")
    else:
        say(f"{store.rows:,} rows of {len(store.sites)} sites, {format_size(store.bytes)}, in {options.out}.")
    if store.rows < options.tokens:
        note(f"the {options.split} text of {options.corpus} has no more tokens")
    say(f"Next: jumpscope train --store {options.out} --out runs/mine")
