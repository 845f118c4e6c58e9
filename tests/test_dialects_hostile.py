"""Files that are broken, mislabelled or made to do harm: each refused by name, and nothing but UserError."""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import dialect_makers as make
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sae
from sae import dialects
from sae.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DIALECTS = {
    "saelens": ("saelens", "sae_weights.safetensors", "cfg.json"),
    "gemma_scope": ("gemma_scope", "params.npz", None),
    "gemma_scope_2": ("gemma_scope_2", "params.safetensors", "config.json"),
    "dictionary_learning": ("dictionary_learning", "ae.pt", "config.json"),
    "sparsify": ("sparsify", "sae.safetensors", "cfg.json"),
}
SCOPE_2 = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.9.output", "width": 20, "l0": 20}


def make_folder(folder, name):
    """A whole folder of a dialect; returns its weights and its config."""
    maker, weights, config = DIALECTS[name]
    options = {"dictionary_learning": {"dict_class": "BatchTopKSAE"}, "gemma_scope_2": {"config": SCOPE_2}}
    getattr(make, maker)(folder, **options.get(name, {}))
    return folder / weights, folder / config if config else None


def refuses(path, match):
    with pytest.raises(UserError, match=match):
        dialects.read(path)


@pytest.mark.parametrize("name", DIALECTS)
def test_torn_files(tmp_path, name):
    weights, config = make_folder(tmp_path / "d", name)
    whole = weights.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 40, 9, 1, 0):
        weights.write_bytes(whole[:length])
        refuses(tmp_path / "d", weights.name)
    weights.write_bytes(whole)
    assert dialects.read(tmp_path / "d")
    if config is not None:
        for text in ('{"k": ', "[]", '"x"', "[" * 100_000, "\xff"):
            config.write_text(text, encoding="latin-1")
            refuses(tmp_path / "d", config.name)
    weights.unlink()
    refuses(tmp_path / "d", "must hold weights")


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(tmp_path, name, value):
    weights, _ = make_folder(tmp_path, name)
    if weights.suffix == ".npz":
        arrays = dict(np.load(weights))
        arrays["W_dec"][3, 2] = value
        np.savez(weights, **arrays)
    else:
        is_torch = weights.suffix == ".pt"
        arrays = torch.load(weights, weights_only=True) if is_torch else load_file(weights)
        changed = next(n for n in arrays if n.lower() in ("w_dec", "decoder.weight"))
        arrays[changed][3, 2] = value
        (torch.save if is_torch else save_file)(arrays, weights)
    refuses(tmp_path, "W_dec must be finite")


def test_shapes_that_do_not_fit(tmp_path):
    for name, tensor in (("threshold", torch.ones(19)), ("b_dec", torch.ones(7)), ("W_dec", torch.ones(20))):
        make.saelens(tmp_path, "jumprelu", make.plain() | {name: tensor})
        refuses(tmp_path, name)
        make.saelens(tmp_path, "jumprelu", make.plain() | {name: tensor}, apply_b_dec_to_input=True)
        refuses(tmp_path, name)
    make.saelens(tmp_path, "jumprelu", make.plain(), d_sae=21)
    refuses(tmp_path, "d_sae must be that of the arrays, 20")
    make.saelens(tmp_path, "topk", make.plain(), k=21)
    refuses(tmp_path, "k must be from 1 to 20")
    make.saelens(tmp_path, "jumprelu", make.plain() | {"W_enc": torch.ones(6, 20, dtype=torch.int32)})
    refuses(tmp_path, "W_enc must be float16")


