"""Dictionaries in a bridge, through its hooks: what they change, what they leave alone to the bit."""

import re

import pytest
import torch
from conftest import CONFIGS, plain_model, tiny_tokenizer, wrapped_model
from dictionaries import config_of, tensors_of
from transformer_lens.model_bridge import TransformerBridge

import sae
from activations.edits import ablate, clamp, scale, steer
from activations.hooks import spliced
from activations.models import LanguageModel
from activations.sites import KINDS, site_name
from activations.splice import clean_run, spliced_final
from sae.errors import UserError

TOKENS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
TOKENS[:, 0] = 2  # BOS
SITE = "blocks.1.hook_resid_post"
D_SAE = 40


def dictionary_at(site=SITE, site_out="", architecture="jumprelu", dtype=torch.float32, **fields):
    cfg = config_of(
        architecture, **{"d_in": 32, "d_sae": D_SAE, "site_in": site, "site_out": site_out} | fields
    )
    tensors = tensors_of(cfg)
    tensors["W_enc"] /= cfg.d_in**0.5
    return sae.build(cfg, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def plain_bridge(architecture="gemma3", dtype=torch.float32) -> TransformerBridge:
    """As a user of TransformerLens has it: weights ask for gradients, nothing of ours around it."""
    model = plain_model(architecture).to(dtype)
    model.config.architectures = [type(model).__name__]
    tokenizer = tiny_tokenizer()
    # which a tokenizer that was read from a folder has
    tokenizer.init_kwargs |= {"name_or_path": "", "add_bos_token": True}
    return TransformerBridge.boot_transformers(
        "tiny", hf_model=model, tokenizer=tokenizer, dtype=dtype, device="cpu"
    )


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return plain_bridge()


@pytest.fixture(scope="module", params=CONFIGS)
def every_model(request: pytest.FixtureRequest) -> LanguageModel:
    return wrapped_model(request.param)


def activation_at(bridge, site, tokens=TOKENS, run=None):
    """What the rest of the model reads at a site, heads concatenated, also while something is spliced in."""
    seen = []
    keep = [(site, lambda activation, hook: seen.append(activation.detach().clone()))]
    with torch.no_grad(), bridge.hooks(fwd_hooks=keep):
        (run or bridge)(tokens)
    return seen[-1].flatten(2)


def n_hooks(bridge):
    return sum(len(handles) for handles in bridge.list_hooks().values())


@torch.no_grad()
def fires_here_and_there(dictionary, x):
    share = (dictionary.encode(x) > 0).flatten(0, -2).float().mean(0)
    return int((share - 0.5).abs().argmin())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_at_every_site_of_every_model(every_model, kind):
    """The reconstruction stands there, what comes after reads it, and with the error nothing changes."""
    bridge, site = every_model.bridge, site_name(1, kind)
    if site not in every_model._points:
        pytest.skip("the architecture does not compute it")
    made = dictionary_at(site, d_in=every_model.site_width(site))
    clean, x = bridge(TOKENS), activation_at(bridge, site)
    with spliced(bridge, made, error_term=True) as at:
        assert torch.equal(bridge(TOKENS), clean)
        assert torch.equal(every_model.run_body(TOKENS), every_model.run_body(TOKENS))
    expected = made.encode(x)
    expected[:, 0] = 0
    torch.testing.assert_close(at.latents[site], expected, rtol=1e-6, atol=1e-6)
    with spliced(every_model, made):
        there = activation_at(bridge, site)
        assert not torch.equal(bridge(TOKENS), clean)
    torch.testing.assert_close(there[:, 1:], made(x)[:, 1:], rtol=1e-6, atol=1e-6)
    assert torch.equal(there[:, 0], x[:, 0])
    assert torch.equal(bridge(TOKENS), clean)


@torch.no_grad()
@pytest.mark.parametrize("architecture", [a for a in CONFIGS if a != "gpt_neox"])
@pytest.mark.parametrize("run", ["bridge", "run_body"])
def test_the_residual_stream_goes_on_with_what_is_spliced_into_its_middle(architecture, run):
    model = wrapped_model(architecture)
    middle, ends = site_name(1, "resid_mid"), [site_name(1, "mlp_out"), SITE]
    with spliced(model, dictionary_at(middle), keep="all"):
        through = model.bridge if run == "bridge" else model.run_body
        mid, mlp, post = (activation_at(model.bridge, site, run=through) for site in (middle, *ends))
    torch.testing.assert_close(post, mid + mlp, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["jumprelu", "topk", "gated", "relu", "batchtopk"])
def test_an_ablation_takes_away_one_row_and_nothing_else(dtype, architecture):
    bridge, made = plain_bridge(dtype=dtype), dictionary_at(architecture=architecture)
    clean, x = bridge(TOKENS), activation_at(bridge, SITE)
    latent = fires_here_and_there(made, x)
    with spliced(bridge, made, error_term=True, edit=ablate(latent), keep="all") as at:
        there = activation_at(bridge, SITE)
        ablated = bridge(TOKENS)
    acts = made.encode(x)
    assert torch.equal(at.latents[SITE], acts)
    assert torch.equal(there, (x + -acts[..., latent, None] * made.W_dec[latent]).to(dtype))
    silent = acts[..., latent] == 0
    assert 0 < int(silent.sum()) < silent.numel()
    assert torch.equal(there[silent], x[silent])
    assert there.dtype == ablated.dtype == clean.dtype == dtype
    assert not torch.equal(ablated, clean)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_error_term_the_logits_are_the_clean_ones(dtype):
    bridge = plain_bridge(dtype=dtype)
    sites = [site_name(layer, kind) for layer in range(4) for kind in ("attn_z", "mlp_out", "resid_post")]
    made = [dictionary_at(site, d_in=64 if site.endswith("z") else 32) for site in sites]
    clean = bridge(TOKENS)
    with spliced(bridge, made, error_term=True, keep="all") as at:
        assert torch.equal(bridge(TOKENS), clean)
    assert sorted(at.latents) == sorted(sites) and len(at.latents) == 12
    for edit in (lambda acts: None, lambda acts: acts, scale(3, by=1.0)):  # edits that change nothing
        with spliced(bridge, made, error_term=True, edit=dict.fromkeys(sites, edit), keep="all"):
            assert torch.equal(bridge(TOKENS), clean)


@torch.no_grad()
def test_the_edits(bridge):
    made = dictionary_at()
    x = activation_at(bridge, SITE)
    acts = made.encode(x)
    latent = fires_here_and_there(made, x)
    row, own = made.W_dec[latent], acts[..., latent, None]
    added = {
        ablate(latent): -own * row,
        scale(latent, by=3.0): 2 * own * row,
        clamp(latent, to=7.0): (7 - own) * row,
        steer(latent, by=-2.5): -2.5 * row.expand_as(x),
        ablate(latent, 4): -own * row - acts[..., 4, None] * made.W_dec[4],
        lambda acts: torch.zeros_like(acts): -(acts @ made.W_dec),
    }
    for edit, difference in added.items():
        with spliced(bridge, made, error_term=True, edit=edit, keep="all"):
            torch.testing.assert_close(activation_at(bridge, SITE), x + difference, rtol=1e-5, atol=1e-4)
        with spliced(bridge, made, edit={SITE: edit}, keep="all") as at:
            there = activation_at(bridge, SITE)
        torch.testing.assert_close(there, made(x) + difference, rtol=1e-5, atol=1e-4)
        assert torch.equal(at.latents[SITE], acts)  # as encoded, not as edited


@torch.no_grad()
def test_where_it_is_spliced(bridge):
    made = dictionary_at()
    x = activation_at(bridge, SITE)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) > 0.5
    after = {"ordinary": TOKENS > 2, "all": torch.ones_like(mask), "mask": mask, "function": TOKENS > 100}
    for name, where in after.items():
        keep = {"mask": mask, "function": lambda tokens: tokens > 100}.get(name, name)
        with spliced(bridge, made, keep=keep, edit=steer(3, by=1.0)) as at:
            there = activation_at(bridge, SITE)
        assert torch.equal((there != x).any(-1), where), name
        assert torch.equal(at.latents[SITE] > 0, (made.encode(x) > 0) & where[..., None])
        with spliced(bridge, made, keep=keep, edit=steer(3, by=1.0), error_term=True):
            assert torch.equal((activation_at(bridge, SITE) != x).any(-1), where), name


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_reads_one_site_and_writes_another(bridge, skip):
    into, out = "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"
    made = dictionary_at(into, out, skip=skip)
    clean, x, y = bridge(TOKENS), activation_at(bridge, into), activation_at(bridge, out)
    with spliced(bridge, made, keep="all"):
        torch.testing.assert_close(activation_at(bridge, out), made(x))
        assert torch.equal(activation_at(bridge, into), x)
    with spliced(bridge, made, keep="all", error_term=True, edit=steer(5, by=2.0)):
        torch.testing.assert_close(activation_at(bridge, out), y + 2 * made.W_dec[5])
    with spliced(bridge, made, error_term=True):
        assert torch.equal(bridge(TOKENS), clean)
    # what stands at the site that it reads is what it reads, in whatever order they are given
    first = dictionary_at(into, architecture="relu")
    for order in ([made, first], [first, made]):
        with spliced(bridge, order, keep="all"):
            torch.testing.assert_close(activation_at(bridge, out), made(first(x)))


