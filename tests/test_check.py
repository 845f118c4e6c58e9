"""The check of dictionaries against a model: the named cause must be the one that was done to them."""

import dataclasses
import math

import pytest
import torch
from dictionary_maker import N_TOKENS, fitting, of_rows, telling_model, token_blocks, training_rows

import sae
from activations.blocks import TokenBlocks
from activations.sites import site_name
from sae.dialects.parts import shift_input
from sae.probe import differences
from sae.sparse import SparseEncoder
from train.causes import Candidate, norm_weight
from train.diagnosis import check, published_l0
from train.fit import Rows, as_text, measure, per_token, scaled, usual_scales
from train.search import Published

SITE = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return telling_model()


@pytest.fixture(scope="module")
def blocks(model):
    return token_blocks(model)


@pytest.fixture(scope="module")
def healthy(model):
    return fitting(model, SITE)


def tensors(dictionary):
    return {name: parameter.detach() for name, parameter in dictionary.named_parameters()}


def rebuilt(dictionary, changed=(), without=(), **fields):
    made = {**tensors(dictionary), **dict(changed)}
    made = {name: tensor for name, tensor in made.items() if name not in without}
    return sae.build(dataclasses.replace(dictionary.cfg, **fields), made)


def relabelled(dictionary, site, site_out=""):
    return rebuilt(dictionary, site_in=site, site_out=site_out or site)


def diagnosed(model, blocks, dictionary):
    return check(dictionary, model, blocks, loss_tokens=100)


def fvu_of(model, blocks, dictionary, text="BOS"):
    rows = Rows(model, blocks, 768)
    x, y = (rows.at(site, text) for site in (dictionary.cfg.site_in, dictionary.cfg.site_out))
    return measure(SparseEncoder(dictionary), x, y).fvu


def explained(model, blocks, broken, *causes, like=None):
    """Checks that the causes are named, and that the dictionary put right is as good as `like`."""
    found = diagnosed(model, blocks, broken)
    assert found.verdict == "explained", str(found)
    assert found.cause.candidate.causes == causes, str(found)
    assert " + ".join(causes) in found.summary
    assert found.wrong
    if like is not None:
        right = found.dictionary
        assert (right.cfg.site_in, right.cfg.site_out) == (like.cfg.site_in, like.cfg.site_out)
        text = found.cause.candidate.text
        assert fvu_of(model, blocks, right, text) < 1.3 * fvu_of(model, blocks, like, text) + 0.02
    return found


@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk", "topk", "relu"])
def test_a_dictionary_that_fits_passes(model, blocks, architecture):
    l0 = {} if architecture != "relu" else {"l0_target": None}
    healthy = fitting(model, SITE, architecture=architecture, **l0)
    found = diagnosed(model, blocks, healthy)
    assert (found.verdict, found.wrong, found.cause) == ("fits", (), None)
    checked = found.dictionary
    assert differences(checked, checked.probe) == [] and checked.cfg == healthy.cfg
    assert found.losses["claimed"]["fvu"] < 0.2


