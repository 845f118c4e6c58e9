"""The page that compares: what `Run.compare` says, in the address, linked, and safe to offer to strangers."""

from pathlib import Path

import pytest
import torch
from page_fakes import VIEWS, address, html_of, page_app
from viewer_fakes import D_MODEL, D_SAE, SITES, fake_dictionary, fake_run

import sae
import viewer
from viewer.app import others

PAGE = VIEWS / "compare.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    mine, other = fake_run(root / "mine"), fake_run(root / "<b>other")
    # latent 3 of ours becomes two of theirs, latent 4 of ours is gone there
    dictionary = fake_dictionary(SITES[0])
    with torch.no_grad():
        near = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(2))
        dictionary.W_dec[3:5] = dictionary.W_dec[3] + 0.2 * near
    sae.save(dictionary, other.site_dir(SITES[0]))
    return [mine.path, other.path]


@pytest.fixture
def show(monkeypatch):
    return lambda *folders, **query: page_app(monkeypatch, PAGE, *folders, **query).run()


def test_it_shows_what_the_api_says(show, folders):
    mine, other = map(viewer.open, folders)
    found = mine.compare(other, site=SITES[0], cosine=0.8)
    asked = {"with": "<b>other", "site": SITES[0], "cosine": "0.8"}
    assert len(found.matched) > 10 and len(found.split) == 1
    for kind in ("matched", "new", "gone", "split", "merged"):
        app = show(*folders, **asked, show=kind)
        assert not app.exception and not app.error and not app.warning
        page, rows = html_of(app), getattr(found, kind)
        for row in rows.head(50).to_dict("records"):
            run = "%3Cb%3Eother" if kind in ("gone", "merged") else "mine"
            assert f"feature?run={run}&amp;site={SITES[0]}&amp;latent={row['latent']}" in page
        for name in ("matched", "new", "gone", "split", "merged"):
            assert f">{len(getattr(found, name)):,}</a>" in page.replace(" ", ">")
        assert "<b>other" not in page and "&lt;b&gt;other" in page
        # what is as usual is left out
        shown = {"show": kind} if kind != "matched" else {}
        assert address(app) == {"run": "mine", "site": SITES[0], "cosine": "0.8", **shown}
    assert "0.8" in html_of(app)


def test_labels_are_those_of_now(show, folders):
    show(*folders, site=SITES[0])
    live = int(viewer.open(folders[0]).compare(viewer.open(folders[1]), layer=0).matched["latent"][0])
    viewer.open(folders[0]).layer(0)[live].label = "<img src=x onerror=1> cities"
    page = html_of(show(*folders, site=SITES[0]))
    assert "&lt;img src=x onerror=1&gt; cities" in page and "<img" not in page


def test_another_cosine_and_site_by_hand(show, folders):
    app = show(*folders, site=SITES[0], show="new")
    app.slider(key="compare_cosine").set_value(0.9).run()
    assert address(app)["cosine"] == "0.9" and address(app)["show"] == "new"
    app.selectbox(key="compare_site").select(SITES[1]).run()
    assert not app.exception and address(app) == {"run": "mine", "cosine": "0.9", "show": "new"}
    assert app.slider(key="compare_cosine").value == 0.9
    assert app.selectbox(key="compare_site").value == SITES[1]


def test_what_was_compared_is_kept_until_a_dictionary_is_written_anew(show, folders, monkeypatch):
    asked = []
    real = viewer.Run.compare
    monkeypatch.setattr(
        viewer.Run, "compare", lambda *args, **rest: (asked.append(rest), real(*args, **rest))[1]
    )
    others._COMPARED.__init__()
    others._at.clear()
    for cosine in ("0.7", "0.8", "0.7"):
        show(*folders, site=SITES[1], cosine=cosine)
    assert len(asked) == 1
    weights = folders[1] / "sites" / SITES[1] / "sae_weights.safetensors"
    weights.touch()
    show(*folders, site=SITES[1])
    assert len(asked) == 2


@pytest.mark.parametrize(
    "asked",
    [
        {"cosine": "x"}, {"cosine": "nan"}, {"cosine": "-1"}, {"show": "<script>"}, {"with": "nobody"},
        {"site": "blocks.9.x"},
    ],
)  # fmt: skip
def test_a_bad_address_is_told_and_something_near_shown(show, folders, asked):
    app = show(*folders, **asked)
    assert not app.exception and not app.error and len(app.warning) == 1
    assert "js-cos" in html_of(app) and address(app) == {"run": "mine"}


@pytest.mark.parametrize("part", ["0", "-3", "99999999999", "²", "1.5"])
def test_parts_that_are_not_there_are_the_nearest(show, folders, part):
    app = show(*folders, part=part)
    assert not app.exception and not app.error and "js-cmp" in html_of(app)


