"""`jumpscope train`."""

import dataclasses
from pathlib import Path

from activations.collector import resting_collector
from activations.ranks import Ranks, open_ranks
from activations.torchrun import restarts
from sae.errors import UserError
from train.cli import plan
from train.cli.console import say, stdout
from train.cli.parsing import parse, take_path
from train.cli.tables import training_summary
from train.config import TrainConfig
from train.resume import refuse_changes
from train.room import crowded
from train.run_folder import RUN, RunFolder, refuse_occupied
from train.together import by_first, together


def run(argv: list[str]) -> None:
    """Trains, or goes on with a run, and says what to do next."""
    argv, resumed = take_path(argv, "--resume", "a run folder")
    with open_ranks() as ranks:
        if resumed is None:
            config = _parse(argv)
            begun = by_first(ranks, "the run folder", lambda: _begun(config))
            resumed = Path(config.out) if begun else None
        else:
            config = _resumed(argv, resumed)
        _train(config, resumed, ranks)


def _train(config: TrainConfig, resumed: Path | None, ranks: Ranks) -> None:
    done = resumed is not None and RunFolder.open(resumed).state() == "done"
    if not done:
        facts = together(ranks, "the plan", lambda: plan.check(config, ranks.rank, ranks.world))
        if error := crowded(facts) if ranks.world > 1 else None:
            raise error
    with resting_collector():  # late: a mistake above should not wait for transformers
        from train.cli import work
        from train.trainer import train_run

    if done:
        say(f"{resumed} is finished: there is nothing to go on with.")
        folder = train_run(config, resume=True)
    else:
        folder = work.train(config, ranks=ranks, resume=resumed is not None)
    stdout.print(training_summary(folder.metrics()))
    say(f"{len(folder.sites())} dictionaries in {folder.path}.")
    say(f"Next: jumpscope eval {folder.path}, then jumpscope index {folder.path}")


def _begun(config: TrainConfig) -> bool:
    """Whether torchrun starts the same command again after a rank was lost, and there is a run to go on with.

    Raises UserError when something else stands where the run is to be made.
    """
    if restarts() and (Path(config.out) / RUN).is_file():
        refuse_changes(RunFolder.open(config.out), config)
        return True
    refuse_occupied(config.out)
    return False


def _parse(argv: list[str]) -> TrainConfig:
    examples = [
        "train --model gemma-3-270m --corpus wiki-leads --layers all --width 4k --l0 50 --out runs/gemma",
        "train --layers 9 --sites resid_post,mlp_out --width 16k --tokens 10M --memory 8G --out runs/nine",
        "train --config runs/gemma/run.json --seed 1 --out runs/gemma-1",
        "train --resume runs/gemma",
    ]
    return parse(
        TrainConfig,
        argv,
        verb="train",
        examples=examples,
        from_dict=TrainConfig.from_dict,
        also="--resume RUN goes on with a run that was stopped, killed or failed, with its own flags.",
    )


def _resumed(argv: list[str], path: Path) -> TrainConfig:
    """The run's own config; flags that are given must say the same, but for those that change no weight."""
    run = RunFolder.open(path)
    rest, other = take_path(argv, "--config", "a file")
    if other is not None:
        raise UserError(
            "--resume takes the config from the run", f"--config {other} beside it", "leave one of them out"
        )
    asked = _parse(["--config", str(path / RUN), *rest])
    if asked.out != run.config()["out"] and Path(asked.out).resolve() != path.resolve():
        raise UserError(
            "--resume goes on in the run's own folder", f"--out {asked.out}", f"leave it out: {path} is meant"
        )
    config = dataclasses.replace(asked, out=str(path))
    refuse_changes(run, config)
    return config