def test_a_transcoder_that_fits_passes(model, blocks):
    transcoder = fitting(model, "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    assert diagnosed(model, blocks, transcoder).verdict == "fits"


@pytest.mark.parametrize(
    "site", ["blocks.2.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"]
)
def test_a_wrong_hook_is_named(model, blocks, healthy, site):
    found = explained(model, blocks, relabelled(healthy, site), "hook", like=healthy)
    assert f"--site {SITE}" in found.cause.candidate.remedy


def test_a_hook_far_away_is_named(model, blocks):
    first = fitting(model, "blocks.0.hook_resid_post")
    explained(model, blocks, relabelled(first, "blocks.3.hook_resid_post"), "hook", like=first)


def test_a_hook_that_is_unknown_is_found(model, blocks, healthy):
    found = explained(model, blocks, relabelled(healthy, "hook_embed"), "hook", like=healthy)
    assert found.claimed is None
    assert "no site hook_embed" in found.wrong[0]


@pytest.mark.parametrize(
    ("reads", "writes"),
    [("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"), ("blocks.1.hook_mlp_out", "")],
)
def test_a_transcoders_sites_are_named(model, blocks, reads, writes):
    transcoder = fitting(model, "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    # the norm's weight apart, both sites are the same: so it must matter here
    explained(model, blocks, relabelled(transcoder, reads, writes), "hook", like=transcoder)


@pytest.mark.parametrize("factor", [7.3, 0.04])
def test_a_scale_is_found(model, blocks, healthy, factor):
    found = explained(model, blocks, scaled(healthy, factor), "scale", like=healthy)
    told = float(found.cause.candidate.what.split("multiplied by ")[1].split()[0])
    assert math.isclose(told, 1 / factor, rel_tol=0.3)


def test_a_usual_scale_is_told_by_name(model, blocks, healthy):
    usual = usual_scales(Rows(model, blocks, 700).at(SITE, "BOS"))
    name = "sqrt(d_in) / mean norm, SAELens's expected_average_only_in"
    found = explained(model, blocks, scaled(healthy, 1 / usual[name]), "scale", like=healthy)
    assert "expected_average_only_in" in found.cause.candidate.what


@pytest.mark.parametrize("sign", [1, -1])
def test_b_dec_at_the_input_is_named(model, blocks, healthy, sign):
    whole = tensors(healthy)
    broken = sae.build(healthy.cfg, shift_input(whole, sign, "the test"))
    found = explained(model, blocks, broken, "b_dec", like=healthy)
    assert ("must not" in found.cause.candidate.what) == (sign < 0)


def test_missing_thresholds_are_named(model, blocks, healthy):
    relu = rebuilt(healthy, without=["threshold"], architecture="relu")
    assert "1 largest" in explained(model, blocks, relu, "gate", like=healthy).summary
    batch = fitting(model, SITE, architecture="batchtopk")
    unset = rebuilt(batch, {"threshold": -torch.ones(N_TOKENS)}, k=1)
    assert "1 largest" in explained(model, blocks, unset, "gate", like=healthy).summary


def test_logarithms_of_thresholds_are_named(model, blocks, healthy):
    logs = rebuilt(healthy, {"threshold": healthy.threshold.clamp_min(1e-3).log()})
    assert "logarithms" in explained(model, blocks, logs, "gate", like=healthy).summary


def test_folded_norms_are_named(model, blocks, healthy):
    whole = tensors(healthy)
    norms = whole["W_dec"].norm(dim=1)
    enc = {"W_enc": whole["W_enc"] * norms, "b_enc": whole["b_enc"] * norms}
    less = {"W_enc": whole["W_enc"] / norms, "b_enc": whole["b_enc"] / norms}
    broken = {
        "decoder's norms count twice": enc | {"threshold": whole["threshold"] * norms},
        "missing in the encoder": less,
        "thresholds have the decoder's norms": {"threshold": whole["threshold"] * norms},
        "thresholds are in units": {"threshold": whole["threshold"] / norms},
    }
    for what, changed in broken.items():
        found = explained(model, blocks, rebuilt(healthy, changed), "folded norms", like=healthy)
        assert what in found.summary


def test_gemmas_one_plus_weight_is_named(model, blocks):
    healthy = fitting(model, "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")
    stored = model.bridge.blocks[1].ln2.original_component.weight.detach()
    wrong = rebuilt(healthy, {"W_enc": healthy.W_enc * (stored / (1 + stored))[:, None]})
    assert "1 + w" in explained(model, blocks, wrong, "folded norms", like=healthy).summary


def test_a_coordinate_without_a_weight_is_left_as_it_is(healthy):
    base = Candidate(causes=(), what="", remedy="", make=lambda: healthy, site=(SITE, SITE))
    gain = torch.full((32,), 3.0)
    gain[4], gain[5] = torch.nan, 1.0
    folded, taken_out = (one.put_right().W_enc / healthy.W_enc for one in norm_weight(base, gain))
    torch.testing.assert_close(folded[0], torch.full((32,), 1.5))
    torch.testing.assert_close(taken_out[0], torch.full((32,), 2 / 3))
    torch.testing.assert_close(torch.stack([folded[4], folded[5], taken_out[4]]), torch.ones(3, 32))


def test_narrow_weights_that_overflow_are_passed_over(model, blocks, healthy):
    large = rebuilt(scaled(healthy, 300.0), {n: p.half() for n, p in tensors(scaled(healthy, 300.0)).items()})
    assert diagnosed(model, blocks, large).cause.candidate.causes == ("scale",)


@pytest.mark.parametrize("names", [("W_enc",), ("W_dec",), ("W_enc", "W_dec")])
def test_transposed_weights_are_named(model, blocks, names):
    square = fitting(model, SITE)
    turned = rebuilt(square, {name: tensors(square)[name].T.contiguous() for name in names})
    found = explained(model, blocks, turned, "transposed", like=square)
    assert " and ".join(names) in found.summary


def with_skip(model):
    """A transcoder whose latents write what its skip leaves."""
    reads, writes = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    (x, tokens), (y, _) = (training_rows(model, site) for site in (reads, writes))
    W_skip = 0.15 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    return rebuilt(of_rows(x, y - x @ W_skip, tokens, reads, writes), {"W_skip": W_skip}, skip=True)


def test_a_skip_the_wrong_way_round_is_named(model, blocks):
    healthy = with_skip(model)
    turned = rebuilt(healthy, {"W_skip": healthy.W_skip.T.contiguous()})
    assert "transposed" in explained(model, blocks, turned, "skip", like=healthy).summary


def test_a_skip_too_many_is_named(model, blocks, healthy):
    skip = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    found = explained(model, blocks, rebuilt(healthy, {"W_skip": skip}, skip=True), "skip", like=healthy)
    assert "left out" in found.summary


@pytest.mark.parametrize("text", ["BOS", "no BOS"])
def test_bos_is_named(model, blocks, text):
    healthy = fitting(model, "blocks.0.hook_resid_post", text=text)
    wrong = rebuilt(healthy, prepend_bos=not healthy.cfg.prepend_bos)
    found = explained(model, blocks, wrong, "BOS", like=healthy)
    assert found.dictionary.cfg.prepend_bos == (text == "BOS")


def test_special_tokens_that_were_counted_are_named(model, blocks):
    x, tokens = training_rows(model, SITE, "special tokens")
    only_bos = torch.where(tokens < 0, 0, -1)
    made = of_rows(x, x, only_bos, SITE, l0_target=None)
    found = explained(model, blocks, made, "special tokens")
    assert "FVU" in found.wrong[0]


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_a_norm_of_each_row_is_named(model, blocks, kind):
    # embeddings, whose norms differ the most
    site = site_name(0, "resid_pre")
    x, tokens = training_rows(model, site)
    read = per_token(kind, x)
    found = explained(model, blocks, of_rows(read, read, tokens, site), "per-token norm")
    assert found.dictionary is None


def test_a_centred_stream_is_named(model, blocks):
    site = site_name(0, "resid_pre")
    x, tokens = training_rows(model, site)
    # as TransformerLens centres: with a row's mean, which others leave in
    centred = x - x.mean(1, keepdim=True)
    found = explained(model, blocks, of_rows(centred, centred, tokens, site), "centring")
    assert diagnosed(model, blocks, found.dictionary).claimed.fit.fvu < 0.15


def test_two_causes_at_once_are_named(model, blocks, healthy):
    whole = tensors(scaled(healthy, 20.0))
    both = sae.build(healthy.cfg, shift_input(whole, 1, "the test"))
    found = diagnosed(model, blocks, both)
    assert found.verdict == "explained", str(found)
    assert set(found.cause.candidate.causes) == {"scale", "b_dec"}
    moved = relabelled(rebuilt(healthy, {"threshold": healthy.threshold / 8}), "blocks.2.hook_mlp_out")
    found = diagnosed(model, blocks, moved)
    assert "hook" in found.cause.candidate.causes
    assert len(found.cause.candidate.causes) == 2


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_dictionary_is_not_explained(model, blocks, healthy, tied):
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(N_TOKENS, 32, generator=generator), dim=1)
    W_enc = W_dec.T.contiguous() if tied else torch.randn(32, N_TOKENS, generator=generator)
    rows = Rows(model, blocks, 700).at(SITE, "BOS")
    b_enc = -rows.mean(0) @ W_enc
    height = (rows @ W_enc + b_enc).flatten().sort().values[-len(rows)]
    made = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "threshold": height.expand(N_TOKENS)}
    found = check(rebuilt(healthy, made), model, blocks)
    assert found.verdict == "unexplained", str(found)
    assert found.dictionary is None
    assert "unexplained by" in found.summary
    # the margin: no guess comes near what would be believed
    allowed = [one.fit.fvu for one in found.tried if found.published.octaves_off(one.fit.l0) <= 0.5]
    assert min(allowed) > 0.55


