"""The training run: rows in, one dictionary per site out. The loop is `_loop`; the rest prepares, keeps and
goes on.
"""

import contextlib
import logging
import signal
import statistics
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import sae
from activations.models import LanguageModel
from activations.positions import RingPosition
from activations.precision import pick_device
from activations.ring import RingBatch
from sae.dictionary import DictionaryConfig
from sae.errors import UserError
from sae.kernels.dispatch import choose_kernel, make_kernel, product_dtype
from sae.probe import spread_rows
from train.checkpoints import (
    Checkpoint,
    newest_step,
    newest_whole,
    remove_checkpoints,
    sweep,
    write_checkpoint,
)
from train.config import TrainConfig
from train.mirror import Mirror, check_wandb
from train.resume import refuse_changes, refuse_other_circumstances
from train.rows import Report, Rows, open_rows
from train.run_folder import RunFolder, hold, refuse_occupied, versions
from train.site_trainer import NonFiniteError, SiteTrainer

_log = logging.getLogger(__name__)

# rows of the first generation that each site's first weights are placed by
_FIRST_ROWS = 8192
# a checkpoint's name of the rows that a site's dictionary is saved with a probe of
_PROBE_ROWS = "probe.rows"


def train_run(
    config: TrainConfig,
    *,
    model: LanguageModel | None = None,
    on_progress: Report | None = None,
    resume: bool = False,
) -> RunFolder:
    """Trains every site of `config` and leaves a run folder, also when stopped by Ctrl-C or SIGTERM.

    With `resume` the run in `config.out` goes on from its newest checkpoint, from the start when it has
    none, and ends with the weights and metrics of a run that was never stopped: on a CPU, bit for bit. One
    that is done is left as it is.

    `model` spares loading `config.model` again. Raises UserError for what the config asks wrongly, before
    anything is written; KeyboardInterrupt after saving what is there; NonFiniteError naming the site, the
    run's state then says why it failed.
    """
    report = on_progress or (lambda what, done, total, detail: None)
    if resume:
        refuse_changes(RunFolder.open(config.out), config)
    else:
        refuse_occupied(config.out)
    check_wandb(config.wandb)
    choose_kernel(pick_device(config.device), config.kernel)
    if resume:
        with hold(config.out):
            return _resume(config, model, report)
    rows = open_rows(config, model, report)
    with hold(config.out):
        sites = list(rows.ring.widths)
        run = RunFolder.create(config.out, config.to_dict(), sites=sites, device=str(rows.device))
        return _run(_Training(config, run, rows), report)


def _resume(config: TrainConfig, model: LanguageModel | None, report: Report) -> RunFolder:
    run = RunFolder.open(config.out)
    run.sweep()
    sweep(run.path)
    if run.state() == "done":
        remove_checkpoints(run.path)
        return run
    checkpoint = newest_whole(run.path)
    position = RingPosition.from_dict(checkpoint.state["position"]) if checkpoint else None
    rows = open_rows(config, model, report, position)
    training = _Training(config, run, rows)
    run.cut_metrics(checkpoint.state["metrics_bytes"] if checkpoint else 0)
    if checkpoint is not None:
        training.go_on_from(checkpoint)
    run.set_state("running", config=config.to_dict())
    return _run(training, report)


