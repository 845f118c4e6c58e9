"""What this machine can still give: memory, under the limits of its control groups, and a GPU's."""

from pathlib import Path

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_STATUS = Path("/proc/self/status")
# a limit above this is version 1's way to say that there is none
_NO_LIMIT = 2**60


def free_memory() -> int:
    """Bytes that this process can still take of the machine's memory, within its control group."""
    free = int(psutil.virtual_memory().available)
    within = cgroup_free()
    return free if within is None else min(free, within)


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that this process can still take of a GPU, those included that torch holds ready."""
    free = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def own_memory() -> int:
    """Bytes of memory that the process holds: its resident set."""
    return int(psutil.Process().memory_info().rss)


def own_private_memory() -> int:
    """The same without mapped files, which the system counts as free since it can read them again."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def own_peak() -> int:
    """The most that `own_memory` has been so far; what it is now where the system keeps no record."""
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return own_memory()


def cgroup_free(root: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> int | None:
    """Bytes left to this process below the lowest limit of its control group and those above it.

    Reads both versions' files. What a group holds of files counts as left, since it can be given back. None
    where no limit is set.
    """
    left = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        first = "memory" in controllers.split(",")
        if controllers and not first:
            continue
        top = root / "memory" if first else root
        one, two = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
        # a container may see its own group as the root, whatever the path says
        folders = [top / path.strip("/"), *(top / path.strip("/")).parents]
        for folder in folders:
            if folder == top.parent:
                break
            limit, used = (_number(folder / name) for name in (one if first else two))
            if limit is not None and used is not None and limit < _NO_LIMIT:
                left.append(max(0, limit - used + _file_pages(folder)))
    return min(left, default=None)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _file_pages(folder: Path) -> int:
    try:
        pairs = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
    except OSError:
        return 0
    held = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    # version 1 has its own group under these names and the whole tree under total_*
    return sum(held.get(f"total_{name}", held.get(name, 0)) for name in ("inactive_file", "active_file"))
