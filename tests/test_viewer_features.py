"""The features page and the catalogue behind it: filters, order, pages, searches and their addresses."""

import html
import re
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest
from page_fakes import VIEWS, address, html_of, page_app
from viewer_fakes import D_SAE, SITES, fake_run

import viewer
from sae import UserError
from viewer import listing
from viewer.catalogue import SORTS, Choice
from viewer.feature_html import Links

PAGE = VIEWS / "features.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "mine").path


@pytest.fixture(scope="module")
def run(folder):
    return viewer.open(folder)


@pytest.fixture
def show(monkeypatch):
    return lambda *folders, **query: page_app(monkeypatch, PAGE, *folders, **query).run()


def shown_latents(app):
    """(site, latent) of each row, in order."""
    rows = re.findall(r'<tr>.*?href="(feature\?[^"]*)"', html_of(app))
    queries = [parse_qs(urlsplit(html.unescape(row)).query) for row in rows]
    return [(query["site"][0], int(query["latent"][0])) for query in queries]


def of(frame):
    return list(zip(frame["site"], frame["latent"], strict=True))


def test_all_latents_of_all_sites_in_their_order(run):
    found = run.browse(Choice(), rows=1000)
    assert found.total == len(found.rows) == 2 * D_SAE and found.torn == {}
    assert of(found.rows) == [(site, n) for site in SITES for n in range(D_SAE)]
    table = run.latents()
    for name in ("label", "label_source", "density", "firings", "mean", "max", "state"):
        assert found.rows[name].tolist() == table[name].tolist()
    tokens = [f.drivers()["token"].tolist()[:1] or [""] for site in SITES for f in run.site(site)]
    assert found.rows["token"].tolist() == [token for [token] in tokens]


@pytest.mark.parametrize(
    "choice",
    [
        {"site": SITES[1]},
        {"state": "silent"},
        {"state": "dense", "site": SITES[0]},
        {"state": "duplicate"},
        {"density": (0.01, 0.1)},
        {"highest": 7.0},
        {"label": "WORD2"},
    ],
)
def test_filters_keep_what_pandas_keeps(run, choice):
    table = run.latents()
    keep = np.ones(len(table), bool)
    if "site" in choice:
        keep &= table["site"] == choice["site"]
    if choice.get("state") == "duplicate":
        keep &= table["duplicate_of"].notna()
    elif "state" in choice:
        keep &= table["state"] == choice["state"]
    low, high = choice.get("density", (0.0, 1.0))
    keep &= (table["density"] >= low) & (table["density"] <= high)
    keep &= table["max"] >= choice.get("highest", 0)
    keep &= table["label"].str.casefold().str.contains(choice.get("label", "").casefold(), regex=False)
    found = run.browse(Choice(**choice), rows=1000)
    assert of(found.rows) == of(table[keep])
    assert 0 <= found.total < len(table)


@pytest.mark.parametrize("name", ["density", "firings", "mean", "max"])
def test_numbers_are_sorted_highest_first_and_ties_stay_in_place(run, name):
    table = run.latents()
    wanted = table.sort_values(name, ascending=False, kind="stable")
    assert of(run.browse(Choice(sort=name), rows=1000).rows) == of(wanted)
    wanted = table.sort_values(name, kind="stable")
    assert of(run.browse(Choice(sort=name, reverse=True), rows=1000).rows) == of(wanted)


@pytest.mark.parametrize("name", ["label", "token"])
@pytest.mark.parametrize("reverse", [False, True])
def test_texts_are_sorted_and_the_empty_come_last(run, name, reverse):
    rows = run.browse(Choice(sort=name, reverse=reverse), rows=1000).rows
    texts = [text.casefold().strip() if name == "token" else text.casefold() for text in rows[name]]
    has = [text for text in texts if text]
    assert has == sorted(has, key=lambda text: text.encode(), reverse=reverse)
    assert texts[len(has) :] == [""] * (len(texts) - len(has)) and len(has) > D_SAE