def test_the_result_is_a_table_and_a_page(model, blocks, healthy):
    found = check(relabelled(healthy, "blocks.2.hook_mlp_out"), model, blocks)
    frame = found.frame
    assert list(frame) == ["causes", "change", "site_in", "site_out", "l0", "fvu"]
    assert len(frame) == len(found.tried) > 20
    assert frame["fvu"].is_monotonic_increasing
    page = found._repr_html_()
    assert "<table" in page and "does not fit, explained by hook" in page
    assert "put right" in str(found)


def test_progress_is_told(model, blocks, healthy):
    told = []
    check(healthy, model, blocks, progress=lambda what, done, total: told.append((what, done, total)))
    assert {what for what, _, _ in told} >= {"reconstruction on held-out text", "causes tried"}
    assert all(0 <= done <= total for _, done, total in told)


def test_a_width_that_no_site_has_is_refused(model, blocks):
    odd = sae.build(
        sae.DictionaryConfig(d_in=33, d_sae=4, architecture="relu", site_in=SITE),
        {
            "W_enc": torch.ones(33, 4),
            "b_enc": torch.ones(4),
            "W_dec": torch.ones(4, 33),
            "b_dec": torch.ones(33),
        },
    )
    with pytest.raises(
        sae.UserError, match=r"d_in, 33\. Found: sites 32: .*hook_resid_pre.*64: attn\.hook_z"
    ):
        diagnosed(model, blocks, odd)
    with pytest.raises(sae.UserError, match="text"):
        check(odd, model, [])


