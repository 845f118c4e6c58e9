"""`jumpscope index RUN`."""

from train.cli.console import say
from train.cli.options import IndexOptions
from train.cli.parsing import parse
from train.run_folder import RunFolder


def run(argv: list[str]) -> None:
    """Builds the index of a run."""
    examples = [
        "index runs/gemma",
        "index runs/gemma --tokens 1M --layers 9",
        "index runs/gemma --corpus sotu",
    ]
    options = parse(IndexOptions, argv, verb="index", examples=examples)
    RunFolder.open(options.run)
    from train.cli import work  # late: a mistake above should not wait for transformers

    loaded = work.load_run(options.run, layers=options.layers, dtype=options.dtype, device=options.device)
    work.build(loaded, options)
    say(f"Indexed {len(loaded.dictionaries)} sites of {options.run}. Next: jumpscope view {options.run}")
