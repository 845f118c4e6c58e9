"""Probe files that are torn, forged or made to do harm: each refused by name, and nothing but UserError."""

import hashlib
import json
import os
import pickle

import pytest
import safetensors.torch
import torch
from dictionaries import placed, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import sae
from sae.errors import UserError
from sae.probe import differences


def written(folder):
    """A whole folder; the path of its probe."""
    sae.save(placed(), folder, probe=rows())
    return folder / "probe.safetensors"


def test_torn_probes(tmp_path):
    path = written(tmp_path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for length in (len(whole) - 1, len(whole) // 2, start, 40, 9, 1, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"probe\.safetensors must be a whole probe"):
            sae.load(tmp_path)
    for place in (start + 3, len(whole) - 5):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match="not those it was written with"):
            sae.load(tmp_path)
    path.unlink()
    assert sae.load(tmp_path).probe is None


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_are_no_probes(tmp_path):
    path, harm = written(tmp_path / "a"), tmp_path / "harm"
    torch.save({"pre": torch.ones(2), "x": Bomb(harm)}, tmp_path / "pickled")
    for content in (pickle.dumps(Bomb(harm)), (tmp_path / "pickled").read_bytes(), b"[" * 10_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match="must be a whole probe"):
            sae.load(tmp_path / "a")
    assert not harm.exists()
    save_file({"x": torch.ones(3)}, path)
    with pytest.raises(UserError, match="must be a whole probe"):
        sae.load(tmp_path / "a")
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(UserError, match=r"at most 64\.0 MiB"):
        sae.load(tmp_path / "a")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="must be a whole probe"):
        sae.load(tmp_path / "a")


def forged(path, change):
    """Writes the probe with changed tensors and conventions, and with a checksum that is right."""
    content = path.read_bytes()
    about = json.loads(
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["probe"]
    )
    tensors = safetensors.torch.load(content)
    del about["sha256"]
    change(about, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(tensors)
    words = json.dumps(about, sort_keys=True).encode() + data[8 + int.from_bytes(data[:8], "little") :]
    about["sha256"] = hashlib.sha256(words).hexdigest()
    path.write_bytes(safetensors.torch.save(tensors, {"probe": json.dumps(about)}))


FORGED = {
    "nothing": (lambda about, t: None, None),
    "newer": (lambda about, t: about.update(version=2), "Update jumpscope"),
    "no tensor": (lambda about, t: t.pop("pre"), "the tensors"),
    "another tensor": (lambda about, t: t.update(more=torch.ones(2)), "the tensors"),
    "shape": (lambda about, t: t.update(pre=t["pre"][:, 1:]), "pre of"),
    "scalar": (lambda about, t: t.update(l0=torch.tensor(3)), "and shape"),
    "dtype": (lambda about, t: t.update(pre=t["pre"].float()), "pre of torch.float32"),
    "narrow rows": (lambda about, t: t.update(rows_in=t["rows_in"].to(torch.float8_e5m2)), "rows_in of"),
    "not finite": (lambda about, t: t["b_dec"].fill_(torch.nan), "b_dec that are NaN"),
    "outside": (lambda about, t: t["latents"][-1:].fill_(200), "within the dictionary"),
    "below": (lambda about, t: t["latents"][:1].fill_(-1), "within the dictionary"),
    "twice": (lambda about, t: t["latents"][:2].fill_(3), "within the dictionary"),
    "sizes": (lambda about, t: about["conventions"].update(d_sae="many"), "the sizes"),
    "no conventions": (lambda about, t: about.update(conventions={}), "the sizes"),
    "skip": (lambda about, t: about["conventions"].update(skip=True), "the tensors"),
    "no rows": (
        lambda about, t: t.update(
            {n: v[:0] for n, v in t.items() if n not in ("latents", "threshold", "b_dec")}
        ),
        "0 rows",
    ),
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_probes(what, tmp_path):
    change, word = FORGED[what]
    path = written(tmp_path)
    forged(path, change)
    if word is None:
        assert sae.load(tmp_path).probe is not None
        return
    with pytest.raises(UserError, match=word):
        sae.load(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("fuzz")
    return made, written(made).read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bytes_at_random(folder, data):
    path, whole = folder[0] / "probe.safetensors", folder[1]
    content = bytearray(whole)
    place = st.one_of(st.integers(0, 900), st.integers(0, len(content) - 1))
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=6)):
        content[at] = value
    path.write_bytes(bytes(content[: len(content) - data.draw(st.integers(0, 2))]))
    try:
        opened = sae.load(folder[0])
    except UserError:
        return
    assert differences(opened, opened.probe) == []
