"""Every dialect against its owner's own code, in both directions, on the same inputs.

Arrays are compared bit for bit where nothing is folded. Latents and outputs are computed in fp64 by both, so
that the 1e-6 which is allowed is all for what folding rounds away.
"""

import json

import dialect_makers as make
import owners
import pytest
import sae_lens
import torch
from owners import D_IN, D_SAE, PAIR, SITE, K, X, agree, ours, randomise, same_bits
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import load_file

import sae
from sae import dialects
from sae.errors import UserError

SAELENS = (
    "standard jumprelu topk gated transcoder skip_transcoder jumprelu_transcoder jumprelu_skip_transcoder"
)


def saelens_results(theirs):
    theirs = theirs.to(torch.float64)
    with torch.no_grad():
        acts = theirs.encode(X.double())
        return acts.to_dense() if acts.is_sparse else acts, theirs(X.double())


@pytest.mark.parametrize("b_dec_first", [False, True])
@pytest.mark.parametrize("name", SAELENS.split())
def test_saelens_files_are_read(tmp_path, name, b_dec_first):
    fields = {"k": K, "rescale_acts_by_decoder_norm": b_dec_first} if name == "topk" else {}
    is_transcoder = "transcoder" in name
    if is_transcoder:
        fields["d_out"] = 9
    sae_class, config_class = sae_lens.registry.get_sae_class(name)
    fields["apply_b_dec_to_input"] = b_dec_first and not is_transcoder
    theirs = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **fields))
    randomise(theirs)
    theirs.cfg.metadata.hook_name = SITE
    theirs.save_model(tmp_path)
    parts = dialects.read(tmp_path)
    if is_transcoder or not b_dec_first:
        raw = theirs.state_dict()
        same_bits(parts.tensors, raw | ({"W_skip": raw["W_skip"].T} if "W_skip" in raw else {}))
    assert parts.cfg["d_out"] == fields.get("d_out", D_IN) and parts.cfg["skip"] == ("skip" in name)
    agree(parts, *saelens_results(theirs))


@pytest.mark.parametrize("name", "standard jumprelu topk gated batchtopk matryoshka_batchtopk".split())
@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
def test_saelens_training_files_are_read(tmp_path, name, save):
    fields = {"k": K} if "topk" in name else {}
    if name == "matryoshka_batchtopk":
        fields["matryoshka_widths"] = [8, D_SAE]
    sae_class, config_class = sae_lens.registry.get_sae_training_class(name)
    theirs = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **fields))
    randomise(theirs)
    if "batchtopk" in name:
        theirs.topk_threshold.fill_(0.4)
    theirs.save_inference_model(tmp_path / "for inference")
    inference = sae_lens.SAE.load_from_disk(tmp_path / "for inference")
    getattr(theirs, save)(tmp_path / "one")
    agree(dialects.read(tmp_path / "one"), *saelens_results(inference))


@pytest.mark.parametrize(
    ("name", "fields", "must"),
    [
        ("abstopk", {"k": K}, "architecture must be one of"),
        ("temporal", {"n_heads": 2, "bottleneck_factor": 1}, "must be those of a dictionary"),
        ("matching_pursuit", {}, "must be those of a dictionary"),
    ],
)
def test_saelens_architectures_that_are_none_of_ours_are_refused(tmp_path, name, fields, must):
    sae_class, config_class = sae_lens.registry.get_sae_class(name)
    sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **fields)).save_model(tmp_path)
    with pytest.raises(UserError, match=must):
        dialects.read(tmp_path)


WRITTEN = [(name, {}) for name in ("jumprelu", "batchtopk", "topk", "relu", "gated")] + [
    (name, {"transcoder": True, "skip": skip, "d_out": 9})
    for name in ("jumprelu", "relu", "batchtopk")
    for skip in (False, True)
]


