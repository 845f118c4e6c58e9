"""`jumpscope harvest`."""

from activations.store import check_new
from sae.numbers import format_size
from train.cli.console import say
from train.cli.options import HarvestOptions
from train.cli.parsing import parse


def run(argv: list[str]) -> None:
    """Writes the store, and says what to do next."""
    examples = [
        "harvest --layers 3-8 --tokens 1M --out stores/mid",
        "harvest --model gpt2 --corpus essays.jsonl --sites mlp_out,resid_post --out stores/gpt2",
    ]
    options = parse(HarvestOptions, argv, verb="harvest", examples=examples)
    check_new(options.out)
    from train.cli import work  # late: a mistake above should not wait for transformers

    store = work.harvest(options)
    size = store.rows * sum(store.widths.values()) * store.dtype.itemsize
    say(f"{store.rows:,} rows of {len(store.sites)} sites, {format_size(size)}, in {options.out}.")
    say(f"Next: jumpscope train --store {options.out} --out runs/mine")
