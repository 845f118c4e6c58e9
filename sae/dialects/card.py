"""The model card that goes beside an exported dictionary."""

from sae.dialects.parts import Parts

_USE = {
    "saelens": 'SAE.load_from_disk("FOLDER")  # from sae_lens import SAE',
    "gemma-scope": 'numpy.load("FOLDER/params.npz")',
    "gemma-scope-2": 'safetensors.torch.load_file("FOLDER/params.safetensors")',
    "dictionary-learning": 'load_dictionary("FOLDER", device="cpu")  # from dictionary_learning.utils',
    "sparsify": 'SparseCoder.load_from_disk("FOLDER")  # from sparsify import SparseCoder',
}
_GATES = {
    "jumprelu": "relu(pre) where pre > threshold (strict)",
    "batchtopk": "relu(pre) where pre > threshold (strict); trained with batch top-k",
    "topk": "the k largest pre-activations of a row, where positive",
    "relu": "relu(pre)",
    "gated": "relu(pre * exp(r_mag) + b_mag) where pre + b_gate > 0, pre = x W_enc",
}


def card(parts: Parts, target: str) -> str:
    """README.md: what the dictionary is, where it belongs, its conventions, how it is opened."""
    cfg = parts.cfg
    kind = "Transcoder" if parts.transcoder else "Sparse autoencoder"
    where = cfg["site_in"] if cfg["site_in"] == cfg["site_out"] else f"{cfg['site_in']} -> {cfg['site_out']}"
    facts = {
        "model": cfg["model"],
        "site (TransformerLens)": where,
        "architecture": cfg["architecture"] + (" with a linear skip" if cfg["skip"] else ""),
        "gate": _GATES[cfg["architecture"]],
        "d_in": cfg["d_in"],
        "d_sae": cfg["d_sae"],
        "d_out": cfg["d_out"],
        "k": cfg["k"],
        "L0 aimed at": cfg["l0_target"],
        "context": cfg["context"],
        "contexts begin with BOS": "yes" if cfg["prepend_bos"] else "no",
        "text": cfg["corpus"],
        "dtype": str(parts.tensors["W_enc"].dtype).removeprefix("torch."),
        "activations": "raw in, raw out: nothing to scale or to subtract beforehand",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value not in ("", 0, None))
    notes = "".join(f"- {note}\n" for note in parts.notes)
    return (
        f"---\nlibrary_name: {target}\ntags:\n- sparse-autoencoder\n- interpretability\n---\n"
        f"# {kind} of {cfg['model'] or 'a language model'}\n\n"
        f"Written by jumpscope in the format of {target}.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        f"    {_USE[target]}\n" + (f"\nOn reading the original:\n\n{notes}" if notes else "")
    )
