"""`jumpscope eval RUN`."""

import dataclasses

from activations.collector import resting_collector
from activations.ranks import open_ranks
from train.cli.console import note, stdout
from train.cli.options import EvalOptions
from train.cli.parsing import parse
from train.cli.tables import eval_caption, eval_summary
from train.run_folder import RunFolder


def run(argv: list[str]) -> None:
    """Measures, writes eval.json and prints the table."""
    examples = [
        "eval runs/gemma",
        "eval runs/gemma --layers 9 --loss-tokens 16k",
        "eval runs/gemma --corpus movie-reviews",
    ]
    options = parse(EvalOptions, argv, verb="eval", examples=examples)
    run = RunFolder.open(options.run)
    with resting_collector():  # late: a mistake above should not wait for transformers
        from train.cli import work

    with open_ranks() as ranks:
        ranks.agree("evaluation", {**dataclasses.asdict(options), "run.json": run.record()})
        loaded = work.load_run(
            options.run, layers=options.layers, dtype=options.dtype, device=options.device, ranks=ranks
        )
        metrics = work.measure(loaded, options, ranks=ranks)
    stdout.print(eval_summary(metrics))
    note(eval_caption(metrics))
