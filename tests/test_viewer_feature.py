"""The feature page: what it shows, its links, its address, and labels with two viewers at once."""

import shutil
from urllib.parse import parse_qs, urlsplit

import pytest
from page_fakes import VIEWS, address, html_of, page_app, press
from viewer_fakes import D_SAE, SITES, fake_run

import viewer
from viewer import feature_html, markup

PAGE = VIEWS / "feature.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "mine").path


@pytest.fixture
def show(monkeypatch):
    return lambda *folders, **query: page_app(monkeypatch, PAGE, *folders, **query).run()


def test_it_shows_what_the_api_says(show, folder):
    app = show(folder, site=SITES[1], latent="5")
    assert not app.exception and not app.error and not app.warning
    feature = viewer.open(folder).layer(1)[5]
    page = html_of(app)
    assert all(value in page for _, value in feature.facts())
    assert page.count('class="js-ex"') == len(feature.examples()) > 0
    assert page.count('class="js-band') == 5 + (len(feature.examples(0)) > 8)
    assert "<script" not in page and "&lt;script&gt;" in page


def test_every_link_leads_to_a_feature_or_a_search_that_there_is(show, folder):
    import html
    import re

    run = viewer.open(folder)
    page = html_of(show(folder, site=SITES[0], latent="5"))
    links = [html.unescape(link) for link in re.findall(r'href="([^"]*)"', page)]
    assert len(links) > 20
    for link in links:
        query = {name: values[0] for name, values in parse_qs(urlsplit(link).query).items()}
        assert query["run"] == "mine"
        if link.startswith("feature?"):
            run.site(query["site"])[int(query["latent"])]
        else:
            assert link.startswith("features?") and query["by"] == "token"
            assert run.index.strings.ids(query["q"])


def test_the_strip_names_the_nearest_latent_of_the_other_layer(show, folder):
    run = viewer.open(folder)
    here = run.layer(0)[5]
    found = run.follow(here)
    assert found["site"].tolist() == [SITES[1]]
    other = run.dictionary(SITES[1]).W_dec
    cosines = other @ here.direction() / other.norm(dim=1) / here.direction().norm()
    assert found["latent"][0] == int(cosines.argmax())
    assert found["cosine"][0] == pytest.approx(float(cosines.max()), abs=1e-6)
    page = html_of(show(folder, site=SITES[0], latent="5"))
    strip = page[page.index("js-strip") :]
    assert (
        f"<b>{found['cosine'][0]:.2f}</b>{found['latent'][0]}</a>" in strip and 'aria-current="true"' in strip
    )


