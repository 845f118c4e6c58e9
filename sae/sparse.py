"""A dictionary's latents as lists of those that fire: what most uses need, at less than the dense cost."""

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.architectures import BatchTopK, JumpReLU
from sae.dictionary import Dictionary
from sae.kernels.dispatch import screen_dtype
from sae.kernels.step import StepWeights

# the largest dense encoder output held at once, in elements: 64 MiB of fp32
_DENSE_ELEMENTS = 2**24
# rows whose lists are made at once, and latents whose weights are turned at once
_ROWS, _LATENTS = 2048, 512
# latents a row that buffers are made for at first; they grow
_PLANNED_L0 = 64.0
# where more than one latent in so many fires, decoding them all as one product is faster
_DENSE_DECODE = 16


@dataclasses.dataclass(frozen=True, eq=False)
class SparseLatents:
    """The latents that fire on some rows: row r has those from `starts[r]` to `starts[r + 1]`, rising."""

    starts: Int[Tensor, " row_plus_one"]
    latent: Int[Tensor, " firing"]
    activation: Float[Tensor, " firing"]

    def __len__(self) -> int:
        """Rows."""
        return len(self.starts) - 1

    @property
    def row(self) -> Int[Tensor, " firing"]:
        """The row of each firing."""
        return torch.arange(len(self), device=self.starts.device).repeat_interleave(self.starts.diff())


class SparseEncoder:
    """Encodes rows with one dictionary into lists of the latents that fire; the weights must not change.

    It gives what the dictionary's `encode` gives but for the rounding of its sums. Where each latent has a
    threshold of its own, on a CPU and in fp32, the training step's screening product finds the pairs and each
    is then computed by itself; elsewhere the dense output is made, some rows at a time.
    """

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        weight = dictionary.W_enc
        fits = weight.device.type == "cpu" and weight.dtype == torch.float32
        has_thresholds = isinstance(dictionary, JumpReLU | BatchTopK)
        self._screened = _Screened(dictionary) if fits and has_thresholds else None

    def encode(self, x: Float[Tensor, "row d_in"]) -> SparseLatents:
        """The latents that fire on rows of raw activations. NaN or infinity in a row gives no promise."""
        make = self._dense if self._screened is None else self._screened.encode
        size = max(1, _DENSE_ELEMENTS // self.dictionary.cfg.d_sae) if self._screened is None else _ROWS
        parts = [make(rows) for rows in x.to(self.dictionary.W_enc.device).split(size)]
        if len(parts) == 1:
            return parts[0]
        counts = torch.cat([part.starts.diff() for part in parts] or [torch.empty(0, dtype=torch.long)])
        return SparseLatents(
            F.pad(counts.cumsum(0), (1, 0)),
            torch.cat([part.latent for part in parts]),
            torch.cat([part.activation for part in parts]),
        )

    def decode(self, latents: SparseLatents, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_out"]:
        """The reconstruction of rows that were encoded, in the dictionary's dtype. A skip reads the rows."""
        return self._decode(latents) + self.dictionary.skip(x)

    def _decode(self, latents: SparseLatents) -> Float[Tensor, "row d_out"]:
        dictionary = self.dictionary
        n, d_sae = len(latents), dictionary.cfg.d_sae
        if len(latents.latent) * _DENSE_DECODE > n * d_sae:
            dense = torch.zeros(n, d_sae, dtype=latents.activation.dtype, device=latents.starts.device)
            dense[latents.row, latents.latent.long()] = latents.activation
            return dictionary.decode(dense)
        decoded = F.embedding_bag(
            latents.latent,
            dictionary.W_dec,
            latents.starts[:-1].to(latents.latent.dtype),
            mode="sum",
            per_sample_weights=latents.activation,
        )
        return decoded + dictionary.b_dec

    def _dense(self, x: Float[Tensor, "row d_in"]) -> SparseLatents:
        acts = self.dictionary.encode(x)
        row, latent = acts.nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(x))
        return SparseLatents(F.pad(counts.cumsum(0), (1, 0)), latent, acts[row, latent])


class _Screened:
    """The way of the training step on a CPU (sae/kernels/cpu.py)."""

    def __init__(self, dictionary: JumpReLU | BatchTopK) -> None:
        # late: numba takes a second to import
        from sae.kernels.cpu_balanced import Balancing
        from sae.kernels.cpu_forward import Buffers, Screens, parts_of
        from sae.kernels.workers import workers_for

        cfg, self._workers = dictionary.cfg, workers_for(torch.get_num_threads())
        W_enc, b_enc = dictionary.W_enc.detach(), dictionary.b_enc.detach().clone()
        W_enc_t = W_enc.new_empty(W_enc.T.shape)
        # a mean that all rows share would widen the product's error, and all pairs would pass the screen
        centre = torch.zeros(cfg.d_in) if cfg.transcoder else dictionary.b_dec.detach().clone()

        def turn(part: slice) -> None:
            W_enc_t[part] = W_enc[:, part].T
            b_enc[part] = (b_enc[part].double() + W_enc_t[part].double() @ centre.double()).float()

        self._workers.run(turn, parts_of(cfg.d_sae, _LATENTS))
        self._weights = StepWeights(
            W_enc_t=W_enc_t,
            b_enc=b_enc,
            W_dec=dictionary.W_dec.detach(),
            b_in=centre,
            b_dec=dictionary.b_dec.detach(),
            threshold=dictionary.threshold.detach(),
        )
        # the gate is pre > threshold, and only positive latents fire
        self._gate = dictionary.threshold.detach().clamp(min=0).numpy()
        self._screens: Screens | None = None
        self._balance = Balancing(*W_enc_t.shape)
        self._buffers = Buffers()

    def encode(self, x: Float[Tensor, "row d_in"]) -> SparseLatents:
        from sae.kernels.cpu_balanced import BalancedForward
        from sae.kernels.cpu_forward import Forward, screens_for

        encoder, dtype = self._weights.W_enc_t, screen_dtype(self._weights.W_enc_t.device)
        balanced = self._balance.screens
        self._screens = balanced or screens_for(self._screens, encoder, dtype, self._workers)
        step = (BalancedForward if balanced else Forward)(
            self._weights, self._screens, self._buffers, self._workers, gate=self._gate, l0=_PLANNED_L0
        )
        step.begin(x, x[:, :0])
        step.encode()
        starts, latent, activation = step.lists()
        firing = slice(int(starts[-1]))
        # copies: the buffers serve the next rows
        lists = (starts, latent[firing], activation[firing])
        self._balance.learn(step)
        return SparseLatents(*(torch.from_numpy(part.copy()) for part in lists))
