"""Tensors in safetensors files, written whole or not at all. Apart from `sae.files`, for it needs torch."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sae.errors import UserError
from sae.files import atomic_write


def save_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file atomically. Tensors that share memory are written each on its own."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        ready[name] = tensor.detach().cpu().contiguous()
        storage = ready[name].untyped_storage().data_ptr()
        if storage in storages:  # safetensors refuses a second tensor in the same memory
            ready[name] = ready[name].clone()
        storages.add(storage)
    atomic_write(path, lambda temporary: safetensors.torch.save_file(ready, temporary, dict(metadata or {})))


def load_tensors(path: Path | str, device: str = "cpu") -> dict[str, Tensor]:
    """Reads a safetensors file. Raises UserError naming the file when it is missing or torn."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path.name} must be there", f"no file {path}", "check the path")
    try:
        return safetensors.torch.load_file(path, device=device)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} must be a whole safetensors file", str(error), "restore the file or write it again"
        ) from error