def test_pages_meet_and_do_not_overlap(run):
    pages = [run.browse(Choice(sort="max"), start=start, rows=7) for start in range(0, 56, 7)]
    together = [place for page in pages for place in of(page.rows)]
    assert together == of(run.browse(Choice(sort="max"), rows=1000).rows)
    assert run.browse(Choice(), start=10**6).rows.empty


def test_a_search_keeps_its_order_and_reasons_through_filters(run):
    read = run.index.strings.of(run.index.texts.tokens[run.index.texts.keep])
    words = " ".join([text for text in read if text.startswith(" word")][:5])
    found = run.find(text=words, limit=1000)
    shown = run.browse(Choice(sort="score"), found, rows=1000)
    assert shown.total == len(found) > 3
    assert shown.rows["score"].tolist() == found["score"].tolist()
    why = dict(zip(of(found), found["why"], strict=True))
    assert shown.rows["why"].tolist() == [why[place] for place in of(shown.rows)]
    one = run.browse(Choice(sort="score", site=SITES[1]), found, rows=1000).rows
    assert of(one) == [place for place in of(shown.rows) if place[0] == SITES[1]]
    # how rare a word is weighs by the sites that are searched, so the order may be another one
    assert set(of(run.find(text=words, sites=[SITES[1]], limit=1000))) == set(of(one))


def test_labels_of_ones_own_are_found_sorted_and_forgotten(tmp_path):
    run = viewer.open(fake_run(tmp_path / "mine").path)
    feature = run.layer(0)[5]
    feature.label = "Aardvarks"
    assert of(run.browse(Choice(label="aardVARK")).rows) == [(SITES[0], 5)]
    assert run.browse(Choice(label="aardvark")).rows["label_source"].tolist() == ["yours"]
    assert run.find(text="aardvark")["latent"].tolist() == [5]
    automatic = feature.automatic_label
    assert (SITES[0], 5) not in of(run.browse(Choice(label=automatic), rows=1000).rows)
    feature.label = ""
    assert run.browse(Choice(label="aardvark")).total == 0


def test_one_torn_site_does_not_hide_the_others(tmp_path, show):
    folder = fake_run(tmp_path / "torn").path
    (folder / "index" / SITES[0] / "manifest.json").write_text("{")
    found = viewer.open(folder).browse(Choice(), rows=1000)
    assert set(found.rows["site"]) == {SITES[1]} and list(found.torn) == [SITES[0]]
    app = show(folder)
    assert not app.exception and len(app.warning) == 1 and "manifest" in app.warning[0].value
    assert {site for site, _ in shown_latents(app)} == {SITES[1]}


def test_an_index_made_anew_is_read_anew(tmp_path):
    run = viewer.open(fake_run(tmp_path / "mine").path)
    assert run.browse(Choice(state="silent")).total < 2 * D_SAE
    fake_run(tmp_path / "other", threshold=1e6)
    (run.path / "index").rename(tmp_path / "old")
    (tmp_path / "other" / "index").rename(run.path / "index")
    assert run.browse(Choice(state="silent")).total == 2 * D_SAE


def test_choices_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="duplicate"):
        Choice(state="alive")
    with pytest.raises(UserError, match="density"):
        Choice(sort="colour")


def test_the_page_shows_the_first_fifty_with_links_and_the_rest_on_pages(show, folder, monkeypatch):
    app = show(folder)
    assert not app.exception and not app.warning and address(app) == {"run": "mine"}
    assert shown_latents(app) == [(site, n) for site in SITES for n in range(D_SAE)]
    page = html_of(app)
    assert f"<b>1 to {2 * D_SAE}</b> of {2 * D_SAE}" in page and page.count('aria-sort="ascending"') == 1


def test_the_address_alone_makes_the_page(show, folder, run):
    app = show(folder, site=SITES[1], sort="max", reverse="1", low="0.001", least="2")
    wanted = run.browse(
        Choice(site=SITES[1], sort="max", reverse=True, density=(0.001, 1.0), highest=2.0), rows=50
    )
    assert shown_latents(app) == of(wanted.rows)
    assert app.selectbox(key="features site").value == SITES[1]
    assert app.number_input(key="features low").value == pytest.approx(0.1)
    assert address(app) == {
        "run": "mine", "site": SITES[1], "sort": "max", "reverse": "1", "low": "0.001", "least": "2"
    }  # fmt: skip


