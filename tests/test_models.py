"""Activations are those of transformers itself, whatever the architecture; tokens read as they should."""

import functools
import gc
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, plain_model, tiny_tokenizer, wrapped_model
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from activations.collector import resting_collector
from activations.models import LanguageModel, load_model, model_shape
from activations.precision import pick_device, pick_dtype
from activations.sites import KINDS, expand_sites, kind_of, layer_of, site_name
from sae.errors import UserError

TOKENS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))

# (module inside a block, whether its input or its output) for each kind, as transformers names them
_ROPE = {
    "attn_z": ("self_attn.o_proj", "in"),
    "attn_out": ("self_attn", "out"),
    "resid_mid": ("post_attention_layernorm", "in"),
    "mlp_in": ("mlp", "in"),
    "mlp_out": ("mlp", "out"),
}
_POST_NORMS = {
    **_ROPE,
    "attn_out": ("post_attention_layernorm", "out"),
    "resid_mid": ("pre_feedforward_layernorm", "in"),
    "mlp_out": ("post_feedforward_layernorm", "out"),
}
PLACES = {
    "gemma": _ROPE,
    "gemma2": _POST_NORMS,
    "gemma3": _POST_NORMS,
    "llama": _ROPE,
    "gpt2": {
        "attn_z": ("attn.c_proj", "in"),
        "attn_out": ("attn", "out"),
        "resid_mid": ("ln_2", "in"),
        "mlp_in": ("mlp", "in"),
        "mlp_out": ("mlp", "out"),
    },
    "gpt_neox": {
        "attn_z": ("attention.dense", "in"),
        "attn_out": ("attention", "out"),
        "mlp_in": ("mlp", "in"),
        "mlp_out": ("mlp", "out"),
    },
}


def _keep(found: dict[str, Tensor], site: str, side: str, _module, args, kwargs, output) -> None:
    value = (args[0] if args else kwargs["hidden_states"]) if side == "in" else output
    found[site] = (value[0] if isinstance(value, tuple) else value).clone()


