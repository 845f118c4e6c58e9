"""Dictionaries on disk: round trips, SAELens reading ours and we reading SAELens's, and files that do not
fit.
"""

import json
from pathlib import Path

import pytest
import torch
from dictionaries import dictionary_of
from safetensors.torch import load_file, save_file

import sae
from sae.dictionary import ARCHITECTURES
from sae.errors import UserError


def dictionary(d_in=6, d_sae=20, architecture="jumprelu", **fields):
    where = {"site_in": "blocks.3.hook_resid_post", "model": "gemma-3-270m", "context": 256}
    return dictionary_of(architecture, d_in=d_in, d_sae=d_sae, l0_target=4.0, **{**where, **fields})


def test_the_gate_is_strict():
    made = dictionary(d_in=1, d_sae=1)
    for name, value in (("W_enc", 1.0), ("b_enc", 0.0), ("threshold", 2.0)):
        getattr(made, name).fill_(value)
    assert made.encode(torch.tensor([[2.0], [2.5]])).tolist() == [[0.0], [2.5]]


KINDS = {
    "sae": {},
    "transcoder": {"site_out": "blocks.3.hook_mlp_out", "d_out": 9},
    "skip_transcoder": {"site_out": "blocks.3.hook_mlp_out", "d_out": 9, "skip": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(architecture, kind, tmp_path):
    made = dictionary(architecture=architecture, **KINDS[kind])
    sae.save(made, tmp_path / "site")
    back = sae.load(tmp_path / "site")
    assert type(back) is type(made) and back.cfg == made.cfg
    assert back.state_dict().keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])


