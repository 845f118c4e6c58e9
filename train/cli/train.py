"""`jumpscope train`."""

import dataclasses
from pathlib import Path

from sae.errors import UserError
from train.cli import plan
from train.cli.console import say, stdout
from train.cli.parsing import parse, take_path
from train.cli.tables import training_summary
from train.config import TrainConfig
from train.run_folder import RUN, RunFolder, refuse_occupied


def run(argv: list[str]) -> None:
    """Trains, or goes on with a run, and says what to do next."""
    argv, resumed = take_path(argv, "--resume", "a run folder")
    config = _parse(argv) if resumed is None else _resumed(argv, resumed)
    if resumed is not None and RunFolder.open(resumed).state() == "done":
        say(f"{resumed} is finished: there is nothing to go on with.")
    else:
        plan.show(config)
    from train.cli import work  # late: a mistake above should not wait for transformers

    folder = work.train(config, resume=resumed is not None)
    stdout.print(training_summary(folder.metrics()))
    say(f"{len(folder.sites())} dictionaries in {folder.path}.")
    say(f"Next: jumpscope eval {folder.path}, then jumpscope index {folder.path}")


def _parse(argv: list[str]) -> TrainConfig:
    examples = [
        "train --model gemma-3-270m --corpus wiki-leads --layers all --width 4k --l0 50 --out runs/gemma",
        "train --layers 9 --sites resid_post,mlp_out --width 16k --tokens 10M --memory 8G --out runs/nine",
        "train --config runs/gemma/run.json --seed 1 --out runs/gemma-1",
        "train --resume runs/gemma",
    ]
    config = parse(TrainConfig, argv, verb="train", examples=examples, from_dict=TrainConfig.from_dict)
    refuse_occupied(config.out)
    return config
