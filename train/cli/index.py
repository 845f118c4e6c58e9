"""`jumpscope index RUN`."""

import dataclasses
from pathlib import Path

from activations.collector import resting_collector
from activations.ranks import open_ranks
from train.cli.console import say
from train.cli.options import IndexOptions
from train.cli.parsing import parse
from train.run_folder import RUN, RunFolder


def run(argv: list[str]) -> None:
    """Builds the index of a run or of dictionaries."""
    examples = [
        "index runs/gemma",
        "index runs/gemma --tokens 1M --corpus sotu --out indexes/sotu",
        "index dictionaries/l5 dictionaries/l9 --model gemma-3-270m --out indexes/two",
    ]
    options = parse(IndexOptions, argv, verb="index", examples=examples)
    first = Path(options.sources[0])
    if first.is_dir() and not any(first.glob("*.*")):
        RunFolder.open(first)  # an empty folder is most likely meant to be a run
    with resting_collector():  # late: a mistake above should not wait for transformers
        from train.cli import indexing

    with open_ranks() as ranks:
        ranks.agree("index", {**dataclasses.asdict(options), "sources": list(options.sources)})
        folders = indexing.build(indexing.open_sources(options, ranks), options.examples)
    root = next(iter(folders.values())).parent
    run_given = len(options.sources) == 1 and (first / RUN).is_file() and not options.out
    sites = f"{len(folders)} site{'s' * (len(folders) != 1)}"
    say(f"Indexed {sites} into {root}. Next: {_next(str(first), root, run_given)}")


def _next(source: str, root: Path, run_given: bool) -> str:
    return f"jumpscope view {source}" if run_given else f'python: viewer.open("{root}")'