def test_published_l0s_are_read_where_they_stand(healthy):
    cfg = dataclasses.replace(healthy.cfg, l0_target=71.0)
    assert str(published_l0(cfg)) == "71"
    cfg = dataclasses.replace(cfg, l0_target=None)
    assert published_l0(cfg) is None
    named = "google/gemma-scope-2-270m-pt/resid_post_all/layer_9_width_16k_l0_"
    assert str(published_l0(cfg, named + "small")) == "10 to 20"
    assert published_l0(cfg, named + "big").high == 120
    assert published_l0(cfg, named.replace("270m", "4b") + "small") is None
    assert published_l0(dataclasses.replace(cfg, architecture="topk", k=8)).low == 8


def test_octaves_off_a_range():
    said = Published(10.0, 20.0, "")
    assert [said.octaves_off(l0) for l0 in (5.0, 10.0, 15.0, 20.0, 80.0)] == [1, 0, 0, 0, 2]
    assert said.octaves_off(0.0) == math.inf


def test_text_is_read_otherwise_token_by_token():
    keep = torch.tensor([[False, True, True, False, True, False]])
    blocks = TokenBlocks(
        tokens=torch.tensor([[2, 7, 8, 2, 9, 2]], dtype=torch.int32),
        document=torch.tensor([[-1, 5, 5, -1, 6, -1]], dtype=torch.int32),
        position=torch.tensor([[-1, 0, 1, -1, 0, -1]], dtype=torch.int32),
        keep=keep,
    )
    assert as_text(blocks, "BOS", 2) is blocks
    assert as_text(blocks, "no BOS", None) is blocks
    without = as_text(blocks, "no BOS", 2)
    assert without.tokens.tolist() == [[7, 8, 9, 2, 2, 2]]
    assert without.keep.tolist() == [[True, True, True, False, False, False]]
    assert without.document.tolist() == [[5, 5, 6, -1, -1, -1]]
    assert as_text(blocks, "special tokens", 2).keep.tolist() == [[True] * 5 + [False]]


def test_fvu_is_that_of_ordinary_rows_against_a_closed_form(healthy):
    encoder = SparseEncoder(healthy)
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(0)) + healthy.b_dec
    error = (healthy(x) - x).square().sum()
    expected = float(error / (x - x.mean(0)).square().sum())
    fit = measure(encoder, x, x)
    assert math.isclose(fit.fvu, expected, rel_tol=1e-4)
    assert fit.l0 == (healthy.encode(x) > 0).sum() / 60
    with_one = torch.cat([x, 1000 * torch.ones(1, 32)])
    assert math.isclose(measure(encoder, with_one, with_one).fvu, expected, rel_tol=1e-4)
    assert not math.isclose(measure(encoder, with_one, with_one, massive=True).fvu, expected, rel_tol=0.1)
