"""The batches for Neuronpedia: the keys its importer asks for, and values against those of the index."""

import json

import numpy as np
import pytest
import torch
from viewer_fakes import D_MODEL, D_SAE, SITES, fake_run

import sae
from sae import UserError
from train.cli.main import main
from viewer import neuronpedia
from viewer.index import storage
from viewer.index.storage import find_index
from viewer.neuronpedia import write_neuronpedia

# what the importer indexes in each feature and each activation, and its types
LISTS = {
    "neuron_alignment_indices": int, "neuron_alignment_values": float, "neuron_alignment_l1": float,
    "correlated_neurons_indices": int, "correlated_neurons_pearson": float, "correlated_neurons_l1": float,
    "correlated_features_indices": int, "correlated_features_pearson": float, "correlated_features_l1": float,
    "neg_str": str, "neg_values": float, "pos_str": str, "pos_values": float,
    "freq_hist_data_bar_heights": int, "freq_hist_data_bar_values": float,
    "logits_hist_data_bar_heights": int, "logits_hist_data_bar_values": float,
    "decoder_weights_dist": float, "activations": dict,
}  # fmt: skip
SCALARS = {
    "feature_index": int,
    "frac_nonzero": float,
    "n_prompts_total": int,
    "n_tokens_in_prompt": int,
    "dataset": str,
}
OF_ACTIVATION = {"bin_min", "bin_max", "bin_contains", "qualifying_token_index", "tokens", "values"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "made")


@pytest.fixture
def site(run):
    return run.site_dir(SITES[0])


def exported(index, out, **kwargs):
    names = write_neuronpedia(index, out, **kwargs)
    batches = [json.loads((out / name).read_text()) for name in names]
    return batches, [feature for batch in batches for feature in batch["features"]]


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_every_key_is_there_with_values_of_its_kind(site, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "FEATURES_PER_FILE", 10)
    batches, features = exported(find_index(site), tmp_path)
    assert [len(batch["features"]) for batch in batches] == [10, 10, 4]
    for number, batch in enumerate(batches):
        assert (batch["model_id"], batch["layer"]) == ("fake", 0)
        assert (batch["sae_set"], batch["sae_id_suffix"]) == (f"resid_post-{D_SAE}", None)
        json.loads((tmp_path / f"batch-{number}.json").read_text(), parse_constant=refuse_constant)
    assert [feature["feature_index"] for feature in features] == list(range(D_SAE))
    for feature in features:
        assert feature.keys() == LISTS.keys() | SCALARS.keys()
        for key, kind in LISTS.items():
            assert all(type(value) is kind for value in feature[key]), key
        for key, kind in SCALARS.items():
            assert type(feature[key]) is kind, key
        for a, b in (("pos_str", "pos_values"), ("neg_str", "neg_values")):
            assert len(feature[a]) == len(feature[b]) == 10
        assert len({len(feature[f"neuron_alignment_{x}"]) for x in ("indices", "values", "l1")}) == 1
        assert len({len(feature[f"correlated_features_{x}"]) for x in ("indices", "pearson", "l1")}) == 1
        assert 0 <= feature["frac_nonzero"] <= 1 and all(
            i < D_MODEL for i in feature["neuron_alignment_indices"]
        )
        assert all(0 < share <= 1 for share in feature["neuron_alignment_l1"])
        assert all(-1 <= r <= 1 for r in feature["correlated_features_pearson"])
        assert all(0 < r <= 1 for r in feature["correlated_features_l1"])
        for activation in feature["activations"]:
            assert activation.keys() == OF_ACTIVATION
            tokens, values = activation["tokens"], activation["values"]
            assert len(tokens) == len(values) > activation["qualifying_token_index"] >= 0
            # the importer takes the first maximum for the peak
            assert values.index(max(values)) == activation["qualifying_token_index"] or (
                values.count(max(values)) > 1
            )
            assert max(values) > 0 and min(values) >= 0


