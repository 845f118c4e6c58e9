"""The head of a .gguf file: what model it is and whether all of it is there, without reading the weights."""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.errors import UserError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One entry of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """Fastest dimension first, as the format has it."""
    quantization: int
    """ggml's number for the tensor's number format."""
    offset: int
    """Bytes from the start of the data."""

    @property
    def n_values(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class GgufHead:
    """Metadata and tensor table of a .gguf file."""

    metadata: dict[str, Any]
    """Scalars and strings as they are; an array as its length."""
    tensors: tuple[GgufTensor, ...]
    size: int
    """Bytes that the whole file must have."""

    @property
    def exact(self) -> bool:
        """Whether some matrix is stored in 16 or 32 bit floats with more precision than bf16 holds."""
        from gguf import GGMLQuantizationType as Kind

        return any(len(t.shape) > 1 and t.quantization in (Kind.F32, Kind.F16) for t in self.tensors)

    def dimension(self, key: str) -> int | None:
        """A number from the metadata of the model's own architecture, for instance block_count."""
        value = self.metadata.get(f"{self.metadata.get('general.architecture')}.{key}")
        return None if value is None else int(value)


def read_head(path: Path) -> GgufHead:
    """Reads the head of a .gguf file. Raises UserError when it is no such file or breaks off within its
    head."""
    do = "download the file again"
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).head()
    except FileNotFoundError as error:
        raise UserError("the .gguf file must be there", f"no file {path}", "check the path") from error
    except (OSError, ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} must be a whole .gguf file", str(error) or "no data", do) from error


def check_whole(path: Path) -> GgufHead:
    """Reads the head and raises UserError when the file is shorter than its tensors need."""
    head = read_head(path)
    found = path.stat().st_size
    if found < head.size:
        short = f"{found:,} of {head.size:,} bytes: it is truncated"
        raise UserError(f"{path} must be a whole .gguf file", short, "download the file again")
    return head


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def head(self) -> GgufHead:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format, where 2 and 3 can be read")
        n_tensors, n_keys = self.scalar("Q"), self.scalar("Q")
        metadata = {self.string(): self.value(self.scalar("I")) for _ in range(n_keys)}
        tensors = tuple(self.tensor() for _ in range(n_tensors))
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        start = -(-self.at // alignment) * alignment
        return GgufHead(
            metadata=metadata,
            tensors=tensors,
            size=start + max((t.offset + _n_bytes(t) for t in tensors), default=0),
        )

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        (value,) = struct.unpack("<" + code, self.take(size))
        return value

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise ValueError(
                f"it breaks off within its head, after {len(self.data):,} bytes: it is truncated"
            )
        piece = self.data[self.at : self.at + size]
        self.at += size
        return piece

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        # arrays hold the vocabulary: only their length is wanted
        item, length = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            self.take(length * struct.calcsize("<" + _SCALARS[item]))
        else:
            for _ in range(length):
                if item == _STRING:
                    self.take(self.scalar("Q"))
                else:
                    self.value(item)
        return length

    def tensor(self) -> GgufTensor:
        name = self.string()
        shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))
        return GgufTensor(name=name, shape=shape, quantization=self.scalar("I"), offset=self.scalar("Q"))


def _n_bytes(tensor: GgufTensor) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.quantization)]
    return tensor.n_values // per_block * block_bytes
