"""The copy of the metrics that goes to Weights & Biases. metrics.jsonl is the record; this is a mirror."""

import os
from typing import Any

from sae.errors import UserError
from train.config import TrainConfig
from train.run_folder import RunFolder


class Mirror:
    """A wandb run for the time of a `with` block, or nothing when the config says off."""

    def __init__(self, config: TrainConfig, run: RunFolder) -> None:
        self._config, self._run = config, run
        self._wandb: Any = None

    def __enter__(self) -> "Mirror":
        if self._config.wandb == "off":
            return self
        import wandb  # takes a second, and most runs do without

        self._wandb = wandb.init(
            project="jumpscope",
            name=self._run.name,
            dir=self._run.path,
            config=self._config.to_dict(),
            mode=self._config.wandb,
            # a resumed run goes on in its own mirror
            id=self._run.record().get("wandb_id"),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True),
        )
        self._run.set_state("running", wandb_id=self._wandb.id)
        return self

    def log(self, step: int, metrics: dict[str, dict[str, float]]) -> None:
        """Sends the figures of every site under `site/metric`."""
        if self._wandb is not None:
            flat = {f"{site}/{name}": value for site, row in metrics.items() for name, value in row.items()}
            self._wandb.log(flat, step=step)

    def __exit__(self, kind: object, *exc: object) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def check_wandb(mode: str) -> None:
    """Raises UserError when an online mirror is asked for and there is no key to log in with."""
    if mode != "online" or os.environ.get("WANDB_API_KEY"):
        return
    import wandb

    # with a key this only reads it; the network is first asked by init
    if not wandb.login(prompt=False):
        raise UserError(
            "--wandb online needs a Weights & Biases key",
            "none in WANDB_API_KEY or from `wandb login`",
            "run `wandb login`, or use --wandb offline and `wandb sync` later",
        )
