"""A run in training: the trainers of this rank's sites, what they have done, and how that is kept."""

import contextlib
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import sae
from activations.positions import RingPosition
from activations.ranks import RankLost, Ranks
from activations.ring import RingBatch, RowStatistics
from sae.dictionary import DictionaryConfig
from sae.errors import UserError
from sae.kernels.dispatch import choose_kernel, make_kernel, product_dtype
from sae.kernels.workers import workers_for
from sae.probe import spread_rows
from train.checkpoints import (
    Checkpoint,
    remove_checkpoints,
    write_checkpoint,
)
from train.config import TrainConfig
from train.first_weights import PLACED_TOGETHER
from train.mirror import Mirror
from train.rows import Rows
from train.run_folder import RunFolder, versions
from train.site_files import file_stem
from train.site_trainer import SiteTrainer
from train.stop import Stop
from train.together import Stragglers, shard_of, together

_log = logging.getLogger(__name__)

# rows of the first generation that each site's first weights are placed by
_FIRST_ROWS = 8192
# a checkpoint's name of the rows that a site's dictionary is saved with a probe of
_PROBE_ROWS = "probe.rows"


class Training:
    """The trainers of this rank's sites, where they stand, and how that is kept.

    `position` and `step` change together, and only when a step is whole; between two steps, and whenever
    `whole` says so, a checkpoint can be written. Several ranks meet at the steps that are logged: stops and
    checkpoints are decided there, by all at the same step.
    """

    def __init__(self, config: TrainConfig, run: RunFolder, rows: Rows, ranks: Ranks) -> None:
        self.config, self.run, self.rows, self.ranks = config, run, rows, ranks
        # one for all sites: they share its buffers
        self.kernel = make_kernel(choose_kernel(rows.device, config.kernel))
        self.shard = shard_of(ranks, config.width, config.shard_latents)
        self.trainers: dict[str, SiteTrainer] = {}
        self.probe_rows: dict[str, dict[str, Tensor]] = {}
        """A few rows of each site, as a checkpoint has them: the same from the start on, so that a resume
        changes no byte of a probe."""
        self.position: RingPosition | None = None
        self.step = self.logged = 0
        """Steps made, and the one that was logged last."""
        self.whole, self._stepped = True, False
        self.latest: dict[str, dict[str, float]] = {}
        """Figures of all sites, this rank's or not."""
        self._started, self._seconds = time.monotonic(), 0.0
        self._checkpoint_due, self._all_keep = self._started + 60 * config.checkpoint_minutes, False
        loads = [float(sum(rows.owned.sites(rank).values())) for rank in range(ranks.world)]
        self._stragglers = Stragglers(loads)
        circumstances = self.circumstances()
        ranks.agree("run", {**circumstances["must_stay"], "threads": circumstances["threads"]})

    def begin(self) -> None:
        """Makes the trainers, unless they came from a checkpoint; harvests the first rows for it."""
        # a rank may have none either way
        if self.position is not None:
            return
        statistics = self.rows.ring.statistics
        with self.ranks.busy("placing the first weights"):
            made = self._begun(statistics)
        for site in statistics:
            self.trainers[site], self.probe_rows[site] = made[site]

    def _begun(
        self, statistics: Mapping[str, RowStatistics]
    ) -> dict[str, tuple[SiteTrainer, dict[str, Tensor]]]:
        """Each site's trainer before its first step, and its probe rows.

        On a CPU several sites side by side, on a thread each: so weights depend neither on the number of
        threads nor on which sites a rank has.
        """
        made, ring = {}, self.rows.ring

        def begin(sites: Sequence[str]) -> None:
            for site in sites:
                first = ring.first_rows(site, _FIRST_ROWS)
                trainer = SiteTrainer.begin(
                    self.config, site, statistics[site], first, self.kernel, self.shard
                )
                made[site] = trainer, {_PROBE_ROWS: spread_rows(first).cpu()}

        sites = list(statistics)
        # shards must meet in the order of the sites
        if self.shard is not None or self.rows.device.type != "cpu":
            begin(sites)
        else:
            threads = torch.get_num_threads()
            lanes = min(threads, PLACED_TOGETHER)
            workers_for(threads).run(begin, [sites[lane::lanes] for lane in range(lanes)])
        return made

    def make_step(self, batch: RingBatch) -> None:
        """One step of every site of this rank."""
        self.ranks.beat()
        self.rows.check()
        now = time.perf_counter()
        self.whole = False
        share = min(1.0, self.step * self.config.batch / self.rows.total)
        jobs = [trainer.job(batch[site], share) for site, trainer in self.trainers.items()]
        # a process's first step compiles, for as long as it likes
        with contextlib.nullcontext() if self._stepped else self.ranks.busy("the first step"):
            made = self.kernel.steps(jobs)
        self._stepped = True
        for trainer, figures in zip(self.trainers.values(), made, strict=True):
            trainer.take(figures)
        self.step += 1
        self.position = self.rows.ring.position()
        self.whole = True
        self.rows.spent.add("step", now)

    def log_if_due(self, mirror: Mirror, stop: Stop) -> None:
        """Writes the figures since the last time; counts from here only once they are written.

        All ranks meet here: what one was asked, to stop or to keep a checkpoint, is done by all.
        """
        if self.step % self.config.log_every or self.step == self.logged:
            return
        mine = {site: trainer.metrics() for site, trainer in self.trainers.items()}
        due = time.monotonic() >= self._checkpoint_due
        now = time.perf_counter()
        answers = self.ranks.share("the figures", [mine, stop.asked, due, self.rows.spent.take()])
        self.rows.spent.add("wait", now)
        figures, asked, due, spent = zip(*answers, strict=True)
        self.latest = {site: figures[rank][site] for site, rank in self.rows.owned.owner.items()}
        stop.agreed, self._all_keep = next(filter(None, asked), ""), due[0]
        if self.ranks.first:
            self._write_figures(mirror, spent)
        self.logged = self.step
        for trainer in self.trainers.values():
            trainer.forget()

    def _write_figures(self, mirror: Mirror, spent: Sequence[Mapping[str, float]]) -> None:
        served = self.step * self.config.batch
        self.run.log(
            [{"step": self.step, "rows": served, "site": site, **row} for site, row in self.latest.items()]
        )
        mirror.log(self.step, self.latest)
        if self.ranks.world > 1:
            self._stragglers.look(spent)
            seconds = [{kind: round(value, 3) for kind, value in row.items()} for row in spent]
            self.run.log_ranks({"step": self.step, "seconds": seconds})

    def keep_if_due(self) -> None:
        """Writes a checkpoint when the last one is old enough, which for several ranks rank 0 has said."""
        alone = self.ranks.world == 1
        if time.monotonic() >= self._checkpoint_due if alone else self._all_keep:
            self.keep()
            self._checkpoint_due = time.monotonic() + 60 * self.config.checkpoint_minutes
            self._all_keep = False

    def keep(self) -> None:
        """Writes a checkpoint, where there was a step; a disk that refuses is a warning. All ranks do it."""
        if self.position is None or not self.whole:
            return
        try:
            tensors = (
                (file_stem(site, self.shard), trainer.tensors() | self.probe_rows[site])
                for site, trainer in self.trainers.items()
            )
            state = self._state(self.position)
            write_checkpoint(self.run.path, self.step, tensors, state, ranks=self.ranks, join=_join)
        except RankLost:
            raise
        except (UserError, OSError) as error:
            if self.ranks.first:
                _log.warning(
                    "no checkpoint of step %d could be written, older ones stay: %s", self.step, error
                )

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Takes up a checkpoint, of any number of ranks."""
        state = checkpoint.state
        latents = self.shard.latents if self.shard else slice(0, self.config.width)
        for site in self.rows.ring.widths:
            tensors, numbers = checkpoint.tensors(site, latents), state["sites"][site]
            # checkpoints of older versions have none, and their dictionaries get no probe
            self.probe_rows[site] = {n: t.clone() for n, t in tensors.items() if n == _PROBE_ROWS}
            self.trainers[site] = SiteTrainer.resume(
                self.config, site, tensors, numbers, self.kernel, self.rows.device, self.shard
            )
        self.step, self.logged, self._seconds = state["step"], state["logged"], state["seconds"]
        self.position = RingPosition.from_dict(state["position"])

    def save(self) -> None:
        """Writes the dictionaries as they stand. All ranks do it."""
        together(self.ranks, "the dictionaries", self._save_own)

    def _save_own(self) -> None:
        refused = None
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
            try:
                dictionary = trainer.dictionary(cfg)
                if dictionary is not None:  # of shards, the first one's
                    sae.save(dictionary, self.run.site_dir(site), probe=probe)
            except (UserError, OSError) as error:
                if self.shard is None:
                    raise
                # the other shards go on to the next dictionary, and wait there for this one
                refused = refused or error
        if refused is not None:
            raise refused

    def record(self, state: str) -> None:
        """Writes the run's state and totals into its run.json, on rank 0."""
        if not self.ranks.first:
            return
        ring = self.rows.ring
        self.run.set_state(
            state,
            rows_harvested=ring.rows_harvested,
            rows_served=self.step * self.config.batch,
            ring_rows=ring.rows,
            seconds=round(self._elapsed(), 1),
        )

    def finish(self) -> None:
        """Records that the run is done; its checkpoints are not needed any more."""
        self.record("done")
        remove_checkpoints(self.run.path)

    def summary(self) -> str:
        """The figures at a glance: the median site, since 18 do not fit on a line."""
        if not self.latest:
            return ""
        l0, fvu = (statistics.median(row[name] for row in self.latest.values()) for name in ("l0", "fvu"))
        return f"L0 {l0:.0f} (target {self.config.l0:g}), FVU {fvu:.3f}"

    def circumstances(self) -> dict[str, Any]:
        """What decides the bits beside the config."""
        rows = self.rows
        made_by = {"device": rows.device.type, "kernel": self.kernel.name, "rows": str(rows.dtype)}
        return {
            "must_stay": {**made_by, "product": str(product_dtype(rows.device)), **rows.identity},
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }

    def _elapsed(self) -> float:
        return self._seconds + time.monotonic() - self._started

    def _state(self, position: RingPosition) -> dict[str, Any]:
        return {
            "logged": self.logged,
            "seconds": self._elapsed(),
            "position": position.to_dict(),
            "sites": {site: trainer.numbers() for site, trainer in self.trainers.items()},
            "metrics_bytes": self.run.sync_metrics() if self.ranks.first else 0,
            "wandb_id": self.run.record().get("wandb_id"),
            "config": self.config.to_dict(),
            **self.circumstances(),
            "generators": "none is used after the start: orders are hashes of (seed, position)",
        }


def _join(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of the run, of what each rank knows: they differ in the sites that they speak of."""
    whole = json.loads(json.dumps(states[0]))
    for state in states[1:]:
        whole["sites"] |= state["sites"]
        parts = zip(whole["position"]["generations"], state["position"]["generations"], strict=True)
        for mine, theirs in parts:
            mine["values"] |= theirs["values"]
    return whole
