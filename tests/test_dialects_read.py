"""Each dialect read from a folder as its owner writes it: arrays, folds, sites, against the definitions.

tests/test_owners.py holds them against the owners' own code.
"""

import dialect_makers as make
import pytest
import torch

from sae import dialects
from sae.dialects.ids import Id, choose_folder, parse_id
from sae.errors import UserError

X = make.numbers(50, make.D_IN, seed=9)


def agree(parts, acts, out, tolerance=1e-6):
    """Latents and outputs, to a relative 1e-6 of the largest."""
    ours = make.compute(parts.cfg, parts.tensors, X)
    for mine, theirs in zip(ours, (acts, out), strict=True):
        assert (mine - theirs.double()).abs().max() <= tolerance * theirs.abs().max()
        assert theirs.abs().max() > 0


def same_bits(parts, tensors):
    assert set(parts.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(parts.tensors[name], tensor), name


def test_saelens_new_layout(tmp_path):
    tensors = make.saelens(tmp_path / "one")
    parts = dialects.read(tmp_path / "one")
    same_bits(parts, tensors)
    assert parts.dialect == "saelens" and parts.notes == ()
    assert parts.cfg == {
        "architecture": "jumprelu",
        "d_in": 6,
        "d_sae": 20,
        "d_out": 6,
        "site_in": "blocks.3.hook_resid_post",
        "site_out": "blocks.3.hook_resid_post",
        "model": "gpt2-small",
        "corpus": "some/text",
        "context": 128,
        "prepend_bos": True,
        "l0_target": None,
        "k": 0,
        "skip": False,
    }


@pytest.mark.parametrize("scale", [None, 2.5])
def test_saelens_folds_scale_and_input_bias(tmp_path, scale):
    raw = make.plain()
    norm = (
        {"normalize_activations": "expected_average_only_in", "norm_scaling_factor": scale} if scale else {}
    )
    make.saelens(tmp_path, "jumprelu", raw, apply_b_dec_to_input=True, **norm)
    t, s = {name: tensor.double() for name, tensor in raw.items()}, scale or 1.0
    pre = (s * X.double() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    acts = torch.relu(pre) * (pre > t["threshold"])
    parts = dialects.read(tmp_path)
    agree(parts, acts, (acts @ t["W_dec"] + t["b_dec"]) / s)
    assert any("input" in note for note in parts.notes)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale", "expected_average_only_in", "new"])
def test_saelens_refuses_a_scale_that_it_cannot_know(tmp_path, norm):
    make.saelens(tmp_path, normalize_activations=norm)
    with pytest.raises(UserError, match=norm):
        dialects.read(tmp_path)


@pytest.mark.parametrize("topk", [True, False])
def test_saelens_old_flat_layout(tmp_path, topk):
    raw = make.plain()
    del raw["threshold"]
    raw["scaling_factor"] = torch.ones(make.D_SAE)
    make.saelens(tmp_path, "standard", raw)
    flat = {"hook_point": "blocks.2.attn.hook_z", "model_name": "gpt2-small", "d_in": 6, "d_sae": 20}
    flat |= {"context_size": 64, "hook_point_head_index": None, "normalize_activations": False}
    if topk:
        flat |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    make.json_file(tmp_path, "cfg.json", flat)
    parts = dialects.read(tmp_path)
    t = {name: tensor.double() for name, tensor in raw.items()}
    acts = torch.relu((X.double() - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    if topk:
        acts = acts * (acts >= acts.topk(3).values[:, -1:])
    agree(parts, acts, acts @ t["W_dec"] + t["b_dec"])
    assert parts.cfg["site_in"] == "blocks.2.attn.hook_z" and parts.cfg["context"] == 64
    assert (parts.cfg["architecture"], parts.cfg["k"]) == (("topk", 3) if topk else ("relu", 0))


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
def test_saelens_batchtopk_as_training_leaves_it(tmp_path, name):
    raw = make.plain() | {"topk_threshold": torch.tensor(0.25)}
    del raw["threshold"]
    make.saelens(tmp_path, name, raw, k=7.0, rescale_acts_by_decoder_norm=False)
    with pytest.raises(UserError, match="k must be of type int"):
        dialects.read(tmp_path)
    make.saelens(tmp_path, name, raw, k=7, rescale_acts_by_decoder_norm=False)
    parts = dialects.read(tmp_path)
    assert parts.cfg["architecture"] == "batchtopk" and parts.cfg["k"] == 7
    assert parts.tensors["threshold"].tolist() == [0.25] * 20


@pytest.mark.parametrize(
    ("folder", "site_in", "site_out", "model"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k", "20.hook_resid_post", "20.hook_resid_post", "2b"),
        ("gemma-scope-9b-it-res/layer_9/width_16k", "9.hook_resid_post", "9.hook_resid_post", "9b-it"),
        ("gemma-scope-2b-pt-mlp/layer_0/width_65k", "0.hook_mlp_out", "0.hook_mlp_out", "2b"),
        ("gemma-scope-9b-pt-att/layer_3/width_16k", "3.attn.hook_z", "3.attn.hook_z", "9b"),
        ("gemma-scope-2b-pt-transcoders/layer_4/w", "4.ln2.hook_normalized", "4.hook_mlp_out", "2b"),
    ],
)
def test_gemma_scope(tmp_path, folder, site_in, site_out, model):
    path = tmp_path / "models--google--x" / folder / "average_l0_71"
    tensors = make.gemma_scope(path)
    for given in (path, path / "params.npz"):
        parts = dialects.read(given)
        same_bits(parts, tensors)
        assert parts.cfg["site_in"] == f"blocks.{site_in}" and parts.cfg["site_out"] == f"blocks.{site_out}"
        assert parts.cfg["model"] == f"google/gemma-2-{model}"
        assert parts.cfg["context"] == 1024 and parts.cfg["l0_target"] == 71.0


def test_gemma_scope_embeddings_and_no_names(tmp_path):
    path = tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    raw = make.gemma_scope(path)
    parts = dialects.read(path)
    assert parts.cfg["site_in"] == "hook_embed"
    torch.testing.assert_close(parts.tensors["W_dec"], raw["W_dec"] * 6**0.5)
    make.gemma_scope(tmp_path / "mine")
    parts = dialects.read(tmp_path / "mine")
    assert parts.cfg["site_in"] == "" and "names no model" in parts.notes[0]


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("kind", "hooks", "sites"),
    [
        ("resid_post_all", ("output", None), ("hook_resid_post",) * 2),
        ("attn_out", ("self_attn.o_proj.input", None), ("attn.hook_z",) * 2),
        ("mlp_out_all", ("post_feedforward_layernorm.output", None), ("hook_mlp_out",) * 2),
        (
            "transcoder_all",
            ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
            ("mlp.hook_in", "hook_mlp_out"),
        ),
    ],
)
def test_gemma_scope_2(tmp_path, kind, hooks, sites, with_config):
    affine = kind == "transcoder_all"
    folder = tmp_path / f"gemma-scope-2-270m-pt/{kind}/layer_9_width_16k_l0_small{'_affine' * affine}"
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "width": 20, "l0": 20}
    config |= {"hf_hook_point_in": f"model.layers.9.{hooks[0]}", "affine_connection": affine}
    config |= {"hf_hook_point_out": hooks[1] and f"model.layers.9.{hooks[1]}", "type": "sae"}
    tensors = make.gemma_scope_2(folder, affine, config if with_config else None)
    parts = dialects.read(folder)
    same_bits(parts, tensors)
    assert (parts.cfg["site_in"], parts.cfg["site_out"]) == tuple(f"blocks.9.{site}" for site in sites)
    assert parts.cfg["model"] == "google/gemma-3-270m"
    assert parts.cfg["l0_target"] == (20.0 if with_config else None)
    assert bool(parts.notes) != with_config


CLASSES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk",
}


@pytest.mark.parametrize("name", CLASSES)
def test_dictionary_learning(tmp_path, name):
    t = {k: v.double() for k, v in make.dictionary_learning(tmp_path, name).items()}
    parts = dialects.read(tmp_path)
    if name == "AutoEncoder":  # its own loader brings the decoder to norm 1
        norms = t["W_dec"].norm(dim=1)
        t |= {"W_enc": t["W_enc"] * norms, "b_enc": t["b_enc"] * norms, "W_dec": t["W_dec"] / norms[:, None]}
    x = X.double() if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else X.double() - t["b_dec"]
    pre = x @ t["W_enc"] + (0 if name == "GatedAutoEncoder" else t["b_enc"])
    if name == "GatedAutoEncoder":
        acts = (pre + t["gate_bias"] > 0) * torch.relu(t["r_mag"].exp() * pre + t["mag_bias"])
    elif "TopKSAE" in name:
        acts = torch.relu(pre) * (pre > float(torch.tensor(0.3)))
    elif name == "AutoEncoderTopK":
        acts = torch.relu(pre) * (pre >= pre.topk(make.K).values[:, -1:])
    else:
        acts = torch.relu(pre) * (pre > t["threshold"] if name == "JumpReluAutoEncoder" else 1)
    agree(parts, acts, acts @ t["W_dec"] + t["b_dec"])
    assert parts.cfg["architecture"] == CLASSES[name]
    assert parts.cfg["k"] == (make.K if "TopK" in name else 0)
    assert parts.cfg["site_in"] == "blocks.5.hook_mlp_out" and parts.cfg["context"] == 128
    assert parts.cfg["model"] == "EleutherAI/pythia-70m-deduped"


def test_a_class_that_only_the_config_could_tell(tmp_path):
    make.dictionary_learning(tmp_path, "BatchTopKSAE")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="dict_class"):
        dialects.read(tmp_path)
    make.dictionary_learning(tmp_path, "GatedAutoEncoder")
    (tmp_path / "config.json").unlink()
    assert dialects.read(tmp_path).cfg["architecture"] == "gated"


