"""Archives made wrong on purpose: .npz, and what torch.save writes."""

import io
import pickle
import random
import struct
import zipfile
from typing import Any

import numpy as np
import torch

from benchmarks.fuzz_bytes import BYTES, HARM, WORDS, Payload, changed, flip, place

_DESCRIPTIONS = "<f8 >f4 <f2 <i4 |b1 |u1 |O <U5 |S4 <c8 <M8[s] |V4 <f16 f4 =f4 <f3".split()
_OPCODES = (
    *(
        b"K\x00",
        b"K\xff",
        b"M\xff\xff",
        b"J\xff\xff\xff\x7f",
        b"J\xff\xff\xff\xff",
        b".",
        b"R",
        b"b",
        b"(",
        b"t",
    ),
    *(b"}", b"]", b"0", b"2", b"Q", b"c__builtin__\neval\n", b"cos\nsystem\n"),
    *(b"r\xff\xff\xff\x7f", b"p999999999\n"),
    *(bytes([op]) + b"\xff" * 7 + b"\x3f" for op in b"\x8a\x8d\x8e\x95\x96"),
)
"""Numbers, ends, calls and lookups of a pickle, and what claims memory."""
_REBUILDERS = (
    *(b"_rebuild_parameter", b"_rebuild_sparse_tensor", b"_rebuild_qtensor"),
    b"_rebuild_meta_tensor_no_storage",
)


