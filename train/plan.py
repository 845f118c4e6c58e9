"""What a training run will take, known before it takes it: memory by item, disk, and time by phase."""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from activations.precision import pick_device, pick_dtype
from activations.ring import ring_bytes, ring_rows, rows_for_memory
from activations.shapes import ModelShape, model_shape
from activations.sites import expand_sites, kind_of
from sae.errors import UserError
from sae.numbers import format_size
from train.config import TrainConfig

# resident size of the process once torch, transformers and a model's code are loaded, less the weights: 0.7
# GiB measured
_PROCESS_BYTES = 800 * 2**20
_FP32 = 4
# a forward pass reaches about this share of the speed of one large matrix product (measured on Gemma 3 270M)
_FORWARD_EFFICIENCY = 0.6
# a training step takes this many times its encoder product and, for each latent firing and each coordinate of
# a row, the time of so many of the product's operations (fitted at widths 2,048 and 16,384 on two cores)
_STEP_PER_PRODUCT = 1.6
_STEP_PER_PAIR = 150.0
# columns of the encoder's product that a thread of the step holds at once
_STEP_BLOCK = 512
# bytes of the feature index per latent: examples with their context, compressed
_INDEX_BYTES_PER_LATENT = 6_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes in bytes and times in seconds. Sizes are computed and hold; times are estimates."""

    sites: dict[str, int]
    """The sites to train and their widths d_in."""
    device: str
    dtype: str
    """The model's dtype, which is also that of the rows in memory."""
    steps: int
    """Training steps."""
    ring_rows: int
    """Rows that the shuffle ring holds."""
    memory: dict[str, int]
    """Bytes by item on the device that computes: the machine's memory, or the GPU's."""
    host_memory: int
    """Bytes beside these in the machine's memory when a GPU computes; 0 on a CPU."""
    disk: dict[str, int]
    """Bytes written, by item."""
    seconds: dict[str, float]
    """Estimated time by phase."""
    flops: float
    """Floating-point operations a second on which the times rest, measured just now with a matrix product."""

    @property
    def memory_total(self) -> int:
        """Peak bytes on the device that computes."""
        return sum(self.memory.values())

    @property
    def disk_total(self) -> int:
        """Bytes that the run leaves on disk."""
        return sum(self.disk.values())

    @property
    def seconds_total(self) -> float:
        """Estimated time of the whole run."""
        return sum(self.seconds.values())


def make_plan(
    config: TrainConfig, *, eval_tokens: int = 0, loss_tokens: int = 0, index_tokens: int = 0
) -> Plan:
    """Works out a training run, and an evaluation and an index after it when their tokens are given.

    Reads the model's configuration, not its weights, and multiplies matrices for half a second. Raises
    UserError when the run does not fit `config.memory` or the disk, saying what would.
    """
    shape = model_shape(config.model)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    sites = {
        site: shape.widths[kind_of(site)]
        for site in expand_sites(config.sites, config.layers, shape.n_layers)
    }
    on_gpu = device.type != "cpu"
    fixed = fixed_costs(config, shape, sites, dtype, on_gpu=on_gpu)
    rows = plan_ring_rows(config, sites, dtype, sum(fixed.values()))
    ring = ring_bytes(sites, dtype=dtype, rows=rows, batch=config.batch, passes=config.passes)
    memory = {**fixed, f"ring, {rows:,} rows": ring}
    flops = _measured_flops(device, dtype)
    plan = Plan(
        sites=sites,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        steps=config.steps,
        ring_rows=rows,
        memory=memory,
        host_memory=_PROCESS_BYTES if on_gpu else 0,
        disk=_disk(config, sites, index=index_tokens > 0),
        seconds=_seconds(config, shape, sites, flops, eval_tokens, loss_tokens, index_tokens),
        flops=flops,
    )
    _refuse_full_disk(plan, Path(config.out))
    return plan


def fixed_costs(
    config: TrainConfig, shape: ModelShape, sites: Mapping[str, int], dtype: torch.dtype, *, on_gpu: bool
) -> dict[str, int]:
    """Bytes that a run takes on the device that computes, whatever the size of its ring, by item."""
    parameters = [dictionary_parameters(config.width, d_in) for d_in in sites.values()]
    tokens = config.model_batch * config.context
    # rows of every site beside the stream, and the widest layer's intermediate products in fp32
    forward = tokens * (2 * sum(sites.values()) * dtype.itemsize + 24 * shape.d_model * _FP32)
    widest = max(sites.values())
    # fp32: weights and both moments; bf16: the encoder that the product reads
    dictionaries = 3 * _FP32 * sum(parameters) + 2 * config.width * sum(sites.values())
    # rows, targets, error; a block of products for each of a few threads; candidates, at four times the L0
    step = config.batch * (_FP32 * (3 * widest + 4 * _STEP_BLOCK) + 24 * 4 * round(config.l0))
    costs = {
        "language model": (shape.body_params + shape.d_vocab * shape.d_model) * dtype.itemsize,
        "forward pass": forward,
        f"{len(sites)} dictionaries, Adam": dictionaries,
        "training step": step,
    }
    return costs if on_gpu else {**costs, "Python, torch, ...": _PROCESS_BYTES}


