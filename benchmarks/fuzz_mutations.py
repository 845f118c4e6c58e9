"""Dictionaries' folders made wrong on purpose, each by a seed: what benchmarks/fuzz_formats.py opens.

A folder is a dict of file names and bytes. A mutation changes one in place, and knows the format that it
breaks, so that what it makes gets past the first checks. The same seed makes the same folder.
"""

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

from benchmarks.fuzz_archives import TORCH, ZIP
from benchmarks.fuzz_bytes import BYTES, WORDS, Change, changed, cut

Files = dict[str, bytes]

_KEYS = (
    *"architecture d_in d_sae d_out dtype k metadata jumpscope site_in site_out model prepend_bos".split(),
    *"apply_b_dec_to_input normalize_activations norm_scaling_factor rescale_acts_by_decoder_norm".split(),
    *"sae_lens_version hook_name hook_name_out hook_head_index context_size context l0_target skip".split(),
    *"activation_fn activation_fn_kwargs hook_point finetuning_scaling_factor dataset_path corpus".split(),
    *"trainer buffer dict_class activation_dim dict_size layer lm_name submodule_name ctx_len".split(),
    *"model_name hf_hook_point_in hf_hook_point_out width l0 affine_connection type".split(),
    *"activation signed transcode skip_connection num_latents target_l0 reshape_activations".split(),
)
_ANSWERS = (
    *"jumprelu topk batchtopk gated relu standard transcoder skip_transcoder jumprelu_transcoder".split(),
    *"jumprelu_skip_transcoder matryoshka_batchtopk abstopk temporal jump_relu groupmax".split(),
    *"AutoEncoder AutoEncoderNew GatedAutoEncoder JumpReluAutoEncoder AutoEncoderTopK".split(),
    *"BatchTopKSAE MatryoshkaBatchTopKSAE IdentityDict layer_norm expected_average_only_in none".split(),
    *"constant_norm_rescale 7.0.0 6.99.0 5.1.0 99 v6 float64 bfloat16 model.layers.9.output".split(),
    *"resid_post_layer_5 mlp_out_layer_99999 blocks.3.hook_resid_post blocks.-1.hook_z".split(),
)
_ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        6,
        20,
        4,
        2**31,
        2**63,
        2**64,
        -(2**70),
        10**400,
        1.5,
        -0.0,
        1e308,
        1e-320,
    ),
    *(float("nan"), float("inf"), [], {}, [[]], [1, 2], {"a": 1}, {"architecture": "topk"}, [None] * 9),
)
_DTYPES = "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL F8_E4M3 F8_E5M2 U64 C64 F4 X".split()


def _field(data: bytes, rng: random.Random) -> bytes:
    """Sets, adds or drops values at any depth."""
    values = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        inner = [values, *(part for part in values.values() if isinstance(part, dict))]
        inner += [part for each in inner[1:] for part in each.values() if isinstance(part, dict)]
        at = rng.choice(inner)
        key = rng.choice(sorted(at)) if at and rng.random() < 0.8 else rng.choice(_KEYS + WORDS)
        value = rng.choice((rng.choice(_ODD), rng.choice(_ANSWERS + WORDS)))
        if rng.random() < 0.15:
            at.pop(key, None)
        elif rng.random() < 0.05:
            at[key] = values
            return json.dumps(values | {key: None}).encode()
        else:
            at[key] = value
    return json.dumps(values).encode()


def _text(data: bytes, rng: random.Random) -> bytes:
    """JSON that parsers disagree about, and what is none."""
    text = data.decode()
    key = rng.choice(sorted(json.loads(data)) or [""])
    value = rng.choice(
        ("1e999", "-0", "NaN", "9" * 5000, '"\\ud800"', "[" * 3000, "null", "1E-400", "{}", "0x10")
    )
    return rng.choice(
        (
            text.replace("{", '{"' + key + f'": {value}, ', 1).encode(),
            (text.rstrip()[:-1] + f', "{key}": {value}}}').encode("utf-8", "surrogatepass"),
            b"\xef\xbb\xbf" + data,
            text.encode("utf-16"),
            b"[" + data + b"]",
            data + data,
            b'{"a":' * rng.choice((500, 100_000)) + b"1",
            value.encode(),
            text.replace('"', "'").encode(),
            data.replace(b":", b": ,", 1),
            b" " * 100_000 + data,
        )
    )


_JSON = (_field, _field, _field, _text)


