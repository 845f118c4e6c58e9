"""One rank of the tests of distributed training: carries out its orders in turn, each a run or a part of one.

An order: the config's fields, whether to resume, on which rank the nth call of what sends which signal, and
what that rank's own config has different. It prints a line of JSON for each: how the order ended.
"""

import json
import sys
from pathlib import Path

import torch
from conftest import wrapped_model
from resume_server import break_off

from activations.models import LanguageModel
from activations.ranks import RankLost, Ranks, open_ranks
from sae.errors import UserError
from train.config import TrainConfig
from train.trainer import train_run


def poison(nth: int) -> None:
    """Makes the nth forward pass give an infinity at one site."""
    inner, calls = LanguageModel.activations, [0]

    def poisoned(self, tokens, sites):
        calls[0] += 1
        found = inner(self, tokens, sites)
        if calls[0] == nth:
            site = list(sites)[-1]
            # written outside of inference mode it would be refused
            found[site] = torch.full_like(found[site], torch.inf)
        return found

    LanguageModel.activations = poisoned


def carry_out(order: dict, ranks: Ranks, model: LanguageModel) -> str:
    """Trains as told; returns how it ended."""
    mine = order.get("rank", 0) == ranks.rank
    fields = {**order["config"], **(order.get("other", {}) if mine else {})}
    originals = LanguageModel.activations
    if order.get("poison") and mine:
        poison(order["poison"])
    if order.get("at") and mine:
        break_off(*order["at"], order["signal"])
    try:
        config = TrainConfig(**fields)
        run = train_run(config, model=None if config.store else model, resume=order.get("resume", False))
        return run.state()
    except KeyboardInterrupt as stop:
        return f"stopped: {stop}"
    except RankLost:
        raise
    except UserError as error:
        return f"refused: {error}"
    finally:
        LanguageModel.activations = originals


def main() -> None:
    """Carries out the orders of a file."""
    model = wrapped_model("gemma3")
    try:
        with open_ranks() as ranks:
            for order in json.loads(Path(sys.argv[1]).read_text()):
                sys.stdout.write(json.dumps(carry_out(order, ranks, model)) + "\n")
                sys.stdout.flush()
    except RankLost as lost:
        sys.stderr.write(str(lost))
        sys.exit(lost.code)


if __name__ == "__main__":
    main()
