"""The overview and the header above every page, run by Streamlit's own tester."""

import json
import re
import shutil
from itertools import pairwise
from urllib.parse import quote

import numpy as np
import pytest
from page_fakes import APP, VIEWS, html_of, page_app
from viewer_fakes import D_SAE, SITES, fake_run

import viewer
from train.run_folder import RunFolder
from viewer import figures
from viewer.health import LOG10_EDGES

OVERVIEW = VIEWS / "overview.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "mine").path


@pytest.fixture
def show(monkeypatch):
    return lambda script, *folders, **query: page_app(monkeypatch, script, *folders, **query).run()


def said(elements):
    return " ".join(element.value for element in elements)


def test_the_overview_shows_every_site(show, folder):
    app = show(OVERVIEW, folder)
    assert not app.exception and not app.error and not app.warning and app.title[0].value == "mine"
    page, health = html_of(app), viewer.open(folder).health()
    assert "0 resid_post" in page and "1 resid_post" in page and "± 0.010" in page and "98.0 %" in page
    assert "made &lt;i&gt;up&lt;/i&gt;" in page and "<i>up" not in page
    for number, site in enumerate(SITES):
        for state in ("silent", "dense"):
            link = f'features?run=mine&amp;site={site}&amp;state={state}" target="_self" data-js-link'
            assert f"{link}>{health[state][number]:.0f}</a>" in page
    # six of layers, two of thresholds; a density a site
    assert page.count('class="js-plot"') == 8 and page.count('class="js-bars"') == 2
    assert "(FVU) by layer: FVU from 0.100 to 0.100" in page


def test_the_metric_of_the_curves_is_in_the_address(show, folder):
    app = show(OVERVIEW, folder)
    assert len(app.get("plotly_chart")) == 1 and dict(app.query_params) == {"run": "mine"}
    app.selectbox(key="curve").select("fvu").run()
    assert not app.exception and app.query_params["curve"] == "fvu"
    app = show(OVERVIEW, folder, run="mine", curve="lr")
    assert app.selectbox(key="curve").value == "lr"
    app = show(OVERVIEW, folder, curve="<b>none")
    assert not app.exception and "<b" not in app.warning[0].value.replace("\\<b", "")
    assert app.selectbox(key="curve").value == "l0"


def test_a_run_in_training_shows_what_it_logged_and_goes_on_at_a_reload(show, tmp_path):
    run = fake_run(tmp_path / "young", index=False, evaluated=False)
    run.set_state("running")
    app = show(OVERVIEW, run.path)
    page = html_of(app)
    assert not app.exception and not app.error and "at step 4" in page and "<b>running</b>" in page
    assert "0.200 <small>of 5.00</small>" in page
    assert "jumpscope eval" in said(app.info) and "jumpscope index" in said(app.info)
    run.log([{"step": 9, "site": site, "l0": 7.5} for site in SITES])
    run.set_state("stopped: by hand")
    app.run()
    assert (
        "at step 9" in html_of(app) and "7.50 <small>" in html_of(app) and "stopped: by hand" in html_of(app)
    )


def test_one_torn_site_hides_no_other(show, tmp_path):
    folder = fake_run(tmp_path / "torn").path
    path = folder / "index" / SITES[0] / "latents.parquet"
    path.write_bytes(path.read_bytes()[:-7])
    app = show(OVERVIEW, folder)
    assert not app.exception and not app.error
    assert "0 resid" in app.warning[0].value and "latents" in app.warning[0].value
    page = html_of(app)
    assert (
        page.count('class="js-bars"') == 1 and f"site={SITES[1]}" in page and f"site={SITES[0]}" not in page
    )
    health = viewer.open(folder).health()
    assert health["trouble"][1] == "" and health["silent"].isna().tolist() == [True, False]


def test_an_index_of_an_older_version_is_told_once(show, tmp_path):
    folder = fake_run(tmp_path / "old").path
    for site in SITES:
        manifest = folder / "index" / site / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
    app = show(OVERVIEW, folder)
    assert not app.exception and not app.error and "version 1" in said(app.warning)
    assert html_of(app).count("<td>98.0 %</td>") == 2


def test_an_index_alone_and_a_site_without_one(show, tmp_path):
    folder = fake_run(tmp_path / "run").path
    shutil.copytree(folder / "index", tmp_path / "alone")
    app = show(OVERVIEW, tmp_path / "alone")
    assert not app.exception and not app.error and not app.warning
    assert "<b>index only</b>" in html_of(app) and html_of(app).count('class="js-bars"') == 2
    shutil.rmtree(folder / "index" / SITES[0])
    app = show(OVERVIEW, folder)
    assert not app.exception and "Not indexed: 0 resid" in said(app.info).replace("\\", "")


def test_only_dead_latents(show, tmp_path):
    app = show(OVERVIEW, fake_run(tmp_path / "dead", threshold=1e6).path)
    assert not app.exception and not app.error
    assert f">{D_SAE}</a>" in html_of(app)


