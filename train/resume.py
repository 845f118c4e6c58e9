"""What must be as it was when a run is resumed: its config, its rows, and what makes its numbers."""

import logging
from collections.abc import Mapping
from typing import Any

from sae.errors import UserError
from train.config import TrainConfig
from train.run_folder import RunFolder

_log = logging.getLogger(__name__)

# what may differ, for it changes no weight
_FREE = frozenset({"out", "memory", "checkpoint_minutes", "wandb"})


def refuse_changes(run: RunFolder, config: TrainConfig) -> None:
    """Raises UserError, with the differences, when a run would go on with another config than it has."""
    was, asked = TrainConfig.from_dict(run.config()).to_dict(), config.to_dict()
    changed = [name for name in was if was[name] != asked[name] and name not in _FREE]
    if changed:
        flags = (f"--{name.replace('_', '-')}: run has {was[name]}, asked {asked[name]}" for name in changed)
        raise UserError(
            "a run goes on with the config it began with",
            "; ".join(flags),
            "leave these flags out, or begin a new run with --out",
        )


def refuse_other_circumstances(
    state: Mapping[str, Any], now: Mapping[str, Any], *, warns: bool = True
) -> None:
    """Compares a checkpoint's state with what the run would go on with.

    `must_stay` (the source of the rows, device, kernel, dtypes) must be equal, or a UserError shows the
    differences. Other `versions` and `threads` are a warning, if it `warns`: they may change the last bits.
    """
    was, found = state["must_stay"], now["must_stay"]
    differences = [
        f"{name}: run has {was.get(name)}, now {found.get(name)}"
        for name in {**was, **found}
        if was.get(name) != found.get(name)
    ]
    if differences:
        raise UserError(
            "a run goes on with the rows and the arithmetic it began with",
            "; ".join(differences),
            "restore them, or begin a new run with --out",
        )
    for name in ("versions", "threads"):
        if warns and state[name] != now[name]:
            _log.warning(
                "the run was made with %s %s and goes on with %s: the last bits may differ",
                name,
                state[name],
                now[name],
            )
