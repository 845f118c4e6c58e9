"""Folders of every dialect, as their owners write them, and what those dictionaries compute, in fp64."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

D_IN, D_SAE, K = 6, 20, 4


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def plain(d_in=D_IN, d_sae=D_SAE, d_out=None):
    """W_enc, b_enc, W_dec, b_dec and a positive threshold."""
    d_out = d_in if d_out is None else d_out
    return {
        "W_enc": numbers(d_in, d_sae),
        "b_enc": numbers(d_sae, seed=1),
        "W_dec": numbers(d_sae, d_out, seed=2),
        "b_dec": numbers(d_out, seed=3),
        "threshold": numbers(d_sae, seed=4).abs(),
    }


def json_file(folder, name, values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))


def saelens(folder, architecture="jumprelu", tensors=None, about=None, **values):
    """The layout of version 6."""
    tensors = dict(plain() if tensors is None else tensors)
    if "jumprelu" not in architecture and "batchtopk" not in architecture:
        tensors.pop("threshold", None)
    metadata = {
        "sae_lens_version": "6.54.0",
        "model_name": "gpt2-small",
        "hook_name": "blocks.3.hook_resid_post",
        "context_size": 128,
        "prepend_bos": True,
        "dataset_path": "some/text",
    }
    config = {
        "architecture": architecture,
        "d_in": tensors["W_enc"].shape[0],
        "d_sae": tensors["W_enc"].shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": metadata | (about or {}),
    }
    json_file(folder, "cfg.json", config | values)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.zeros(tensors["W_enc"].shape[1])}, folder / "sparsity.safetensors")
    return tensors


def gemma_scope(folder, tensors=None):
    tensors = plain() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    return tensors


def gemma_scope_2(folder, affine=False, config=None):
    tensors = plain()
    theirs = {name.lower() if name[0] == "W" else name: tensor for name, tensor in tensors.items()}
    if affine:
        tensors["W_skip"] = theirs["affine_skip_connection"] = numbers(D_IN, D_IN, seed=5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / "params.safetensors")
    if config is not None:
        json_file(folder, "config.json", config)
    return tensors


def dictionary_learning(folder, dict_class, said="", **trainer):
    raw = plain()
    linear = {"encoder.weight": raw["W_enc"].T, "decoder.weight": raw["W_dec"].T}
    k, threshold = torch.tensor(K, dtype=torch.int), torch.tensor(0.3)
    bias = {"encoder.bias": raw["b_enc"]}
    four = {name: raw[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    gates = {"r_mag": numbers(D_SAE, seed=6), "gate_bias": raw["b_enc"], "mag_bias": numbers(D_SAE, seed=8)}
    arrays = {
        "AutoEncoder": linear | bias | {"bias": raw["b_dec"]},
        "AutoEncoderNew": linear | bias | {"decoder.bias": raw["b_dec"]},
        "GatedAutoEncoder": linear | gates | {"decoder_bias": raw["b_dec"]},
        "JumpReluAutoEncoder": raw,
        "AutoEncoderTopK": linear | bias | {"b_dec": raw["b_dec"], "k": k, "threshold": threshold},
        "BatchTopKSAE": linear | bias | {"b_dec": raw["b_dec"], "k": k, "threshold": threshold},
        "MatryoshkaBatchTopKSAE": four
        | {"k": k, "threshold": threshold, "group_sizes": torch.tensor([8, D_SAE - 8])},
    }[dict_class]
    about = {"dict_class": said or dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 5}
    about |= {"lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "mlp_out_layer_5"}
    json_file(folder, "config.json", {"trainer": about | trainer, "buffer": {"ctx_len": 128}})
    torch.save({n: t.contiguous() for n, t in arrays.items()}, folder / "ae.pt")
    return raw | gates


def sparsify(folder, transcode=False, skip=False, **values):
    raw = plain()
    arrays = {"encoder.weight": raw["W_enc"].T.contiguous(), "encoder.bias": raw["b_enc"]}
    arrays |= {"W_dec": raw["W_dec"], "b_dec": raw["b_dec"]}
    if skip:
        raw["W_skip"] = numbers(D_IN, D_IN, seed=5)
        arrays["W_skip"] = raw["W_skip"].T.contiguous()
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE}
    config |= {"k": K, "multi_topk": False, "skip_connection": skip, "transcode": transcode, "d_in": D_IN}
    json_file(folder, "cfg.json", config | values)
    save_file(arrays, folder / "sae.safetensors")
    json_file(folder.parent, "config.json", {"model": "EleutherAI/pythia-160m", "ctx_len": 2048})
    return raw


def compute(cfg, tensors, x):
    """A canonical dictionary's latents and outputs, from the definition."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x = x.double()
    product = x @ t["W_enc"]
    if cfg["architecture"] == "gated":
        open_gate = product + t["b_gate"] > 0
        acts = open_gate * torch.relu(product * t["r_mag"].exp() + t["b_mag"])
    else:
        acts = torch.relu(product + t["b_enc"])
        if "threshold" in t:
            acts = acts * (product + t["b_enc"] > t["threshold"])
        if cfg["architecture"] == "topk":
            least = acts.topk(cfg["k"], dim=-1).values[..., -1:]
            acts = acts * (acts >= least)
    out = acts @ t["W_dec"] + t["b_dec"]
    return acts, out + x @ t["W_skip"] if "W_skip" in t else out
