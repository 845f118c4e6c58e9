"""What a training run will take, known before it takes it: memory by item, disk, and time by phase."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from activations.exchange import Ownership, exchange_bytes
from activations.precision import pick_device, pick_dtype
from activations.ring import ring_bytes, ring_rows, rows_for_memory
from activations.shapes import ModelShape, model_shape
from activations.sites import expand_sites, kind_of, layer_of
from activations.store import open_store
from activations.store_writer import SHARD_BYTES
from sae.errors import UserError
from sae.numbers import format_size
from train.config import TrainConfig
from train.first_weights import PLACED_TOGETHER
from train.times import Measured, Speeds, basis, evaluation_seconds, index_seconds, pass_flops, training_rates
from train.together import divide

# resident size of the process with torch, transformers and the CPU kernel's compiler; with a model, its
# tokenizer by the size of the vocabulary, and a packaged text
_PROCESS, _PER_TOKEN, _TEXT = 620 * 2**20, 1300, 85 * 2**20
_FP32 = 4
EXCHANGE = "exchange"
"""A plan's name for the memory of what ranks trade, and of the rows they have in store."""
# numbers a token in a layer's intermediate products, in multiples of d_model
_LAYER_PRODUCTS = 22
# bytes of a score of explicit attention: as computed, in fp32, and its softmax
_SCORE = 12
# columns of the encoder's product that a thread of the step holds at once, and sites a thread from which on
# every thread makes whole steps
_STEP_BLOCK, _SIDE_BY_SIDE = 512, 4
# bytes of a step's lists by row and unit of L0: candidates are about twice the active pairs
_STEP_LISTS = 32
# rows that first weights are placed by; pre-activations that the first thresholds are a quantile of; the
# memory of the search for it on a GPU, and on a CPU that for each of them
_FIRST_ROWS, _FIRST_PRE, _SEARCH, _SEARCH_CPU = 8192, 2**24, 48 * 2**20, 2
# rows that a store gives at once
_STORE_ROWS = 8192
# bytes of the feature index per latent: examples with their context, compressed
_INDEX_PER_LATENT = 6_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes in bytes, times in seconds, rates in tokens a second. Sizes hold; times are estimates."""

    sites: dict[str, int]
    """The sites and their widths d_in."""
    own: dict[str, int]
    """Those whose dictionaries the process trains: all, or a rank's share."""
    device: str
    dtype: str
    """The model's dtype, which is also that of the rows in memory."""
    ring_rows: int = 0
    """Rows that the shuffle ring holds."""
    memory: dict[str, int]
    """Bytes by item on the device that computes: the machine's memory, or the GPU's."""
    host_memory: int
    """Bytes beside these in the machine's memory when a GPU computes; 0 on a CPU."""
    loading: int
    """Bytes that the process has held at most until now; 0 where that was not measured."""
    disk: dict[str, int]
    """Bytes written, by item."""
    seconds: dict[str, float]
    """Estimated time by phase."""
    rates: dict[str, float]
    """Tokens a second: `harvest`, and `train`, through the steps of all sites."""
    basis: str
    """What the times rest on, in words."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return getattr(torch, self.dtype)

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
    config: TrainConfig,
    *,
    measured: Measured | None = None,
    eval_tokens: int = 0,
    loss_tokens: int = 0,
    index_tokens: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Plan:
    """Works out a training run, and an evaluation and an index after it when their tokens are given.

    Memory is that of one `rank` of `world`; disk and times are those of the run. Reads the model's
    configuration or the store's manifest, no weights. Times, and the size of the process, rest on
    `measured`; without it on a matrix product of half a second and on what is usual. Raises UserError when
    the run does not fit `config.memory` or the disk, saying what would.
    """
    shape, sites, dtype, tokens = rows_to_train(config)
    device = pick_device(config.device)
    on_gpu = device.type != "cpu"
    owned = divide(sites, dtype, world, config.shard_latents)
    own = owned.sites(rank)
    fixed = fixed_costs(config, shape, owned, rank, world, on_gpu=on_gpu, measured=measured)
    rows = plan_ring_rows(config, own, dtype, sum(fixed.values()))
    ring = ring_bytes(own, dtype=dtype, rows=rows, batch=config.batch, passes=config.passes)
    speeds = Speeds.of(device, dtype)
    rates = training_rates(config, shape, sites, speeds, measured)
    if shape is not None and measured is not None:
        speeds = dataclasses.replace(speeds, forward=rates["harvest"] * pass_flops(shape, sites))
    # every rank runs the model; the one with most to train decides
    most = max(sum(owned.sites(other).values()) for other in range(world))
    gains = {"harvest": world, "train": sum(sites.values()) / most}
    rates = {phase: rate * gains[phase] for phase, rate in rates.items()}
    seconds = {"harvest": tokens / rates["harvest"]} if "harvest" in rates else {}
    seconds["train"] = tokens * config.passes / rates["train"]
    if shape is not None and eval_tokens + loss_tokens:
        seconds["evaluate"] = evaluation_seconds(shape, sites, config.width, speeds, eval_tokens, loss_tokens)
    if shape is not None and index_tokens:
        seconds["index"] = index_seconds(shape, sites, config.width, speeds, index_tokens)
    plan = Plan(
        sites=sites,
        own=own,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        ring_rows=rows,
        memory={**fixed, f"ring, {rows:,} rows": ring},
        host_memory=_process(shape, measured) + _weights(shape, dtype, measured) if on_gpu else 0,
        loading=0 if measured is None else measured.peak,
        disk=_disk(config, sites, index=index_tokens > 0),
        seconds=seconds,
        rates=rates,
        basis=basis(speeds, measured),
    )
    refuse_full_disk(plan, Path(config.out))
    return plan


def plan_harvest(
    shape: ModelShape,
    sites: Mapping[str, int],
    dtype: torch.dtype,
    measured: Measured | None = None,
    *,
    device: torch.device,
    tokens: int,
    context: int,
    model_batch: int,
    out: str,
) -> Plan:
    """The same for a store of activations; no times without `measured`. Raises UserError when the disk has
    no room for it.
    """
    size = tokens * (sum(sites.values()) * dtype.itemsize + 3 * 4)
    forward = _forward(shape, sites, dtype, context, model_batch)
    shard = min(size, SHARD_BYTES)
    process, weights = _process(shape, measured), _weights(shape, dtype, measured)
    on_gpu = device.type != "cpu"
    rate = measured.harvest_rate if measured is not None else None
    plan = Plan(
        sites=dict(sites),
        own={},
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        memory={"language model": weights, "forward pass": forward}
        | ({} if on_gpu else {"shard": shard, "Python, libraries": process}),
        host_memory=process + max(weights, shard) if on_gpu else 0,
        loading=measured.peak if measured is not None else 0,
        disk={"activations": size},
        seconds={"harvest": tokens / rate} if rate else {},
        rates={"harvest": rate} if rate else {},
        basis="measured just now",
    )
    refuse_full_disk(plan, Path(out))
    return plan


def rows_to_train(config: TrainConfig) -> tuple[ModelShape | None, dict[str, int], torch.dtype, int]:
    """The model's shape, or None for a store; sites and their widths; the rows' dtype; how many there are.

    Raises UserError for what the model or the store does not have.
    """
    if config.store:
        store = open_store(config.store)
        wanted = set(expand_sites(config.sites, config.layers, 1 + max(map(layer_of, store.sites))))
        widths = {site: store.widths[site] for site in store.sites if site in wanted}
        if not widths:
            raise UserError(
                "the store must hold a site that --sites and --layers name",
                f"it holds {', '.join(store.sites)}",
                "choose from these",
            )
        return None, widths, store.dtype, min(store.rows, config.tokens)
    shape = model_shape(config.model)
    sites = expand_sites(config.sites, config.layers, shape.n_layers)
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    return shape, {site: shape.widths[kind_of(site)] for site in sites}, dtype, config.tokens


def rows_ahead(config: TrainConfig) -> int:
    """Rows that a rank may have in store beside its ring: what the ring will next take in."""
    return _ring_rows(config) // config.passes


def fixed_costs(
    config: TrainConfig,
    shape: ModelShape | None,
    owned: Ownership,
    rank: int = 0,
    world: int = 1,
    *,
    on_gpu: bool,
    measured: Measured | None = None,
) -> dict[str, int]:
    """Bytes that a rank takes on the device that computes, whatever the size of its ring, by item.

    `shape` is None where rows come from a store. Working memory is that of the phase which needs most.
    """
    sites = owned.sites(rank)
    costs = {}
    if shape is not None:
        costs["language model"] = _weights(shape, owned.dtype, measured)
    if shape is not None and world > 1:
        # a thread harvests at all times
        batch = {"model_batch": config.model_batch, "context": config.context}
        costs["forward pass"] = _forward(shape, owned.widths, owned.dtype, **batch)
        costs[EXCHANGE] = exchange_bytes(owned, rank, world=world, ahead=rows_ahead(config), **batch)
    if sites:
        parameters = [dictionary_parameters(config.own_width, d_in) for d_in in sites.values()]
        # fp32: weights and moments; bf16: the encoder that the product reads
        moments = 2 if config.beta1 else 1
        dictionaries = (1 + moments) * _FP32 * sum(parameters) + 2 * config.own_width * sum(sites.values())
        phases = _working_memory(config, shape, sites, owned.dtype, on_gpu=on_gpu, harvests=world == 1)
        phase = max(phases, key=lambda name: phases[name])
        costs[f"{len(sites)} dictionaries"] = dictionaries
        costs[f"work: {phase}"] = phases[phase]
    return costs if on_gpu else {**costs, "Python, libraries": _process(shape, measured)}


def plan_ring_rows(config: TrainConfig, sites: Mapping[str, int], dtype: torch.dtype, fixed: int) -> int:
    """Rows of the shuffle ring: `config.buffer`, or fewer where there are fewer tokens.

    They follow from the config alone, so that neither memory nor the other sites change a row's place.
    Raises UserError when `config.memory` does not hold them beside `fixed` bytes.
    """
    shares = {"batch": config.batch, "passes": config.passes}
    smallest = config.passes * config.batch
    rows = _ring_rows(config)
    ring = ring_bytes(sites, dtype=dtype, rows=rows, **shares)
    if fixed + ring <= config.memory:
        return rows
    remedy = f"give --memory {-(-(fixed + ring) // 2**30)}G"
    spare = config.memory - fixed
    if spare >= ring_bytes(sites, dtype=dtype, rows=smallest, **shares):
        remedy += f" or --buffer {rows_for_memory(spare, sites, dtype=dtype, **shares)}"
    raise UserError(
        "--memory must hold the model, the dictionaries and the shuffle buffer: "
        f"{format_size(fixed)} + {format_size(ring)}",
        f"--memory {format_size(config.memory)}",
        f"{remedy}, or fewer --layers, or a smaller --width",
    )


def dictionary_parameters(width: int, d_in: int) -> int:
    """Numbers in a dictionary: two matrices, b_enc and threshold, b_dec."""
    return 2 * d_in * width + 2 * width + d_in


def refuse_full_disk(plan: Plan, out: Path) -> None:
    """Raises UserError when the disk of `out` has no room for the plan."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if plan.disk_total > free:
        raise UserError(
            f"the disk must have {format_size(plan.disk_total)} free for the run",
            f"{format_size(free)} at {place}",
            "free some space or choose another --out",
        )


