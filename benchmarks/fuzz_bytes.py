"""Changes that any file's bytes can suffer, and the names, arrays and payload of the other mutations."""

import os
import random
import struct
from collections.abc import Callable
from typing import Any

import torch

Change = Callable[[bytes, random.Random], bytes]

HARM = "harm-was-done"
"""What a pickle makes in the working folder when it is run."""

WORDS = (
    *"W_enc W_dec b_enc b_dec threshold W_skip r_mag b_gate b_mag gate_bias mag_bias".split(),
    *"k bias group_sizes".split(),
    *"w_enc w_dec affine_skip_connection encoder.weight encoder.bias decoder.weight decoder.bias".split(),
    *"scaling_factor sparsity topk_threshold W_dec_norms decoder_bias".split(),
    *("", "..", "../../x", "/etc/passwd", "C:/x", "a\0b", "x" * 10_000, "\ud800", "日本", "W_enc.npy", "."),
)


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (HARM,)


def place(size: int, rng: random.Random) -> int:
    # structure lies at the ends: headers in front, a zip's directory behind
    spot = rng.choice((rng.randrange(400), size - 1 - rng.randrange(900), rng.randrange(size or 1)))
    return min(max(0, spot), max(0, size - 1))


def flip(data: bytes, rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if made else 0):
        at = place(len(made), rng)
        made[at] = rng.choice((made[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
    return bytes(made)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[
        : rng.choice((rng.randrange(len(data) + 1), max(0, len(data) - rng.randrange(1, 9)), 0, 1, 9))
    ]


def _remove(data: bytes, rng: random.Random) -> bytes:
    at = place(len(data), rng)
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, rng.randrange(1, 200))) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = place(len(data), rng)
    new = rng.choice(
        (rng.randbytes(rng.randrange(1, 40)), bytes(rng.randrange(1, 4000)), data[:64], data[-64:])
    )
    return data[:at] + new + data[at:]


def _number(data: bytes, rng: random.Random) -> bytes:
    """Writes a size that is none over whatever stands there."""
    at = place(len(data), rng)
    value = rng.choice(
        (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1, len(data))
    )
    new = rng.choice(
        (struct.pack("<Q", value), struct.pack("<I", value & 0xFFFFFFFF), struct.pack("<H", value & 0xFFFF))
    )
    return data[:at] + new + data[at + len(new) :]


BYTES: tuple[Change, ...] = (flip, flip, cut, _remove, _insert, _number)


def changed(arrays: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    made = dict(arrays)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(sorted(made))
        array, way = made[name], rng.randrange(9)
        if way == 0:
            kinds = (
                torch.float16,
                torch.bfloat16,
                torch.float64,
                torch.int32,
                torch.bool,
                torch.float8_e4m3fn,
            )
            made[name] = array.to(rng.choice((*kinds, torch.complex64, torch.uint8)))
        elif way == 1 and array.numel():
            flat = array.clone().flatten()
            odd = (float("nan"), float("inf"), -float("inf"), 1e38, 1e-45, -0.0)
            flat[rng.randrange(flat.numel())] = rng.choice(odd) if array.is_floating_point() else -1
            made[name] = flat.reshape(array.shape)
        elif way == 2:
            made[name] = array.T if array.ndim == 2 else array.reshape(-1, 1)
        elif way == 3:
            made[name] = torch.zeros(_small(array.shape, rng), dtype=array.dtype)
        elif way == 4 and len(made) > 1:
            del made[name]
        elif way == 5:
            made[rng.choice(WORDS[:26])] = array
        elif way == 6:
            made[rng.choice(WORDS[:26])] = made.pop(name)
        elif way == 7:
            made[name] = array * rng.choice((0, -1, 1e30, 1e-40))
        else:
            made[rng.choice(WORDS[:26])] = torch.randn(
                rng.choice(((), (1,), (20,), (6,), (6, 6), (20, 6), (0,)))
            )
    return made


def _small(shape: torch.Size, rng: random.Random) -> list[int]:
    return rng.choice(
        ([], [0], [1], [0, 20], [6, 0], [*shape, 1], [20], [6], [n + 1 for n in shape], [1, *shape])
    )
