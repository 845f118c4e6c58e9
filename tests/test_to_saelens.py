"""Live SAELens objects: they compute what ours do, share the tensors, and come back as they were."""

import sys
import warnings

import pytest
import torch
from dictionaries import config_of, dictionary_of, tensors_of

import sae
from sae.dictionary import ARCHITECTURES
from sae.errors import UserError

sae_lens = pytest.importorskip("sae_lens")

SITE, MLP_IN, MLP_OUT = "blocks.3.hook_resid_post", "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"
CLASSES = {
    "jumprelu": "JumpReLUSAE",
    "batchtopk": "JumpReLUSAE",
    "relu": "StandardSAE",
    "topk": "TopKSAE",
    "gated": "GatedSAE",
}
TRANSCODERS = [
    ("jumprelu", False, "JumpReLUTranscoder"),
    ("jumprelu", True, "JumpReLUSkipTranscoder"),
    ("batchtopk", True, "JumpReLUSkipTranscoder"),
    ("relu", False, "Transcoder"),
    ("relu", True, "SkipTranscoder"),
]
ABOUT = {"site_in": SITE, "model": "gpt2", "corpus": "some/text", "context": 64, "prepend_bos": False}


def all_kinds():
    for architecture, name in CLASSES.items():
        yield dictionary_of(architecture, **ABOUT), name
    for architecture, skip, name in TRANSCODERS:
        sites = {"site_in": MLP_IN, "site_out": MLP_OUT}
        yield dictionary_of(architecture, **ABOUT | sites, d_out=7, skip=skip), name


@pytest.mark.parametrize(("ours", "name"), all_kinds(), ids=lambda value: str(value)[:30])
def test_the_object_computes_the_same_on_the_same_tensors(ours, name):
    theirs = ours.to_saelens()
    assert type(theirs) is getattr(sae_lens, name)
    x = torch.randn(5, 9, 12)
    acts = ours.encode(x)
    assert 0 < int((acts > 0).sum()) < acts.numel()
    if ours.cfg.architecture == "gated":  # they scale the weights by exp(r_mag), we the product
        torch.testing.assert_close(theirs.encode(x), acts, rtol=1e-6, atol=1e-6 * float(acts.max()))
    else:
        assert torch.equal(theirs.encode(x), acts)
    assert torch.equal(theirs.decode(acts), ours.decode(acts))
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-6, atol=1e-6 * float(ours(x).abs().max()))
    for key, tensor in theirs.state_dict().items():
        assert tensor.data_ptr() == ours.state_dict()[key].data_ptr(), key
        assert not tensor.requires_grad


@pytest.mark.parametrize(("ours", "name"), all_kinds(), ids=lambda value: str(value)[:30])
def test_the_object_is_what_saelens_loads_from_our_folder(ours, name, tmp_path):
    sae.save(ours, tmp_path)
    theirs, loaded = ours.to_saelens(), sae_lens.SAE.load_from_disk(str(tmp_path))
    assert theirs.cfg == loaded.cfg and theirs.dtype == loaded.dtype and theirs.device == loaded.device
    assert theirs.cfg.metadata.hook_name == ours.cfg.site_in
    assert theirs.cfg.metadata.model_name == "gpt2" and theirs.cfg.metadata.prepend_bos is False
    if ours.cfg.transcoder:
        assert theirs.cfg.metadata.hook_name_out == MLP_OUT and theirs.cfg.d_out == 7
    state = loaded.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(("ours", "name"), all_kinds(), ids=lambda value: str(value)[:30])
def test_there_and_back_is_the_same_dictionary(ours, name):
    back = sae.from_saelens(ours.to_saelens())
    assert back.cfg == ours.cfg
    for key, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor)
        assert back.state_dict()[key].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_objects_that_saelens_made_come_with_their_input_bias_folded(architecture):
    made_class, config_class = sae_lens.registry.get_sae_class(architecture)
    more = {"k": 4} if architecture == "topk" else {}
    about = sae_lens.saes.sae.SAEMetadata(hook_name=SITE, model_name="gpt2", context_size=64)
    config = config_class(d_in=12, d_sae=40, apply_b_dec_to_input=True, metadata=about, **more)
    theirs = made_class(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ours = sae.from_saelens(theirs)
    x = torch.randn(50, 12)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert (ours.cfg.site_in, ours.cfg.model, ours.cfg.context) == (SITE, "gpt2", 64)


def test_dtype_and_heads_go_along():
    cfg = config_of("jumprelu", site_in="blocks.2.attn.hook_z")
    ours = sae.build(cfg, {name: tensor.bfloat16() for name, tensor in tensors_of(cfg).items()})
    theirs = ours.to_saelens()
    assert theirs.dtype == theirs.W_enc.dtype == torch.bfloat16 and theirs.cfg.dtype == "bfloat16"
    heads = torch.randn(2, 5, 3, 4).bfloat16()
    assert torch.equal(theirs.encode(heads), ours.encode(heads.flatten(-2)))
    assert torch.equal(theirs(heads).flatten(-2), ours(heads.flatten(-2)))


@pytest.mark.parametrize("architecture", ["topk", "gated"])
@pytest.mark.parametrize("skip", [False, True])
def test_what_saelens_has_no_class_for_is_refused(architecture, skip):
    ours = dictionary_of(architecture, site_in=MLP_IN, site_out=MLP_OUT, skip=skip)
    with pytest.raises(UserError, match=f"{architecture}_{'skip_' * skip}transcoder: it has .*jumprelu"):
        ours.to_saelens()


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UserError, match="pip install 'sae-lens"):
        dictionary_of("jumprelu").to_saelens()


def test_what_cannot_come_back_is_refused():
    with pytest.raises(UserError, match=r"an sae_lens\.SAE.*Linear"):
        sae.from_saelens(torch.nn.Linear(2, 2))
    config = sae_lens.StandardSAEConfig(d_in=12, d_sae=40, normalize_activations="layer_norm")
    with pytest.raises(UserError, match="which no weights can do"):
        sae.from_saelens(sae_lens.StandardSAE(config))


def test_every_architecture_is_tested_here():
    assert set(CLASSES) == set(ARCHITECTURES)


def test_making_one_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dictionary_of("jumprelu", **ABOUT).to_saelens()