def test_labels_that_lie(tmp_path):
    make.saelens(tmp_path / "a", "gated")
    refuses(tmp_path / "a", "b_gate")
    make.saelens(tmp_path / "b", "abstopk")
    refuses(tmp_path / "b", "architecture must be one of")
    make.saelens(tmp_path / "c", about={"jumpscope": {"architecture": "topk"}})
    refuses(tmp_path / "c", "architecture must be one")
    make.dictionary_learning(tmp_path / "d", "AutoEncoder", said="GatedAutoEncoder")
    refuses(tmp_path / "d", "GatedAutoEncoder must hold")
    make.dictionary_learning(tmp_path / "e", "BatchTopKSAE", k=make.K + 1)
    refuses(tmp_path / "e", "k must be that of the arrays")
    make.sparsify(tmp_path / "f", activation="groupmax")
    refuses(tmp_path / "f", "activation must be one of topk")
    make.gemma_scope_2(tmp_path / "g", True, SCOPE_2 | {"affine_connection": False})
    refuses(tmp_path / "g", "affine_connection")
    # contents count, and not names
    make.gemma_scope(tmp_path / "h")
    shutil.move(tmp_path / "h/params.npz", tmp_path / "h/params.safetensors")
    assert dialects.read(tmp_path / "h").dialect == "gemma-scope"
    save_file({"x": torch.ones(3)}, tmp_path / "i.safetensors")
    refuses(tmp_path / "i.safetensors", "must be those of a dictionary")
    (tmp_path / "j.npz").write_bytes(b"no archive at all")
    refuses(tmp_path / "j.npz", "is none of them")


def test_newer_versions(tmp_path):
    make.saelens(tmp_path, about={"sae_lens_version": "7.0.0"})
    refuses(tmp_path, "version 6 at most")
    make.saelens(tmp_path, about={"jumpscope": {"architecture": "jumprelu", "colour": 1}})
    refuses(tmp_path, "colour")


