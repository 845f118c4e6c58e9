"""The training run: rows in, one dictionary per site out. The loop is `_loop`; the rest prepares, keeps and
goes on.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

from activations.exchange import RefusedByAll
from activations.models import LanguageModel
from activations.positions import RingPosition
from activations.ranks import RankLost, Ranks, open_ranks
from sae.errors import UserError
from sae.kernels.dispatch import choose_kernel
from train.checkpoints import (
    at_step,
    newest_step,
    newest_whole,
    remove_checkpoints,
    sweep,
)
from train.config import TrainConfig
from train.mirror import Mirror, check_wandb
from train.resume import refuse_changes, refuse_other_circumstances
from train.rows import Report, Rows, device_of, open_rows
from train.run_folder import RunFolder, git_commit, hold, refuse_occupied, versions
from train.site_trainer import NonFiniteError
from train.stop import Stop
from train.together import by_first
from train.training import Training

_log = logging.getLogger(__name__)


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

    Under torchrun each rank trains the sites that it owns, and rank 0 alone reports progress; weights and
    metrics are those of one rank alone, and a run goes on with another number of ranks. A signal to any of
    them stops all at the next step that is logged.

    `model` spares loading `config.model` again. Raises UserError for what the config asks wrongly, before
    anything is written; KeyboardInterrupt after saving what is there; NonFiniteError naming the site, the
    run's state then says why it failed; RankLost when another rank is lost.
    """
    with open_ranks() as ranks:
        report = on_progress if on_progress and ranks.first else (lambda what, done, total, detail: None)
        ranks.agree("run", {**config.to_dict(), "resume": resume, "code": git_commit(), **versions()})
        by_first(ranks, "the run folder", lambda: _refuse(config, resume))
        check_wandb(config.wandb)
        choose_kernel(device_of(config, ranks), config.kernel)
        if resume:
            with _held(ranks, config.out):
                return _resume(config, model, ranks, report)
        rows = open_rows(config, model, report, ranks)
        with _held(ranks, config.out):
            by_first(ranks, "the run folder", lambda: _create(config, rows))
            run = RunFolder.open(config.out)
            return _run(Training(config, run, rows, ranks), report)


def _refuse(config: TrainConfig, resume: bool) -> None:
    if resume:
        refuse_changes(RunFolder.open(config.out), config)
    else:
        refuse_occupied(config.out)


def _create(config: TrainConfig, rows: Rows) -> None:
    RunFolder.create(config.out, config.to_dict(), sites=list(rows.owned.widths), device=str(rows.device))


@contextlib.contextmanager
def _held(ranks: Ranks, path: str) -> Iterator[None]:
    """One run at a time works on a folder: its rank 0 holds it."""
    with contextlib.ExitStack() as stack:
        by_first(ranks, "the run folder", lambda: stack.enter_context(hold(path)))
        yield


def _resume(config: TrainConfig, model: LanguageModel | None, ranks: Ranks, report: Report) -> RunFolder:
    run = RunFolder.open(config.out)
    found = by_first(ranks, "the newest checkpoint", lambda: _newest(run))
    if found == "done":
        return run
    checkpoint = None if found is None else at_step(run.path, found)
    position = RingPosition.from_dict(checkpoint.state["position"]) if checkpoint else None
    rows = open_rows(config, model, report, ranks, position)
    training = Training(config, run, rows, ranks)
    if checkpoint is not None:
        refuse_other_circumstances(checkpoint.state, training.circumstances(), warns=ranks.first)
        training.go_on_from(checkpoint)
    if ranks.first:
        run.cut_metrics(checkpoint.state["metrics_bytes"] if checkpoint else 0)
        run.set_state("running", config=config.to_dict())
    return _run(training, report)


def _newest(run: RunFolder) -> int | str | None:
    """Clears what a kill left; returns the step of the newest whole checkpoint, or that the run is done."""
    run.sweep()
    sweep(run.path)
    if run.state() == "done":
        remove_checkpoints(run.path)
        return "done"
    checkpoint = newest_whole(run.path)
    return checkpoint and checkpoint.step


def _run(training: Training, report: Report) -> RunFolder:
    """Trains to the end, and leaves what is there when that is not reached."""
    run, ranks = training.run, training.ranks
    with Stop(alone=ranks.world == 1) as stop:
        try:
            # one mirror shows all
            mirrored = training.config if ranks.first else dataclasses.replace(training.config, wandb="off")
            with Mirror(mirrored, run) as mirror:
                _loop(training, mirror, stop, report)
        except KeyboardInterrupt as interrupt:
            if ranks.world == 1 or stop.agreed:
                _leave(training, interrupt)
            raise
        except RankLost as error:
            with _warned("state"):
                training.record(f"failed: {error.found}")
            raise
        except Exception as error:
            # one with figures that are not finite would only fail again, and several ranks can only keep
            # together what they refuse together
            if isinstance(error, RefusedByAll) or (
                ranks.world == 1 and not isinstance(error, NonFiniteError)
            ):
                training.keep()
            with _warned("state"):
                training.record(f"failed: {error}")
            if isinstance(error, UserError) and training.step:
                go_on = (
                    f"`jumpscope train --resume {run.path}` goes on from step {newest_step(run.path) or 0}"
                )
                raise UserError(error.must, error.found, f"{error.do}; then {go_on}") from error
            raise
    by_first(ranks, "the end of the run", training.finish)
    return run


def _leave(training: Training, interrupt: KeyboardInterrupt) -> None:
    """Keeps and saves what a stopped run has. No rank goes before all is written."""
    training.rows.close()
    training.keep()
    with _warned("dictionaries"):
        training.save()
    with _warned("state"):
        by_first(training.ranks, "the run's state", lambda: training.record(f"stopped: {interrupt}"))


def _loop(training: Training, mirror: Mirror, stop: Stop, report: Report) -> None:
    training.begin()
    # what a checkpoint found written before its log was
    training.log_if_due(mirror, stop)
    for batch in training.rows.ring:
        with stop.at_step_boundary():
            training.make_step(batch)
            training.log_if_due(mirror, stop)
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