def test_without_dictionaries_the_strip_has_the_layers_beside(show, folder, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(folder / "index", alone / "index")
    app = show(alone, site=SITES[0], latent="5")
    assert not app.exception and not app.error
    near = viewer.open(alone).layer(0)[5].neighbours()
    best = near.loc[near["kind"] == "next"].iloc[0]
    assert f"<b>{best['cosine']:.2f}</b>{best['latent']}</a>" in html_of(app)


def test_the_address_follows_the_controls(show, folder):
    app = show(folder)
    live = viewer.open(folder).layer(0).live().tolist()
    assert address(app) == {"run": "mine", "site": SITES[0], "latent": str(live[0])}
    press(app, "Next")
    assert address(app)["latent"] == str(live[1]) and app.number_input(key="latent").value == live[1]
    press(app, "Next")
    press(app, "Previous")
    assert address(app)["latent"] == str(live[1])
    press(app, "Random")
    assert int(address(app)["latent"]) in live
    app.number_input(key="latent").set_value(7).run()
    app.selectbox(key="site").select(SITES[1]).run()
    assert not app.exception and address(app) == {"run": "mine", "site": SITES[1], "latent": "7"}
    assert "<h1>1 resid_post · 7</h1>" in html_of(app)


@pytest.mark.parametrize("latent", ["-1", "x", str(D_SAE), "9" * 30, "²", "<b>"])
def test_a_bad_address_is_answered_with_a_feature_and_a_warning(show, folder, latent):
    app = show(folder, site=SITES[0], latent=latent)
    assert not app.exception and len(app.warning) == 1
    assert app.number_input(key="latent").value == viewer.open(folder).layer(0).live()[0]


def test_an_unknown_site_is_named(show, folder):
    app = show(folder, site="blocks.99.hook_resid_post")
    assert not app.exception and "99" in app.warning[0].value


def test_only_dead_latents(show, tmp_path):
    app = show(fake_run(tmp_path / "dead", threshold=1e6).path)
    assert not app.exception and not app.error and "all are dead" in app.warning[0].value
    ways = [button for button in app.button if button.label in ("Previous", "Next", "Random")]
    assert len(ways) == 3 and all(button.disabled for button in ways)
    assert "<b>Silent.</b>" in html_of(app)


def test_what_is_odd_is_explained(show, folder):
    run = viewer.open(folder)
    assert run.layer(0)[1].state == "dense" and run.layer(0)[2].state == "silent"
    assert "<b>Dense.</b>" in html_of(show(folder, site=SITES[0], latent="1"))
    assert "<b>Silent.</b>" in html_of(show(folder, site=SITES[0], latent="2"))
    ordinary = next(f for f in run.layer(0) if f.state == "live" and f.duplicate_of is None)
    assert (
        "js-state"
        not in html_of(show(folder, site=SITES[0], latent=str(ordinary.latent))).split("</style>")[-1]
    )


def test_bands_count_every_firing_once(folder):
    for feature in viewer.open(folder).layer(0):
        bands = feature.bands()
        assert bands["count"].sum() == feature.firings
        if len(bands):
            assert bands["band"].tolist() == [1, 2, 3, 4, 5]
            assert bands["upper"].tolist() == [feature.max, *bands["lower"][:-1]]
            activation = feature.activations()["activation"]
            assert bands["count"][0] == (activation >= bands["lower"][0]).sum()


def test_a_label_is_written_and_taken_back(show, tmp_path):
    folder = fake_run(tmp_path / "mine").path
    app = show(folder, site=SITES[0], latent="5")
    press(app, "Label")
    app.text_input(key="edit_label").set_value("  <b>mine</b> ")
    app.text_area(key="edit_notes").set_value("line one\nline two")
    press(app, "Save")
    feature = viewer.open(folder).layer(0)[5]
    assert (feature.label, feature.notes) == ("<b>mine</b>", "line one\nline two")
    page = html_of(show(folder, site=SITES[0], latent="5"))
    assert "&lt;b&gt;mine&lt;/b&gt;" in page and "your label" in page and "line one\nline two" in page
    assert f"Automatic label: {feature.automatic_label}"[:20] in page
    app = show(folder, site=SITES[0], latent="5")
    press(app, "Label")
    assert app.text_input(key="edit_label").value == "<b>mine</b>"
    app.text_input(key="edit_label").set_value("")
    press(app, "Save")
    assert feature.label_source != "yours" and feature.notes == "line one\nline two"


def test_two_viewers_lose_nothing_of_each_other(show, tmp_path):
    folder = fake_run(tmp_path / "mine").path
    mine = show(folder, site=SITES[0], latent="5")
    press(mine, "Label")
    # another viewer writes both while the dialog is open
    theirs = viewer.open(folder).layer(0)[5]
    theirs.label, theirs.notes = "their label", "their notes"
    mine.text_input(key="edit_label").set_value("my label")
    press(mine, "Save")
    # the label was written meanwhile: told, not written over; the notes, untouched here, stay theirs
    assert theirs.label == "their label" and "their label" in mine.warning[0].value
    press(mine, "Save")
    assert (theirs.label, theirs.notes) == ("my label", "their notes")
    assert (folder / "labels.jsonl").read_text().count("\n") == 3


def test_context_unfolds_and_values_show_in_place():
    tokens = [f" w{n}" for n in range(9)]
    values = [0.0] * 9
    values[4], values[8] = 2.0, 1.0
    page = markup.example_html(tokens, values, 4, 2.0, reach=1)
    near, far = page.split('<span class="js-cut"> …</span>')
    assert "w3" in near and "w5" in near and "w6" in far and "w8" in far and 'data-v="1.00"' in far
    assert (
        near.startswith('<p><span class="js-far">')
        and "w2" in near.split('<span class="js-cut">… </span>')[0]
    )
    assert "js-far" not in markup.example_html(tokens, values, 4, 2.0)
    assert "".join(tokens).strip() in markup.example_html(tokens, [0.0] * 9, 4, 2.0)


def test_links_escape_what_they_lead_to():
    links = feature_html.Links(
        feature=lambda s, n: f'"><b>{s}', token=lambda t: f"?q={t}", attributes="data-x"
    )
    assert links.to_feature("a", 1, "inside") == '<a href="&quot;&gt;&lt;b&gt;a" data-x>inside</a>'
    assert links.to_token('"><script>').count("<") == 4
    assert links.to_token("x" * 5000).startswith("<span")