def test_a_run_deleted_while_it_is_viewed(show, tmp_path):
    gone, stays = (fake_run(tmp_path / name, index=False).path for name in ("gone", "stays"))
    app = show(APP, gone, stays)
    assert app.title[0].value == "gone"
    shutil.rmtree(gone)
    app = show(APP, gone, stays, run="gone")
    assert not app.exception and "run" in app.error[0].value
    assert "cannot be read" in html_of(app) and 'href=".?run=stays"' in html_of(app)


def test_two_runs_of_the_same_name_have_addresses_of_their_own(show, tmp_path):
    folders = [fake_run(tmp_path / name / "same", index=False).path for name in "ab"]
    RunFolder.open(folders[1]).set_state("failed: no <b>disk</b>")
    app = show(APP, *folders, run="b/same", site="kept")
    page = html_of(app)
    for name in ("a/same", "b/same"):
        assert f'href=".?run={quote(name, safe="")}&amp;' in page
    assert re.search(r'<a href="\.\?run=b%2Fsame[^>]*aria-current="true">b/same', page)
    assert "failed: no &lt;b&gt;disk" in page and "<b>disk" not in page
    assert app.query_params["run"] == "b/same"


def test_an_unknown_run_is_told_once(show, folder, tmp_path):
    other = fake_run(tmp_path / "other", index=False).path
    app = show(APP, folder, other, run="**x**")
    assert not app.exception and len(app.warning) == 1 and "other" in app.warning[0].value
    assert "\\*\\*x" in app.warning[0].value and app.title[0].value == "mine"


def test_health_counts_what_the_index_says(folder):
    run = viewer.open(folder)
    health = run.health().set_index("site")
    for site in SITES:
        latents = run.site(site).latents()
        live = latents.loc[latents["firings"] > 0]
        row = health.loc[site]
        share = live["threshold"] / live["mean"]
        assert row["latents"] == D_SAE and row["silent"] == D_SAE - len(live)
        assert row["live"] + row["dense"] == len(live) == sum(row["density"])
        expected = [share.quantile(q) for q in (0.1, 0.5, 0.9)]
        assert np.allclose([row[f"threshold_{n}"] for n in ("low", "middle", "high")], expected)
        assert row["barely"] == pytest.approx((live["max"] < 1.5 * live["threshold"]).mean())
        assert row["open"] == 0 and row["duplicates"] == latents["duplicate_of"].notna().sum()
        logs = live["log10_density"]
        bins = [((logs >= low) & (logs < high)).sum() for low, high in pairwise(LOG10_EDGES[:-1])]
        assert row["density"][:-1] == bins
    assert json.dumps(health.loc[SITES[0], "density"])


def test_a_log_is_read_anew_when_it_grew(tmp_path):
    run = fake_run(tmp_path / "run", index=False)
    seen = viewer.open(run.path)
    before = seen.curves()
    before["step"] = 0  # what a reader does with its own copy is its own business
    assert seen.curves()["step"].max() == 4
    run.log([{"step": 7, "site": SITES[0]}])
    assert seen.curves()["step"].max() == 7 and seen.last_step()["step"].tolist() == [7, 4]


def points(picture):
    return [tuple(map(float, p)) for p in re.findall(r"js-dot[^>]*left:([\d.-]+)%;top:([\d.-]+)%", picture)]


def test_a_figure_puts_values_where_they_are():
    frame = viewer.runs.pd.DataFrame(
        {"layer": [0, 1, 2], "kind": "resid_post", "fvu": [0.0, 0.2, 0.4], "se": [float("nan"), 0.1, 0.0]}
    )
    picture = figures.by_layer(frame, {"fvu": "FVU"}, title="a <b> title", error="se")
    assert points(picture) == [(0, 100), (50, 50), (100, 0)] and "± 0.10" in picture
    assert picture.count("js-up") == 2 and picture.count("js-error") == 1 and "js-key" not in picture
    assert "<b>" not in picture and 'aria-label="a &lt;b&gt; title by layer: FVU from 0 to 0.400"' in picture
    gap = figures.by_layer(frame.assign(fvu=[0.1, float("nan"), 0.1]), {"fvu": "x"}, title="t")
    assert len(points(gap)) == 2 and "js-up" not in gap and "js-level" not in gap


def test_lines_of_a_figure_differ_in_more_than_colour():
    frame = viewer.runs.pd.DataFrame({"layer": [0, 1], "kind": ["a", "b"], "x": [1.0, -2.0], "y": [3.0, 4.0]})
    picture = figures.by_layer(frame, {"x": "X", "y": "Y"}, title="t")
    assert len(set(re.findall(r"js-dot js-(\w+)\" style", picture))) == 4
    for name in ("a X", "b X", "a Y", "b Y"):
        assert f"</i> {name}</span>" in picture