def test_two_dictionaries_in_a_folder(tmp_path):
    make.saelens(tmp_path)
    make.gemma_scope(tmp_path)
    refuses(tmp_path, r"params\.npz, sae_weights\.safetensors")
    assert dialects.read(tmp_path / "params.npz").dialect == "gemma-scope"
    refuses(tmp_path.parent, "did you mean|must hold weights")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path):
    harm = tmp_path / "harm"
    make.dictionary_learning(tmp_path / "a", "AutoEncoder")
    torch.save({"encoder.weight": torch.ones(2, 2), "x": Bomb(harm)}, tmp_path / "a/ae.pt")
    refuses(tmp_path / "a", r"ae\.pt")
    (tmp_path / "a/ae.pt").write_bytes(pickle.dumps(Bomb(harm)))
    refuses(tmp_path / "a", "bare pickle")
    np.savez(tmp_path / "params.npz", W_enc=np.array([Bomb(harm)], dtype=object), w_dec=np.ones(3))
    refuses(tmp_path / "params.npz", "pickled objects")
    assert not harm.exists()
    torch.save([torch.ones(2)], tmp_path / "a/ae.pt")
    refuses(tmp_path / "a", "dict of tensors")


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, data in members:
            made.writestr(name, data)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_archives_that_are_traps(tmp_path):
    path = tmp_path / "params.npz"
    archive(path, [("W_enc.npy", npy(np.zeros((2000, 2000))))], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refuses(path, "unpack to over 20 times")
    good = npy(np.ones((6, 20), np.float32))
    for name in ("../W_enc.npy", "/W_enc.npy", "a\\..\\W_enc.npy", "C:/W_enc.npy"):
        archive(path, [(name, good)])
        refuses(path, "must stay inside")
    archive(path, [("W_enc.txt", good)])
    refuses(path, "must be .npy")
    # a header that claims more than there is
    archive(path, [("W_enc.npy", good.replace(b"(6, 20)", b"(9, 99)"))])
    refuses(path, "header must fit")
    archive(path, [("W_enc.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 60_000) + b"{" * 60_000)])
    refuses(path, "whole file")
    archive(path, [("W_enc.npy", npy(np.array(["text"])))])
    refuses(path, "plain numbers")


def test_storages_that_lie(tmp_path):
    make.dictionary_learning(tmp_path, "JumpReluAutoEncoder")
    path = tmp_path / "ae.pt"
    with zipfile.ZipFile(path) as whole:
        members = [(info.filename, whole.read(info)) for info in whole.infolist()]
    # the pickle says that a storage of 120 numbers has 65,400: torch would read foreign memory
    changed = [(n, d.replace(b"K\x78", b"M\x78\xff") if n.endswith("data.pkl") else d) for n, d in members]
    assert changed != members
    archive(path, changed)
    refuses(tmp_path, "as long as their members")
    archive(path, members, zipfile.ZIP_DEFLATED)
    refuses(tmp_path, "does not compress")
    torch.save({"encoder.weight": torch.ones(1).expand(10**6, 10**6)}, path)
    refuses(tmp_path, "must fit into the file")


def test_members_that_claim_more_than_the_file_has(tmp_path):
    for maker in (make.gemma_scope, lambda folder: make.dictionary_learning(folder, "JumpReluAutoEncoder")):
        maker(tmp_path)
        path = next(path for path in tmp_path.iterdir() if path.suffix in (".npz", ".pt"))
        content = bytearray(path.read_bytes())
        at = content.find(b"PK\x01\x02") + 20  # how many bytes the first member takes in the file
        content[at : at + 4] = b"\xff\xff\xff\x7f"
        path.write_bytes(content)
        refuses(path, "members must not overlap")
        path.unlink()


def test_no_file_and_no_folder(tmp_path):
    make.saelens(tmp_path / "d")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        refuses(tmp_path / name, f"{name} is neither")
    weights = tmp_path / "d" / "sae_weights.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    refuses(tmp_path / "d", "must hold weights")
    weights.unlink()
    weights.symlink_to("/proc/self/mem")
    for read in (dialects.read, sae.load):
        with pytest.raises(UserError, match=r"sae_weights\.safetensors"):
            read(tmp_path / "d")


def test_biases_that_would_be_spread(tmp_path):
    one = torch.ones(1)
    make.saelens(tmp_path / "a", "standard", make.plain() | {"b_enc": one}, apply_b_dec_to_input=True)
    refuses(tmp_path / "a", r"b_enc must have shape \(20,\)")
    without = {name: tensor for name, tensor in make.plain().items() if name != "b_enc"}
    make.saelens(tmp_path / "none", "standard", without, apply_b_dec_to_input=True)
    refuses(tmp_path / "none", r"b_enc must have shape \(20,\)\. Found: no such tensor")
    for folder, name in (("b", "AutoEncoderTopK"), ("c", "AutoEncoder")):
        make.dictionary_learning(tmp_path / folder, name)
        arrays = torch.load(tmp_path / folder / "ae.pt", weights_only=True)
        torch.save(arrays | {"encoder.bias": one}, tmp_path / folder / "ae.pt")
        refuses(tmp_path / folder, r"b_enc must have shape \(20,\)|must fit each other")
    make.sparsify(tmp_path / "layers.5")
    weights = tmp_path / "layers.5/sae.safetensors"
    save_file(load_file(weights) | {"encoder.bias": one}, weights)
    refuses(tmp_path / "layers.5", r"b_enc must have shape \(20,\)")
    save_file(load_file(weights) | {"encoder.weight": torch.ones(3, 6, 20)}, weights)
    refuses(tmp_path / "layers.5", "W_enc must be a matrix")


@pytest.mark.parametrize("claim", [b"r\xff\xff\xff\x3f", b"\x96" + b"\xff" * 7 + b"\x3f", b" " * 2**20])
def test_pickles_that_claim_memory(tmp_path, claim):
    # an object kept as the billionth; a bytearray of 2^62 bytes; a megabyte of pickle
    make.dictionary_learning(tmp_path, "JumpReluAutoEncoder")
    path = tmp_path / "ae.pt"
    with zipfile.ZipFile(path) as whole:
        members = [(info.filename, whole.read(info)) for info in whole.infolist()]
    archive(path, [(n, d[:3] + claim + d[3:] if n.endswith("data.pkl") else d) for n, d in members])
    with pytest.raises(UserError) as error:
        dialects.read(tmp_path)
    assert not isinstance(error.value.__cause__, MemoryError)
    assert (
        "number its objects" in str(error.value)
        or "whole file" in str(error.value)
        or "small" in str(error.value)
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.bool, torch.complex64])
def test_numbers_of_other_kinds(tmp_path, dtype):
    make.sparsify(tmp_path / "layers.5")
    weights = tmp_path / "layers.5/sae.safetensors"
    arrays = load_file(weights)
    save_file(arrays | {"b_dec": arrays["b_dec"].to(dtype)}, weights)
    refuses(tmp_path / "layers.5", "b_dec must be float16")


def test_values_that_cannot_be_said(tmp_path):
    for name, value in (("l0", 10**400), ("l0", float("nan")), ("l0", float("inf"))):
        make.gemma_scope_2(tmp_path, False, SCOPE_2 | {name: value})
        refuses(tmp_path, "l0 must be finite")
    for text in ("\x1b[2Jgone", "a\nb", "\ud800"):
        make.gemma_scope_2(tmp_path, False, SCOPE_2 | {"model_name": text})
        refuses(tmp_path, "model_name must be plain text")
    # the refusal itself can be printed, whatever was in the file
    make.gemma_scope_2(tmp_path, False, {"architecture": "\ud800"})
    with pytest.raises(UserError) as error:
        dialects.read(tmp_path)
    str(error.value).encode()
    make.saelens(tmp_path / "long", about={"jumpscope": {"architecture": "jumprelu", "x" * 10**5: 1}})
    with pytest.raises(UserError, match="keys that this version knows") as error:
        dialects.read(tmp_path / "long")
    assert len(str(error.value)) < 10_000
    (tmp_path / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="must hold JSON"):
        sae.load(tmp_path)


def test_a_slice_of_the_fuzzing(tmp_path):
    # benchmarks/fuzz_formats.py runs it by the million; each number is a folder broken in its own way
    command = [sys.executable, str(ROOT / "benchmarks/fuzz_formats.py"), "--cases", "600"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["findings"] == {} and result["seeds"] == [0, 600]
    # neither everything is broken beyond recognition nor is everything let through
    assert result["opened"] > 20 and result["refused"] > 300


@pytest.mark.parametrize("name", DIALECTS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_at_random(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        weights, config = make_folder(folder, name)
        target = data.draw(st.sampled_from([weights, *([config] if config else [])]))
        content = bytearray(target.read_bytes())
        # structure lies at the ends: headers in front, a zip's directory behind
        place = st.one_of(
            st.integers(0, min(400, len(content) - 1)),
            st.integers(max(0, len(content) - 900), len(content) - 1),
            st.integers(0, len(content) - 1),
        )
        for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=8)):
            content[at] = value
        cut = data.draw(st.integers(0, 3))
        target.write_bytes(bytes(content[: len(content) - cut]))
        try:
            parts = dialects.read(folder)
        except UserError:
            return
        # what still opens is whole
        assert all(torch.isfinite(tensor).all() for tensor in parts.tensors.values())
    finally:
        shutil.rmtree(folder)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@pytest.mark.parametrize("name", [name for name, row in DIALECTS.items() if row[2]])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_configs_at_random(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        _, config = make_folder(folder, name)
        values = json.loads(config.read_text())
        inner = data.draw(st.sampled_from([values, *(v for v in values.values() if isinstance(v, dict))]))
        for key in data.draw(st.lists(st.sampled_from(sorted(inner)), min_size=1, max_size=4)):
            inner[key] = data.draw(VALUES)
        config.write_text(json.dumps(values))
        try:
            parts = dialects.read(folder)
            dialects.write(parts, folder / "out", "saelens")
        except UserError:
            return
        assert dialects.read(folder / "out").cfg == parts.cfg
    finally:
        shutil.rmtree(folder)