def _ring_rows(config: TrainConfig) -> int:
    smallest = config.passes * config.batch
    enough = min(config.buffer, config.tokens + smallest - 1)
    return ring_rows(enough, batch=config.batch, passes=config.passes)


def _process(shape: ModelShape | None, measured: Measured | None) -> int:
    if measured is not None:
        return measured.process
    return _PROCESS if shape is None else _PROCESS + _PER_TOKEN * shape.d_vocab + _TEXT


def _weights(shape: ModelShape | None, dtype: torch.dtype, measured: Measured | None) -> int:
    if shape is None:
        return 0
    return (shape.body_params + shape.vocab_params) * dtype.itemsize if measured is None else measured.weights


def _working_memory(
    config: TrainConfig,
    shape: ModelShape | None,
    sites: Mapping[str, int],
    dtype: torch.dtype,
    *,
    on_gpu: bool,
    harvests: bool,
) -> dict[str, int]:
    """Bytes by phase beside what stays throughout; `harvests` means that steps and the model take turns."""
    row, widest = sum(sites.values()) * dtype.itemsize, max(sites.values())
    threads = 1 if on_gpu else torch.get_num_threads()
    together = len(sites) >= _SIDE_BY_SIDE * threads
    # rows and error in fp32 and the rows in bf16; lists of pairs; blocks of the product
    lists = config.batch * ((3 * _FP32 + 2) * widest + _STEP_LISTS * round(config.l0))
    blocks = config.batch * (config.own_width // 4 if on_gpu else _STEP_BLOCK * dtype.itemsize * threads)
    step = config.batch * row + lists * (threads if together else 1) + blocks
    if shape is None:
        # a row batch and its copy, and two shards: one is read while the other is used
        made, name = _STORE_ROWS * row, "store and step"
        store = open_store(config.store)
        shard = SHARD_BYTES * sum(sites.values()) // sum(store.widths.values())
        harvest = 2 * made + min(2 * shard, store.rows * row)
    elif not harvests:
        harvest, made, name = 0, 0, "step"
    else:
        harvest = _forward(shape, sites, dtype, config.context, config.model_batch)
        made, name = config.model_batch * config.context * row, "model and step"
    # weights and screens of the last sites come after their thresholds
    rest = (4 * _FP32 + 2) * config.own_width * widest
    first = min(_FIRST_ROWS, _ring_rows(config) // config.passes)
    looked_at = min(first, max(64, _FIRST_PRE // config.width)) * config.own_width
    first_rows = first * widest * (dtype.itemsize + _FP32)
    search = _SEARCH if on_gpu else _SEARCH_CPU * looked_at
    at_once = min(threads, len(sites), PLACED_TOGETHER) if config.shard_latents == 1 else 1
    return {
        name: harvest + step,
        "first thresholds": made + at_once * (first_rows + looked_at * _FP32 + search - rest),
        # a dictionary for raw activations, made for its file
        "saving": made + step + _FP32 * dictionary_parameters(config.width, widest),
    }


def _forward(
    shape: ModelShape, sites: Mapping[str, int], dtype: torch.dtype, context: int, model_batch: int
) -> int:
    """Bytes of a forward pass: rows of every site, twice, the widest layer and its attention."""
    row = 2 * sum(sites.values()) + _LAYER_PRODUCTS * shape.d_model
    return model_batch * context * (row * dtype.itemsize + _SCORE * shape.n_heads * context)


def _disk(config: TrainConfig, sites: Mapping[str, int], *, index: bool) -> dict[str, int]:
    lines = len(sites) * (config.steps // config.log_every + 1)
    dictionaries = _FP32 * sum(dictionary_parameters(config.width, d_in) for d_in in sites.values())
    items = {
        "dictionaries": dictionaries,
        # weights and both moments; two are kept, and a third is written before one of them goes
        "checkpoints, until it is done": 3 * 3 * dictionaries,
        "metrics": 300 * lines,
    }
    if index:
        items["feature index"] = _INDEX_PER_LATENT * config.width * len(sites)
    return items