def test_many_rows_come_in_parts(show, tmp_path):
    wide = 120
    paths = []
    for seed, name in enumerate(("a", "b")):
        folder = fake_run(tmp_path / name, index=False, evaluated=False)
        cfg = sae.DictionaryConfig(d_in=D_MODEL, d_sae=wide, site_in=SITES[0], model="fake")
        dictionary = sae.JumpReLU(cfg)
        generator = torch.Generator().manual_seed(seed)
        dictionary.W_dec.data = torch.randn(wide, D_MODEL, generator=generator)
        sae.save(dictionary, folder.site_dir(SITES[0]))
        paths.append(folder.path)
    page = html_of(show(*paths, site=SITES[0], show="new", cosine="1.0", part="3"))
    assert "<b>101 to 120</b> of 120" in page and page.count("<tr>") == 21 and "part=2" in page
    # without an index there is no page to lead to
    assert "feature?" not in page and "has no index here" in page


def test_one_run_alone_says_how_to_have_two(show, folders):
    app = show(folders[0])
    assert not app.exception and not app.error and "jumpscope view RUN OTHER" in app.info[0].value


def test_runs_without_a_common_site_are_told(show, folders, tmp_path):
    from train.run_folder import RunFolder

    site = "blocks.7.hook_resid_post"
    lone = RunFolder.create(tmp_path / "lone", {"model": "fake"}, sites=[site], device="cpu")
    app = show(folders[0], lone.path)
    assert not app.exception and "in common" in app.error[0].value


@pytest.fixture
def published(monkeypatch, folders):
    """What sae.load is asked for beside the runs' own; the hub has one dictionary."""
    asked, real = [], sae.load

    def load(name):
        if isinstance(name, Path) and any(folder in name.parents for folder in folders):
            return real(name)
        asked.append(name)
        return fake_dictionary(SITES[0], seed=5)

    monkeypatch.setattr(others.sae, "load", load)
    monkeypatch.setattr(others, "_FETCHED", {})
    monkeypatch.setattr(others, "may_fetch", lambda: True)
    return asked


def test_a_published_dictionary_is_fetched_when_a_person_says_so(show, folders, published):
    app = show(folders[0], hub="org/repo/layer_0")
    # an address alone, which any page of the web may link to, fetches nothing
    assert not app.exception and published == [] and "js-cos" not in html_of(app)
    assert app.text_input(key="hub_id").value == "org/repo/layer_0"
    app.button[0].click().run()
    assert not app.exception and not app.error and published == ["org/repo/layer_0"]
    assert address(app) == {"run": "mine", "hub": "org/repo/layer_0"}
    assert f"of {D_SAE}" in html_of(app).replace("of org/repo/layer_0", f"of {D_SAE}")
    # everyone's address works from now on
    again = show(folders[0], hub="org/repo/layer_0", site=SITES[1])
    assert "js-cos" in html_of(again) and published == ["org/repo/layer_0"]
    assert "was made for" in again.info[-1].value


@pytest.mark.parametrize(
    "typed", ["/etc/passwd", "../x", "~/x", ".", "x", "a/../../b", "C:\\x", "tests/viewer"]
)
def test_a_path_is_never_opened(show, folders, published, typed, tmp_path, monkeypatch):
    (tmp_path / "tests" / "viewer").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    app = show(*folders)
    app.text_input(key="hub_id").set_value(typed)
    app.button[0].click().run()
    assert not app.exception and len(app.error) == 1 and published == []


def test_strangers_fetch_nothing(show, folders, published, monkeypatch):
    monkeypatch.setattr(others, "may_fetch", lambda: False)
    app = show(*folders)
    assert not app.text_input and not app.expander and not app.exception
    with pytest.raises(sae.UserError, match="other machines"):
        others.fetch("org/repo/layer_0")
    app = show(folders[0], hub="org/repo/layer_0")
    assert not app.text_input and "own machine" in app.info[-1].value and published == []


@pytest.mark.parametrize(
    ("listens", "headers", "may"),
    [
        ("127.0.0.1", {}, True), ("::1", {}, True), ("localhost", {}, True), ("0.0.0.0", {}, False),
        ("", {}, False), ("192.168.1.5", {}, False), ("127.0.0.1", {"X-Forwarded-For": "1.2.3.4"}, False),
    ],
)  # fmt: skip
def test_who_is_at_this_machine(monkeypatch, listens, headers, may):
    class Context:
        pass

    context = Context()
    context.headers = headers
    monkeypatch.setattr(others.st, "context", context)
    monkeypatch.setattr(others.st, "get_option", {"server.address": listens}.get)
    assert others.may_fetch() is may
