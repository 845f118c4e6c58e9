"""One shard of a store: a plain safetensors file, written in a stream and read into buffers of the caller's.

The safetensors package maps what it reads and wants whole tensors to write; a store can afford neither.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from activations.places import Append, Place
from sae.errors import UserError

MAP = ("document", "position", "token")
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I8": torch.int8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# as the safetensors package itself
_MAX_HEADER_BYTES = 100_000_000


class Field(NamedTuple):
    """What a tensor of a shard must be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def scale_name(site: str) -> str:
    """The tensor beside a site in 8 bits: what each row was divided by."""
    return f"{site}.scale"


def shard_fields(widths: Mapping[str, int], dtype: torch.dtype, rows: int) -> dict[str, Field]:
    """All tensors of a shard, in the order they are written."""
    fields = {name: Field(torch.int32, (rows,)) for name in MAP}
    if dtype == torch.int8:
        fields |= {scale_name(site): Field(torch.float32, (rows,)) for site in widths}
    # the widest types first: then each tensor begins at a multiple of its own type's size
    return fields | {site: Field(dtype, (rows, width)) for site, width in widths.items()}


def empty_fields(fields: Mapping[str, Field]) -> dict[str, Tensor]:
    """Tensors for the fields, in one piece of memory."""
    # numpy asks the system for large pages, torch does not: with small ones, touching fresh memory for the
    # first time takes longer than reading a file into it
    memory = torch.from_numpy(np.empty(sum(field.nbytes for field in fields.values()), dtype=np.uint8))
    made, offset = {}, 0
    for name, field in fields.items():
        made[name] = memory[offset : offset + field.nbytes].view(field.dtype).view(field.shape)
        offset += field.nbytes
    return made


def write_shard(
    append: Append, fields: Mapping[str, Field], parts: Callable[[str], Iterable[Tensor]]
) -> dict[str, Any]:
    """Writes a shard from the pieces that `parts` gives of each field; returns its bytes and its sha256."""
    offset, header = 0, {}
    for name, field in fields.items():
        end = offset + field.nbytes
        header[name] = {
            "dtype": _NAMES[field.dtype],
            "shape": list(field.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0

    def put(content: bytes | memoryview) -> None:
        nonlocal size
        append(content)
        digest.update(content)
        size += len(content)

    put(len(text).to_bytes(8, "little") + text)
    for name in fields:
        for part in parts(name):
            put(_bytes_of(part.contiguous()))
    return {"bytes": size, "sha256": digest.hexdigest()}


def read_shard(place: Place, name: str, size: int, wanted: Mapping[str, tuple[Field, Tensor]]) -> None:
    """Reads the `wanted` tensors of a shard of `size` bytes, each into a contiguous buffer of its field.

    Raises UserError naming the shard when it is missing, cut short, or not what the fields say.
    """
    path = place.of(name)
    try:
        with place.reading(name) as read_at:

            def fill(offset: int, view: memoryview) -> None:
                if (count := read_at(offset, view)) != len(view):
                    raise torn(path, f"it ends {len(view) - count} bytes too early")

            prefix = bytearray(8)
            fill(0, memoryview(prefix))
            length = int.from_bytes(prefix, "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise torn(path, f"a header of {length} bytes")
            text = bytearray(length)
            fill(8, memoryview(text))
            begins = _places(path, bytes(text), size - 8 - length, {key: f for key, (f, _) in wanted.items()})
            for key in sorted(begins, key=begins.__getitem__):
                fill(8 + length + begins[key], _bytes_of(wanted[key][1]))
    except OSError as error:
        raise torn(path, error.strerror or str(error)) from error


def torn(path: str, found: str) -> UserError:
    """The error for a file of a store that is missing or not as it was written."""
    return UserError(f"{path} must be whole", found, "restore the file from a copy, or harvest again")


def _places(path: str, text: bytes, room: int, fields: Mapping[str, Field]) -> dict[str, int]:
    """Where each field begins in the data, once everything said about it is found to be right."""
    try:
        header = json.loads(text)
    except ValueError as error:
        raise torn(path, "a header that is not JSON") from error
    begins = {}
    for name, field in fields.items():
        entry = header.get(name) if isinstance(header, dict) else None
        if not isinstance(entry, dict):
            raise torn(path, f"no tensor {name}")
        if (entry.get("dtype"), entry.get("shape")) != (_NAMES[field.dtype], list(field.shape)):
            raise torn(
                path,
                f"{name} is {entry.get('dtype')} {entry.get('shape')} "
                f"instead of {_NAMES[field.dtype]} {list(field.shape)}",
            )
        match entry.get("data_offsets"):
            case [int(begin), int(end)] if 0 <= begin <= end <= room and end - begin == field.nbytes:
                begins[name] = begin
            case offsets:
                raise torn(path, f"{name} at {offsets} of {room} bytes")
    return begins


def _bytes_of(tensor: Tensor) -> memoryview:
    # numpy has no bfloat16; an empty tensor cannot be cast
    return tensor.view(torch.uint8).numpy().reshape(-1).data if tensor.numel() else memoryview(b"")
