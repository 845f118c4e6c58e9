"""One dictionary in training: its parameters, optimiser, thresholds and counters, none of them shared with
another site.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from activations.ring import RowStatistics
from sae.architectures import build
from sae.dictionary import Dictionary, DictionaryConfig, parameter_shapes
from sae.kernels.dispatch import StepKernel, screen_dtype
from sae.kernels.shards import Shard
from sae.kernels.step import TRAINED, Job, Moments, StepFigures, StepSettings, StepState, StepWeights
from sae.losses import Sparsity
from train.config import TrainConfig
from train.first_weights import first_weights
from train.schedule import l0_aim, lr_factor

# share of the way to a batch's least activation kept that batchtopk's threshold goes in a step: a mean over
# some ten batches, which all but agree. A longer one lags behind the weights in a run of a few hundred steps.
_FOLLOW = 0.1


class NonFiniteError(RuntimeError):
    """A site's rows or its loss are not finite; its parameters still are, for no step was made from them."""


class SiteTrainer:
    """Trains the dictionary of one site from batches of raw rows [batch, d_in].

    Inside, rows are divided by `scale`, so that outside of the strongest principal directions E||x - mean||^2
    is 1; `dictionary()` folds that back. Over all directions the scale would be that of the strongest, which
    hold 99 % of the variance at layer 0 of Gemma 3 270M (86 % at layer 9): pre-activations would be small
    beside a step of bias and threshold, and thresholds would run down to zero, where L0 cannot be steered.
    The kernel makes the steps and may serve other sites too.
    """

    def __init__(
        self, config: TrainConfig, site: str, state: StepState, bandwidth: float, kernel: StepKernel
    ) -> None:
        """Takes a state as it is; `begin` makes the first one and `resume` an earlier one."""
        self.config, self.site, self.kernel = config, site, kernel
        self.state, self.weights, self.scale = state, state.weights, state.scale_in
        self.bandwidth = bandwidth
        """In scaled units."""
        device = state.weights.W_dec.device
        self.product_dtype = screen_dtype(device, kernel.name)
        self._window = _Window(state.weights.W_dec.shape[1], device)

    @classmethod
    def begin(
        cls,
        config: TrainConfig,
        site: str,
        statistics: RowStatistics,
        first_rows: Float[Tensor, "row d_in"],
        kernel: StepKernel,
        shard: Shard | None = None,
    ) -> "SiteTrainer":
        """The trainer before its first step, placed by a site's statistics and some of its rows.

        With `shard`, of those of a dictionary's latents; the other shards begin at the same time.
        """
        weights, scale, bandwidth = first_weights(config, site, statistics, first_rows, shard)
        state = StepState.begin(weights, beta1=config.beta1, scale_in=scale, scale_out=scale, shard=shard)
        return cls(config, site, state, bandwidth, kernel)

    @classmethod
    def resume(
        cls,
        config: TrainConfig,
        site: str,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Any],
        kernel: StepKernel,
        device: torch.device,
        shard: Shard | None = None,
    ) -> "SiteTrainer":
        """The trainer that `tensors` and `numbers` were taken from, with not a bit of difference.

        With `shard`, of those of its latents that `tensors` must be of (`train.site_files.read_site`): the
        whole one's, whatever shards it had.
        """
        # copies in memory that torch aligned itself, as the first ones were
        there = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}

        def named(prefix: str) -> dict[str, Tensor]:
            return {name: there[prefix + name] for name in TRAINED}

        scale = numbers["scale"]
        state = StepState(
            weights=StepWeights(**named(""), b_in=there["b_dec"]),
            first=Moments(**named("first.")) if config.beta1 else None,
            second=Moments(**named("second.")),
            silent_for=there["silent_for"],
            l0_shift=there["l0_shift"],
            scale_in=scale,
            scale_out=scale,
            steps=numbers["steps"],
            shard=shard,
        )
        trainer = cls(config, site, state, numbers["bandwidth"], kernel)
        trainer._window.restore(there, numbers["window_rows"])
        return trainer

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the trainer, by name: for a checkpoint."""
        return {**dict(self.state.tensors()), **self._window.tensors()}

    def numbers(self) -> dict[str, Any]:
        """Everything of the trainer that is no tensor, as JSON has it."""
        return {
            "steps": self.state.steps,
            "scale": self.scale,
            "bandwidth": self.bandwidth,
            "window_rows": self._window.rows,
        }

    def step(self, rows: Float[Tensor, "batch d_in"], share: float) -> None:
        """One update from a batch of raw rows; `share` is the part of the run that is done.

        Raises NonFiniteError, with the parameters as they were, when the rows or the loss are not finite. On
        a GPU, where looking would make it wait, `metrics` raises it instead.
        """
        self.take(self.kernel.step(*self.job(rows, share)))

    def job(self, rows: Float[Tensor, "batch d_in"], share: float) -> Job:
        """What `step` asks of the kernel, for who asks for several sites at once and then calls `take`."""
        return Job(self.state, rows, rows, self.settings(share))

    def take(self, figures: StepFigures) -> None:
        """What a step found. Raises as `step` does."""
        self._window.add(figures)
        if figures.l0.device.type == "cpu":
            self._check_finite()

    def metrics(self) -> dict[str, float]:
        """Means since `forget`, and the share of latents dead now. Raises as `step` does.

        Shards are asked at the same time, and tell the same: of all their latents.
        """
        self._check_finite()
        silent, threshold = self.state.silent_for >= self.config.dead_after, self.weights.threshold
        if self.state.shard is None:
            dead, threshold = float(silent.float().mean()), float(threshold.mean() * self.scale)
        else:
            sums = torch.stack([silent.double().sum(), threshold.double().sum()])
            self.state.shard.add(sums)
            dead, threshold = (sums / self.state.shard.d_sae).tolist()
            threshold *= self.scale
        # topk has none
        thresholds = {} if self.config.architecture == "topk" else {"threshold": threshold}
        return {**self._window.means(), "dead": dead, **thresholds}

    def forget(self) -> None:
        """Lets the next `metrics` count from here."""
        self._window.clear()

    def dictionary(self, cfg: DictionaryConfig) -> Dictionary | None:
        """The dictionary as it stands, for raw activations: scale and input bias folded in. `cfg` has the
        architecture and k of the training.

        b_enc' = C b_enc - C b_in W_enc     b_dec' = C b_dec     threshold' = C threshold     W unchanged

        Shards are asked at the same time: the first gets the whole dictionary, the others None.
        """
        w = self.weights
        folded = {
            "W_enc": w.W_enc_t,
            "b_enc": self.scale * (w.b_enc - w.W_enc_t @ w.b_in),
            "W_dec": w.W_dec,
            "b_dec": self.scale * w.b_dec,
            "threshold": self.scale * w.threshold,
        }
        shard, own = self.state.shard, {}
        for name, shape in parameter_shapes(cfg).items():
            if shard is None or shard.index == 0:
                own[name] = torch.empty(shape)
            # a latent's column of W_enc is its row of the transposed one
            into = own[name].T if own and name == "W_enc" else own.get(name)
            if shard is not None and name != "b_dec":
                shard.collect(folded[name], into)
            elif into is not None:
                into.copy_(folded[name])
        return build(cfg, own) if own else None

    def settings(self, share: float) -> StepSettings:
        """What a step aims at when `share` of the run is done."""
        config, factor = self.config, lr_factor(self.config, share)
        deviation = self.bandwidth / config.bandwidth
        threshold_lr = config.threshold_lr * deviation * factor
        return StepSettings(
            bandwidth=self.bandwidth,
            sparsity=Sparsity(kind=config.sparsity, coefficient=config.sparsity_coefficient),
            l0_wanted=l0_aim(config, share),
            l0_gain=config.l0_gain,
            lr=config.lr * factor,
            threshold_lr=_FOLLOW if config.architecture == "batchtopk" else threshold_lr,
            beta1=config.beta1,
            beta2=config.beta2,
            pull_after=config.pull_after,
            support=config.architecture,
            k=config.k,
            product_dtype=self.product_dtype,
        )

    def _check_finite(self) -> None:
        error = self._window.refused
        if bool(error):
            raise NonFiniteError(f"{self.site}: rows or loss are not finite in {int(error)} steps")


class _Window:
    """Sums of a site's figures between two logging steps, on the device so that no step waits for them."""

    def __init__(self, d_out: int, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._y = torch.zeros(d_out, dtype=torch.float64, device=device)
        self.rows = 0
        self.refused = torch.zeros((), dtype=torch.long, device=device)
        """Steps that were not made."""

    def add(self, figures: StepFigures) -> None:
        batch = len(figures.l0)
        self._sums += torch.stack(
            [figures.squared_error.sum(), figures.l0.sum(), figures.sparsity * batch, figures.y_square]
        )
        self._y += figures.y_sum
        self.rows += batch
        self.refused += ~figures.finite

    def means(self) -> dict[str, float]:
        """L0, FVU about the rows' own mean, loss. Empty before the first step."""
        if not self.rows:
            return {}
        error, l0, sparsity, square = (self._sums / self.rows).tolist()
        variance = square - float(((self._y / self.rows) ** 2).sum())
        return {"l0": l0, "fvu": error / variance if variance > 0 else 0.0, "loss": error + sparsity}

    def clear(self) -> None:
        """Starts again."""
        self._sums.zero_()
        self._y.zero_()
        self.rows = 0

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {"window.sums": self._sums, "window.y": self._y, "window.refused": self.refused}

    def restore(self, tensors: Mapping[str, Tensor], rows: int) -> None:
        """The inverse of `tensors`."""
        self._sums, self._y = tensors["window.sums"], tensors["window.y"]
        self.refused, self.rows = tensors["window.refused"], rows
