"""Each dialect written and read again: identical bits where nothing is folded, latents to 1e-6 where
something is, a refusal with its reason where the format has no words for it; the card; and the three verbs.
"""

import re

import dialect_makers as make
import pytest
import torch
from cli_fakes import refused

import sae
from sae import dialects
from sae.dialects.parts import make_parts
from sae.errors import UserError
from train.cli.main import main

X = make.numbers(40, make.D_IN, seed=9)
SITE = "blocks.5.hook_resid_post"
PAIR = ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")


def parts(architecture="jumprelu", sites=(SITE, SITE), skip=False, d_out=None, **fields):
    tensors = make.plain(d_out=d_out)
    if architecture not in ("jumprelu", "batchtopk"):
        del tensors["threshold"]
    if architecture == "batchtopk":
        tensors["threshold"] = torch.full_like(tensors["b_enc"], 0.3)
    if architecture == "gated":
        tensors |= {"b_gate": tensors.pop("b_enc"), "b_mag": make.numbers(make.D_SAE, seed=8)}
        tensors["r_mag"] = make.numbers(make.D_SAE, seed=6)
    if skip:
        tensors["W_skip"] = make.numbers(make.D_IN, d_out or make.D_IN, seed=5)
    fields = {"k": make.K if "topk" in architecture else 0, "model": "google/gemma-3-270m"} | fields
    return make_parts(
        architecture, tensors, source="test", dialect="test", site_in=sites[0], site_out=sites[1], **fields
    )


# what is written, what it is on reading, and whether its arrays are the same bits
ROUND_TRIPS = [
    ("saelens", "jumprelu", "jumprelu", {}, True),
    ("saelens", "batchtopk", "batchtopk", {}, True),
    ("saelens", "topk", "topk", {}, True),
    ("saelens", "relu", "relu", {}, True),
    ("saelens", "gated", "gated", {}, True),
    ("saelens", "jumprelu", "jumprelu", {"sites": PAIR, "d_out": 9}, True),
    ("saelens", "relu", "relu", {"sites": PAIR, "skip": True, "d_out": 9}, True),
    ("saelens", "jumprelu", "jumprelu", {"sites": PAIR, "skip": True}, True),
    ("gemma-scope", "jumprelu", "jumprelu", {}, True),
    ("gemma-scope-2", "jumprelu", "jumprelu", {"l0_target": 20.0}, True),
    ("gemma-scope-2", "batchtopk", "jumprelu", {}, True),
    ("gemma-scope-2", "relu", "jumprelu", {}, False),
    ("gemma-scope-2", "jumprelu", "jumprelu", {"sites": PAIR, "skip": True}, True),
    ("dictionary-learning", "jumprelu", "jumprelu", {}, True),
    ("dictionary-learning", "relu", "relu", {}, True),
    ("dictionary-learning", "topk", "topk", {}, False),
    ("dictionary-learning", "batchtopk", "batchtopk", {}, False),
    ("dictionary-learning", "gated", "gated", {}, False),
    ("sparsify", "topk", "topk", {}, False),
    ("sparsify", "topk", "topk", {"sites": PAIR, "skip": True}, True),
]


@pytest.mark.parametrize(("target", "written", "found", "fields", "bits"), ROUND_TRIPS)
def test_round_trips(tmp_path, target, written, found, fields, bits):
    made = parts(written, **fields)
    module = "layers.5.mlp" if "sites" in fields else "layers.5"
    names = dialects.write(made, tmp_path / module, target)
    assert sorted(path.name for path in (tmp_path / module).iterdir()) == sorted(names)
    back = dialects.read(tmp_path / module)
    assert back.dialect == target and back.cfg["architecture"] == found
    if bits:
        assert {n: t.tolist() for n, t in back.tensors.items()} == {
            n: t.tolist() for n, t in made.tensors.items()
        }
    ours, theirs = (make.compute(p.cfg, p.tensors, X) for p in (made, back))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-6 * mine.abs().max() and mine.abs().max() > 0
    for name in ("site_in", "site_out", "d_out", "skip"):
        assert back.cfg[name] == made.cfg[name] or (target == "gemma-scope" and name.startswith("site"))
    if target == "saelens":
        assert back.cfg == made.cfg