def test_the_controls_write_the_address(show, folder, run):
    app = show(folder, page="1", sort="max")
    read = run.index.strings.of(run.index.texts.tokens[run.index.texts.keep])
    word = next(text for text in read if text.startswith(" word")).strip()
    app.text_input(key="features q").set_value(word).run()
    assert not app.exception and address(app) == {"run": "mine", "q": word}
    assert shown_latents(app) == of(run.find(text=word, limit=50))
    app.selectbox(key="features by").select("token").run()
    assert address(app)["by"] == "token"
    # the text has the token with its space
    assert shown_latents(app) == of(run.find(token=f" {word}", limit=50))
    app.selectbox(key="features state").select("live").run()
    app.number_input(key="features high").set_value(5).run()
    assert address(app) == {"run": "mine", "q": word, "by": "token", "state": "live", "high": "0.05"}


def test_a_search_that_finds_nothing_says_what_to_try(show, folder):
    app = show(folder, q="zebra", by="token")
    assert not app.exception and "words" in app.warning[0].value
    app = show(folder, q="zebra")
    assert not app.exception and "take filters away" in html_of(app)
    app = show(folder, q="?!", by="words")
    assert not app.exception and "word" in app.warning[0].value
    app = show(folder, q="zebra", by="label")
    assert not app.exception and "another spelling" in html_of(app)


@pytest.mark.parametrize(
    "query",
    [
        {"page": "0"}, {"page": "x"}, {"page": "²"}, {"page": "9" * 30}, {"state": "<b>"}, {"by": "magic"},
        {"sort": "colour"}, {"site": "blocks.99.hook_resid_post"}, {"low": "nan"}, {"high": "-1"},
        {"least": "inf"},
    ],
)  # fmt: skip
def test_a_bad_address_is_told_and_left_out(show, folder, query):
    app = show(folder, **query)
    assert not app.exception and len(app.warning) == 1 and address(app) == {"run": "mine"}
    assert len(shown_latents(app)) == 2 * D_SAE


def test_a_page_too_far_is_the_last(show, folder):
    app = show(folder, page="999")
    assert not app.exception and len(shown_latents(app)) == 2 * D_SAE


def test_hostile_searches_are_text(show, folder):
    for text in ("<script>window.pwned=1</script>", "\x00nul", "\u202ereversed", '"><img src=x>', "x" * 5000):
        for by in ("words", "token", "label"):
            app = show(folder, q=text, by=by)
            assert not app.exception
            assert "<script" not in html_of(app) and "<img" not in html_of(app)


def test_the_table_tells_its_order_and_what_is_odd():
    rows = pd.DataFrame(
        [
            {
                "site": SITES[0], "layer": 0, "latent": 3, "label": "<i>", "label_source": "yours",
                "token": "<b>", "density": 0.5, "firings": 1234, "mean": 1.0, "max": 2.0, "duplicate_of": 1.0,
                "state": "dense", "score": 0.25, "why": "a & b",
            }
        ]
    )  # fmt: skip
    links = Links(feature=lambda site, latent: f"f?{latent}", token=lambda token: "t")
    page = listing.table_html(rows, links, ("score", False), lambda name: f"?sort={name}")
    assert re.search(r'aria-sort="descending"><a href="\?sort=score" >score ↓', page)
    assert (
        "duplicate of 1" in page and ">dense<" in page and "<b>&lt;i&gt;</b>" in page and "a &amp; b" in page
    )
    assert all(f"?sort={name}" in page for name in SORTS)
    ways = listing.pages_html(101, 2, 50, links.attributes, lambda number: f"?page={number}")
    assert "<b>51 to 100</b> of 101" in ways and "?page=1" in ways and "?page=3" in ways
    ways = listing.pages_html(101, 3, 50, links.attributes, lambda number: f"?page={number}")
    assert "<b>101 to 101</b>" in ways and "<span>Next page</span>" in ways
