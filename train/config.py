"""What a training run is told: one dataclass, which is also the command line and the file in the run
folder.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Literal

from tyro.constructors import PrimitiveConstructorSpec

from sae.config import Config, SparsityKind
from sae.errors import UserError
from sae.numbers import parse_count, parse_size, parse_width


def _number(parse: Callable[[str], int], metavar: str) -> PrimitiveConstructorSpec[int]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


Count = Annotated[int, _number(parse_count, "N")]
Width = Annotated[int, _number(parse_width, "N")]
Size = Annotated[int, _number(parse_size, "SIZE")]

TrainedArchitecture = Literal["jumprelu", "topk", "batchtopk"]
"""The kinds of gate that can be trained."""

_ABOVE_ZERO = (
    "width",
    "l0",
    "tokens",
    "passes",
    "buffer",
    "batch",
    "model_batch",
    "lr",
    "threshold_lr",
    "bandwidth",
    "l0_start",
    "dead_after",
    "pull_after",
    "memory",
    "log_every",
    "checkpoint_minutes",
    "shard_latents",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Train one dictionary for each site of a language model, all from the same forward passes."""

    model: str = "gemma-3-270m"
    """Language model: a name of `jumpscope models`, a hub id, a transformers folder or a .gguf file."""
    corpus: str = "wiki-leads"
    """Text: a name of `jumpscope corpora`, a .txt, .jsonl or .parquet file, or a `datasets` name
    (streamed).
    """
    sites: str = "resid_post"
    """Kinds of site, with commas: resid_post, resid_mid, resid_pre, mlp_out, attn_out, attn_z."""
    layers: str = "all"
    """Layers: all, 9, 3-8 (both ends), ::2, or several with commas."""
    width: Width = 4096
    """Latents in each dictionary; 16k means 16,384."""
    architecture: TrainedArchitecture = "jumprelu"
    """Gate: jumprelu (a threshold for each latent, learned), topk (the `l0` largest on each token), batchtopk
    (`l0` a token of the largest in a batch; then a threshold for all).
    """
    l0: float = 50.0
    """Target L0: latents firing on a token, on average. The main knob. A whole number for topk and
    batchtopk.
    """
    tokens: Count = 250_000
    """Tokens to harvest; each trains every dictionary `passes` times."""
    passes: Count = 4
    """How often a harvested row is trained on before it leaves memory. On a CPU the model costs more than
    the step.
    """
    batch: Count = 2048
    """Rows in a training step."""
    context: Count = 256
    """Tokens in a block, BOS included."""
    model_batch: Count = 8
    """Blocks in a forward pass."""
    buffer: Count = 65_536
    """Rows of the shuffle buffer: batches are drawn from so many rows at once."""
    lr: float = 2e-3
    """Adam's learning rate for weights and biases, at its height."""
    threshold_lr: float = 0.05
    """The same for jumprelu's thresholds, in standard deviations of the first pre-activations."""
    warmup: float = 0.04
    """Share of the steps over which the learning rate rises from zero."""
    decay: float = 0.2
    """Share of the steps, at the end, over which it falls to zero."""
    sparsity: SparsityKind = "quadratic"
    """Sparsity term; see sae/losses.py."""
    sparsity_coefficient: float = 0.1
    """Its weight, in units of the mean squared error of predicting the mean (principal ones aside)."""
    bandwidth: float = 0.5
    """Window of the threshold's gradient, in standard deviations of the first pre-activations."""
    l0_start: float = 1.5
    """L0 at the start, in multiples of the target."""
    l0_anneal: float = 0.3
    """Share of the steps over which the L0 aimed at falls to the target."""
    l0_gain: float = 0.02
    """Share of the L0 missed in a step by which the aim moves the other way; 0: the penalty alone."""
    principal: int = 8
    """Strongest principal directions that get two latents of their own at the start; 0 for none."""
    beta1: float = 0.9
    """Adam's first moment; 0 keeps none."""
    beta2: float = 0.999
    """Adam's second moment."""
    dead_after: Count = 100_000
    """Training tokens of silence after which a latent counts as dead."""
    pull_after: Count = 50_000
    """Training tokens of silence after which a latent is drawn towards firing, a little with every step."""
    memory: Size = 8 * 2**30
    """Memory that the run may take, the model included. A run that needs more is refused."""
    seed: int = 0
    """Decides the documents' order, the batches and the first weights."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The model's dtype and that of the rows in memory. auto: bfloat16 where the hardware has it."""
    device: str = "auto"
    """auto, cpu or cuda."""
    kernel: Literal["auto", "cpu", "triton", "reference"] = "auto"
    """What makes the training steps; auto: the fastest that runs on the device. `jumpscope info` tells."""
    shard_latents: Count = 1
    """Ranks of a run under torchrun that each dictionary's latents are divided over, for one that is too wide
    for a rank.
    """
    store: str = ""
    """Train from a folder that `jumpscope harvest` wrote instead of running the model."""
    out: str = "runs/train"
    """Run folder to create."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, from which `--resume` goes on."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Mirror the metrics to Weights & Biases."""

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            if not getattr(self, name) > 0:
                raise UserError(
                    f"--{_flag(name)} must be above zero", f"{getattr(self, name)}", "give a positive number"
                )
        self._check_sizes()
        for name in ("warmup", "decay", "l0_anneal"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"--{_flag(name)} is a share of the steps, from 0 to 1",
                    f"{getattr(self, name)}",
                    "give a number from 0 to 1",
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"--{_flag(name)} must be from 0 to below 1",
                    f"{getattr(self, name)}",
                    "the defaults 0.9 and 0.999 suit most runs",
                )
        if not math.isfinite(self.checkpoint_minutes):
            raise UserError("--checkpoint-minutes must be finite", "infinity", "give a large number")
        if self.sparsity_coefficient < 0:
            raise UserError(
                "--sparsity-coefficient must not be negative",
                f"{self.sparsity_coefficient}",
                "the default 0.1 suits most runs",
            )

    def _check_sizes(self) -> None:
        if self.l0 > self.width:
            raise UserError(
                "--l0 must not exceed --width: no more latents can fire than there are",
                f"--l0 {self.l0:g} with --width {self.width}",
                "lower --l0 or raise --width",
            )
        if self.shard_latents > self.width:
            raise UserError(
                "--shard-latents must not exceed --width: each rank must have a latent",
                f"--shard-latents {self.shard_latents} with --width {self.width}",
                "lower --shard-latents",
            )
        if self.architecture != "jumprelu" and self.l0 != int(self.l0):
            raise UserError(
                f"--l0 must be a whole number with --architecture {self.architecture}",
                f"--l0 {self.l0:g}",
                f"give --l0 {max(1, round(self.l0))}, or --architecture jumprelu",
            )
        if self.tokens < self.batch:
            raise UserError(
                "--tokens must fill at least one batch",
                f"--tokens {self.tokens} with --batch {self.batch}",
                "raise --tokens or lower --batch",
            )
        if self.buffer < self.passes * self.batch:
            raise UserError(
                "--buffer must hold a batch for each pass",
                f"--buffer {self.buffer} with --passes {self.passes} and --batch {self.batch}",
                f"give --buffer {self.passes * self.batch} or more, a smaller --batch or fewer --passes",
            )
        if self.context < 2:
            raise UserError(
                "--context must be at least 2: BOS and a token",
                f"{self.context}",
                "the default 256 suits most corpora",
            )

    @property
    def steps(self) -> int:
        """Training steps, if the corpus holds `tokens` tokens."""
        return self.tokens * self.passes // self.batch

    @property
    def own_width(self) -> int:
        """Latents of a dictionary that one rank has, at most."""
        return -(-self.width // self.shard_latents)

    @property
    def k(self) -> int:
        """Active latents a row in a step; 0 where thresholds decide."""
        return 0 if self.architecture == "jumprelu" else int(self.l0)


def _flag(name: str) -> str:
    return name.replace("_", "-")