@pytest.mark.parametrize(
    ("target", "architecture", "fields", "reason"),
    [
        ("saelens", "topk", {"sites": PAIR}, "transcoders with relu and jumprelu"),
        ("gemma-scope", "topk", {}, "JumpReLU gates only"),
        ("gemma-scope", "jumprelu", {"sites": PAIR, "skip": True}, "has no skip"),
        ("gemma-scope-2", "gated", {}, "JumpReLU gates only"),
        ("gemma-scope-2", "jumprelu", {"sites": ("blocks.1.hook_resid_mid",) * 2}, "knows the sites"),
        ("gemma-scope-2", "jumprelu", {"sites": ("", "")}, "knows the sites"),
        ("dictionary-learning", "jumprelu", {"sites": PAIR}, "has no transcoders"),
        ("dictionary-learning", "relu", {"sites": ("blocks.1.attn.hook_z",) * 2}, "knows the sites"),
        ("sparsify", "jumprelu", {}, "topk gates only"),
        ("sparsify", "topk", {"sites": PAIR, "d_out": 9}, "as many numbers"),
        ("neuronpedia", "jumprelu", {}, "must be one of"),
    ],
)
def test_what_a_format_cannot_express(tmp_path, target, architecture, fields, reason):
    with pytest.raises(UserError, match=reason):
        dialects.write(parts(architecture, **fields), tmp_path / "out", target)
    assert list((tmp_path / "out").glob("*")) == []


def test_one_threshold_for_all(tmp_path):
    made = parts("batchtopk")
    made.tensors["threshold"][3] = 0.5
    with pytest.raises(UserError, match="one threshold"):
        dialects.write(made, tmp_path, "dictionary-learning")


def test_the_card_says_what_it_is(tmp_path):
    dialects.write(parts("topk", context=128, prepend_bos=False), tmp_path, "sparsify")
    text = (tmp_path / "README.md").read_text()
    for row in ("model | google/gemma-3-270m", f"site (TransformerLens) | {SITE}", "k | 4", "BOS | no"):
        assert row in text
    assert "d_sae | 20" in text and "library_name: sparsify" in text


def test_import_writes_what_ours_opens(tmp_path, capfd):
    make.gemma_scope(tmp_path / "theirs")
    words = ["--site", "blocks.20.hook_resid_post", "--model", "gemma-2-2b", "--out", tmp_path / "ours"]
    assert main(["import", str(tmp_path / "theirs"), *map(str, words)]) == 0
    out, err = capfd.readouterr()
    assert "jumprelu of 20 latents, gemma-2-2b, blocks.20.hook_resid_post, from gemma-scope" in out
    assert "names no model" in err
    opened = sae.load(tmp_path / "ours")
    assert (opened.cfg.site_in, opened.cfg.site_out) == ("blocks.20.hook_resid_post",) * 2
    expected = make.compute({"architecture": "jumprelu"}, make.plain(), X)[1].float()
    torch.testing.assert_close(opened(X), expected, rtol=1e-5, atol=1e-5)


def test_export_and_info(tmp_path, capfd):
    dialects.write(parts("relu", sites=(SITE, SITE)), tmp_path / "one", "dictionary-learning")
    words = ["--to", "saelens", "--out", str(tmp_path / "two")]
    assert main(["export", str(tmp_path / "one"), *words]) == 0
    assert "cfg.json, sae_weights.safetensors, README.md" in capfd.readouterr().out
    assert main(["info", str(tmp_path / "one" / "ae.pt")]) == 0
    out = capfd.readouterr().out
    assert re.search(r"format\s+dictionary-learning", out) and re.search(r"site in\s+" + SITE, out)
    assert re.search(r"architecture\s+relu", out)
    line = refused(capfd, "export", tmp_path / "one", "--to", "sparsify", "--out", tmp_path / "three")
    assert "it holds topk gates only" in line and "relu" in line
