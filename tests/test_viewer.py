"""Each page of the viewer, run by Streamlit's own tester."""

import inspect
import shutil
import socket
import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from viewer_fakes import D_SAE, SITES, fake_run

import viewer
from sae import UserError
from viewer.app import launch

APP = Path(viewer.__file__).resolve().parent / "app" / "main.py"
OVERVIEW, FEATURE = APP.parent / "views" / "overview.py", APP.parent / "views" / "feature.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "mine").path


@pytest.fixture
def show(monkeypatch):
    def shown(script, folder, **query):
        monkeypatch.setattr(sys, "argv", ["main.py", str(folder)])
        app = AppTest.from_file(str(script), default_timeout=30)
        for name, value in query.items():
            app.query_params[name] = value
        return app.run()

    return shown


def html_of(app):
    return "".join(str(element.proto.body) for element in app.get("html"))


def test_the_overview_shows_every_site_and_the_curves(show, folder):
    app = show(OVERVIEW, folder)
    assert not app.exception and not app.error and app.title[0].value == "mine"
    page = html_of(app)
    assert "0 resid_post" in page and "1 resid_post" in page and "± 0.010" in page and "98.0 %" in page
    assert f"feature?run=mine&amp;site={SITES[1]}" in page
    assert len(app.get("plotly_chart")) == 5
    app.selectbox(key="curve").select("fvu").run()
    assert not app.exception


def test_the_whole_app_starts_on_the_overview(show, folder):
    app = show(APP, folder)
    assert not app.exception and app.title[0].value == "mine"


def test_the_feature_page_shows_what_the_api_says(show, folder):
    app = show(FEATURE, folder, site=SITES[1], latent="5")
    assert not app.exception and not app.error and not app.warning
    feature = viewer.open(folder).layer(1)[5]
    page = html_of(app)
    assert all(value in page for _, value in feature.facts())
    assert page.count("js-ex") >= len(feature.examples()) > 0
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_address_follows_the_controls(show, folder):
    app = show(FEATURE, folder)
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
    assert "7" in app.header[0].value


def address(app):
    """The query as the browser would show it; the tester gives lists for what it was told itself."""
    return {k: v[0] if isinstance(v, list) else v for k, v in app.query_params.items()}


def press(app, label):
    next(button for button in app.button if button.label == label).click().run()


@pytest.mark.parametrize("latent", ["-1", "x", str(D_SAE), "9" * 30, "²", "<b>"])
def test_a_bad_address_is_answered_with_a_feature_and_a_warning(show, folder, latent):
    app = show(FEATURE, folder, site=SITES[0], latent=latent)
    assert (
        not app.exception
        and len(app.warning) == 1
        and app.number_input(key="latent").value == viewer.open(folder).layer(0).live()[0]
    )


def test_an_unknown_site_is_named(show, folder):
    app = show(FEATURE, folder, site="blocks.99.hook_resid_post")
    assert not app.exception and "99" in app.warning[0].value


def test_a_bare_run_says_what_to_do(show, tmp_path):
    bare = fake_run(tmp_path / "bare", index=False, evaluated=False).path
    app = show(OVERVIEW, bare)
    said = " ".join(info.value for info in app.info)
    assert not app.exception and "jumpscope eval" in said and "jumpscope index" in said
    app = show(FEATURE, bare)
    assert not app.exception and "jumpscope index" in app.error[0].value


def test_only_dead_latents(show, tmp_path):
    dead = fake_run(tmp_path / "dead", threshold=1e6).path
    app = show(FEATURE, dead)
    assert not app.exception and not app.error and "all are dead" in app.warning[0].value
    assert all(button.disabled for button in app.button)


def test_a_torn_index_and_a_deleted_run_become_messages(show, tmp_path):
    folder = fake_run(tmp_path / "torn").path
    app = show(FEATURE, folder)
    path = folder / "index" / SITES[0] / "latents.parquet"
    path.write_bytes(path.read_bytes()[:-7])
    app = show(FEATURE, folder)
    assert not app.exception and "parquet" in app.error[0].value
    shutil.rmtree(folder)
    for script in (OVERVIEW, FEATURE):
        app = show(script, folder)
        assert not app.exception and "run" in app.error[0].value


def test_an_address_that_is_taken_or_senseless_is_refused(folder):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(UserError, match="--port"):
            launch.launch([folder], port=busy.getsockname()[1], headless=True)
    with pytest.raises(UserError, match="65535"):
        launch.launch([folder], port=0, headless=True)
    with pytest.raises(UserError, match=r"run\.json"):
        launch.launch([folder.parent], port=8765, headless=True)


def test_the_server_stays_on_this_machine_and_tells_nobody():
    options = launch.options(port=1, headless=True, address="127.0.0.1")
    assert options["server_address"] == "127.0.0.1" and options["browser_gatherUsageStats"] is False
    assert inspect.signature(launch.launch).parameters["address"].default == "127.0.0.1"
