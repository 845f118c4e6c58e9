"""`jumpscope train`."""

from train.cli import plan
from train.cli.console import say, stdout
from train.cli.parsing import parse
from train.cli.tables import training_summary
from train.config import TrainConfig
from train.run_folder import refuse_occupied


def run(argv: list[str]) -> None:
    """Trains, and says what to do next."""
    examples = [
        "train --model gemma-3-270m --corpus wiki-leads --layers all --width 4k --l0 50 --out runs/gemma",
        "train --layers 9 --sites resid_post,mlp_out --width 16k --tokens 10M --memory 8G --out runs/nine",
        "train --config runs/gemma/run.json --seed 1 --out runs/gemma-1",
    ]
    config = parse(TrainConfig, argv, verb="train", examples=examples, from_dict=TrainConfig.from_dict)
    refuse_occupied(config.out)
    plan.check(config)
    from train.cli import work  # late: a mistake above should not wait for transformers

    folder = work.train(config)
    stdout.print(training_summary(folder.metrics()))
    say(f"{len(folder.sites())} dictionaries in {folder.path}.")
    say(f"Next: jumpscope eval {folder.path}, then jumpscope index {folder.path}")
