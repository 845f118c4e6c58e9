"""The sizes of a model, from its configuration alone: what a plan needs before any weight is read."""

import functools
from dataclasses import dataclass
from pathlib import Path

from activations.gguf_file import GgufHead, read_head
from activations.hub import config_folder
from activations.sites import KINDS
from activations.sources import head_path, resolve
from sae.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model."""

    n_layers: int
    d_model: int
    n_heads: int
    d_vocab: int
    max_context: int
    """Tokens that the model reads at once."""
    widths: dict[str, int]
    """The width of an activation, by kind of site."""
    body_params: int
    """Parameters outside embedding and unembedding: what a pass without logits computes with."""
    vocab_params: int
    """Parameters of embedding and unembedding, once where both are the same."""


def model_shape(name: str) -> ModelShape:
    """The sizes of the model that `load_model` would load under this name, without loading it.

    Reads the head of a .gguf file or a config.json, which is all that is downloaded of a model of the hub.
    Raises UserError as `load_model` does.
    """
    path = head_path(name)
    if path is not None:
        stat = path.stat() if path.exists() else None
        return _of_file(path, stat and (stat.st_mtime_ns, stat.st_size))
    place = resolve(name)
    return _from_config(place if isinstance(place, Path) else config_folder(place))


def _shape(
    n_layers: int,
    d_model: int,
    n_heads: int,
    d_head: int,
    *,
    d_vocab: int,
    max_context: int,
    body_params: int,
    vocab_params: int,
) -> ModelShape:
    widths = {kind: n_heads * d_head if kind == "attn_z" else d_model for kind in KINDS}
    return ModelShape(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_vocab=d_vocab,
        max_context=max_context,
        widths=widths,
        body_params=body_params,
        vocab_params=vocab_params,
    )


@functools.lru_cache(maxsize=4)
def _of_file(path: Path, _state: tuple[int, int] | None) -> ModelShape:
    """Of a .gguf file in one state of it; its head holds the vocabulary: half a second to read."""
    return _from_head(read_head(path), path)


def _from_head(head: GgufHead, path: Path) -> ModelShape:
    tensors = {tensor.name: tensor for tensor in head.tensors}
    numbers = {
        key: head.dimension(key) for key in ("block_count", "embedding_length", "attention.head_count")
    }
    missing = [key for key, number in numbers.items() if number is None]
    if missing or "token_embd.weight" not in tensors:
        found = f"no {', '.join(missing) or 'token_embd.weight'} in {path}"
        raise UserError("a .gguf file must describe a language model", found, "choose another file")
    n_layers, d_model, n_heads = (number or 0 for number in numbers.values())
    outside = ("token_embd.weight", "output.weight", "rope_freqs.weight")
    return _shape(
        n_layers,
        d_model,
        n_heads,
        head.dimension("attention.key_length") or d_model // n_heads,
        d_vocab=tensors["token_embd.weight"].shape[1],
        max_context=head.dimension("context_length") or 0,
        body_params=sum(tensor.n_values for tensor in head.tensors if tensor.name not in outside),
        vocab_params=sum(tensors[name].n_values for name in outside[:2] if name in tensors),
    )


def _from_config(folder: Path) -> ModelShape:
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        ).get_text_config()
        with torch.device("meta"):
            body = AutoModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        do = "choose a model that transformers reads without code of its own"
        raise UserError(
            f"{folder} must hold the config.json of a language model", str(error)[:200], do
        ) from error
    n_heads, d_model = config.num_attention_heads, config.hidden_size
    embedding = body.get_input_embeddings().weight
    return _shape(
        config.num_hidden_layers,
        d_model,
        n_heads,
        getattr(config, "head_dim", None) or d_model // n_heads,
        d_vocab=config.vocab_size,
        max_context=getattr(config, "max_position_embeddings", None) or 0,
        body_params=sum(parameter.numel() for parameter in body.parameters()) - embedding.numel(),
        vocab_params=embedding.numel() * (1 if config.tie_word_embeddings else 2),
    )
