"""Dictionaries on disk: round trips, SAELens reading ours and we reading SAELens's, and files that do not
fit.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sae
from sae.errors import UserError


def dictionary(d_in=6, d_sae=20, **fields) -> sae.JumpReLU:
    cfg = sae.DictionaryConfig(
        d_in=d_in,
        d_sae=d_sae,
        site_in="blocks.3.hook_resid_post",
        model="gemma-3-270m",
        context=256,
        l0_target=4.0,
        **fields,
    )
    g = torch.Generator().manual_seed(0)
    made = sae.JumpReLU(cfg)
    made.load_state_dict({n: torch.randn(p.shape, generator=g) for n, p in made.state_dict().items()})
    made.threshold.data.abs_()
    return made.requires_grad_(False)


def test_encode_is_the_formula():
    made = dictionary()
    x = torch.randn(9, 6)
    pre = x @ made.W_enc + made.b_enc
    expected = torch.relu(pre) * (pre > made.threshold)
    assert torch.equal(made.encode(x), expected)
    torch.testing.assert_close(made(x), expected @ made.W_dec + made.b_dec)
    assert made(x.bfloat16()).dtype == torch.bfloat16


def test_the_gate_is_strict():
    made = dictionary(d_in=1, d_sae=1)
    for name, value in (("W_enc", 1.0), ("b_enc", 0.0), ("threshold", 2.0)):
        getattr(made, name).fill_(value)
    assert made.encode(torch.tensor([[2.0], [2.5]])).tolist() == [[0.0], [2.5]]


def test_round_trip(tmp_path):
    made = dictionary()
    sae.save(made, tmp_path / "site")
    back = sae.load(tmp_path / "site")
    assert back.cfg == made.cfg
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])


def test_saelens_reads_ours(tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    made = dictionary(d_in=64, d_sae=300)
    sae.save(made, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    x = torch.randn(50, 64)
    torch.testing.assert_close(theirs.encode(x), made.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.decode(theirs.encode(x)), made(x), rtol=1e-5, atol=1e-5)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "gemma-3-270m"


def test_we_read_saelens(tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    theirs = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=8, d_sae=30, apply_b_dec_to_input=False))
    with torch.no_grad():
        theirs.threshold += torch.rand(30)
        theirs.b_dec += torch.randn(8)
    theirs.save_model(str(tmp_path))
    ours, x = sae.load(tmp_path), torch.randn(20, 8)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)


def test_what_we_cannot_read_is_refused(tmp_path):
    sae.save(dictionary(), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    del config["metadata"]["jumpscope"]
    for key, value in (
        ("architecture", "topk"),
        ("apply_b_dec_to_input", True),
        ("normalize_activations", "layer_norm"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=key):
            sae.load(tmp_path)


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"cfg\.json"):
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
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError, match="whole safetensors"):
        sae.load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="must be there"):
        sae.load(tmp_path)


def test_config_round_trips_and_refuses_unknown_keys():
    cfg = dictionary().cfg
    assert sae.DictionaryConfig.from_dict(cfg.to_dict()) == cfg
    assert cfg.site_out == cfg.site_in and cfg.d_out == cfg.d_in
    with pytest.raises(UserError, match="colour"):
        sae.DictionaryConfig.from_dict({**cfg.to_dict(), "colour": 1})
    with pytest.raises(UserError, match="d_sae"):
        sae.DictionaryConfig(d_in=3, d_sae=0)
