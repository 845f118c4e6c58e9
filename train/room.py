"""Whether a machine has the memory that a plan asks for: for one process, and for all ranks on it."""

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from activations.ring import ring_bytes, rows_for_memory
from sae.errors import UserError
from sae.numbers import format_size
from train.config import TrainConfig
from train.machine import free_gpu_memory, free_memory, own_private_memory
from train.plan import EXCHANGE, Plan


def missing_memory(plan: Plan, config: TrainConfig | None = None) -> UserError | None:
    """The error for a plan that exceeds what is free, less what this process holds of it already.

    With the `config` of a training run it names the --buffer that fits, if any does.
    """
    own = own_private_memory()
    free, need, where = free_memory(), plan.memory_total - own, "memory"
    if plan.device != "cpu":
        if plan.host_memory - own > free:
            must = (
                f"the machine must have the memory planned beside the GPU's: {format_size(plan.host_memory)}"
            )
            return UserError(must, f"{format_size(free)} free", "close other programs")
        device = torch.device(plan.device)
        free, where = free_gpu_memory(device), "GPU memory"
        need = plan.memory_total - torch.cuda.memory_allocated(device)
    if need <= free:
        return None
    remedy = "close other programs"
    if config is not None and plan.own:
        shares = {"batch": config.batch, "passes": config.passes}
        dtype = plan.torch_dtype
        spare = free - need + ring_bytes(plan.own, dtype=dtype, rows=plan.ring_rows, **shares)
        if spare >= ring_bytes(plan.own, dtype=dtype, rows=config.passes * config.batch, **shares):
            remedy += f", or give --buffer {rows_for_memory(spare, plan.own, dtype=dtype, **shares)}"
        remedy += ", or fewer --layers, or a smaller --width"
    return UserError(
        f"the {where} planned must be free: {format_size(plan.memory_total)}, "
        f"of which {format_size(max(0, plan.memory_total - need))} are taken already",
        f"{format_size(free)} free",
        remedy,
    )


def rank_facts(plan: Plan, config: TrainConfig | None = None) -> dict[str, Any]:
    """A rank's plan as it is told to the others; sizes in bytes. A harvest has no `config`, and no ring.

    `need` is what it will still take of its machine's memory, of which `free` is left for all.
    """
    ring = 0
    if config is not None:
        shares = {"rows": plan.ring_rows, "batch": config.batch, "passes": config.passes}
        ring = ring_bytes(plan.own, dtype=plan.torch_dtype, **shares)
    on_machine = plan.memory_total if plan.device == "cpu" else plan.host_memory
    return {
        "host": socket.gethostname(),
        "sites": len(plan.own),
        "ring": ring,
        "exchange": plan.memory.get(EXCHANGE, 0),
        "total": plan.memory_total,
        "need": on_machine - own_private_memory(),
        "free": free_memory(),
    }


_LESS = "start fewer ranks there, or give a smaller --buffer, fewer --layers or a smaller --width"


def crowded(ranks: Sequence[Mapping[str, Any]], remedy: str = _LESS) -> UserError | None:
    """The error for a machine that has no room for all its ranks, by the facts of every rank."""
    for host in dict.fromkeys(facts["host"] for facts in ranks):
        here = [facts for facts in ranks if facts["host"] == host]
        need, free = sum(facts["need"] for facts in here), min(facts["free"] for facts in here)
        if need > free:
            return UserError(
                f"the memory planned for the {len(here)} ranks on {host} must be free: {format_size(need)}",
                f"{format_size(free)} free",
                remedy,
            )
    return None