@torch.no_grad()
def test_every_way_of_running_the_bridge(bridge):
    made, edit = dictionary_at(), steer(3, by=2.0)
    latent_site = "blocks.2.hook_resid_post"
    with spliced(bridge, made, edit=edit) as at:
        logits = bridge(TOKENS)
        cached_logits, cache = bridge.run_with_cache(TOKENS)
        hooked = bridge.run_with_hooks(TOKENS, fwd_hooks=[(latent_site, lambda x, hook: x * 1)])
        with bridge.hooks(fwd_hooks=[(SITE, lambda x, hook: x * 1)]):
            inner = bridge(TOKENS)
        assert torch.equal(bridge(TOKENS), logits)  # none of them took our hooks away
    assert all(torch.equal(other, logits) for other in (cached_logits, hooked, inner))
    with spliced(bridge, made, edit=edit):
        there = activation_at(bridge, SITE)
    assert torch.equal(cache["blocks.1.hook_out"], there)
    pairs = spliced(bridge, made, edit=edit).fwd_hooks
    assert torch.equal(bridge.run_with_hooks(TOKENS, fwd_hooks=pairs), logits)
    with at:  # may be opened again
        assert torch.equal(bridge(TOKENS), logits)
    assert n_hooks(bridge) == 0


@torch.no_grad()
def test_compatibility_mode_edits_once(bridge):
    """There a hook under another name than its point's own runs twice."""
    ours = plain_bridge()
    ours.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    made = dictionary_at()
    x = activation_at(bridge, SITE)
    with spliced(ours, made, error_term=True, edit=steer(3, by=2.0), keep="all"):
        torch.testing.assert_close(activation_at(ours, "blocks.1.hook_out"), x + 2 * made.W_dec[3])