# what SAELens has no name for it must not take for something else
UNKNOWN_TO_SAELENS = {(a, k) for a in ("topk", "gated") for k in ("transcoder", "skip_transcoder")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_reads_ours(architecture, kind, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    made = dictionary(d_in=64, d_sae=300, architecture=architecture, **KINDS[kind])
    sae.save(made, tmp_path)
    if (architecture, kind) in UNKNOWN_TO_SAELENS:
        with pytest.raises(KeyError, match=f"{architecture}_{kind}"):
            sae_lens.SAE.load_from_disk(str(tmp_path))
        return
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    x = torch.randn(50, 64)
    torch.testing.assert_close(theirs.encode(x), made.encode(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(theirs(x), made(x), rtol=1e-5, atol=1e-3)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "gemma-3-270m"


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("JumpReLUSAE", "jumprelu"),
        ("StandardSAE", "relu"),
        ("TopKSAE", "topk"),
        ("GatedSAE", "gated"),
        ("Transcoder", "relu"),
        ("SkipTranscoder", "relu"),
        ("JumpReLUTranscoder", "jumprelu"),
        ("JumpReLUSkipTranscoder", "jumprelu"),
    ],
)
def test_we_read_saelens(name, architecture, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    own = {"k": 4} if name == "TopKSAE" else {"d_out": 9} if "Transcoder" in name else {}
    config = getattr(sae_lens, f"{name}Config")(d_in=8, d_sae=30, apply_b_dec_to_input=False, **own)
    theirs = getattr(sae_lens, name)(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += torch.rand(parameter.shape) - 0.4
    theirs.save_model(str(tmp_path))
    ours, x = sae.load(tmp_path), torch.randn(20, 8)
    assert ours.cfg.architecture == architecture and ours.cfg.skip == ("Skip" in name)
    assert (ours.encode(x) > 0).any()
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-4)


def test_weights_stay_in_their_file(tmp_path):
    """Loading maps the file; what is anonymous memory of this process would be a second copy."""
    made = dictionary(d_in=512, d_sae=16_384, architecture="batchtopk")
    sae.save(made, tmp_path)
    expected = made.W_enc.sum()
    del made
    before = anonymous_memory()
    back = sae.load(tmp_path)
    assert anonymous_memory() - before < 0.1 * back.W_enc.nbytes
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [[int(end, 16) for end in m[0].split("-")] for m in maps if m[-1].endswith(".safetensors")]
    for parameter in back.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in spans)
    assert torch.equal(back.W_enc.sum(), expected)


def anonymous_memory():
    """Bytes of this process that no file holds."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def test_a_file_that_is_replaced_does_not_change_what_was_loaded(tmp_path):
    made = dictionary()
    sae.save(made, tmp_path)
    back = sae.load(tmp_path)
    sae.save(dictionary_of("relu", d_in=6, d_sae=20), tmp_path)
    assert torch.equal(back.threshold, made.threshold) and torch.equal(back.W_dec, made.W_dec)


def test_what_we_cannot_read_is_refused(tmp_path):
    sae.save(dictionary(), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    del config["metadata"]["jumpscope"]
    for key, value in (
        ("architecture", "temporal"),
        ("rescale_acts_by_decoder_norm", True),
        ("normalize_activations", "layer_norm"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=key):
            sae.load(tmp_path)


def test_what_needs_folding_is_folded(tmp_path):
    made, x = dictionary(), torch.randn(20, 6)
    sae.save(made, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    del config["metadata"]["jumpscope"]
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": True}))
    torch.testing.assert_close(sae.load(tmp_path)(x), made.decode(made.encode(x - made.b_dec)))


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="folder must hold weights"):
        sae.load(tmp_path)
    sae.save(dictionary(), tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "threshold": tensors["threshold"][:-1].clone()}, weights)
    with pytest.raises(UserError, match="threshold"):
        sae.load(tmp_path)
    save_file({n: t for n, t in tensors.items() if n != "b_dec"}, weights)
    with pytest.raises(UserError, match="b_dec"):
        sae.load(tmp_path)
    save_file({**tensors, "b_enc": tensors["b_enc"] * torch.nan}, weights)
    with pytest.raises(UserError, match="b_enc must be finite"):
        sae.load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match="must be a whole file"):
        sae.load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="must hold weights"):
        sae.load(tmp_path)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([1], "config"),
        ({"metadata": 3}, "metadata"),
        ({"metadata": {"jumpscope": "x"}}, "config"),
        ({"metadata": {"jumpscope": {"d_in": 6, "d_sae": "20"}}}, "d_sae"),
        ({"metadata": {"jumpscope": {"d_in": True, "d_sae": 20}}}, "d_in"),
        ({"metadata": {"jumpscope": {"d_in": 6, "d_sae": 21}}}, "d_sae must be that of the arrays, 20"),
        ({"metadata": {"jumpscope": {"d_in": 6, "d_sae": 20, "architecture": "later"}}}, "later"),
        ({"metadata": {"jumpscope": {"d_in": 6, "d_sae": 20, "architecture": ["relu"]}}}, "architecture"),
        ({"metadata": {"jumpscope": {"d_in": 6, "d_sae": 20, "newer": 1}}}, "newer"),
        ({"architecture": {}}, "architecture"),
        (
            {"architecture": "standard", "apply_b_dec_to_input": False, "normalize_activations": "none"},
            "threshold",
        ),
    ],
)
def test_configs_that_are_none(values, word, tmp_path):
    sae.save(dictionary(), tmp_path)
    if isinstance(values, dict) and "metadata" in values:
        values = json.loads((tmp_path / "cfg.json").read_text()) | values
    (tmp_path / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=word):
        sae.load(tmp_path)


def test_config_round_trips_and_refuses_unknown_keys():
    cfg = dictionary().cfg
    assert sae.DictionaryConfig.from_dict(cfg.to_dict()) == cfg
    assert cfg.site_out == cfg.site_in and cfg.d_out == cfg.d_in
    with pytest.raises(UserError, match="colour"):
        sae.DictionaryConfig.from_dict({**cfg.to_dict(), "colour": 1})
    with pytest.raises(UserError, match="d_sae"):
        sae.DictionaryConfig(d_in=3, d_sae=0)
