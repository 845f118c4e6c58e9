"""The architectures: their formulas, what `build` takes and refuses, lists of what fires, evaluation and
index.
"""

import re

import pytest
import torch
from dictionaries import config_of, dictionary_of, tensors_of
from test_evals import make_blocks
from viewer_fakes import SITES, FakeModel, fake_blocks, fake_run

import sae
import viewer
from sae.dictionary import ARCHITECTURES
from sae.errors import UserError
from sae.sparse import SparseEncoder
from train.cli.main import main
from train.evals import evaluate
from viewer.index.build import build_index

SITE, BEFORE = "blocks.1.hook_resid_post", "blocks.1.hook_resid_mid"


def fires(architecture, tensors, x, latent, others):
    """Whether a latent fires on a row and how strongly, one number at a time."""
    product = float(x @ tensors["W_enc"][:, latent])
    if architecture == "gated":
        magnitude = product * float(tensors["r_mag"][latent].exp()) + float(tensors["b_mag"][latent])
        return max(0.0, magnitude) if product + float(tensors["b_gate"][latent]) > 0 else 0.0
    pre = product + float(tensors["b_enc"][latent])
    if architecture == "topk":
        return max(0.0, pre) if int((others > pre + 1e-9).sum()) < 5 else 0.0
    return (
        pre if pre > max(0.0, float(tensors["threshold"][latent]) if "threshold" in tensors else 0.0) else 0.0
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("skip", [False, True])
def test_the_formulas(architecture, skip):
    cfg = config_of(architecture, skip=skip, d_out=7)
    tensors = {name: tensor.double() for name, tensor in tensors_of(cfg).items()}
    made, x = sae.build(cfg, tensors), torch.randn(6, 12, dtype=torch.float64)
    pre = x @ tensors["W_enc"] + tensors["b_gate" if architecture == "gated" else "b_enc"]
    expected = [[fires(architecture, tensors, row, j, pre[r]) for j in range(40)] for r, row in enumerate(x)]
    acts = made.encode(x)
    torch.testing.assert_close(acts, torch.tensor(expected, dtype=torch.float64))
    assert 0 < int((acts > 0).sum()) < acts.numel()
    torch.testing.assert_close(made.pre_activations(x), pre)
    output = acts @ tensors["W_dec"] + tensors["b_dec"] + (x @ tensors["W_skip"] if skip else 0)
    torch.testing.assert_close(made(x), output)
    assert made(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(made.encode(x.view(2, 3, 12)), acts.view(2, 3, 40))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_firing_threshold_says_what_fires(architecture):
    made, x = dictionary_of(architecture), torch.randn(50, 12)
    if made.firing_threshold is None:
        assert architecture in ("topk", "gated")
    else:
        assert torch.equal(made.encode(x) > 0, made.pre_activations(x) > made.firing_threshold)


def test_topk_leaves_out_what_is_not_positive():
    made = dictionary_of("topk", k=40)
    x = torch.randn(9, 12)
    assert torch.equal(made.encode(x), made.pre_activations(x).relu())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_build_takes_tensors_without_a_copy(architecture):
    cfg = config_of(architecture, skip=True)
    tensors = tensors_of(cfg)
    tensors["W_enc"] = tensors["W_enc"].T.contiguous().T
    made = sae.build(cfg, tensors)
    for name, tensor in made.state_dict().items():
        assert tensor.data_ptr() == tensors[name].data_ptr() and tensor.stride() == tensors[name].stride()
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert architecture in repr(made).lower() and "d_sae=40" in repr(made) and "skip=True" in repr(made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("b_dec"), ["b_dec", "no such tensor"]),
        (lambda t: t.update(b_enc=t["b_enc"][:-1]), ["b_enc", "(39,)"]),
        (lambda t: t.update(b_gate=t["b_enc"]), ["b_gate", "jumprelu"]),
        (lambda t: t.update(threshold=t["threshold"].half()), ["threshold", "float16", "float32"]),
        (lambda t: t.update({n: v.int() for n, v in t.items()}), ["floating-point", "int32"]),
        (lambda t: t["W_dec"][3, 4:6].fill_(torch.nan), ["W_dec", "2 of 480"]),
        (lambda t: t["b_enc"][7:].copy_(torch.tensor([torch.inf, -torch.inf] + [0] * 31)), ["b_enc", "2 of"]),
    ],
)
def test_build_names_what_is_wrong(change, words):
    cfg = config_of("jumprelu")
    tensors = tensors_of(cfg)
    change(tensors)
    with pytest.raises(UserError) as error:
        sae.build(cfg, tensors, source="some/file")
    assert all(word in str(error.value) for word in [*words, "some/file"])