def plan_ring_rows(config: TrainConfig, sites: Mapping[str, int], dtype: torch.dtype, fixed: int) -> int:
    """Rows of the shuffle ring: what `config.memory` leaves beside `fixed` bytes, and no more than the
    tokens asked for.

    Raises UserError when too little is left.
    """
    smallest = config.passes * config.batch
    smallest_bytes = ring_bytes(sites, dtype=dtype, rows=smallest, batch=config.batch, passes=config.passes)
    if config.memory < fixed + smallest_bytes:
        raise UserError(
            "--memory must hold the model, the dictionaries and a small shuffle ring: "
            f"{format_size(fixed)} + {format_size(smallest_bytes)}",
            f"--memory {format_size(config.memory)}",
            f"Give --memory {_gigabytes(fixed + 2 * smallest_bytes)}, fewer --layers or a smaller --width",
        )
    rows = rows_for_memory(
        config.memory - fixed, sites, dtype=dtype, batch=config.batch, passes=config.passes
    )
    enough = ring_rows(config.tokens + smallest - 1, batch=config.batch, passes=config.passes)
    return max(smallest, min(rows, enough))


def dictionary_parameters(width: int, d_in: int) -> int:
    """Numbers in a dictionary: two matrices, b_enc and threshold, b_dec."""
    return 2 * d_in * width + 2 * width + d_in


def _disk(config: TrainConfig, sites: Mapping[str, int], *, index: bool) -> dict[str, int]:
    lines = len(sites) * (config.steps // config.log_every + 1)
    items = {
        "dictionaries": _FP32 * sum(dictionary_parameters(config.width, d_in) for d_in in sites.values()),
        "metrics": 300 * lines,
    }
    if index:
        items["feature index"] = _INDEX_BYTES_PER_LATENT * config.width * len(sites)
    return items


def _seconds(
    config: TrainConfig,
    shape: ModelShape,
    sites: Mapping[str, int],
    flops: float,
    eval_tokens: int,
    loss_tokens: int,
    index_tokens: int,
) -> dict[str, float]:
    body = 2 * shape.body_params / (_FORWARD_EFFICIENCY * flops)
    unembed = 2 * shape.d_model * shape.d_vocab / (_FORWARD_EFFICIENCY * flops)
    encode = sum(2 * d_in * config.width for d_in in sites.values()) / flops
    pairs = _STEP_PER_PAIR * config.l0 * sum(sites.values()) / flops
    items = {
        "harvest": 0.0 if config.store else config.tokens * body,
        "train": config.steps * config.batch * (encode * _STEP_PER_PRODUCT + pairs),
    }
    if eval_tokens or loss_tokens:
        # a splice runs half the layers on average; baselines add two variants on a quarter of the tokens
        variants = 1 + 1.5 * len(sites)
        items["evaluate"] = eval_tokens * (body + 2 * encode) + loss_tokens * variants * (body / 2 + unembed)
    if index_tokens:
        # top and bottom logits: every latent's direction through the unembedding
        logits = len(sites) * config.width * unembed
        items["index"] = index_tokens * (body + 2 * encode) + logits
    return items


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product of a training step's kind, over a quarter of a second or so."""
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


def _refuse_full_disk(plan: Plan, out: Path) -> None:
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if plan.disk_total > free:
        raise UserError(
            f"the disk must have {format_size(plan.disk_total)} free for the run",
            f"{format_size(free)} at {place}",
            "Free some space or choose another --out",
        )


def missing_memory(plan: Plan) -> str | None:
    """A warning when the plan, although within --memory, exceeds what is free on the machine now."""
    if plan.device.startswith("cuda"):
        free = torch.cuda.mem_get_info(torch.device(plan.device))[0]
    else:
        free = psutil.virtual_memory().available
    if plan.memory_total <= free:
        return None
    return (
        f"only {format_size(free)} of memory are free now of the {format_size(plan.memory_total)} planned: "
        "close other programs, or give a smaller --memory"
    )


def _gigabytes(n_bytes: int) -> str:
    return f"{-(-n_bytes // 2**30)}G"
