"""Arrays out of files that strangers made.

Nothing is unpickled but by torch's own restricted reader, and that only after what the file claims has been
held against its size.
"""

import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import torch
from torch import Tensor

from sae.errors import UserError
from sae.files import read_json
from sae.numbers import format_size
from sae.tensor_files import load_tensors

Kind = Literal["npz", "safetensors", "pt"]

_RATIO, _SLACK = 20, 2**20
"""An .npz may unpack to this many times its size plus this many bytes: weights hardly compress."""
_LONGEST_HEADER = 10_000
_LARGEST_CONFIG = 16 * 2**20
_LONGEST_PICKLE = 2**20
_STORAGES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
}
"""torch.save's names of what lies in a member, and the bytes of a number there."""
_NAMES = 10_000
"""Members that an archive may have."""
_AGAIN = "take another copy; do not trust the one that made it"


def kind_of(path: Path) -> Kind | None:
    """What a file is by its first bytes and its members; None for what holds no arrays.

    Raises UserError for pickles, which are refused whatever they are called.
    """
    with _reading(path), path.open("rb") as file:
        start = file.read(16)
    if start[:4] == b"PK\x03\x04":
        names = [info.filename for info in _members(path)]
        if any(name.rpartition("/")[2] == "data.pkl" for name in names):
            return "pt"
        return "npz"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size:
        return "safetensors"
    if start[:1] == b"\x80":
        must = "weights must be .safetensors, .npz, or what today's torch.save writes"
        raise UserError(
            must, f"{path} is a bare pickle, which can run code", "ask its owner for .safetensors"
        )
    return None


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file. Raises UserError when it is torn."""
    with _reading(path), safetensors.safe_open(path, framework="pt") as file:
        return list(file.keys())


def read_arrays(path: Path, kind: Kind) -> dict[str, Tensor]:
    """The arrays of a file by name. Raises UserError naming the file when it is not whole, or not safe."""
    if kind == "npz":
        return _read_npz(path)
    if kind == "pt":
        return _read_torch(path)
    with _reading(path):
        return load_tensors(path)


def write_npz(path: Path, arrays: dict[str, Tensor]) -> None:
    """Writes an uncompressed .npz, as numpy's own `savez` does."""
    # a file, for numpy adds .npz to the names of paths
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: array.numpy() for name, array in arrays.items()})


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object of sane size. Raises UserError for anything else."""
    with _reading(path):
        size = path.stat().st_size
        if size > _LARGEST_CONFIG:
            raise _unsafe(path, "a config must be small", format_size(size))
        values = read_json(path)
    if not isinstance(values, dict):
        raise _unsafe(path, "a config must be a JSON object", type(values).__name__)
    return values


def check_name(name: str, where: object) -> None:
    """Raises UserError for a name that could lead out of its folder."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or name.startswith("/") or "\\" in name or "\0" in name or ":" in parts[0]:
        raise UserError("names must stay inside their folder", f"{name!r} in {where}", _AGAIN)


