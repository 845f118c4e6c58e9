"""A site's files in a checkpoint: one of all latents, or one for each shard's range of them.

    SITE.safetensors              the whole dictionary's tensors
    SITE.FIRST-LAST.safetensors   those of the latents from FIRST to before LAST, and what all latents share

Nothing tells of ranks, so that a dictionary can be taken up by any number of shards.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.errors import UserError
from sae.kernels.shards import Shard
from sae.kernels.step import PER_LATENT

_ENDING = ".safetensors"
_OF_LATENTS = {*PER_LATENT, "silent_for"}


def file_stem(site: str, shard: Shard | None) -> str:
    """The name, without its ending, of the file that a trainer's tensors go into."""
    return site if shard is None else f"{site}.{shard.latents.start}-{shard.latents.stop}"


def read_site(folder: Path, site: str, latents: slice) -> dict[str, Tensor]:
    """A site's tensors on the CPU: of a range of its latents, and what they share. No others are read.

    Raises UserError naming the site or the file when latents are missing or a file is torn.
    """
    parts: list[dict[str, Tensor]] = []
    reached = latents.start
    for path, first, last in _files(folder, site, latents.stop):
        if first <= reached < last:
            stop = min(last, latents.stop)
            parts.append(_read(path, slice(reached - first, stop - first)))
            reached = stop
    if not parts or reached < latents.stop:
        raise UserError(
            f"{folder} must hold the latents {latents.start} to {latents.stop} of {site}",
            f"those up to {reached}" if parts else "no file of them",
            "restore the checkpoint from a copy",
        )
    return {
        name: torch.cat([part[name] for part in parts]) if _of_latents(name) else tensor
        for name, tensor in parts[0].items()
    }


def _files(folder: Path, site: str, width: int) -> list[tuple[Path, int, int]]:
    """The site's files in the order of the latents, with the first of them and what is behind the last."""
    pattern = re.compile(re.escape(site) + r"\.(\d+)-(\d+)" + re.escape(_ENDING))
    ranges = [(path, pattern.fullmatch(path.name)) for path in folder.glob(f"*{_ENDING}")]
    found = [(path, int(match[1]), int(match[2])) for path, match in ranges if match]
    if (whole := folder / f"{site}{_ENDING}").is_file():
        found.append((whole, 0, width))
    return sorted(found, key=lambda file: file[1:])


def _read(path: Path, latents: slice) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {n: file.get_slice(n)[latents] if _of_latents(n) else file.get_tensor(n) for n in names}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} must be a whole safetensors file", str(error), "restore the file or write it again"
        ) from error


def _of_latents(name: str) -> bool:
    return name.rpartition(".")[2] in _OF_LATENTS
