"""Probes: what holds is opened, whatever changed is named, and no probe file can do harm."""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil

import pytest
import safetensors.torch
import torch
from cli_fakes import refused
from dictionaries import dictionary_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sae
from sae import dialects
from sae.dictionary import ARCHITECTURES
from sae.errors import UserError
from sae.probe import LATENTS, check, differences, make_probe
from train.cli.main import main

SITE = {"site_in": "blocks.3.hook_resid_post", "model": "gemma-3-270m", "context": 256}
KINDS = {
    "sae": {},
    "transcoder": {"site_out": "blocks.3.hook_mlp_out", "d_out": 9},
    "skip_transcoder": {"site_out": "blocks.3.hook_mlp_out", "d_out": 9, "skip": True},
}


def dictionary(architecture="jumprelu", d_in=12, d_sae=200, dtype=torch.float32, **fields):
    return dictionary_of(architecture, d_in=d_in, d_sae=d_sae, **{**SITE, **fields}).to(dtype)


def rows(n=64, width=12, seed=1, dtype=torch.float32):
    return 3 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def probe_of(made, seed=1):
    outs = rows(width=made.cfg.d_out, seed=seed + 1) if made.cfg.transcoder else None
    return make_probe(made, rows(width=made.cfg.d_in, seed=seed), outs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_probe_holds_and_comes_back(architecture, kind, dtype, tmp_path):
    made = dictionary(architecture, dtype=dtype, **KINDS[kind])
    sae.save(made, tmp_path / "a", probe=probe_of(made))
    back = sae.load(tmp_path / "a")
    assert back.probe is not None and back.probe.complete
    sae.save(back, tmp_path / "b")
    for name in ("cfg.json", "sae_weights.safetensors", "probe.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_probe_is_what_the_dictionary_computes(architecture, kind):
    made = dictionary(architecture, **KINDS[kind])
    probe = probe_of(made)
    assert torch.equal(probe.rows_in, rows()[torch.arange(8) * 8])
    exact = made.double()
    x = probe.rows_in.double()
    acts = exact.encode(x)
    assert torch.equal(probe.l0, (acts > 0).sum(1)) and probe.l0.min() > 0
    fired = (acts > 0).any(0)
    assert set(fired.nonzero().flatten().tolist()) <= set(probe.latents.tolist())
    # some that do not fire are there where there are any
    assert int((~fired)[probe.latents].sum()) >= min(32, int((~fired).sum()))
    torch.testing.assert_close(probe.pre, exact.pre_activations(x)[:, probe.latents])
    torch.testing.assert_close(probe.activations, acts[:, probe.latents])
    torch.testing.assert_close(probe.reconstruction, exact(x))
    target = x if kind == "sae" else probe.rows_out.double()
    expected = (target - exact(x)).square().sum() / (target - target.mean(0)).square().sum()
    assert probe.fvu == pytest.approx(float(expected))


def scaled(name, factor=1.001):
    return lambda tensors, probe: {name: tensors[name] * factor}


def swapped(tensors, probe):
    first, second = probe.latents[:2]
    order = torch.arange(tensors["W_enc"].shape[1])
    order[first], order[second] = second, first
    return {"W_enc": tensors["W_enc"][:, order]}


def transposed(name):
    return lambda tensors, probe: {name: tensors[name].T}


def flipped(name, bit):
    """One bit of one number of a sampled latent that fires."""

    def corrupt(tensors, probe):
        latent = int(probe.latents[(probe.activations > 0).any(0)][0])
        place = (3, latent) if name == "W_enc" else (latent, 3)
        bits = tensors[name].clone().view(torch.int32)
        bits[place] ^= 1 << bit
        return {name: bits.view(torch.float32)}

    return corrupt


def unfolded(tensors, probe):
    return {name: tensors[name] / 7.5 for name in ("b_enc", "b_dec", "threshold")}


BROKEN = {
    "scaled encoder": ("jumprelu", {}, scaled("W_enc"), {"encoder"}),
    "swapped columns": ("jumprelu", {}, swapped, {"encoder"}),
    "threshold dropped": ("jumprelu", {}, scaled("threshold", 0.0), {"threshold"}),
    "a batchtopk's threshold": ("batchtopk", {}, scaled("threshold", 1.5), {"threshold"}),
    "scale unfolded": ("jumprelu", {}, unfolded, {"encoder", "threshold", "b_dec"}),
    "b_dec zeroed": ("relu", {}, scaled("b_dec", 0.0), {"b_dec"}),
    "decoder norms": ("topk", {}, scaled("W_dec", 2.0), {"decoder"}),
    "encoder transposed": ("jumprelu", {"d_in": 48, "d_sae": 48}, transposed("W_enc"), {"encoder"}),
    "decoder transposed": ("relu", {"d_in": 48, "d_sae": 48}, transposed("W_dec"), {"decoder"}),
    "encoder's bit": ("jumprelu", {}, flipped("W_enc", 22), {"encoder"}),
    "encoder's last bit": ("jumprelu", {}, flipped("W_enc", 0), {"encoder"}),
    "decoder's bit": ("jumprelu", {}, flipped("W_dec", 22), {"decoder"}),
    "gated magnitudes": ("gated", {}, scaled("r_mag"), {"gate"}),
    "gated biases": ("gated", {}, scaled("b_mag"), {"gate"}),
    "gated gates": ("gated", {}, scaled("b_gate"), {"encoder"}),
    "skip transposed": (
        "jumprelu",
        {"site_out": "blocks.3.hook_mlp_out", "skip": True},
        transposed("W_skip"),
        {"W_skip"},
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_changed_is_named(what, tmp_path):
    architecture, fields, corrupt, named = BROKEN[what]
    made = dictionary(architecture, **fields)
    probe = probe_of(made)
    sae.save(made, tmp_path, probe=probe)
    weights = tmp_path / "sae_weights.safetensors"
    tensors = load_file(weights)
    broken = tensors | corrupt(tensors, probe)
    save_file({name: tensor.contiguous() for name, tensor in broken.items()}, weights)
    with pytest.raises(UserError, match="must compute what its probe says") as error:
        sae.load(tmp_path)
    assert {phrase.split(":")[0].strip() for phrase in error.value.found.split(";")[:-1]} == named
    assert str(tmp_path) in error.value.found
    with pytest.raises(UserError, match="must compute what its probe says"):
        dialects.read(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("site_in", "blocks.4.hook_resid_post"),
        ("model", "gemma-3-1b"),
        ("prepend_bos", False),
        ("context", 128),
        ("architecture", "batchtopk"),
    ],
)
def test_the_config_of_another(field, value, tmp_path):
    made = dictionary()
    sae.save(made, tmp_path / "a", probe=rows())
    other = sae.build(dataclasses.replace(made.cfg, **{field: value}), made.state_dict())
    sae.save(other, tmp_path / "b", probe=rows())
    shutil.copy(tmp_path / "b" / "cfg.json", tmp_path / "a" / "cfg.json")
    with pytest.raises(UserError, match=f"config: {field} is {value!r}, and {getattr(made.cfg, field)!r} in"):
        sae.load(tmp_path / "a")


def test_another_gate(tmp_path):
    """A topk dictionary of the same tensors as the relu one, and the other k."""
    relu = dictionary("relu")
    probe = probe_of(relu)
    topk = sae.build(dataclasses.replace(relu.cfg, architecture="topk", k=5), relu.state_dict())
    found = differences(topk, probe)
    assert [phrase.split(":")[0] for phrase in found] == ["config", "config", "gate"]
    other = sae.build(dataclasses.replace(topk.cfg, k=6), relu.state_dict())
    assert "k is 6, and 5" in differences(other, probe_of(topk))[0]


def test_sizes_of_another(tmp_path):
    found = differences(dictionary(d_in=11, d_sae=3), probe_of(dictionary()))
    assert [phrase.split(" is ")[0] for phrase in found] == ["config: d_in", "config: d_sae", "config: d_out"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_in_another_order_hold(architecture, dtype):
    """Another machine adds up in another order: here, the input's and the latents' axes are shuffled."""
    made = dictionary(architecture, d_in=640, d_sae=300, dtype=dtype)
    made.W_enc[:, 7] = made.W_enc[:, 8]  # a tie that top-k may break either way
    probe = probe_of(made)
    order = torch.randperm(640, generator=torch.Generator().manual_seed(0))
    part = dataclasses.replace(
        probe, rows_in=probe.rows_in[:, order], decoded=probe.decoded[:, order], b_dec=probe.b_dec[order]
    )
    tensors = {n: t[order] if n in ("W_enc", "b_dec") else t for n, t in made.state_dict().items()}
    tensors["W_dec"] = tensors["W_dec"][:, order]
    moved = sae.build(made.cfg, tensors)
    assert differences(moved, part) == []
    assert not torch.equal(make_probe(moved, part.rows_in).pre, probe.pre)
    # one at a time, and from both ends
    x, W = probe.rows_in.double(), made.W_enc.double()[:, probe.latents]
    for step in (1, -1):
        by_hand = torch.zeros_like(probe.pre)
        for i in list(range(640))[::step]:
            by_hand += x[:, i : i + 1] * W[i]
        by_hand += made.get_parameter(made.gate_bias).double()[probe.latents]
        assert differences(made, dataclasses.replace(probe, pre=by_hand)) == []


def test_where_no_latent_fires(tmp_path):
    made = dictionary()
    made.threshold.fill_(1e6)
    sae.save(made, tmp_path, probe=rows())
    back = sae.load(tmp_path)
    assert back.probe.l0.tolist() == [0] * 8 and len(back.probe.latents) >= 32
    assert torch.equal(back.probe.decoded, back.b_dec.double().expand(8, -1))
    back.threshold[int(back.probe.latents[5])] = 0.5
    assert differences(back, back.probe)[0].startswith("threshold")


@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_where_most_latents_fire(architecture):
    made = dictionary(architecture, d_sae=6000, k=2500 if architecture == "topk" else 0)
    probe = probe_of(made)
    assert len(probe.rows_in) == 1 and len(probe.latents) <= LATENTS and not probe.complete
    assert probe.l0 > 2000 and probe.fvu is None
    assert differences(made, probe) == []
    made.W_dec[int(probe.latents[9])] *= 1.1
    assert differences(made, probe)[0].startswith("decoder")


def test_what_was_changed_is_saved_with_a_probe_that_holds(tmp_path):
    sae.save(dictionary(), tmp_path / "a", probe=rows())
    changed = sae.load(tmp_path / "a").bfloat16()
    sae.save(changed, tmp_path / "b")
    back = sae.load(tmp_path / "b")
    assert torch.equal(back.probe.rows_in, rows()[torch.arange(8) * 8])
    assert not torch.equal(back.probe.pre, changed.probe.pre)


def test_no_probe_stays_beside_other_weights(tmp_path):
    sae.save(dictionary(), tmp_path, probe=rows())
    sae.save(dictionary(d_sae=30), tmp_path)
    assert sae.load(tmp_path).probe is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize(
    ("given", "outs", "word"),
    [
        (rows(width=11), None, "finite rows of width 12"),
        (rows(n=0), None, "finite rows of width 12"),
        (rows() * torch.inf, None, "not all finite"),
        (rows(), rows(), "no transcoder"),
    ],
)
def test_rows_that_are_none(given, outs, word):
    with pytest.raises(UserError, match=word):
        make_probe(dictionary(), given, outs)


def test_rows_of_a_transcoder_belong_together():
    made = dictionary(**KINDS["transcoder"])
    with pytest.raises(UserError, match="one for each of rows_in"):
        make_probe(made, rows(), rows(n=63, width=9))
    assert make_probe(made, rows()).fvu is None


def test_check_says_what_and_where():
    made = dictionary()
    probe = probe_of(made)
    check(made, probe)
    made.b_dec.zero_()
    with pytest.raises(UserError, match=r"b_dec: values differ in 12 of 12.*in the attic"):
        check(made, probe, source="the attic")


def test_saelens_takes_no_notice(tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    made = dictionary()
    sae.save(made, tmp_path, probe=rows())
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    torch.testing.assert_close(theirs(rows()), made(rows()), rtol=1e-5, atol=1e-4)


def test_info_import_and_export(tmp_path, capfd):
    sae.save(dictionary(), tmp_path / "a", probe=rows())
    assert main(["info", str(tmp_path / "a")]) == 0
    out = capfd.readouterr().out
    assert re.search(r"probe\s+held: 8 rows, \d+ latents, L0 \d+\.\d, FVU", out)
    words = ["--to", "saelens", "--out", str(tmp_path / "b")]
    assert main(["export", str(tmp_path / "a"), *words]) == 0
    assert "probe.safetensors" in capfd.readouterr().out
    assert sae.load(tmp_path / "b").probe is not None
    words = ["--site", "blocks.4.hook_resid_post", "--out", str(tmp_path / "c")]
    assert main(["import", str(tmp_path / "b"), *words]) == 0
    assert sae.load(tmp_path / "c").probe.conventions["site_in"] == "blocks.4.hook_resid_post"
    assert main(["export", str(tmp_path / "c"), "--to", "gemma-scope", "--out", str(tmp_path / "d")]) == 0
    capfd.readouterr()
    assert main(["info", str(tmp_path / "d")]) == 0
    assert re.search(r"probe\s+none", capfd.readouterr().out)
    shutil.copy(tmp_path / "a" / "cfg.json", tmp_path / "c" / "cfg.json")
    assert "config: site_in is" in refused(capfd, "info", tmp_path / "c")


def written(folder):
    """A whole folder; the path of its probe."""
    sae.save(dictionary(), folder, probe=rows())
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
    "scalar": (lambda about, t: t.update(l0=torch.tensor(3)), "l0 of"),
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