def _header(data: bytes, rng: random.Random) -> bytes:
    """A header that lies about names, dtypes, shapes and places."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        row = header[rng.choice(names)]
        way = rng.randrange(8)
        if way == 0:
            row["dtype"] = rng.choice((*_DTYPES, 7, None))
        elif way == 1:
            row["shape"] = _shape(row["shape"], rng)
        elif way == 2:
            row["data_offsets"] = [
                rng.choice((0, 4, len(body), 2**63, -1, *row["data_offsets"])) for _ in "ab"
            ]
        elif way == 3:
            row["data_offsets"] = header[rng.choice(names)]["data_offsets"]
        elif way == 4:
            header[rng.choice(WORDS)] = rng.choice((row, {}, None, dict(row, shape=[0], data_offsets=[0, 0])))
        elif way == 5:
            header["__metadata__"] = rng.choice(({"format": "pt"}, {"a": 1}, [], None, {"x": "y" * 10_000}))
        elif way == 6:
            row[rng.choice(("extra", "dtype", "shape", "data_offsets"))] = rng.choice(_ODD)
        else:
            row["shape"], row["dtype"] = [2 * n for n in row["shape"]], rng.choice(("F16", "BF16", "I8"))
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        name = json.dumps(rng.choice(names)).encode()
        text = text.replace(
            b"{", b"{" + name + b': {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, ', 1
        )
    length = rng.choice((len(text),) * 12 + (0, len(text) - 1, 2**63, len(text) + len(body)))
    return struct.pack("<Q", length) + text + body


def _arrays(data: bytes, rng: random.Random) -> bytes:
    """A whole safetensors file of changed arrays: dtypes, shapes, names, values."""
    from safetensors.torch import load, save

    return save({name: array.contiguous() for name, array in changed(load(data), rng).items()})


def _shape(shape: list[int], rng: random.Random) -> list[Any]:
    n = rng.choice((0, 1, -1, 2**31, 2**62, 1.5, "6", None, True))
    return rng.choice(
        (
            [*shape, n],
            [n],
            shape[::-1],
            shape[1:],
            [shape[0] * 2, *shape[1:]] if shape else [2],
            [1] * 70,
            [*shape, 1],
        )
    )


_SAFETENSORS = (_header, _header, _arrays)


_KINDS: dict[str, tuple[Change, ...]] = {
    "json": _JSON,
    "safetensors": _SAFETENSORS,
    "npz": ZIP,
    "pt": (*ZIP, *ZIP, *TORCH),
}


def mutate(files: Files, rng: random.Random, others: list[Files]) -> tuple[Files, list[str]]:
    """A broken copy of a folder, and the names of what was done to it.

    `others` are the folders that parts may be taken from.
    """
    made, done = dict(files), []
    for _ in range(rng.choices((1, 2, 3, 5), (60, 25, 10, 5))[0]):
        name = rng.choice(sorted(made))
        pool = _KINDS.get(name.rpartition(".")[2], BYTES)
        change = rng.choice(pool if rng.random() < 0.75 else BYTES)
        if rng.random() < 0.06:
            done.append(_between(made, name, rng, others))
            continue
        try:
            made[name] = change(made[name], rng)
        except Exception:  # an earlier mutation left nothing that this one could read
            made[name] = cut(made[name], rng)
        done.append(f"{change.__name__} {name}")
    return made, done


def _between(files: Files, name: str, rng: random.Random, others: list[Files]) -> str:
    """Moves whole files: between names, and in from another dictionary."""
    other = rng.choice(others)
    taken = rng.choice(sorted(other))
    way = rng.randrange(5)
    if way == 0:
        files[name] = other[taken]
    elif way == 1:
        files[taken] = other[taken]
    elif way == 2 and len(files) > 1:
        del files[name]
    elif way == 3:
        new = rng.choice(
            ("params.npz", "ae.pt", "cfg.json", "config.json", "sae_weights.safetensors", "x.npz")
        )
        files[new] = files.pop(name)
    else:
        files[f"sub/{name}"] = files.pop(name)
    return f"between {name} {taken} {way}"


def misplace(folder: Path, rng: random.Random) -> tuple[Path, str]:
    """Makes the file system lie about a written folder; returns the path to open, and what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files or rng.random() < 0.94:
        return (folder if rng.random() < 0.9 or not files else rng.choice(files)), ""
    path, way = rng.choice(files), rng.randrange(7)
    if way < 5:
        path.unlink()  # and something else stands there
    if way == 0:
        path.symlink_to(
            rng.choice(("/dev/zero", "/dev/null", "/etc/passwd", ".", path.name, "nowhere", "/proc/self/mem"))
        )
    elif way == 1:
        os.mkfifo(path)
    elif way == 2:
        path.mkdir()
    elif way == 3 and len(files) > 1:
        path.symlink_to(next(other for other in files if other != path))
    elif way == 4:
        path.with_suffix(rng.choice((".npz", ".pt", ".safetensors", ".json", ".PT"))).write_bytes(b"")
    elif way == 5:
        path.rename(path.with_suffix(rng.choice((".npz", ".pt", ".safetensors", ".bin"))))
    elif way == 6:
        path.chmod(0)
    return (folder if rng.random() < 0.5 else path), f"misplace {path.name} {way}"
