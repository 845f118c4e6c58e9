"""Each page of the viewer, run by Streamlit's own tester."""

import shutil

import pytest
from page_fakes import APP, VIEWS, page_app
from viewer_fakes import SITES, fake_run

OVERVIEW, FEATURE = VIEWS / "overview.py", VIEWS / "feature.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "mine").path


@pytest.fixture
def show(monkeypatch):
    return lambda script, *folders, **query: page_app(monkeypatch, script, *folders, **query).run()


def test_the_whole_app_starts_on_the_overview(show, folder):
    app = show(APP, folder)
    assert not app.exception and app.title[0].value == "mine"


def test_a_bare_run_says_what_to_do(show, tmp_path):
    bare = fake_run(tmp_path / "bare", index=False, evaluated=False).path
    app = show(OVERVIEW, bare)
    said = " ".join(info.value for info in app.info)
    assert not app.exception and "jumpscope eval" in said and "jumpscope index" in said
    app = show(FEATURE, bare)
    assert not app.exception and "jumpscope index" in app.error[0].value


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