def test_values_are_those_of_the_index(site, tmp_path):
    index = find_index(site)
    _, features = exported(index, tmp_path)
    firings, texts = storage.read_firings(index), storage.read_texts(index.parent)
    strings = storage.read_tokens(index.parent)
    rows = storage.read_rows(index / storage.LATENTS).to_pylist()
    examples = storage.read_rows(index / storage.EXAMPLES).to_pylist()
    for feature, row in zip(features, rows, strict=True):
        latent, values = feature["feature_index"], firings.latent(feature["feature_index"])[1]
        assert feature["frac_nonzero"] == len(values) / len(texts)
        assert feature["pos_str"] == [strings[i] for i in row["top_tokens"]]
        np.testing.assert_allclose(feature["neg_values"], row["bottom_logits"], atol=1e-5)
        assert sum(feature["freq_hist_data_bar_heights"]) == len(values)
        middles, heights = (np.array(feature[f"logits_hist_data_bar_{x}"]) for x in ("values", "heights"))
        std = np.sqrt((heights * middles**2).sum() / heights.sum())
        assert std == pytest.approx(row["logit_std"], rel=0.1)
        mine = [example for example in examples if example["latent"] == latent]
        assert len(mine) == len(feature["activations"])
        for example, activation in zip(mine, feature["activations"], strict=True):
            at = activation["qualifying_token_index"]
            assert activation["tokens"][at] == strings[example["token"]]
            assert activation["values"][at] == pytest.approx(example["activation"], abs=1e-5)
            if example["band"] == 0:
                assert (activation["bin_min"], activation["bin_contains"]) == (-1, -1)
                assert activation["bin_max"] == pytest.approx(row["max"])
            else:
                low, high = activation["bin_min"], activation["bin_max"]
                assert low < high and low - 1e-5 <= activation["values"][at] <= high + 1e-5
                share = ((values > low) & (values <= high)).mean()
                assert activation["bin_contains"] == pytest.approx(share, abs=1e-5)
    silent, always = features[2], features[1]
    assert silent["activations"] == silent["freq_hist_data_bar_heights"] == [] and silent["frac_nonzero"] == 0
    assert always["frac_nonzero"] == 1 and {a["bin_min"] == -1 for a in always["activations"]} == {
        True,
        False,
    }


def test_windows_end_where_the_document_does(site, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "_CONTEXT", 3)
    index = find_index(site)
    _, features = exported(index, tmp_path)
    texts, strings = storage.read_texts(index.parent), storage.read_tokens(index.parent)
    examples = storage.read_rows(index / storage.EXAMPLES).to_pylist()
    activations = [activation for feature in features for activation in feature["activations"]]
    cut = 0
    for example, activation in zip(examples, activations, strict=True):
        block, peak = example["block"], example["peak"]
        near = range(max(0, peak - 3), min(texts.tokens.shape[1], peak + 4))
        # from the peak outwards, to the first token of another document
        same = [texts.document[block, p] == texts.document[block, peak] for p in near]
        first = max((p + 1 for p, s in zip(near, same, strict=True) if p < peak and not s), default=near[0])
        last = min((p for p, s in zip(near, same, strict=True) if p > peak and not s), default=near[-1] + 1)
        assert activation["tokens"] == [strings[i] for i in texts.tokens[block, first:last].tolist()]
        cut += len(activation["tokens"]) < 7
    assert cut


def test_correlated_features_are_those_that_fire_together(site, tmp_path):
    index = find_index(site)
    _, features = exported(index, tmp_path)
    firings = storage.read_firings(index)
    fires = np.zeros((D_SAE, len(storage.read_texts(index.parent))))
    for latent in range(D_SAE):
        fires[latent, firings.latent(latent)[0]] = 1
    checked = 0
    for feature in features:
        mine = fires[feature["feature_index"]]
        for other, r, cosine in zip(
            *(feature[f"correlated_features_{x}"] for x in ("indices", "pearson", "l1")), strict=True
        ):
            assert r == pytest.approx(np.corrcoef(mine, fires[other])[0, 1], abs=1e-4)
            assert cosine == pytest.approx(
                mine @ fires[other] / np.linalg.norm(mine) / np.linalg.norm(fires[other]), abs=1e-4
            )
            checked += 1
    assert checked > D_SAE


def test_the_verb_writes_them_with_the_decoder_rows(site, tmp_path, capfd):
    assert main(["export", str(site), "--to", "neuronpedia", "--out", str(tmp_path / "pages")]) == 0
    assert "batch-0.json" in capfd.readouterr().out
    features = json.loads((tmp_path / "pages" / "batch-0.json").read_text())["features"]
    vectors = torch.tensor([feature["vector"] for feature in features])
    torch.testing.assert_close(vectors, sae.load(site).W_dec.detach(), atol=1e-5, rtol=0)
    # the index alone will do, without them
    index = find_index(site)
    assert main(["export", str(index), "--to", "neuronpedia", "--out", str(tmp_path / "other")]) == 0
    assert "vector" not in json.loads((tmp_path / "other" / "batch-0.json").read_text())["features"][0]


def test_without_an_index_it_says_what_to_do(tmp_path, capfd):
    bare = fake_run(tmp_path / "bare", index=False)
    words = ["--to", "neuronpedia", "--out", str(tmp_path / "pages")]
    assert main(["export", str(bare.site_dir(SITES[0])), *words]) == 2
    line = capfd.readouterr().err
    assert "feature index" in line and f"jumpscope index {bare.path}" in line
    assert main(["export", "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", *words]) == 2
    assert "RUN/sites/SITE" in capfd.readouterr().err
    assert not (tmp_path / "pages").exists()


def test_a_torn_index_is_refused(tmp_path):
    run = fake_run(tmp_path / "torn")
    index = find_index(run.site_dir(SITES[0]))
    (index / storage.EXAMPLES).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=storage.EXAMPLES):
        write_neuronpedia(index, tmp_path / "pages")
    assert not (tmp_path / "pages").exists()