def _members(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def _archive(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def _zipped(data: bytes, rng: random.Random) -> bytes:
    """A whole archive of the wrong members."""
    members = _members(data)
    at = rng.randrange(len(members))
    name, content = members[at]
    folder = name.rpartition("/")[0]
    way = rng.randrange(9)
    if way == 0:
        members[at] = (
            rng.choice((*WORDS, "../" + name, "/" + name, f"{folder}/../{name}", name + ".txt")) or "_",
            content,
        )
    elif way == 1:
        members.append((name, rng.choice((content, b"", members[0][1]))))
    elif way == 2:
        return _archive(members, rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    elif way == 3:
        shape = (3000, 500)
        members[at] = (name, _npy(np.zeros(shape, np.float32)))
        return _archive(members, zipfile.ZIP_DEFLATED)
    elif way == 4:
        members[at] = (name, rng.choice((data, _archive(members, zipfile.ZIP_DEFLATED), b"")))
    elif way == 5:
        del members[at]
    elif way == 6:
        members.append(
            (rng.choice(("x.npy", "data.pkl", "a/data.pkl", "x/", "a/b/c.npy", "byteorder")), content)
        )
    elif way == 7:
        members[at] = (name, flip(content, rng))
    else:
        rng.shuffle(members)
    return (
        rng.choice((b"", b"", b"", b"#!/bin/sh\n"))
        + _archive(members)
        + rng.choice((b"", b"", b"PK\x05\x06" + bytes(18)))
    )


def _directory(data: bytes, rng: random.Random) -> bytes:
    """Lies in the archive's directory: sizes, methods, flags, places, links."""
    made = bytearray(data)
    at = (
        data.rfind(b"PK\x01\x02", 0, place(len(data), rng))
        if rng.random() < 0.5
        else data.find(b"PK\x01\x02")
    )
    at = max(at, data.find(b"PK\x01\x02"))
    field, size = rng.choice(
        ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (38, 4), (42, 4))
    )
    value = rng.choice((0, 1, 8, 9, 99, 2**32 - 1, 2**31, len(data), 0xA1FF0000, rng.randrange(2**32)))
    made[at + field : at + field + size] = (value % 256**size).to_bytes(size, "little")
    if rng.random() < 0.3:
        end = data.rfind(b"PK\x05\x06")
        spot, size = rng.choice(((8, 2), (10, 2), (12, 4), (16, 4), (20, 2)))
        made[end + spot : end + spot + size] = (value % 256**size).to_bytes(size, "little")
    return bytes(made)


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _member(data: bytes, rng: random.Random) -> bytes:
    """A member whose own header lies, in an archive that is whole."""
    members = _members(data)
    at = rng.randrange(len(members))
    name, content = members[at]
    if not name.endswith(".npy"):
        members[at] = (name, rng.choice(BYTES)(content, rng))
        return _archive(members)
    size = int.from_bytes(content[8:10], "little")
    header, body = content[10 : 10 + size].decode("latin-1"), content[10 + size :]
    odd = (
        f"({rng.choice((0, -1, 2**31, 2**62, '6.0', 'True', 'None', '1,' * 40))}, 20)",
        "()",
        "[6, 20]",
        "(6, 20",
        "6",
    )
    way = rng.randrange(8)
    if way == 0:
        header = header.replace("<f4", rng.choice(_DESCRIPTIONS))
    elif way == 1:
        header = header.replace(
            "False", rng.choice(("True", "1", "None", "__import__('os').mkdir('" + HARM + "')"))
        )
    elif way == 2:
        start, stop = header.index("("), header.index(")") + 1
        header = header[:start] + rng.choice(odd) + header[stop:]
    elif way == 3:
        header = rng.choice(
            ("{" * 5000, "{'descr': '<f4'}", "", "(" * 500, header + " " * 60_000, "\0", "lambda: 0")
        )
    elif way == 4:
        body = _npy(np.array([Payload()], dtype=object))[-40:]
    elif way == 5:
        members[at] = (name, _npy(np.array(rng.choice(([Payload()], ["a"], [True], [1 + 2j], 3.0, [])))))
        return _archive(members)
    elif way == 6:
        header = header.replace(
            "'<f4'", rng.choice(("[('a', '<f4')]", "'<f4', 'descr': '|O'", "('<f4', (2,))", "None"))
        )
    else:
        body = body[: rng.randrange(len(body) + 1)] + bytes(rng.choice((0, 4, 4000)))
    version = rng.choice((1, 1, 1, 1, 2, 3, 9))
    length = struct.pack("<H" if version == 1 else "<I", len(header) & 0xFFFF)
    members[at] = (
        name,
        b"\x93NUMPY" + bytes([version, 0]) + length + header.encode("latin-1", "replace") + body,
    )
    return _archive(members)


def _npz(data: bytes, rng: random.Random) -> bytes:
    """A whole .npz, or a whole file of torch.save, of changed arrays."""
    if any(name.endswith(".npy") for name, _ in _members(data)):
        arrays = {name: torch.from_numpy(array) for name, array in np.load(io.BytesIO(data)).items()}
        made, buffer = changed(arrays, rng), io.BytesIO()
        save = rng.choice((np.savez, np.savez, np.savez_compressed))
        wide = {
            n: a.float() if a.dtype in (torch.bfloat16, torch.float8_e4m3fn) else a for n, a in made.items()
        }
        save(
            buffer,
            allow_pickle=False,
            **{name.replace("/", "_"): array.numpy() for name, array in wide.items()},
        )
        return buffer.getvalue()
    arrays = torch.load(io.BytesIO(data), weights_only=True)
    buffer = io.BytesIO()
    torch.save(changed(arrays, rng), buffer)
    return buffer.getvalue()


def _objects(data: bytes, rng: random.Random) -> bytes:
    """What torch.save and pickle write of objects that are no dict of tensors."""
    arrays = torch.load(io.BytesIO(data), weights_only=True)
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    odd: list[Any] = [
        *(
            Payload(),
            None,
            1,
            "text",
            [array],
            {"a": array},
            array.expand(3, *array.shape),
            array.to_sparse(),
        ),
        *(
            torch.nn.Parameter(array.float()),
            array.to(torch.complex64),
            torch.empty(0),
            array.numpy(),
            {1: array},
        ),
        *(
            torch.ones(1).expand(10**6, 10**6),
            torch.ones(4)[::2],
            torch.ones(3, device="meta"),
            torch.tensor(1),
        ),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ]
    new: Any = {**arrays, name: rng.choice(odd)}
    way = rng.randrange(10)
    if way == 0:
        new = rng.choice((odd, array, {1: array}, {}, (arrays,), torch.nn.Linear(2, 2), Payload()))
    elif way == 1:
        new = dict.fromkeys(arrays, array)
    elif way == 2:
        return pickle.dumps(rng.choice((Payload(), {"W_enc": Payload()})), protocol=rng.randrange(6))
    buffer = io.BytesIO()
    torch.save(new, buffer, _use_new_zipfile_serialization=rng.random() < 0.9)
    return buffer.getvalue()


def _opcodes(data: bytes, rng: random.Random) -> bytes:
    """The pickle within a file of torch.save, changed under a right checksum."""
    members = _members(data)
    at = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    name, content = members[at]
    way = rng.randrange(6)
    if way == 0:
        content = pickle.dumps({"W_enc": Payload()}, protocol=2)
    elif way == 1:
        new = rng.choice(
            (b"FloatStorage", b"DoubleStorage", b"HalfStorage", b"QInt8Storage", b"UntypedStorage")
        )
        content = content.replace(b"FloatStorage", new, rng.choice((1, 99)))
    elif way == 2:
        spot = place(len(content), rng)
        content = content[:spot] + rng.choice(_OPCODES) + content[spot + rng.randrange(3) :]
    elif way == 3:
        content = content.replace(
            b"K\x06",
            rng.choice((b"K\x00", b"K\x07", b"K\xff", b"M\x00\x10", b"J\xff\xff\xff\xff")),
            rng.choice((1, 2)),
        )
    elif way == 4:
        content = content.replace(
            b"_rebuild_tensor_v2",
            rng.choice(_REBUILDERS),
            1,
        )
    else:
        content = flip(content, rng)
    members[at] = (name, content)
    return _archive(members)


ZIP = (_zipped, _directory, _member, _npz)
TORCH = (_objects, _opcodes, _opcodes)