class _Training:
    """The trainers of all sites, where they stand, and how that is kept.

    `position` and `step` change together, and only when a step is whole; between two steps, and whenever
    `whole` says so, a checkpoint can be written.
    """

    def __init__(self, config: TrainConfig, run: RunFolder, rows: Rows) -> None:
        self.config, self.run, self.rows = config, run, rows
        # one for all sites: they share its buffers
        self.kernel = make_kernel(choose_kernel(rows.device, config.kernel))
        self.trainers: dict[str, SiteTrainer] = {}
        self.probe_rows: dict[str, dict[str, Tensor]] = {}
        """A few rows of each site, as a checkpoint has them: the same from the start on, so that a resume
        changes no byte of a probe."""
        self.position: RingPosition | None = None
        self.step = self.logged = 0
        """Steps made, and the one that was logged last."""
        self.whole = True
        self.latest: dict[str, dict[str, float]] = {}
        self._started, self._seconds = time.monotonic(), 0.0
        self._checkpoint_due = self._started + 60 * config.checkpoint_minutes

    def begin(self) -> None:
        """Makes the trainers, unless they came from a checkpoint; harvests the first rows for it."""
        if self.trainers:
            return
        made = {}
        ring = self.rows.ring
        for site, moments in ring.statistics.items():
            first = ring.first_rows(site, _FIRST_ROWS)
            made[site] = SiteTrainer.begin(self.config, site, moments, first, self.kernel)
            self.probe_rows[site] = {_PROBE_ROWS: spread_rows(first).cpu()}
        self.trainers = made

    def make_step(self, batch: RingBatch) -> None:
        """One step of every site."""
        self.whole = False
        share = min(1.0, self.step * self.config.batch / self.rows.total)
        jobs = [trainer.job(batch[site], share) for site, trainer in self.trainers.items()]
        for trainer, figures in zip(self.trainers.values(), self.kernel.steps(jobs), strict=True):
            trainer.take(figures)
        self.step += 1
        self.position = self.rows.ring.position()
        self.whole = True

    def log_if_due(self, mirror: Mirror) -> None:
        """Writes the figures since the last time; counts from here only once they are written."""
        if self.step % self.config.log_every or self.step == self.logged:
            return
        self.latest = {site: trainer.metrics() for site, trainer in self.trainers.items()}
        served = self.step * self.config.batch
        self.run.log(
            [{"step": self.step, "rows": served, "site": site, **row} for site, row in self.latest.items()]
        )
        self.logged = self.step
        for trainer in self.trainers.values():
            trainer.forget()
        mirror.log(self.step, self.latest)

    def keep_if_due(self) -> None:
        """Writes a checkpoint when the last one is old enough."""
        if time.monotonic() >= self._checkpoint_due:
            self.keep()
            self._checkpoint_due = time.monotonic() + 60 * self.config.checkpoint_minutes

    def keep(self) -> None:
        """Writes a checkpoint, where there was a step; a disk that refuses is a warning."""
        if self.position is None or not self.whole:
            return
        try:
            tensors = (
                (site, trainer.tensors() | self.probe_rows[site]) for site, trainer in self.trainers.items()
            )
            write_checkpoint(self.run.path, self.step, tensors, self._state(self.position))
        except (UserError, OSError) as error:
            _log.warning("no checkpoint of step %d could be written, older ones stay: %s", self.step, error)

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Takes up a checkpoint. Raises UserError when what it rests on has changed."""
        state = checkpoint.state
        refuse_other_circumstances(state, self._circumstances())
        for site in self.rows.ring.widths:
            tensors, numbers = checkpoint.tensors(site), state["sites"][site]
            # checkpoints of older versions have none, and their dictionaries get no probe
            self.probe_rows[site] = {n: t.clone() for n, t in tensors.items() if n == _PROBE_ROWS}
            self.trainers[site] = SiteTrainer.resume(
                self.config, site, tensors, numbers, self.kernel, self.rows.device
            )
        self.step, self.logged, self._seconds = state["step"], state["logged"], state["seconds"]
        self.position = RingPosition.from_dict(state["position"])

    def save(self) -> None:
        """Writes the dictionaries as they stand."""
        for site, trainer in self.trainers.items():
            cfg = DictionaryConfig(
                d_in=self.rows.ring.widths[site],
                d_sae=self.config.width,
                architecture=self.config.architecture,
                k=self.config.k,
                site_in=site,
                model=self.rows.model,
                corpus=self.config.corpus,
                context=self.config.context,
                l0_target=self.config.l0,
            )
            probe = self.probe_rows[site].get(_PROBE_ROWS)
            dictionary = trainer.dictionary(cfg)
            if dictionary is not None:  # of shards, the first one's
                sae.save(dictionary, self.run.site_dir(site), probe=probe)

    def record(self, state: str) -> None:
        """Writes the run's state and totals into its run.json."""
        ring = self.rows.ring
        self.run.set_state(
            state,
            rows_harvested=ring.rows_harvested,
            rows_served=self.step * self.config.batch,
            ring_rows=ring.rows,
            seconds=round(self._elapsed(), 1),
        )

    def summary(self) -> str:
        """The figures at a glance: the median site, since 18 do not fit on a line."""
        if not self.latest:
            return ""
        l0, fvu = (statistics.median(row[name] for row in self.latest.values()) for name in ("l0", "fvu"))
        return f"L0 {l0:.0f} (target {self.config.l0:g}), FVU {fvu:.3f}"

    def _elapsed(self) -> float:
        return self._seconds + time.monotonic() - self._started

    def _circumstances(self) -> dict[str, Any]:
        """What decides the bits beside the config."""
        rows = self.rows
        made_by = {"device": rows.device.type, "kernel": self.kernel.name, "rows": str(rows.dtype)}
        return {
            "must_stay": {**made_by, "product": str(product_dtype(rows.device)), **rows.identity},
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }

    def _state(self, position: RingPosition) -> dict[str, Any]:
        return {
            "logged": self.logged,
            "seconds": self._elapsed(),
            "position": position.to_dict(),
            "sites": {site: trainer.numbers() for site, trainer in self.trainers.items()},
            "metrics_bytes": self.run.sync_metrics(),
            "wandb_id": self.run.record().get("wandb_id"),
            "config": self.config.to_dict(),
            **self._circumstances(),
            "generators": "none is used after the start: orders are hashes of (seed, position)",
        }