@torch.no_grad()
def test_nested_splices_add_up_and_leave_nothing_behind(bridge):
    clean, x = bridge(TOKENS), activation_at(bridge, SITE)
    made = dictionary_at()
    with spliced(bridge, made, error_term=True, edit=steer(3, by=2.0), keep="all"):
        with spliced(bridge, dictionary_at("blocks.2.hook_mlp_out"), keep="all"):
            both = bridge(TOKENS)
        with spliced(bridge, made, error_term=True, edit=steer(4, by=1.0), keep="all"):
            there = activation_at(bridge, SITE)
        outer = bridge(TOKENS)
    torch.testing.assert_close(there, x + 2 * made.W_dec[3] + made.W_dec[4])
    assert not torch.equal(both, outer) and not torch.equal(outer, clean)
    with pytest.raises(KeyboardInterrupt), spliced(bridge, made):
        raise KeyboardInterrupt

    def fail(acts):
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"), spliced(bridge, made, edit=fail):
        bridge(TOKENS)
    assert torch.equal(bridge(TOKENS), clean)
    assert n_hooks(bridge) == 0 and bridge.context_level == 0


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "llama"])
@pytest.mark.parametrize("kind", ["resid_post", "attn_z", "resid_mid"])
@pytest.mark.parametrize("error_term", [True, False])
def test_steered_generation_is_the_same_with_a_cache(architecture, kind, error_term):
    model = wrapped_model(architecture)
    site = site_name(1, kind)
    made = dictionary_at(site, d_in=model.site_width(site))
    args = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    plain = model.bridge.generate(TOKENS, **args)
    with spliced(model, made, error_term=error_term, edit=steer(3, 7, by=20.0)) as at:
        cached = model.bridge.generate(TOKENS, **args)
        assert at.latents[site].shape == (2, 1, D_SAE)
        whole = model.bridge.generate(TOKENS, use_past_kv_cache=False, **args)
        assert at.latents[site].shape == (2, 14, D_SAE)
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, plain)
    assert torch.equal(model.bridge.generate(TOKENS, **args), plain)


