"""Language models: tokens in, activations at named sites out."""

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from activations.collector import resting_collector
from activations.convert import quiet
from activations.norms import PlainNorms
from activations.precision import pick_device, pick_dtype
from activations.shapes import ModelShape, model_shape
from activations.side_by_side import Gathered, joined, side_by_side
from activations.sites import KINDS, kind_of, layer_of, site_name
from activations.sources import fetch_folder, known_models
from sae.errors import UserError

__all__ = ["LanguageModel", "ModelShape", "known_models", "load_model", "model_shape", "special_ids"]

_PROBE = "Hello world,\n\tit's 3.14 o'clock — naïve café 東京 🙂"


class _AllFound(Exception):
    """Ends a forward pass once every wanted activation has been seen."""


class LanguageModel:
    """A causal language model with named sites, behind TransformerLens' bridge.

    Dropout is off and no parameter asks for a gradient. Attention is the explicit (eager) one that the bridge
    needs, so numbers equal those of transformers with `attn_implementation="eager"`, not of its fused
    attention.
    """

    def __init__(self, name: str, hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wraps a loaded transformers model; `load_model` is the way to get one by name.

        The model is changed in place: the bridge puts its hook points into it. Raises UserError when
        TransformerLens has no bridge for the architecture.
        """
        config = hf_model.config.get_text_config()
        head: Any = hf_model.get_output_embeddings()
        if head is None or getattr(config, "is_encoder_decoder", False):
            raise UserError(
                "the model must be a causal language model", hf_model.config.model_type, "choose another"
            )
        self.name = name
        self.tokenizer = tokenizer
        self.device: torch.device = head.weight.device
        self.dtype: torch.dtype = head.weight.dtype
        self.d_vocab, self.d_model = (int(size) for size in head.weight.shape)
        self.max_context = int(getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length)
        # read before the bridge sees the tokenizer: it fills in the special tokens that are missing
        bos: Any = tokenizer.bos_token_id
        self.bos_id: int | None = bos
        self.special_ids: tuple[int, ...] = special_ids(tokenizer)
        self.bridge = _boot(hf_model, tokenizer, head.weight)
        self.n_layers = len(self.bridge.blocks)
        self._head: Any = head
        self._body: nn.Module = hf_model.base_model
        bridge: Any = self.bridge
        self._norm: nn.Module = bridge.ln_final.original_component
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._logit_scale = _logit_scale(config)
        self._norms = PlainNorms(bridge)
        self._points: dict[str, nn.Module] = {}
        hooks = self.bridge.hook_dict
        for site in (site_name(layer, kind) for layer in range(self.n_layers) for kind in KINDS):
            if site in hooks:
                self._points[site] = hooks[site]

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site, by layer and then in the order of computation."""
        return tuple(self._points)

    def site_width(self, site: str) -> int:
        """The width at a site, known without a forward pass. Raises UserError for a site it lacks."""
        self.check_sites([site])
        if kind_of(site) != "attn_z":
            return self.d_model
        projection = self.bridge.blocks[layer_of(site)].attn.o.original_component
        # transformers' GPT-2 keeps its projections as Conv1D, whose weight is [in, out]
        return int(
            projection.in_features if hasattr(projection, "in_features") else projection.weight.shape[0]
        )

    def check_sites(self, sites: Sequence[str]) -> None:
        """Raises UserError, before any forward pass, for a site that this model does not have."""
        if not sites:
            raise UserError("at least one site must be asked for", "none", "name one, such as resid_post")
        for site in sites:
            layer, kind = layer_of(site), kind_of(site)
            if layer >= self.n_layers:
                found = f"layer {layer} in {site}"
                raise UserError(
                    f"{self.name} has layers 0 to {self.n_layers - 1}", found, "choose one of these"
                )
            if site not in self._points:
                kinds = [kind for kind in KINDS if site_name(layer, kind) in self._points]
                found = f"{kind} at layer {layer}, which this architecture does not compute"
                raise UserError(
                    f"the site must exist in {self.name}", found, f"choose from {', '.join(kinds)}"
                )

    @torch.inference_mode()
    def activations(
        self, tokens: Int[Tensor, "batch pos"], sites: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch pos d_in"]]:
        """The activations at `sites`, in the model's dtype and on its device, from one forward pass.

        The pass stops after the last wanted site and never computes logits. Heads are concatenated at attn_z.
        Sites that are the same tensor (resid_post and the next layer's resid_pre) may share memory: do not
        write to them. Raises UserError for a site the model does not have and for more tokens than its
        context holds.
        """
        self.check_sites(sites)
        found = Gathered()

        def keep(site: str, activation: Tensor) -> None:
            # what a norm gives before its weight is fp32 in every model
            found.put(site, activation.to(self.dtype))
            if found.has(sites):
                raise _AllFound

        with self.watching({site: functools.partial(keep, site) for site in sites}):
            self._run_parts(tokens)
        return {site: found.take(site) for site in dict.fromkeys(sites)}

    def run_body(
        self, tokens: Int[Tensor, "batch pos"], *, gradients: bool = False
    ) -> Float[Tensor, "batch pos d_model"]:
        """The hidden states after the final norm: everything but the logits. `gradients` records the pass."""
        self._check_context(tokens)
        with torch.inference_mode(not gradients), self._norms.standing_in():
            return self._final(tokens.to(self.device))

    def run_parts(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """`run_body` as fast as it can be had: parts of the batch side by side, where that is faster.

        A watcher is then given each part's activation by itself, and `own_part` says which blocks it is of.
        """
        return joined([final for final in self._run_parts(tokens) if final is not None])

    @torch.inference_mode()
    def _run_parts(self, tokens: Int[Tensor, "batch pos"]) -> list[Tensor | None]:
        """The hidden states of each part; None where a watcher ended its pass."""
        self._check_context(tokens)

        def run(part: Tensor) -> Tensor | None:
            with suppress(_AllFound):
                return self._final(part)

        with self._norms.standing_in():
            return side_by_side(tokens.to(self.device), run)

    def _final(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self._body(tokens, use_cache=False).last_hidden_state

    def _check_context(self, tokens: Int[Tensor, "batch pos"]) -> None:
        if tokens.shape[1] > self.max_context:
            must = f"{self.name} reads at most {self.max_context} tokens at once"
            raise UserError(must, f"{tokens.shape[1]} tokens", "use a shorter context")

    @contextmanager
    def watching(self, watchers: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
        """Within it, each watcher is given its site's activation; a tensor it returns replaces that one."""
        handles = []
        try:
            for site, watcher in watchers.items():
                # hooked by torch itself: the bridge's own hooks would split attn_z into heads
                handles.append(self._points[site].register_forward_hook(_as_hook(watcher)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def final_norm(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The model's last norm, on a residual stream."""
        return self._norm(resid)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding matrix: a view of the model's own weights."""
        return self._head.weight.detach().T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"] | None:
        """The unembedding's bias, which most models do not have."""
        bias = getattr(self._head, "bias", None)
        return None if bias is None else bias.detach()

    def cap_logits(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
        """The scaling and soft capping that the model applies to its raw logits; mostly none."""
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def unembed(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Logits from hidden states after the final norm, with the model's soft capping."""
        return self.cap_logits(F.linear(hidden, self.W_U.T, self.b_U))

    @property
    def _backend(self) -> Any:
        """The tokenizer itself, behind that of transformers; None where that is all there is."""
        return getattr(self.tokenizer, "backend_tokenizer", None)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of a text, with BOS in front only when asked for (and when the model has one)."""
        backend = self._backend
        if backend is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        else:  # straight to the tokenizer: transformers would warn about every text longer than the context
            ids = backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else list(ids)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Each token as it reads inside a text, its leading space kept; part of a character reads <0xE2>."""
        # decoded behind another token, since decoders drop the space in front of a text
        anchor = self.encode("a")[-1]
        pairs = [[anchor], *([anchor, int(token)] for token in ids)]
        backend = self._backend
        if backend is None:
            texts = self.tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
        else:  # straight to the tokenizer: transformers takes eight times as long
            texts = backend.decode_batch(pairs, skip_special_tokens=False)
        start = len(texts[0])
        return [
            text[start:] if _readable(text[start:]) else self._raw_piece(int(token))
            for token, text in zip(ids, texts[1:], strict=True)
        ]

    @functools.cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 over the vocabulary and a probing sentence's ids: equal when texts give equal tokens."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(json.dumps([vocabulary, self.encode(_PROBE)]).encode()).hexdigest()

    def _raw_piece(self, token: int) -> str:
        piece: Any = self.tokenizer.convert_ids_to_tokens(token) if token < len(self.tokenizer) else None
        if piece is None:
            return f"<{token}>"
        alphabet = _byte_alphabet()
        if not piece.startswith("<0x") and all(letter in alphabet for letter in piece):
            return "".join(f"<0x{alphabet[letter]:02X}>" for letter in piece)
        return piece


def load_model(
    name: str, *, dtype: str = "auto", device: str = "auto", cache: Path | None = None, progress: bool = True
) -> LanguageModel:
    """A model by its known name, hub id, local transformers folder or .gguf file.

    `dtype` auto is bf16 where the hardware multiplies it natively, else fp32; `device` auto is the GPU when
    there is one. A .gguf is converted once, into `cache` ($JUMPSCOPE_CACHE, or the user's cache folder).
    Remote code is never run and pickles are never read. Raises UserError for all that can be wrong with the
    name or the files.
    """
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    source = fetch_folder(name, cache=cache, progress=progress)
    hf_model, tokenizer = _read_folder(source.folder, kind)
    hf_model.to(device=place)  # pyright: ignore[reportCallIssue]  # its own decorator hides the signature
    return LanguageModel(source.name, hf_model, tokenizer)


def _read_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with resting_collector():
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        with quiet():
            hf_model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager", use_safetensors=True, **local
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        must = f"{folder} must hold a whole transformers model and its tokenizer"
        do = "restore the files, or choose a causal language model that needs no code of its own"
        raise UserError(must, _first_line(error), do) from error
    return hf_model, tokenizer


def _boot(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weight: Tensor) -> TransformerBridge:
    hf_model.eval().requires_grad_(False)
    # unless it says that it adds BOS, the bridge would read the tokenizer once more, from the disk or the hub
    own = copy.copy(tokenizer) if tokenizer.eos_token is not None else copy.deepcopy(tokenizer)
    own.init_kwargs = {"name_or_path": "", **tokenizer.init_kwargs, "add_bos_token": True}
    architecture = type(hf_model).__name__
    hf_model.config.architectures = [
        architecture
    ]  # the bridge goes by it, and a model built in code has none
    try:
        return TransformerBridge.boot_transformers(
            str(hf_model.config.name_or_path or "model"),
            hf_model=hf_model,
            tokenizer=own,
            dtype=weight.dtype,
            device=str(weight.device),
        )
    except ValueError as error:
        must = "TransformerLens must have a bridge for the model's architecture"
        raise UserError(must, f"{architecture}, for which it has none", "choose another model") from error


def _as_hook(watcher: Callable[[Tensor], Tensor | None]) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    return lambda _module, _inputs, output: watcher(output)


def _readable(text: str) -> bool:
    # a replacement character stands for part of a character; control characters would ruin a page
    return bool(text) and all(letter != "\ufffd" and (letter >= " " or letter in "\n\t\r") for letter in text)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens that stand for no text: BOS, EOS, padding and the like."""
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return tuple(sorted({*tokenizer.all_special_ids, *added}))


def _logit_scale(config: Any) -> float:
    # Cohere multiplies its logits, Granite divides them
    return float(getattr(config, "logit_scale", None) or 1) / float(
        getattr(config, "logits_scaling", None) or 1
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: as they are, or from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}
