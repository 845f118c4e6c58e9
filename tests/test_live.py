"""What a run does with its model: traces, interventions, attributions, on a tiny model."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TEXTS
from dictionaries import config_of, tensors_of

import sae
import viewer
from activations.hooks import spliced
from activations.sites import site_name
from sae.errors import UserError
from train.run_folder import RunFolder
from viewer.live.attribution import Verification
from viewer.live.interventions import LossChange

SITES = [site_name(layer, "resid_post") for layer in range(3)]
SITE = SITES[1]
TEXT = "The capital of France"
D_SAE = 40


def made_run(path, *, sites=SITES, model="tiny-gemma3", **fields):
    run = RunFolder.create(path, {"model": model}, sites=sites, device="cpu")
    for number, site in enumerate(sites):
        cfg = config_of("jumprelu", **{"d_in": 32, "d_sae": D_SAE, "site_in": site} | fields)
        tensors = tensors_of(cfg, seed=number)
        tensors["W_enc"] /= cfg.d_in**0.5
        sae.save(sae.build(cfg, tensors), run.site_dir(site))
    run.set_state("done")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    return viewer.open(made_run(tmp_path_factory.mktemp("live") / "run"), model=tiny_model)


@pytest.fixture(scope="module")
def tokens(tiny_model):
    return torch.tensor([tiny_model.encode(TEXT, add_bos=True)])


def residual(run, tokens, context, site=SITE):
    with context:
        return run.model.activations(tokens, [site])[site]


def busy(run, tokens, site=SITE):
    """A latent that fires at some tokens of the text and not at others."""
    acts = run._live.dictionary(site).encode(residual(run, tokens, torch.no_grad(), site))[0, 1:]
    return int(((acts > 0).float().mean(0) - 0.5).abs().argmin())


def test_a_trace_is_every_firing(run, tokens, tiny_model):
    trace = run.trace(TEXT)
    for site in SITES:
        # the same rows: the last bit of a product may depend on how many there are
        acts = run._live.dictionary(site).encode(tiny_model.activations(tokens, [site])[site][0, 1:])
        rows = trace.frame.loc[trace.frame["site"] == site]
        found = torch.zeros_like(acts)
        found[rows["position"].to_numpy(), rows["latent"].to_numpy()] = torch.tensor(
            rows["activation"].to_numpy()
        )
        assert torch.equal(found, acts) and len(rows) == int((acts > 0).sum()) > 0
    assert trace.tokens == tiny_model.token_strings(tokens[0, 1:].tolist())
    assert list(trace.frame["token"]) == [trace.tokens[p] for p in trace.frame["position"]]
    only = run.trace(TEXT, sites=[SITE]).frame
    expected = trace.frame.loc[trace.frame["site"] == SITE].reset_index(drop=True)
    pd.testing.assert_frame_equal(only, expected)


def test_special_tokens_in_a_text_are_left_out(run):
    whole, plain = run.trace("capital<eos> of France"), run.trace("capital of France")
    assert whole.tokens == plain.tokens
    assert not whole.frame["activation"].equals(plain.frame["activation"])  # which the model did read


def test_the_strongest_of_a_trace_and_its_pictures(run):
    trace = run.trace("<b>France & Italy</b>")
    trace.frame["share"] = np.linspace(0.1, 0.9, len(trace.frame))
    trace.frame["label"] = '<img src=x onerror="window.pwned=1">'
    trace.frame.loc[trace.frame.index % 3 == 0, "density"] = 0.5
    best = trace.top(2)
    assert (best["density"] != 0.5).all()
    light = trace.frame.loc[trace.frame["density"].isna()]
    highest = light.groupby(["site", "position"])["share"].max()
    first = best.groupby(["site", "position"], sort=False)["share"].first()
    pd.testing.assert_series_equal(first.sort_index(), highest)
    assert list(best["site"].unique()) == SITES
    figure = trace.heatmap()
    grid = np.array(figure.data[0].z)
    assert grid.shape == (3, len(trace.tokens)) and np.nanmax(grid) == pytest.approx(highest.max())
    for made in (trace._repr_html_(), json.dumps(figure.to_plotly_json(), default=str)):
        assert "<img" not in made and "&lt;img" in made
    assert "3 sites" in repr(trace)


def test_ablation_takes_away_exactly_what_the_feature_wrote(run, tokens):
    latent = busy(run, tokens)
    made = run._live.dictionary(SITE)
    x = residual(run, tokens, torch.no_grad())
    act = made.encode(x)[..., latent, None]
    act[:, 0] = 0  # BOS is left alone
    there = residual(run, tokens, run.ablate((1, latent)).at_work())
    assert torch.equal(there, x + -act * made.W_dec[latent])
    changed = (there != x).any(-1)
    assert torch.equal(changed, act[..., 0] > 0) and 0 < int(changed.sum()) < changed.numel() - 1
    assert torch.equal(residual(run, tokens, torch.no_grad()), x)


@pytest.mark.parametrize("strength", [6.0, -0.3, 1e-4])
def test_steering_adds_exactly_what_it_says(run, tokens, strength):
    latent = busy(run, tokens)
    made = run._live.dictionary(SITE)
    x = residual(run, tokens, torch.no_grad())
    steered = run.steer({(SITE, latent): strength}, unit="absolute")
    there = residual(run, tokens, steered.at_work())
    assert torch.equal(there[:, 1:], x[:, 1:] + torch.tensor(strength) * made.W_dec[latent])
    assert torch.equal(there[:, 0], x[:, 0])
    several = run.steer({(SITE, latent): strength, (1, 7): 2.0, (0, 3): -1.0}, unit="absolute")
    with several.at_work():  # layer 0 as well, so the residual of layer 1 has both
        first, second = (run.model.activations(tokens, [site])[site] for site in SITES[:2])
    clean = residual(run, tokens, torch.no_grad(), SITES[0])
    assert torch.equal(first[:, 1:], clean[:, 1:] - run._live.dictionary(SITES[0]).W_dec[3])
    alone = run.steer({(0, 3): -1.0}, unit="absolute")
    below = residual(run, tokens, alone.at_work())
    expected = below + strength * made.W_dec[latent] + 2 * made.W_dec[7]
    torch.testing.assert_close(second[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-5)


def test_logits_and_the_next_token_table(run, tokens):
    nothing = run.steer({(1, 3): 0.0}, unit="absolute")
    clean = run.model.unembed(run.model.run_body(tokens))[0]
    assert torch.equal(nothing.logits(TEXT), clean)
    steered = run.steer({(1, 3): 20.0}, unit="absolute")
    logits = steered.logits(TEXT)
    assert logits.shape == (tokens.shape[1], 300) and not torch.equal(logits, clean)
    table = steered.next_tokens(TEXT, 4)
    here, without = logits[-1].softmax(-1), clean[-1].softmax(-1)
    assert set(here.topk(4).indices.tolist()) | set(without.topk(4).indices.tolist()) == set(table["id"])
    for row in table.to_dict("records"):
        assert row["probability"] == pytest.approx(float(here[row["id"]]))
        assert row["without"] == pytest.approx(float(without[row["id"]]))
        assert row["ratio"] == pytest.approx(row["probability"] / row["without"], rel=1e-4)
    assert table["probability"].is_monotonic_decreasing


def test_generation_is_what_the_model_writes_without_a_cache(run):
    steered = run.steer({(1, 3): 30.0, (2, 5): -10.0}, unit="absolute")
    told = steered.generate(TEXT, max_new_tokens=8)
    for text, context in ((told.text, steered.at_work()), (told.without, torch.no_grad())):
        ids = run.model.encode(TEXT, add_bos=True)
        with context, torch.no_grad():
            for _ in range(8):  # each token by a whole pass
                final = run.model.run_body(torch.tensor([ids]))[0, -1]
                ids.append(int(run.model.unembed(final).argmax()))
        written = ids[-8:]
        if 1 in written:  # EOS ends it
            written = written[: written.index(1)]
        assert text == run.model.tokenizer.decode(written, skip_special_tokens=True)
    assert told.text != told.without
    warm = steered.generate(TEXT, max_new_tokens=8, temperature=1.5, seed=1)
    assert warm == steered.generate(TEXT, max_new_tokens=8, temperature=1.5, seed=1)
    assert warm.without != steered.generate(TEXT, max_new_tokens=8, temperature=1.5, seed=2).without
    assert "with" in repr(told) and "<h4>" in told._repr_html_()
    with pytest.raises(UserError, match="at most 64 tokens"):
        steered.generate(TEXT, max_new_tokens=64)


@torch.no_grad()
def test_losses_are_the_cross_entropies_of_each_text_alone(run):
    texts = [*TEXTS, "a", TEXTS[0] + " " + TEXTS[1]]
    ablated = run.ablate((1, 3), (2, 4), (0, 8))
    change = ablated.loss(texts)
    for number, text in enumerate(texts):
        ids = run.model.encode(text)
        rows = change.frame.loc[change.frame["text"] == number]
        assert list(rows["position"]) == list(range(1, len(ids)))
        assert list(rows["token"]) == run.model.token_strings(ids[1:])
        if len(ids) < 2:
            continue
        tokens = torch.tensor([[2, *ids]])
        for name, context in (("loss", ablated.at_work()), ("without", torch.no_grad())):
            with context:
                logits = run.model.unembed(run.model.run_body(tokens))[0, 1:-1]
            expected = torch.nn.functional.cross_entropy(logits, tokens[0, 2:], reduction="none")
            torch.testing.assert_close(torch.tensor(rows[name].to_numpy()), expected, rtol=1e-4, atol=1e-4)
    assert change.difference == pytest.approx(change.loss - change.without, abs=1e-5) != 0
    assert (change.frame["kl"] > -1e-5).all() and change.frame["kl"].max() > 0
    pieces = ablated.loss(TEXTS[1], context=10).frame
    n = len(run.model.encode(TEXTS[1]))
    # nine tokens a piece behind BOS; the first of a piece has no ordinary token before it
    assert list(pieces["position"]) == [p for p in range(n) if p % 9]


def test_the_standard_error_is_that_of_a_ratio_by_text():
    frame = pd.DataFrame({"text": [0, 0, 1, 2, 2, 2], "difference": [1.0, 3.0, 2.0, 0.0, 0.0, 3.0]})
    change = LossChange(frame.assign(loss=1.0, without=0.0), "made up")
    # sums 4, 2, 3 of 2, 1, 3 tokens about the mean 1.5: residuals 1, 0.5, -1.5
    assert change.standard_error == pytest.approx((3.5 * 3 / 2) ** 0.5 / 6)
    assert np.isnan(LossChange(frame[:2], "one text").standard_error)


def test_attributions_are_slopes_and_verification_measures(run, tokens, tiny_model):
    target = tiny_model.token_strings([70])[0]
    for against in (None, 71):
        attribution = run.attribute(TEXT, 70, against=against)

        def value(context, against=against):
            with context, torch.no_grad():
                logits = tiny_model.unembed(tiny_model.run_body(tokens))[0, -1]
            return float(logits[70] - (logits.mean() if against is None else logits[against]))

        clean = value(torch.no_grad())
        assert attribution.value == pytest.approx(clean, abs=1e-5)
        assert repr(target) in repr(attribution)
        row = attribution.frame.iloc[0]
        step = 0.01 * row["activation"]

        def nudged(row, by, value=value):
            def edit(acts):
                # behind BOS
                acts[0, row["position"] + 1, row["latent"]] += by
                return acts

            made = run._live.dictionary(row["site"])
            return value(spliced(tiny_model, made, error_term=True, edit=edit))

        slope = (nudged(row, step) - nudged(row, -step)) / (2 * step)
        assert row["gradient"] == pytest.approx(slope, rel=2e-2)
        assert row["attribution"] == pytest.approx(row["gradient"] * row["activation"], rel=1e-5)
        check = attribution.verify(20)
        assert len(check.frame) == 20
        # several run in a batch, each with an ablation of its own
        for row in check.frame.iloc[::4].to_dict("records"):
            fall = clean - nudged(row, -row["activation"])
            assert row["measured"] == pytest.approx(fall, abs=1e-4)
        assert check.correlation > 0.5
    assert attribution.frame["attribution"].abs().is_monotonic_decreasing
    fires = run.trace(TEXT).frame
    assert len(fires) == len(attribution.frame)
    drawn = attribution.verify(5, among=50).frame
    assert len(drawn) == 5 and drawn.index.max() > 5
    sums = attribution.features()
    assert sums["attribution"].sum() == pytest.approx(attribution.frame["attribution"].sum(), rel=1e-3)
    assert np.nansum(np.array(attribution.heatmap().data[0].z, dtype=float)) == pytest.approx(
        attribution.frame["attribution"].sum(), rel=1e-3
    )
    assert "<table" in attribution._repr_html_() and len(check.figure().data) == 2


def test_correlations_of_a_verification():
    check = Verification(pd.DataFrame({"attribution": [1.0, 2.0, 3.0], "measured": [1.0, 4.0, 9.0]}))
    assert check.rank_correlation == pytest.approx(1) and check.correlation == pytest.approx(0.98974332)
    assert np.isnan(Verification(check.frame[:1]).correlation)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run: run.trace(""), ["at least one token"]),
        (lambda run: run.trace("a" * 80), ["at most 64 tokens"]),
        (lambda run: run.trace(TEXT, sites=["blocks.9.hook_resid_post"]), ["run's", SITE]),
        (lambda run: run.steer({}), ["at least one feature"]),
        (lambda run: run.steer({(1, D_SAE): 1.0}), ["from 0 to 39", "40"]),
        (lambda run: run.steer({(1, 3): 1.0}), ['unit="absolute"', "no firing of 3"]),
        (lambda run: run.steer({(1, 3): 1.0}, unit="sigma"), ["'sigma'"]),
        (lambda run: run.steer({(1, 3): float("nan")}, unit="absolute"), ["finite", "nan"]),
        (lambda run: run.steer({(1, 3): 1.0, (SITE, 3): 2.0}), ["named once", f"3 at {SITE}"]),
        (lambda run: run.ablate((7, 3)), ["0 sites for layer 7", "1 resid_post"]),
        (lambda run: run.ablate(), ["at least one feature"]),
        (lambda run: run.ablate((1, 3)).loss(["a", ""]), ["two tokens in a row"]),
        (lambda run: run.attribute(TEXT, " Paris, France"), ["one token", "' Paris"]),
        (lambda run: run.attribute(TEXT, 300), ["from 0 to 299"]),
        (lambda run: run.attribute(TEXT, 70).verify(0), ["something to verify"]),
    ],
)
def test_what_cannot_be_is_refused(run, call, words):
    with pytest.raises(UserError) as error:
        call(run)
    assert all(word in str(error.value) for word in words), error.value


def test_the_model_is_loaded_on_first_use_in_fp32(tmp_path, monkeypatch, tiny_model):
    asked = []
    path = made_run(tmp_path / "run")
    monkeypatch.setattr(
        "viewer.live.model.load_model", lambda name, **how: asked.append((name, how["dtype"])) or tiny_model
    )
    run = viewer.open(path)
    assert "run" in repr(run) and not asked
    assert run.trace(TEXT).frame.equals(run.trace(TEXT).frame)
    # dictionaries that a trace opened still take part in gradients
    assert len(run.attribute(TEXT, 70).frame) > 0
    assert asked == [("tiny-gemma3", "fp32")]


def test_a_model_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = viewer.open(made_run(tmp_path / "run", model="no-such-model-of-ours"))
    assert len(run.overview()) == 3
    for call in (lambda: run.model, lambda: run.trace(TEXT), lambda: run.ablate((1, 3)).loss([TEXT])):
        with pytest.raises(UserError) as error:
            call()
        text = str(error.value)
        assert "no-such-model-of-ours" in text and "browsing works without" in text


def test_dictionaries_of_another_width(tmp_path, tiny_model):
    run = viewer.open(made_run(tmp_path / "run", d_in=48), model=tiny_model)
    with pytest.raises(UserError, match="48 for 32"):
        run.trace(TEXT)


def test_features_of_another_run_are_refused(tmp_path, run):
    other = viewer.open(made_run(tmp_path / "run"))

    class Fake:
        class site:
            name, index = SITE, other.index

        latent = 3

    with pytest.raises(UserError, match="of this run"):
        run.ablate(Fake)
    assert "3 at" in repr(other.ablate(Fake))


def test_a_transcoder_is_traced_and_ablated_where_it_writes(tmp_path, tiny_model, tokens):
    site, out = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    run = viewer.open(made_run(tmp_path / "run", sites=[site], site_out=out), model=tiny_model)
    made = run._live.dictionary(site)
    acts = tiny_model.activations(tokens, [site, out])
    latent = busy(run, tokens, site)
    assert set(run.trace(TEXT).frame["site"]) == {site}
    act = made.encode(acts[site])[..., latent, None]
    act[:, 0] = 0
    with run.ablate((site, latent)).at_work():
        there = tiny_model.activations(tokens, [out])[out]
    assert torch.equal(there, acts[out] + -act * made.W_dec[latent])
    assert len(run.attribute(TEXT, 70).verify(3).frame) == 3
