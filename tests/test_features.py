"""The Features API: what it answers, and that nothing in it can execute."""

import re
import shutil
import subprocess
import sys

import pytest
from viewer_fakes import D_SAE, SITES, fake_run

import viewer
from sae import UserError
from viewer import markup


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return viewer.open(fake_run(tmp_path_factory.mktemp("runs") / "mine").path)


def test_a_run_finds_its_sites_by_name_and_by_layer(run):
    assert run.sites == list(SITES)
    site = run.layer(1)
    assert site.name == SITES[1] == run.layer(1, "resid_post").name and len(site) == D_SAE
    with pytest.raises(UserError, match="0 sites for layer 7"):
        run.layer(7)
    with pytest.raises(UserError, match="Choose from"):
        run.site("blocks.0.hook_mlp_out")
    for latent in (-1, D_SAE):
        with pytest.raises(UserError, match=f"0 to {D_SAE - 1}"):
            site[latent]
    assert [feature.latent for feature in site] == list(range(D_SAE))


def test_a_feature_answers_in_tables_that_agree_with_one_another(run):
    site = run.layer(0)
    table = site.latents().set_index("latent")
    assert site.live().tolist() == table.index[table["firings"] > 0].tolist()
    for latent in site.live().tolist():
        feature = site[latent]
        examples, histogram, logits = feature.examples(), feature.histogram(), feature.logits()
        assert feature.density == table.loc[latent, "density"] and feature.firings == histogram["count"].sum()
        assert histogram["upper"].iloc[0] > feature.threshold and histogram["upper"].iloc[-1] > feature.max
        assert (
            examples["activation"].iloc[0] == feature.max and examples["activation"].is_monotonic_decreasing
        )
        assert examples["document"].is_unique
        for row in examples.itertuples():
            assert row.values[row.peak] == row.activation and row.tokens[row.peak] == row.token
        assert logits["side"].value_counts().to_dict() == {"top": 10, "bottom": 10}
        assert (
            logits["logit"].iloc[0] == logits["logit"].max()
            and logits["logit"].iloc[10] == logits["logit"].min()
        )


def test_a_silent_latent_shows_itself_too(run):
    feature = run.layer(0)[2]
    assert (feature.density, feature.max, len(feature.examples()), len(feature.histogram())) == (0, 0, 0, 0)
    assert "never fires" in repr(feature) and "never fired" in feature._repr_html_()


def test_the_overview_has_a_row_a_site_with_or_without_an_eval(run, tmp_path):
    assert run.overview()["l0"].tolist() == [5.2, 5.2]
    bare = viewer.open(fake_run(tmp_path / "bare", index=False, evaluated=False).path)
    assert bare.overview()["site"].tolist() == list(SITES) and bare.overview()["fvu"].isna().all()
    assert "–" in bare._repr_html_() and "bare" in repr(bare)
    with pytest.raises(UserError, match="is not there"):
        bare.layer(0)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run\.json"):
        viewer.open(tmp_path)


def test_no_html_that_came_from_text_survives(run, tmp_path):
    tags = re.compile(r"<\s*/?\s*(script|img|svg|b\b|a\b)[^>]*(onerror|onload|pwned|out)", re.I)
    pieces = []
    for site in SITES:
        for feature in run.site(site):
            pieces += [feature._repr_html_(), repr(feature)]
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", pieces[-1])
            assert not tags.search(pieces[-2])
    shown = "".join(pieces)
    # the test would be empty if none of them were shown at all
    assert "&lt;script&gt;" in shown and "&lt;img" in shown and "⟨U+202E⟩" in shown and "⟨U+0000⟩" in shown
    assert "longlong" in shown and "long" * 40 not in shown
    assert not tags.search(run._repr_html_()) and "made &lt;i&gt;up" in run._repr_html_()
    assert "<i>" not in run.layer(0)._repr_html_()


@pytest.mark.parametrize(
    ("token", "alone", "shown"),
    [
        (" Paris", True, "·Paris"),
        (" Paris", False, " Paris"),
        ("  ", False, "··"),
        ("a\n", True, "a↵"),
        ("\t", False, "⇥"),
        ("", True, "⟨empty⟩"),
        ("\u200b", True, "⟨U+200B⟩"),
        ("👩\u200d🔬", True, "👩\u200d🔬"),
        ("\ud800", True, "⟨U+D800⟩"),
    ],
)
def test_readable_tokens(token, alone, shown):
    assert markup.readable(token, alone=alone) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.012345, "0.0123"),
        (4.5678, "4.57"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (1e-7, "1.0e-07"),
        (float("nan"), "–"),
    ],
)
def test_numbers_for_people(value, shown):
    assert markup.number(value) == shown


def test_an_example_marks_its_peak_by_more_than_colour():
    page = markup.example_html([" a", " b", "\n", "<c>"], [0.0, 2.0, 0.5, 4.0], 3, 4.0)
    assert page.count("js-on") == 3 and page.count("js-peak") == 1
    assert re.search(
        r'js-peak[^>]*title="&lt;c&gt;: 4.00"[^>]*>&lt;c&gt;</span><span class="js-val">4.00<', page
    )
    assert 'title="·b: 2.00"' in page and "↵" in page


def test_the_api_needs_neither_streamlit_nor_a_language_model(run):
    code = (
        f"import sys, viewer; viewer.open({str(run.path)!r}).layer(0)[0]._repr_html_(); "
        "print([m for m in ('streamlit', 'transformers', 'transformer_lens', 'torch') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "streamlit" not in answer.stdout and "transformer" not in answer.stdout


def test_a_run_deleted_while_it_is_open_is_an_error_that_says_so(tmp_path):
    folder = fake_run(tmp_path / "gone").path
    run = viewer.open(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="index"):
        run.layer(0)