def test_large_values_are_finite_though_their_sum_is_not():
    cfg = config_of("relu", d_in=4, d_sae=8)
    sae.build(cfg, {name: torch.full_like(tensor, 3e38) for name, tensor in tensors_of(cfg).items()})


@pytest.mark.parametrize(
    ("architecture", "fields", "word"),
    [
        ("topk", {"k": 0}, "from 1 to 40"),
        ("batchtopk", {"k": 41}, "from 0 to 40"),
        ("relu", {"k": 3}, "only topk and batchtopk"),
        ("transformer", {}, "jumprelu, topk, batchtopk, gated, relu"),
    ],
)
def test_configs_that_make_no_sense(architecture, fields, word):
    with pytest.raises(UserError, match=word):
        config_of(architecture, **fields)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("fields", [{}, {"skip": True}, {"d_out": 7}, {"site_out": "b"}])
def test_lists_give_what_the_dense_dictionary_gives(architecture, fields):
    made, x = dictionary_of(architecture, site_in="a", **fields), torch.randn(70, 12)
    encoder = SparseEncoder(made)
    latents = encoder.encode(x)
    found = torch.zeros(70, 40)
    found[latents.row, latents.latent.long()] = latents.activation
    torch.testing.assert_close(found, made.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.decode(latents, x), made(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_info_describes_every_architecture(architecture, tmp_path, capsys):
    sae.save(dictionary_of(architecture), tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"architecture +{architecture}\b", told)
    assert bool(re.search(r"thresholds +none", told)) == (architecture in ("topk", "gated"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_evaluated(architecture, tiny_model):
    """Also as a transcoder with a skip; the numbers are those of the plain formulas."""
    blocks = make_blocks(n=4, per_batch=2)
    made = dictionary_of(architecture, d_in=32, site_in=BEFORE, site_out=SITE, skip=True)
    found = evaluate(tiny_model, {SITE: made}, blocks, loss_tokens=30, baseline_tokens=10)[SITE]
    acts = [tiny_model.activations(b.tokens, [BEFORE, SITE]) for b in blocks]
    x, y = (
        torch.cat([a[s][b.keep] for a, b in zip(acts, blocks, strict=True)]).float() for s in (BEFORE, SITE)
    )
    assert found["l0"] == pytest.approx(float((made.encode(x) > 0).sum(1).float().mean()), rel=1e-3)
    variance = (y - y.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(float((made(x) - y).square().sum() / variance), rel=1e-4)
    assert found["delta_ce"] is not None and found["kl"] > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_indexed_and_browsed(architecture, tmp_path):
    run = fake_run(tmp_path / "run", index=False)
    dictionaries = {
        site: dictionary_of(architecture, d_in=16, d_sae=24, site_in=site, model="fake") for site in SITES
    }
    blocks = fake_blocks()
    build_index(FakeModel(), dictionaries, lambda start: blocks, run.index_root, text={}, examples=4)
    site, made = viewer.open(run.path).layer(0), dictionaries[SITES[0]]
    x = torch.cat([FakeModel().activations(b.tokens, SITES)[SITES[0]][b.keep] for b in blocks])
    fired = (made.encode(x) > 0).sum(0)
    latent = int(fired.argmax())
    feature = site[latent]
    assert feature.firings == int(fired[latent])
    assert (feature.threshold is None) == (architecture in ("topk", "gated"))
    assert ("threshold" in repr(feature)) == (feature.threshold is not None)
    assert "Highest" in feature._repr_html_() and len(site.latents()) == 24
