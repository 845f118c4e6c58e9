"""How long each phase takes, from a few rates."""

import dataclasses
import functools
import time
from collections.abc import Mapping

import torch

from activations.shapes import ModelShape
from activations.sites import layer_of
from train.config import TrainConfig

# a forward pass reaches about this share of the speed of one large matrix product (measured on Gemma 3 270M)
_FORWARD_EFFICIENCY = 0.6
# a training step takes this many times its encoder product and, for each latent firing and each coordinate of
# a row, the time of so many of the product's operations (fitted at widths 2,048 and 16,384 on two cores)
_STEP_PER_PRODUCT = 1.6
_STEP_PER_PAIR = 150.0
# products with the whole vocabulary are made in 8-bit integers where that is faster
_UNEMBED = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What a trial showed."""

    harvest_rate: float | None
    """Tokens a second from text to rows; None where rows come from a store."""
    train_rate: float | None
    """Rows a second through the training steps of all sites together; None where nothing is trained."""
    weights: int
    """Bytes of the model's weights, wherever they are."""
    process: int
    """Bytes of the machine's memory that the process holds, without the weights."""
    peak: int
    """The most that it has held so far, weights included: mostly while the model was loaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speeds:
    """Floating-point operations a second."""

    product: float
    """Of a large matrix product."""
    forward: float
    """Of a forward pass."""

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> "Speeds":
        """From a matrix product, which takes a quarter of a second."""
        product = measured_flops(device, dtype)
        return cls(product=product, forward=_FORWARD_EFFICIENCY * product)


@functools.cache
def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product of a training step's kind, over a quarter of a second or so;
    measured once in a process.
    """
    a = torch.ones(1024, 1024, device=device, dtype=dtype)
    operations, elapsed, start = 0, 0.0, 0.0
    while elapsed < 0.25:
        float((a @ a)[0, 0])  # device sync
        if start:  # the first product also sets up the library
            operations += 2 * 1024**3
        else:
            start = time.perf_counter()
        elapsed = time.perf_counter() - start
    return operations / elapsed


def training_rates(
    config: TrainConfig,
    shape: ModelShape | None,
    sites: Mapping[str, int],
    speeds: Speeds,
    measured: Measured | None,
) -> dict[str, float]:
    """Tokens a second: `harvest`, unless rows come from a store, and `train`, through all sites' steps.

    Of one rank, with its own latents of each dictionary; the sums over ranks are not in it.
    """
    if measured is not None:
        found = {"harvest": measured.harvest_rate, "train": measured.train_rate}
        return {phase: rate for phase, rate in found.items() if rate is not None}
    encode = sum(2 * d_in * config.own_width for d_in in sites.values()) / speeds.product
    pairs = _STEP_PER_PAIR * config.l0 / config.shard_latents * sum(sites.values()) / speeds.product
    rates = {} if shape is None else {"harvest": speeds.forward / pass_flops(shape, sites)}
    return {**rates, "train": 1 / (encode * _STEP_PER_PRODUCT + pairs)}


def pass_flops(shape: ModelShape, sites: Mapping[str, int]) -> float:
    """Operations for a token of a forward pass that ends at the last of the sites."""
    return 2 * shape.body_params * (1 + max(map(layer_of, sites))) / shape.n_layers


def evaluation_seconds(
    shape: ModelShape, sites: Mapping[str, int], width: int, speeds: Speeds, tokens: int, loss_tokens: int
) -> float:
    """Time of an evaluation."""
    # a splice runs half the layers on average; baselines add two variants on a quarter of the tokens
    variants = 1 + 1.5 * len(sites)
    body, unembed, encode = _parts(shape, sites, width, speeds)
    return tokens * (body + 2 * encode) + loss_tokens * variants * (body / 2 + unembed)


def index_seconds(
    shape: ModelShape, sites: Mapping[str, int], width: int, speeds: Speeds, tokens: int
) -> float:
    """Time of a feature index."""
    body, unembed, encode = _parts(shape, sites, width, speeds)
    # top and bottom logits: every latent's direction through the unembedding
    return tokens * (body + 2 * encode) + len(sites) * width * unembed


def basis(speeds: Speeds, measured: Measured | None = None) -> str:
    """What times rest on, in words."""
    if measured is not None:
        return "measured just now with the model and its steps"
    return f"estimated from a matrix product at {speeds.product / 1e9:.0f} GFLOP/s"


def _parts(
    shape: ModelShape, sites: Mapping[str, int], width: int, speeds: Speeds
) -> tuple[float, float, float]:
    """Seconds a token: the model's body, its unembedding, the dictionaries' encoders."""
    body = 2 * shape.body_params / speeds.forward
    unembed = _UNEMBED * 2 * shape.d_model * shape.d_vocab / speeds.forward
    return body, unembed, sum(2 * d_in * width for d_in in sites.values()) / speeds.product