def _run(training: _Training, report: Report) -> RunFolder:
    """Trains to the end, and leaves what is there when that is not reached."""
    run = training.run
    try:
        with Mirror(training.config, run) as mirror, _Stop() as stop:
            _loop(training, mirror, stop, report)
    except KeyboardInterrupt as interrupt:
        training.keep()
        with _warned("dictionaries"):
            training.save()
        with _warned("state"):
            training.record(f"stopped: {interrupt}")
        raise
    except Exception as error:
        # one with figures that are not finite would only fail again
        if not isinstance(error, NonFiniteError):
            training.keep()
        with _warned("state"):
            training.record(f"failed: {error}")
        if isinstance(error, UserError) and training.step:
            go_on = f"`jumpscope train --resume {run.path}` goes on from step {newest_step(run.path) or 0}"
            raise UserError(error.must, error.found, f"{error.do}; then {go_on}") from error
        raise
    training.record("done")
    remove_checkpoints(run.path)
    return run


def _loop(training: _Training, mirror: Mirror, stop: "_Stop", report: Report) -> None:
    training.begin()
    # what a checkpoint found written before its log was
    training.log_if_due(mirror)
    for batch in training.rows.ring:
        with stop.at_step_boundary():
            training.make_step(batch)
            training.log_if_due(mirror)
            training.keep_if_due()
        report("train", training.step * training.config.batch, training.rows.total, training.summary())
    training.save()


@contextlib.contextmanager
def _warned(what: str) -> Iterator[None]:
    """Makes a warning of a disk that refuses, where another error is on its way to the user."""
    try:
        yield
    except (UserError, OSError) as error:
        _log.warning("the %s could not be written: %s", what, error)


class _Stop:
    """Turns Ctrl-C and SIGTERM into a KeyboardInterrupt that never falls inside a step."""

    def __enter__(self) -> "_Stop":
        self._in_step, self._asked = False, ""
        self._previous = {}
        # only the main thread may set handlers; elsewhere Ctrl-C keeps its usual meaning
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_step_boundary(self) -> Iterator[None]:
        """Within it a signal waits; it is raised at the end."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        if self._asked:
            raise KeyboardInterrupt(self._asked)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self._asked = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if not self._in_step:
            raise KeyboardInterrupt(self._asked)
