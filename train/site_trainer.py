"""One dictionary in training: its parameters, optimiser, thresholds and counters, none of them shared with
another site.
"""

import hashlib

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from activations.ring import RowStatistics
from sae.jumprelu import DictionaryConfig, JumpReLU
from sae.kernels.sparse import encoder_product, sparse_step
from sae.kernels.step import StepResult, StepSettings, StepWeights
from sae.losses import Sparsity
from train.config import TrainConfig
from train.schedule import l0_aim, lr_factor

# pre-activations looked at to place the first thresholds: a quantile of so many is known to a few parts in a
# thousand
_SAMPLE = 2**24


class NonFiniteError(RuntimeError):
    """A site's loss or gradient is not finite; its parameters still are, for the update was not made."""


class SiteTrainer:
    """Trains the dictionary of one site from batches of raw rows [batch, d_in].

    Inside, rows are divided by `scale` so that E||x - mean||^2 = 1; `dictionary()` folds that back.
    """

    def __init__(
        self, config: TrainConfig, site: str, statistics: RowStatistics, first_rows: Float[Tensor, "row d_in"]
    ) -> None:
        self.config, self.site, self.scale = config, site, statistics.scale
        device, d_in = first_rows.device, first_rows.shape[1]
        generator = torch.Generator().manual_seed(_site_seed(config.seed, site))
        mean = (statistics.mean / self.scale).to(device)
        centred = first_rows.float() / self.scale - mean
        directions = _first_directions(centred, config.width, config.principal, generator)
        self.weights = StepWeights(
            W_enc_t=directions.clone(),
            b_enc=torch.zeros(config.width, device=device),
            W_dec=directions,
            # an SAE subtracts its own b_dec from the input: one tensor in both places
            b_in=mean,
            b_dec=mean,
            threshold=torch.zeros(config.width, device=device),
        )
        self.bandwidth = self._place_thresholds(centred)
        self.product_dtype = first_rows.dtype if first_rows.dtype == torch.bfloat16 else torch.float32
        self.optimizer = torch.optim.Adam(
            [
                {
                    "params": [
                        self.weights.W_enc_t,
                        self.weights.b_enc,
                        self.weights.W_dec,
                        self.weights.b_dec,
                    ]
                },
                {"params": [self.weights.threshold]},
            ],
            betas=(config.beta1, config.beta2),
            fused=True,
        )
        self.silent_for: Int[Tensor, " d_sae"] = torch.zeros(config.width, dtype=torch.long, device=device)
        self._l0_shift = torch.zeros((), device=device)
        self._window = _Window(d_in, device)

    def step(self, rows: Float[Tensor, "batch d_in"], share: float) -> None:
        """One update from a batch of raw rows; `share` is the part of the run that is done.

        Raises NonFiniteError before the update when the loss or a gradient is not finite.
        """
        x = rows.float() / self.scale
        result = sparse_step(self.weights, x, x, self.settings(share))
        if not _all_finite(result):
            error = float(result.squared_error.mean())
            raise NonFiniteError(f"{self.site}: the loss or a gradient is not finite (error {error})")
        self._update(result, lr_factor(self.config, share))
        self._steer_l0(result, share)
        self.silent_for += len(rows)
        self.silent_for[result.fired > 0] = 0
        self._window.add(result, x)

    def metrics(self) -> dict[str, float]:
        """Means since the last call, and the share of latents dead now."""
        return {
            **self._window.take(),
            "dead": float((self.silent_for >= self.config.dead_after).float().mean()),
            "threshold": float(self.weights.threshold.mean() * self.scale),
        }

    def dictionary(self, cfg: DictionaryConfig) -> JumpReLU:
        """The dictionary as it stands, for raw activations: scale and input bias folded in.

        b_enc' = C b_enc - C b_in W_enc     b_dec' = C b_dec     threshold' = C threshold     W unchanged
        """
        w = self.weights
        folded = {
            "W_enc": w.W_enc_t.T,
            "b_enc": self.scale * (w.b_enc - w.W_enc_t @ w.b_in),
            "W_dec": w.W_dec,
            "b_dec": self.scale * w.b_dec,
            "threshold": self.scale * w.threshold,
        }
        dictionary = JumpReLU(cfg)
        dictionary.load_state_dict({name: tensor.detach().cpu() for name, tensor in folded.items()})
        return dictionary.requires_grad_(False)

    def settings(self, share: float) -> StepSettings:
        """What a step aims at when `share` of the run is done."""
        config = self.config
        return StepSettings(
            bandwidth=self.bandwidth,
            sparsity=Sparsity(kind=config.sparsity, coefficient=config.sparsity_coefficient),
            l0_target=float(l0_aim(config, share) + self._l0_shift),
            product_dtype=self.product_dtype,
        )

    def _update(self, result: StepResult, factor: float) -> None:
        w = self.weights
        for group, top in zip(
            self.optimizer.param_groups, (self.config.lr, self.config.threshold_lr), strict=True
        ):
            group["lr"] = top * factor
        # the part of the gradient along a row would only change its norm, which is held at 1
        along = torch.linalg.vecdot(result.W_dec, w.W_dec).unsqueeze(1)
        w.W_enc_t.grad, w.b_enc.grad = result.W_enc_t, result.b_enc
        w.W_dec.grad = result.W_dec.addcmul_(along, w.W_dec, value=-1)
        w.b_dec.grad = result.b_dec + result.b_in
        w.threshold.grad = result.threshold
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        w.W_dec /= torch.linalg.vector_norm(w.W_dec, dim=1, keepdim=True)
        self._pull_dead(factor)
        w.threshold.clamp_(min=0)

    def _pull_dead(self, factor: float) -> None:
        """Draws latents that have long been silent towards firing: bias up, threshold down, a full step each.

        This is Adam's step under a pre-activation loss on dead latents alone; that loss's gradient by W_enc
        is nearly nothing, since rows are centred. Done by hand it leaves no trace in the moments.
        """
        silent = self.silent_for >= self.config.dead_after // 2
        self.weights.b_enc += self.config.lr * factor * silent
        self.weights.threshold -= self.config.threshold_lr * factor * silent

    def _steer_l0(self, result: StepResult, share: float) -> None:
        """Moves the L0 that the sparsity term aims at until the L0 reached is the one wanted.

        A penalty alone stops where its slope meets the reconstruction's, above the target by an amount that
        differs from layer to layer; an integrator takes that out.
        """
        wanted = l0_aim(self.config, share)
        error = (wanted - result.l0.mean()).clamp(-wanted / 4, wanted / 4)
        self._l0_shift = (self._l0_shift + self.config.l0_gain * error).clamp(-wanted / 2, wanted / 2)

    def _place_thresholds(self, centred: Float[Tensor, "row d_in"]) -> float:
        """Puts thresholds where L0 is `l0_start` times the target; returns the bandwidth in scaled units."""
        sample = centred[: max(64, _SAMPLE // self.config.width)]
        pre = encoder_product(self.weights, sample, torch.float32)
        firing = min(pre.numel(), max(1, round(self.config.l0_start * self.config.l0 * len(sample))))
        self.weights.threshold.fill_(pre.flatten().topk(firing).values[-1].clamp(min=0))
        return self.config.bandwidth * float(pre.std())


class _Window:
    """Sums of a site's figures between two logging steps, on the device so that no step waits for them."""

    def __init__(self, d_out: int, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._y = torch.zeros(d_out, dtype=torch.float64, device=device)
        self._rows = 0

    def add(self, result: StepResult, y: Float[Tensor, "batch d_out"]) -> None:
        batch = len(y)
        self._sums += torch.stack(
            [result.squared_error.sum(), result.l0.sum(), result.sparsity * batch, (y**2).sum()]
        )
        self._y += y.sum(0)
        self._rows += batch

    def take(self) -> dict[str, float]:
        """L0, FVU about the rows' own mean, loss; then starts again. Empty before the first step."""
        if not self._rows:
            return {}
        error, l0, sparsity, square = (self._sums / self._rows).tolist()
        variance = square - float(((self._y / self._rows) ** 2).sum())
        self._sums.zero_()
        self._y.zero_()
        self._rows = 0
        return {"l0": l0, "fvu": error / variance if variance > 0 else 0.0, "loss": error + sparsity}


def _first_directions(
    centred: Float[Tensor, "row d_in"], width: int, principal: int, generator: torch.Generator
) -> Float[Tensor, "width d_in"]:
    """Random unit rows, but for the strongest principal directions, which get two latents each and are taken
    out of the rest.

    A few directions (massive activations) can hold most of the variance. Random rows would all feel them,
    all learn them
    at once, overshoot, and half of them would die of the correction. Latents of their own carry them from
    the start.
    """
    device, d_in = centred.device, centred.shape[1]
    rows = torch.randn(width, d_in, generator=generator).to(device)
    q = min(principal, d_in - 1, len(centred), width // 4)
    if q > 0:
        # exact, by the small Gram matrix: the randomised methods draw from torch's global generator
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        strongest = vectors[:, -q:].T
        rows -= (rows @ strongest.T) @ strongest
        rows[: 2 * q] = torch.cat([strongest, -strongest])
    return F.normalize(rows, dim=1)


def _all_finite(result: StepResult) -> bool:
    # a sum is finite only if its terms are; a NaN or an infinity in a row reaches that row's error
    total = (
        result.squared_error.sum()
        + result.W_enc_t.sum()
        + result.W_dec.sum()
        + result.threshold.sum()
        + result.sparsity
    )
    return bool(torch.isfinite(total))


def _site_seed(seed: int, site: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{site}".encode(), digest_size=7).digest(), "big")