@pytest.mark.parametrize(("architecture", "fields"), WRITTEN)
@pytest.mark.parametrize("writer", ["export", "save"])
def test_saelens_reads_ours(tmp_path, architecture, fields, writer):
    parts = ours(architecture, **fields)
    if writer == "export":
        dialects.write(parts, tmp_path, "saelens")
    else:
        sae.save(sae.build(sae.DictionaryConfig(**parts.cfg), parts.tensors), tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    found = theirs.state_dict()
    same_bits(found | ({"W_skip": found["W_skip"].T} if "W_skip" in found else {}), parts.tensors)
    assert theirs.cfg.metadata.hook_name == parts.cfg["site_in"]
    agree(parts, *saelens_results(theirs))


@pytest.fixture
def local(monkeypatch, tmp_path):
    """SAELens's loaders read repositories that are folders."""

    def download(repo_id, filename, subfolder="", **_):
        path = tmp_path / repo_id / subfolder / filename
        if not path.is_file():
            raise loaders.EntryNotFoundError("none")
        return str(path)

    def sizes(repo_id, filename):
        return {name: list(t.shape) for name, t in load_file(tmp_path / repo_id / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", sizes)
    return tmp_path


def loaded(loader, repo, folder):
    """SAELens's live object by way of a loader, and its config."""
    values, tensors, _ = loader(repo, folder, cfg_overrides={"d_in": D_IN, "d_sae": D_SAE, "d_out": D_IN})
    theirs = sae_lens.SAE.from_dict(
        loaders.handle_config_defaulting(values) | {"reshape_activations": "none"}
    )
    theirs.load_state_dict(tensors)
    return theirs, values


@pytest.mark.parametrize("kind", ["res", "mlp", "att", "transcoders", "embedding"])
@pytest.mark.parametrize("made_by", ["theirs", "ours"])
def test_gemma_scope(local, kind, made_by):
    repo = f"google/gemma-scope-2b-pt-{'res' if kind == 'embedding' else kind}"
    folder = f"{'embedding' if kind == 'embedding' else 'layer_5'}/width_16k/average_l0_71"
    if made_by == "theirs":
        tensors = make.gemma_scope(local / repo / folder)
    else:
        parts = ours("jumprelu")
        tensors = parts.tensors
        dialects.write(parts, local / repo / folder, "gemma-scope")
    is_transcoder = kind == "transcoders"
    loader = (
        loaders.gemma_2_transcoder_huggingface_loader
        if is_transcoder
        else loaders.gemma_2_sae_huggingface_loader
    )
    theirs, values = loaded(loader, repo, folder)
    found = dialects.read(local / repo / folder)
    if kind != "embedding":
        same_bits(found.tensors, tensors)
        same_bits(theirs.state_dict(), tensors)
    assert found.cfg["site_in"] == values["hook_name"]
    assert found.cfg["site_out"] == values.get("hook_name_out", values["hook_name"])
    assert found.cfg["model"] == f"google/{values['model_name']}"
    assert (found.cfg["context"], found.cfg["prepend_bos"]) == (values["context_size"], values["prepend_bos"])
    agree(found, *saelens_results(theirs))


SECOND = "google/gemma-scope-2-270m-pt"


@pytest.mark.parametrize("kind", ["resid_post", "mlp_out_all", "attn_out", "transcoder_all"])
@pytest.mark.parametrize("made_by", ["theirs", "theirs without a config", "ours"])
def test_gemma_scope_2(local, kind, made_by):
    folder = f"{kind}/layer_5_width_16k_l0_small"
    is_transcoder = kind == "transcoder_all"
    if made_by == "ours":
        site = {"resid_post": SITE, "mlp_out_all": PAIR[1], "attn_out": "blocks.5.attn.hook_z"}.get(kind, "")
        parts = ours("jumprelu", is_transcoder, site=site)
        dialects.write(parts, local / SECOND / folder, "gemma-scope-2")
        tensors = parts.tensors
    else:
        inferred = loaders._infer_gemma_3_raw_cfg_dict(SECOND, folder) if made_by == "theirs" else None
        tensors = make.gemma_scope_2(local / SECOND / folder, False, inferred)
    theirs, values = loaded(loaders.gemma_3_sae_huggingface_loader, SECOND, folder)
    found = dialects.read(local / SECOND / folder)
    same_bits(found.tensors, tensors)
    same_bits(theirs.state_dict(), tensors)
    assert found.cfg["model"] == values["model_name"] == "google/gemma-3-270m"
    # SAELens names the transcoder's site hook_mlp_in, which in TransformerLens lies before the norm
    site_in = PAIR[0] if is_transcoder else values["hook_name"]
    assert (found.cfg["site_in"], found.cfg["site_out"]) == (site_in, values.get("hook_name_out", site_in))
    agree(found, *saelens_results(theirs))


def test_the_affine_skip_of_gemma_scope_2_is_not_transposed(local):
    # Google's tutorial adds x @ affine_skip_connection. SAELens 6.54 keeps the matrix as it is and multiplies
    # by its transpose: its loader turns every affine transcoder's skip over. We follow the makers.
    folder = "transcoder_all/layer_5_width_16k_l0_small_affine"
    raw = make.gemma_scope_2(local / SECOND / folder, affine=True)
    theirs, _ = loaded(loaders.gemma_3_sae_huggingface_loader, SECOND, folder)
    found = dialects.read(local / SECOND / folder)
    acts, wrong = saelens_results(theirs)
    skip = raw["W_skip"].double()
    right = wrong - X.double() @ skip.T + X.double() @ skip
    agree(found, acts, right)
    assert (right - wrong).abs().max() > 0.1
    # what we export for SAELens computes what the makers' does
    dialects.write(found, local / "export", "saelens")
    agree(found, *saelens_results(sae_lens.SAE.load_from_disk(local / "export")))


class Data(list):
    """Batches of activations, as its trainer takes them."""

    def __init__(self, batches):
        super().__init__(batches)
        self.config = {"ctx_len": 128}


TRAINERS = {
    "StandardTrainer": {},
    "StandardTrainerAprilUpdate": {},
    "PAnnealTrainer": {},
    "GatedSAETrainer": {},
    "GatedAnnealTrainer": {},
    "JumpReluTrainer": {},
    "TopKTrainer": {"k": K},
    "BatchTopKTrainer": {"k": K},
    "MatryoshkaBatchTopKTrainer": {"k": K, "group_fractions": [0.4, 0.6]},
}


def learning_results(model):
    model = model.double()
    with torch.no_grad():
        return model.encode(X.double()), model(X.double())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", TRAINERS)
def test_dictionary_learning_files_are_read(tmp_path, name, scaled):
    theirs = owners.dictionary_learning()
    data = Data(3 * make.numbers(32, D_IN, seed=i) + 1 for i in range(4))
    config = {"trainer": getattr(theirs, name), "activation_dim": D_IN, "dict_size": D_SAE, "layer": 5}
    config |= {"lm_name": "EleutherAI/pythia-70m-deduped", "steps": 5000, "device": "cpu", "seed": 0}
    if name != "GatedAnnealTrainer":
        config["submodule_name"] = "mlp_out_layer_5"
    steps = 0 if "Anneal" in name and scaled else 3
    theirs.trainSAE(
        data, [config | TRAINERS[name]], steps, save_dir=tmp_path, device="cpu", normalize_activations=scaled
    )
    folder = tmp_path / "trainer_0"
    model, _ = theirs.load_dictionary(folder, "cpu")
    parts = dialects.read(folder)
    assert parts.cfg["site_in"] == (SITE if name == "GatedAnnealTrainer" else "blocks.5.hook_mlp_out")
    assert parts.cfg["context"] == 128 and parts.cfg["model"] == "EleutherAI/pythia-70m-deduped"
    agree(parts, *learning_results(model))
    # weights that have nothing in common with those of a beginning
    model = model.float()
    randomise(model)
    if hasattr(model, "threshold") and not model.threshold.ndim:
        model.threshold.fill_(0.4)
    torch.save(model.state_dict(), folder / "ae.pt")
    model, _ = theirs.load_dictionary(folder, "cpu")
    parts = dialects.read(folder)
    if name == "JumpReluTrainer":
        same_bits(parts.tensors, model.state_dict())
    agree(parts, *learning_results(model))


@pytest.mark.parametrize("architecture", ["jumprelu", "relu", "topk", "batchtopk", "gated"])
def test_dictionary_learning_reads_ours(tmp_path, architecture):
    parts = ours(architecture, context=128)
    dialects.write(parts, tmp_path, "dictionary-learning")
    theirs, config = owners.dictionary_learning().load_dictionary(tmp_path, "cpu")
    assert config["buffer"]["ctx_len"] == 128 and config["trainer"]["submodule_name"] == "resid_post_layer_5"
    found = {
        name: tensor.T if name.endswith("weight") else tensor for name, tensor in theirs.state_dict().items()
    }
    if architecture in ("jumprelu", "relu"):
        names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
        names |= {"decoder.weight": "W_dec", "decoder.bias": "b_dec"}
        same_bits({names.get(name, name): tensor for name, tensor in found.items()}, parts.tensors)
    agree(parts, *learning_results(theirs))


def sparsify_results(theirs):
    theirs = theirs.double()
    with torch.no_grad():
        top, latents, _ = theirs.encode(X.double())
        return torch.zeros(len(X), D_SAE, dtype=top.dtype).scatter(1, latents, top), theirs(
            X.double()
        ).sae_out


@pytest.mark.parametrize("sizes", [{"num_latents": D_SAE}, {"expansion_factor": 5, "num_latents": 0}])
@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsify_files_are_read(tmp_path, transcode, skip, dtype, sizes):
    coder, config = owners.sparse_coder()
    theirs = coder(D_IN, config(k=K, transcode=transcode, skip_connection=skip, **sizes), dtype=dtype)
    randomise(theirs)
    folder = tmp_path / ("layers.5.mlp" if transcode else "layers.5")
    theirs.save_to_disk(folder)
    theirs = coder.load_from_disk(folder)
    parts = dialects.read(folder)
    assert (parts.cfg["site_in"], parts.cfg["site_out"]) == (PAIR if transcode else (SITE, SITE))
    if transcode:
        raw = theirs.state_dict()
        names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
        turned = {names.get(n, n): t.T if n in ("encoder.weight", "W_skip") else t for n, t in raw.items()}
        same_bits(parts.tensors, turned)
    width = theirs.num_latents
    acts, out = make.compute(parts.cfg, parts.tensors, X)
    with torch.no_grad():
        theirs = theirs.double()
        top, latents, _ = theirs.encode(X.double())
        expected = (
            torch.zeros(len(X), width, dtype=top.dtype).scatter(1, latents, top),
            theirs(X.double()).sae_out,
        )
    for mine, other in zip((acts, out), expected, strict=True):
        assert (mine - other).abs().max() <= 1e-6 * other.abs().max()


def test_sparsify_groupmax_is_refused(tmp_path):
    coder, config = owners.sparse_coder()
    coder(D_IN, config(k=K, num_latents=D_SAE, activation="groupmax")).save_to_disk(tmp_path / "layers.5")
    with pytest.raises(UserError, match="activation must be one of topk"):
        dialects.read(tmp_path / "layers.5")


@pytest.mark.parametrize("fields", [{}, {"transcoder": True}, {"transcoder": True, "skip": True}])
def test_sparsify_reads_ours(tmp_path, fields):
    parts = ours("topk", **fields)
    dialects.write(parts, tmp_path / "layers.5.mlp", "sparsify")
    theirs = owners.sparse_coder()[0].load_from_disk(tmp_path / "layers.5.mlp")
    raw = theirs.state_dict()
    if fields:
        names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
        turned = {names.get(n, n): t.T if n in ("encoder.weight", "W_skip") else t for n, t in raw.items()}
        same_bits(turned, parts.tensors)
    agree(parts, *sparsify_results(theirs))
    assert json.loads((tmp_path / "layers.5.mlp/cfg.json").read_text())["k"] == K