@torch.no_grad()
def test_a_dictionary_of_another_dtype():
    bridge = plain_bridge(dtype=torch.bfloat16)
    clean = bridge(TOKENS)
    for dtype in (torch.bfloat16, torch.float64):
        made = dictionary_at(dtype=dtype)
        with spliced(bridge, made, error_term=True, edit=steer(3, by=1.0)) as at:
            assert bridge(TOKENS).dtype == torch.bfloat16
        assert at.latents[SITE].dtype == dtype
        with spliced(bridge, made, error_term=True):
            assert torch.equal(bridge(TOKENS), clean)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda b: spliced(b, [dictionary_at()] * 2), ["blocks.1.hook_out", "one dictionary only"]),
        (
            lambda b: spliced(b, [dictionary_at(), dictionary_at("blocks.1.hook_out")]),
            ["one dictionary only"],
        ),
        (lambda b: spliced(b, dictionary_at("blocks.9.hook_resid_post")), ["blocks.9", "hook points"]),
        (lambda b: spliced(b, dictionary_at("blocks.1.hook_resid_pots")), ["id you mean", SITE]),
        (lambda b: spliced(b, dictionary_at("")), ["''", "site_in"]),
        (lambda b: spliced(b, dictionary_at(), edit={"blocks.2.hook_resid_post": ablate(1)}), [SITE]),
        (
            lambda b: spliced(b, [dictionary_at(), dictionary_at("blocks.2.hook_mlp_out")], edit=ablate(1)),
            ["{site: edit}", "2 dictionaries"],
        ),
        (lambda b: spliced(b, dictionary_at(), keep="most"), ["'most'", "ordinary"]),
    ],
)
def test_what_does_not_fit_is_refused_before_a_pass(bridge, build, words):
    with pytest.raises(UserError) as error:
        build(bridge)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"made": dictionary_at(d_in=48)}, ["48 for 32", SITE]),
        ({"made": dictionary_at(site_out="blocks.1.hook_mlp_out", d_out=48)}, ["48 for 32", "mlp_out"]),
        ({"made": dictionary_at("blocks.3.hook_resid_post", SITE)}, ["must be computed before", "blocks.3"]),
        ({"edit": ablate(40)}, ["from 0 to 39", "40"]),
        ({"edit": lambda acts: acts[:, 1:]}, ["keep the shape", "(2, 8, 40)"]),
        ({"keep": torch.ones(2, 5, dtype=torch.bool)}, ["(2, 5) for (2, 9)", "function of the tokens"]),
        ({"gradients": True}, ["no_grad"]),
    ],
)
def test_what_does_not_fit_is_refused_by_the_pass(bridge, options, words):
    options = {"made": dictionary_at(), **options}
    with torch.no_grad(), spliced(bridge, options.pop("made"), **options), pytest.raises(UserError) as error:
        bridge(TOKENS)
    assert all(word in str(error.value) for word in words)
    assert n_hooks(bridge) == 0


@torch.no_grad()
def test_watching_encodes_when_asked_and_only_then(bridge, monkeypatch):
    made = dictionary_at("blocks.1.hook_resid_mid")
    x = activation_at(bridge, "blocks.1.hook_resid_mid")
    calls = []
    encode = type(made).encode
    monkeypatch.setattr(type(made), "encode", lambda self, x: calls.append(1) or encode(self, x))
    with spliced(bridge, made, error_term=True) as at:
        bridge(TOKENS)
    assert not calls and len(at.latents) == 1
    with spliced(bridge, made, keep="all") as at:  # which writes over the activation, in place
        bridge(TOKENS)
    assert torch.equal(at.latents["blocks.1.hook_resid_mid"], encode(made, x)) and len(calls) == 2


@torch.no_grad()
def test_losses_are_those_of_the_evaluation(bridge, tiny_model):
    made = dictionary_at()
    run = clean_run(tiny_model, TOKENS, [SITE])
    x = run.acts[SITE]
    replacement = torch.where((TOKENS > 2)[..., None], made(x), x)
    expected = spliced_final(tiny_model, TOKENS, run, SITE, replacement)
    with spliced(tiny_model, made):
        assert torch.equal(tiny_model.run_body(TOKENS), expected)
        assert torch.equal(tiny_model.bridge(TOKENS), tiny_model.unembed(expected))


@torch.no_grad()
def test_a_pass_without_tokens_has_no_special_ones(bridge):
    embedded = activation_at(bridge, "embed.hook_out")
    with spliced(bridge, dictionary_at()):
        bridge(TOKENS)
        with pytest.raises(UserError, match=re.escape("keep='all'")):
            bridge(embedded)


@torch.no_grad()
def test_the_example_of_the_docstring_runs(bridge):
    tokens, dictionary = TOKENS, dictionary_at()
    lines = re.search(r"\n\n((?: {8}.*\n)+)\n", spliced.__doc__)[1]
    code = "\n".join(line[8:] for line in lines.splitlines()).replace("123", "12")
    names = {"bridge": bridge, "dictionary": dictionary, "tokens": tokens, "spliced": spliced}
    exec(code, names | {"ablate": ablate}, found := {})
    assert found["logits"].shape == (2, 9, 300)
    assert found["at"].latents[SITE].shape == (2, 9, D_SAE)