class _reading:
    """Turns whatever a parser says about a broken file into a UserError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # parsers of hostile bytes raise nearly anything; none of it is a bug of ours
        if isinstance(error, Exception) and not isinstance(error, UserError):
            # torch's advice to load pickles without its guard must not reach the user
            said = "" if isinstance(error, pickle.UnpicklingError) else f": {error}".split("\n")[0]
            found = f"{type(error).__name__}{said[:200]}"
            raise UserError(f"{self.path} must be a whole file of its kind", found, _AGAIN) from error


def _unsafe(path: Path, must: str, found: str) -> UserError:
    return UserError(must, f"{found} in {path}", _AGAIN)


def _members(path: Path) -> list[zipfile.ZipInfo]:
    with _reading(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    names = [info.filename for info in members]
    for name in names:
        check_name(name, path)
    if len(names) != len(set(names)) or len(names) > _NAMES:
        raise _unsafe(path, "an archive's names must be few and each there once", f"{len(names)} names")
    # a reader takes as much memory as a member says that it holds
    if sum(info.compress_size for info in members) > path.stat().st_size:
        raise _unsafe(path, "members must not overlap", "more bytes than the file has")
    return members


def _read_npz(path: Path) -> dict[str, Tensor]:
    members = _members(path)
    unpacked, size = sum(info.file_size for info in members), path.stat().st_size
    if unpacked > _RATIO * size + _SLACK:
        raise _unsafe(
            path, f"an .npz must not unpack to over {_RATIO} times its size", f"{format_size(unpacked)}"
        )
    arrays: dict[str, Tensor] = {}
    with _reading(path), zipfile.ZipFile(path) as archive:
        for info in members:
            name = info.filename
            if not name.endswith(".npy"):
                raise _unsafe(path, "the members of an .npz must be .npy", repr(name))
            with archive.open(info) as stream:
                arrays[name.removesuffix(".npy")] = _read_npy(stream, info.file_size, f"{path}:{name}")
    return arrays


def _read_npy(stream: Any, size: int, where: str) -> Tensor:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise UserError("an array's header must be of version 1 or 2", f"{version} in {where}", _AGAIN)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, by_columns, dtype = read(stream, max_header_size=_LONGEST_HEADER)
    if dtype.kind not in "fiu":
        found = "pickled objects" if dtype.hasobject else str(dtype)
        raise UserError("an array must hold plain numbers", f"{found} in {where}", _AGAIN)
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize != size - stream.tell():
        found = f"{shape} of {dtype} in {size} bytes of {where}"
        raise UserError("an array's header must fit its bytes", found, _AGAIN)
    array = np.empty(count, dtype)
    view, done = array.view(np.uint8).data, 0
    while done < len(view) and (got := stream.readinto(view[done:])):
        done += got
    # the end of a member is where its checksum is compared
    if done != len(view) or stream.read(1):
        raise UserError("an array must be whole", f"{done} of {len(view)} bytes of {where}", _AGAIN)
    array = array.reshape(shape, order="F" if by_columns else "C")
    return torch.from_numpy(np.ascontiguousarray(array, dtype.newbyteorder("=")))


def _read_torch(path: Path) -> dict[str, Tensor]:
    members, size = _members(path), path.stat().st_size
    if any(
        info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in members
    ):
        raise _unsafe(path, "torch.save does not compress", "compressed members")
    with _reading(path):
        _check_storages(path, {info.filename: info.file_size for info in members})
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise _unsafe(path, "the weights must be a dict of tensors", type(loaded).__name__)
    for name, tensor in loaded.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise _unsafe(path, f"{name} must be a plain tensor", type(tensor).__name__)
        # a stride of 0 makes a giant of one number
        if tensor.numel() * tensor.element_size() > size:
            raise _unsafe(path, f"{name} must fit into the file", f"shape {tuple(tensor.shape)}")
    return {name: tensor.detach() for name, tensor in loaded.items()}


class _Stub:
    """Stands for every object that a pickle would make, and does nothing."""

    def __init__(self, *values: object) -> None: ...

    def __call__(self, *values: object) -> "_Stub":
        return self

    def __setitem__(self, name: object, value: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _Storages(pickle.Unpickler):
    """Walks a pickle without making anything of it, and keeps what it says about storages."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.claims: list[tuple[str, str, int]] = []

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        made = _Stub()
        made.name = global_name  # type: ignore[attr-defined]
        return made

    def persistent_load(self, pid: Any) -> Any:
        _, storage, key, _, numel = pid
        self.claims.append((getattr(storage, "name", ""), str(key), int(numel)))
        return _Stub()


def _check_storages(path: Path, sizes: dict[str, int]) -> None:
    # torch takes a storage's length from the pickle and not from its member: a lie reads foreign memory
    with zipfile.ZipFile(path) as archive:
        main = next(name for name in sizes if name.rpartition("/")[2] == "data.pkl")
        if sizes[main] > _LONGEST_PICKLE:
            raise _unsafe(path, "the pickle of some tensors must be small", format_size(sizes[main]))
        content = archive.read(main)
        # the unpickler makes room for as many objects as the highest number that one is kept under
        kept = (at for code, at, _ in pickletools.genops(content) if "PUT" in code.name)
        if not all(0 <= int(at or 0) < len(content) for at in kept):
            raise _unsafe(path, "a pickle must number its objects in order", "a number beyond its length")
        walk = _Storages(io.BytesIO(content))
        walk.load()
        if archive.testzip() is not None:
            raise _unsafe(path, "checksums must be right", "a wrong one")
    for storage, key, numel in walk.claims:
        width = _STORAGES.get(storage)
        if width is None or sizes.get(f"{main.removesuffix('data.pkl')}data/{key}") != numel * width:
            raise _unsafe(path, "storages must be as long as their members", f"{storage} of {numel}")