@contextmanager
def recorded(model: nn.Module, architecture: str) -> Iterator[dict[str, Tensor]]:
    """Activations of a plain transformers model by plain torch hooks."""
    found: dict[str, Tensor] = {}
    handles = []
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
    places = {**PLACES[architecture], "resid_pre": ("", "in"), "resid_post": ("", "out")}
    for layer, block in enumerate(blocks):
        for kind, (path, side) in places.items():
            keep = functools.partial(_keep, found, site_name(layer, kind), side)
            handles.append(block.get_submodule(path).register_forward_hook(keep, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_site_equals_transformers_own(architecture: str) -> None:
    plain = plain_model(architecture)
    with torch.no_grad(), recorded(plain, architecture) as expected:
        output = plain(TOKENS, output_hidden_states=True)
    model = wrapped_model(architecture)
    sites = [site for site in expected if site in model._points]
    assert len(sites) == 4 * (6 if architecture == "gpt_neox" else 7)
    acts = model.activations(TOKENS, sites)
    for site in sites:
        assert acts[site].shape == (2, 12, model.site_width(site))
        torch.testing.assert_close(
            acts[site], expected[site], rtol=0, atol=1e-5, msg=lambda m, s=site: f"{s}: {m}"
        )
    for layer in range(4):
        torch.testing.assert_close(
            acts[site_name(layer, "resid_pre")], output.hidden_states[layer], rtol=0, atol=1e-5
        )
    final = model.run_body(TOKENS)
    torch.testing.assert_close(final, output.hidden_states[-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.final_norm(acts[site_name(3, "resid_post")]), final, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.unembed(final), output.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.cap_logits(final @ model.W_U), output.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3", "llama", "gpt2"])
def test_attention_and_mlp_outputs_are_what_the_residual_stream_gains(architecture: str) -> None:
    model = wrapped_model(architecture)
    acts = model.activations(TOKENS, expand_sites(",".join(KINDS), "1", 4))
    pre, mid, post = (acts[site_name(1, f"resid_{place}")] for place in ("pre", "mid", "post"))
    torch.testing.assert_close(pre + acts[site_name(1, "attn_out")], mid)
    torch.testing.assert_close(mid + acts[site_name(1, "mlp_out")], post)


def test_the_pass_stops_after_the_last_wanted_site(tiny_model: LanguageModel) -> None:
    ran: list[int] = []
    counters = [
        block.register_forward_hook(lambda *_args, layer=layer: ran.append(layer))
        for layer, block in enumerate(tiny_model.bridge.blocks)
    ]
    try:
        tiny_model.activations(TOKENS, ["blocks.2.hook_resid_mid", "blocks.0.hook_resid_post"])
    finally:
        for counter in counters:
            counter.remove()
    assert ran == [0, 1]


def test_asking_leaves_no_hook_behind_even_after_an_error(tiny_model: LanguageModel) -> None:
    site = "blocks.1.hook_resid_post"
    tiny_model.activations(TOKENS, [site])
    with pytest.raises(IndexError):
        tiny_model.activations(torch.full((1, 4), 10_000), [site])
    assert not tiny_model._points[site]._forward_hooks


def test_activations_do_not_depend_on_what_else_is_asked(tiny_model: LanguageModel) -> None:
    sites = expand_sites(",".join(KINDS), "all", 4)
    together = tiny_model.activations(TOKENS, sites)
    for site in sites:
        assert torch.equal(tiny_model.activations(TOKENS, [site])[site], together[site])


def test_bad_sites_and_too_long_texts_are_refused(tiny_model: LanguageModel) -> None:
    with pytest.raises(UserError, match="layers 0 to 3"):
        tiny_model.check_sites(["blocks.4.hook_resid_post"])
    with pytest.raises(UserError, match="at least one site"):
        tiny_model.activations(TOKENS, [])
    with pytest.raises(UserError, match="at most 64 tokens"):
        tiny_model.activations(torch.ones(1, 65, dtype=torch.long), ["blocks.0.hook_resid_post"])
    with pytest.raises(UserError, match="resid_mid at layer 1, which this architecture does not compute"):
        wrapped_model("gpt_neox").check_sites(["blocks.1.hook_resid_mid"])


def test_encoding_adds_bos_only_when_asked(tiny_model: LanguageModel) -> None:
    ids = tiny_model.encode("Paris is the capital")
    assert tiny_model.encode("Paris is the capital", add_bos=True) == [2, *ids]
    assert 2 not in ids
    assert tiny_model.special_ids == (0, 1, 2)


def test_byte_level_tokens_read_as_they_decode(tiny_model: LanguageModel) -> None:
    text = "the capital of Rome\n"
    strings = tiny_model.token_strings(tiny_model.encode(text))
    assert "".join(strings) == text
    assert any(piece.startswith(" ") for piece in strings)
    assert tiny_model.token_strings(tiny_model.encode("é")) == ["<0xC3>", "<0xA9>"]
    assert tiny_model.token_strings([2, 9999]) == ["<bos>", "<9999>"]
    assert tiny_model.token_strings([]) == []


class SlowTokenizer(PreTrainedTokenizerFast):
    """One that transformers keeps in Python."""

    @property
    def backend_tokenizer(self):
        return None


def test_tokens_read_the_same_where_transformers_decodes_them() -> None:
    fast, slow = tiny_tokenizer(), tiny_tokenizer()
    slow.__class__ = SlowTokenizer
    ids, model = range(len(fast) + 1), plain_model("gpt2")
    strings = LanguageModel("fast", model, fast).token_strings(ids)
    assert len(set(strings)) > 100
    assert LanguageModel("slow", model, slow).token_strings(ids) == strings


def test_the_tokenizer_hash_tells_tokenizers_apart(tiny_model: LanguageModel) -> None:
    assert wrapped_model("gpt2").tokenizer_hash == tiny_model.tokenizer_hash
    other = tiny_tokenizer()
    other.add_tokens(["capital of"])
    assert LanguageModel("other", plain_model("gpt2"), other).tokenizer_hash != tiny_model.tokenizer_hash


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    plain_model("gemma2").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_local_folder_loads_in_the_dtype_asked_for(folder: Path) -> None:
    model = load_model(str(folder), dtype="fp32", device="cpu")
    site = "blocks.2.hook_resid_post"
    expected = wrapped_model("gemma2").activations(TOKENS, [site])[site]
    torch.testing.assert_close(model.activations(TOKENS, [site])[site], expected)
    assert model.name == str(folder)
    half = load_model(str(folder), dtype="bf16", device="cpu")
    assert half.activations(TOKENS, [site])[site].dtype == torch.bfloat16


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_rests_only_while_the_tokenizer_is_read(enabled, folder: Path, monkeypatch) -> None:
    seen, read = [], AutoTokenizer.from_pretrained

    def watched(*args, **kwargs):
        seen.append(gc.isenabled())
        return read(*args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", watched)
    (gc.enable if enabled else gc.disable)()
    try:
        load_model(str(folder), dtype="float32")
        after = gc.isenabled()
        with pytest.raises(ZeroDivisionError), resting_collector():
            _ = 1 / 0
        assert (seen, after, gc.isenabled()) == ([False], enabled, enabled)
    finally:
        gc.enable()


def test_shapes_are_known_without_loading(folder: Path) -> None:
    shape, model = model_shape(str(folder)), wrapped_model("gemma2")
    assert (shape.n_layers, shape.d_model, shape.d_vocab, shape.max_context) == (4, 32, 300, 64)
    assert shape.widths == {kind: model.site_width(site_name(3, kind)) for kind in KINDS}
    assert shape.body_params == sum(p.numel() for p in plain_model("gemma2").parameters()) - 300 * 32


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_with_a_file_missing_is_refused(folder: Path, tmp_path: Path, missing: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / missing).unlink()
    with pytest.raises(UserError):
        load_model(str(broken))


def test_torn_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="whole transformers model"):
        load_model(str(broken))


def test_pickled_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="could run code"):
        load_model(str(pickled))


def test_code_that_comes_with_a_model_is_never_run(folder: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(folder, hostile)
    config = json.loads((hostile / "config.json").read_text())
    config |= {
        "model_type": "made_up",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (hostile / "config.json").write_text(json.dumps(config))
    (hostile / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError):
        load_model(str(hostile))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["gemma-3-270n", "no such model", "a/b/c", "/no/such/folder", ""])
def test_unknown_models_are_refused_with_the_known_names(name: str) -> None:
    with pytest.raises(UserError, match="gemma-3-270m"):
        load_model(name)


def test_unknown_dtypes_and_devices_are_refused() -> None:
    with pytest.raises(UserError, match="bf16"):
        pick_dtype("int8", torch.device("cpu"))
    with pytest.raises(UserError, match="device"):
        pick_device("toaster")
    assert pick_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)


def test_gemma_is_itself(gemma: LanguageModel) -> None:
    assert (gemma.n_layers, gemma.d_model, gemma.d_vocab, gemma.max_context) == (18, 640, 262_144, 32_768)
    assert gemma.site_width("blocks.9.attn.hook_z") == 1024
    assert (gemma.bos_id, gemma.special_ids[:3]) == (2, (0, 1, 2))
    assert len(gemma.special_ids) > 6000  # with the unused ones
    text = "Paris is the capital of"
    assert 2 not in gemma.encode(text)
    final = gemma.run_body(torch.tensor([gemma.encode(text, add_bos=True)]))
    assert gemma.token_strings([int(gemma.unembed(final[0, -1]).argmax())]) == [" France"]
    assert gemma.token_strings([238, 107]) == ["<0x00>", "\n"]
    sizes = model_shape("gemma-3-270m")
    assert (sizes.n_layers, sizes.d_model, sizes.d_vocab, sizes.widths["attn_z"]) == (18, 640, 262_144, 1024)
    # a name of a layer and kind in, the same site's layer and kind out, for each of them
    for site in expand_sites(",".join(KINDS), "all", 18):
        assert gemma.site_width(site) == sizes.widths[kind_of(site)]
        assert layer_of(site) < 18