@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True)])
def test_sparsify(tmp_path, transcode, skip):
    folder = tmp_path / ("layers.5.mlp" if transcode else "layers.5")
    t = {k: v.double() for k, v in make.sparsify(folder, transcode, skip).items()}
    parts = dialects.read(folder)
    pre = torch.relu((X.double() - (0 if transcode else t["b_dec"])) @ t["W_enc"] + t["b_enc"])
    acts = pre * (pre >= pre.topk(make.K).values[:, -1:])
    agree(parts, acts, acts @ t["W_dec"] + t["b_dec"] + (X.double() @ t["W_skip"] if skip else 0))
    sites = (
        ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out") if transcode else ("blocks.5.hook_resid_post",) * 2
    )
    assert (parts.cfg["site_in"], parts.cfg["site_out"]) == sites
    assert parts.cfg["model"] == "EleutherAI/pythia-160m" and not parts.cfg["prepend_bos"]


def test_a_fold_of_narrow_weights_keeps_its_digits(tmp_path):
    raw = {name: tensor.bfloat16() for name, tensor in make.plain().items()}
    make.saelens(tmp_path, "jumprelu", raw, apply_b_dec_to_input=True, dtype="bfloat16")
    t = {name: tensor.double() for name, tensor in raw.items()}
    pre = (X.double() - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    acts = torch.relu(pre) * (pre > t["threshold"])
    parts = dialects.read(tmp_path)
    agree(parts, acts, acts @ t["W_dec"] + t["b_dec"])
    assert parts.tensors["W_enc"].dtype == torch.float32
    make.saelens(tmp_path, "jumprelu", raw, dtype="bfloat16")
    same_bits(dialects.read(tmp_path), raw)


@pytest.mark.parametrize(
    ("text", "repo", "folder"),
    [
        (
            "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
            "google/gemma-scope-2b-pt-res",
            "layer_20/width_16k/average_l0_71",
        ),
        (
            "google/gemma-scope-2-270m-pt/resid_post_all/layer_9_width_16k_l0_small",
            "google/gemma-scope-2-270m-pt",
            "resid_post_all/layer_9_width_16k_l0_small",
        ),
        (
            "gemma-scope-2b-pt-res-canonical:layer_20/width_16k/canonical",
            "google/gemma-scope-2b-pt-res",
            "layer_20/width_16k/canonical",
        ),
        (
            "https://huggingface.co/google/gemma-scope-2b-pt-res/tree/main/layer_20/width_16k/average_l0_71",
            "google/gemma-scope-2b-pt-res",
            "layer_20/width_16k/average_l0_71",
        ),
        ("gemma-scope-2-4b-it-res-all:layer_0_w", "google/gemma-scope-2-4b-it", "resid_post_all/layer_0_w"),
        (
            "gemma-scope-2-27b-it-transcoders:transcoder/layer_16_w",
            "google/gemma-scope-2-27b-it",
            "transcoder/layer_16_w",
        ),
        ("gemma-scope-9b-pt-att:layer_1/w", "google/gemma-scope-9b-pt-att", "layer_1/w"),
    ],
)
def test_ids(text, repo, folder):
    assert parse_id(text) == Id(repo, folder)


def test_ids_that_are_close():
    folders = [f"layer_20/width_16k/average_l0_{l0}" for l0 in (22, 38, 71, 139)] + [
        "layer_1/width_16k/average_l0_64"
    ]
    assert choose_folder(Id("a/b", "layer_20/width_16k/canonical"), folders).endswith("_71")
    tied = [f"x/average_l0_{l0}" for l0 in (64, 136, 306)]
    assert choose_folder(Id("a/b", "x/canonical"), tied).endswith("_136")
    with pytest.raises(UserError, match="Did you mean layer_20/width_16k/average_l0_71"):
        choose_folder(Id("a/b", "layer_20/width_16k/average_l0_72"), folders)
    with pytest.raises(UserError, match=r"mean layer_20/width_16k/average_l0_139 or [^?]*average_l0_22 or"):
        choose_folder(Id("a/b", "layer_20"), folders)
    with pytest.raises(UserError, match="Did you mean google/gemma-scope-2b-pt-res/layer_20/x"):
        parse_id("gemma-scope-2b-pt-res/layer_20/x")
    with pytest.raises(UserError, match="Did you mean gemma-scope-2b-pt-res"):
        parse_id("gemma-scope-2b-pt-ress:layer_20/width_16k/canonical")
    for text in (
        "gemma-scope-2b-pt-res",
        "a/../../b",
        "a/b/../c",
        "gemma-scope-2b-pt-res:../x",
        "",
        "/nowhere/at/all",
        "./x/y",
    ):
        with pytest.raises(UserError):
            parse_id(text)
