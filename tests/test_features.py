"""The Features API: what it answers, and that nothing in it can execute."""

import os
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
        best = feature.examples(0)
        assert best["activation"].iloc[0] == feature.max and best["activation"].is_monotonic_decreasing
        assert not best.duplicated(["block", "document"]).any()
        assert examples["band"].is_monotonic_increasing and len(best) == (examples["band"] == 0).sum()
        fired = feature.activations().set_index(["block", "document", "position"])
        assert len(fired) == feature.firings and fired["activation"].max() == feature.max
        for row in examples.to_dict("records"):
            assert (
                row["values"][row["peak"]] == row["activation"] and row["tokens"][row["peak"]] == row["token"]
            )
            # all that fired in this document of this block is shown, and nothing else
            here = fired.sort_index().loc[(row["block"], row["document"]), "activation"]
            assert [v for v in row["values"] if v] == here.tolist()
        assert logits["side"].value_counts().to_dict() == {"top": 10, "bottom": 10}
        assert (
            logits["logit"].iloc[0] == logits["logit"].max()
            and logits["logit"].iloc[10] == logits["logit"].min()
        )
        drivers = feature.drivers()
        assert (
            drivers["share"].is_monotonic_decreasing
            and feature.drivers("lift")["lift"].is_monotonic_decreasing
        )
        assert drivers["count"][0] == (fired["token"] == drivers["token"][0]).sum()
        assert feature.logit_histogram()["count"].sum() == 300


def test_a_context_is_cut_at_the_document_and_no_further(run):
    for feature in run.layer(1):
        whole = feature.examples()
        for context in (0, 2, 500):
            cut = feature.examples(context=context)
            for a, b in zip(whole.to_dict("records"), cut.to_dict("records"), strict=True):
                low = max(0, a["peak"] - context)
                assert b["tokens"] == a["tokens"][low : a["peak"] + context + 1]
                assert (
                    b["values"] == a["values"][low : a["peak"] + context + 1] and b["peak"] == a["peak"] - low
                )
    texts = run.index.texts
    row = run.layer(1)[1].examples(0).iloc[0]
    here = texts.document[row["block"]] == row["document"]
    assert row["tokens"] == run.index.strings.of(texts.tokens[row["block"]][here])


def test_neighbours_and_what_fires_together(run):
    feature = run.layer(0)[5]
    near, together = feature.neighbours(), feature.cofiring()
    assert set(near["kind"]) == {"cosine", "next"} and set(together["site"]) == {SITES[0]}
    for row in near.to_dict("records"):
        other = run.site(row["site"])[row["latent"]]
        a, b = feature.direction(), other.direction()
        assert row["cosine"] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)
        assert row["label"] == other.label
    mine = set(feature.activations()["row"])
    for row in together.to_dict("records"):
        assert row["count"] == len(mine & set(run.layer(0)[row["latent"]].activations()["row"]))


def test_a_neighbour_whose_site_has_no_index_here_has_no_label(tmp_path):
    path = fake_run(tmp_path / "run").path
    shutil.rmtree(path / "index" / SITES[1])
    near = viewer.open(path).layer(0)[5].neighbours()
    assert set(near["site"]) == set(SITES) and not near.loc[near["site"] == SITES[1], "label"].any()
    assert near.loc[near["site"] == SITES[0], "label"].all()


def test_what_a_feature_cannot_answer_is_refused(run):
    feature = run.layer(0)[5]
    for wrong in (
        lambda: feature.examples(6),
        lambda: feature.examples(context=-1),
        lambda: feature.drivers("x"),
    ):
        with pytest.raises(UserError, match="Found"):
            wrong()


def test_figures_are_made_for_every_latent_and_carry_no_markup(run):
    for feature in run.layer(0):
        figures = [feature.plot_logits(), feature.plot_drivers(), feature.plot_histogram()]
        assert all("<script" not in figure.to_json() and "<img" not in figure.to_json() for figure in figures)
    assert len(run.layer(0).plot_density().data) == 1


def test_an_index_without_a_run_can_be_browsed(run, tmp_path):
    index = shutil.copytree(run.path / "index", tmp_path / "alone")
    alone = viewer.open(index)
    assert alone.sites == list(SITES) and "index only" in repr(alone) and "fake" in alone._repr_html_()
    assert viewer.open(index / SITES[1]).layer(1)[3].label == alone.layer(1)[3].label
    assert alone.layer(0)[5]._repr_html_() == run.layer(0)[5]._repr_html_()
    assert len(alone.find(text="word77")) and len(alone.curves()) == 0
    with pytest.raises(UserError, match=r"dictionary of .* must be here"):
        alone.find(like=alone.layer(0)[5])
    assert viewer.open(run.path / "index").path == run.path == viewer.open(run.path / "index" / SITES[0]).path
    # a dictionary's own folder with its index in it
    home = shutil.copytree(run.folder.site_dir(SITES[0]), tmp_path / "dictionary")
    shutil.copytree(index, home / "index")
    shutil.rmtree(home / "index" / SITES[1])
    assert len(viewer.open(home).find(like=viewer.open(home).layer(0)[5])) == 20


def test_an_index_written_anew_is_not_mixed_with_the_old_one(tmp_path):
    run = viewer.open(fake_run(tmp_path / "mine").path)
    site, feature = run.layer(0), run.layer(0)[5]
    path = run.path / "index" / SITES[0] / "examples.parquet"
    feature.examples()
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="Open the run again"):
        feature.examples()
    manifest = run.path / "index" / SITES[0] / "manifest.json"
    os.utime(manifest, ns=(1, 1))
    assert run.layer(0) is not site and len(run.layer(0)[5].examples()) == len(
        run.layer(0)[5].examples(0, 3)
    ) + len([e for e in run.layer(0)[5].examples()["band"] if e])


def test_an_index_cut_short_is_named(tmp_path):
    run = viewer.open(fake_run(tmp_path / "mine").path)
    folder = run.path / "index" / SITES[0]
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, content in whole.items():
        (folder / name).write_bytes(content[:-9])
        with pytest.raises(UserError, match=re.escape(name)):
            run.layer(0)
        (folder / name).unlink()
        with pytest.raises(UserError, match=re.escape(name)):
            run.layer(0)
        (folder / name).write_bytes(content)
    assert run.layer(0)[5].firings and run.layer(1)[5].firings


def test_a_silent_latent_shows_itself_too(run):
    feature = run.layer(0)[2]
    assert (feature.density, feature.max, len(feature.examples()), len(feature.histogram())) == (0, 0, 0, 0)
    assert len(feature.drivers()) == len(feature.activations()) == 0 and feature.state == "silent"
    assert "never fires" in repr(feature) and "never fired" in feature._repr_html_()
    assert "never fired" in feature.plot_histogram().layout.xaxis.title.text


def test_the_overview_has_a_row_a_site_with_or_without_an_eval(run, tmp_path):
    assert run.overview()["l0"].tolist() == [5.2, 5.2]
    bare = viewer.open(fake_run(tmp_path / "bare", index=False, evaluated=False).path)
    assert bare.overview()["site"].tolist() == list(SITES) and bare.overview()["fvu"].isna().all()
    assert "–" in bare._repr_html_() and "bare" in repr(bare)
    with pytest.raises(UserError, match="is not there"):
        bare.layer(0)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run\.json.*texts/manifest\.json.*neither.*the same command"):
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
        r'js-peak[^>]*data-v="4.00" data-t="&lt;c&gt;"[^>]*>&lt;c&gt;</span><span class="js-val">4.00<', page
    )
    assert 'data-v="2.00" data-t="·b"' in page and "↵" in page


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
