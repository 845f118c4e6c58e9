"""The viewer in a real browser: nothing that it shows can execute."""

import pytest
from browser_fakes import NEEDS_BROWSER, chromium, served, settled, watched, where
from viewer_fakes import SITES, fake_run

import viewer
from viewer.app.shell import PAGES

pytestmark = NEEDS_BROWSER
HOSTILE = '"><img src=x onerror=window.pwned=1><script>window.pwned=1</script>'


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs = [fake_run(root / name) for name in ("mine", "other")]
    for run in runs:
        for site in SITES:
            for latent in (1, 5, 6):
                viewer.open(run.path).site(site)[latent].label = f"{HOSTILE} {latent}"
                viewer.open(run.path).site(site)[latent].notes = HOSTILE
    return [run.path for run in runs]


@pytest.fixture(scope="module")
def address(folders, tmp_path_factory):
    with served(folders, tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def tab(browser, address):
    with watched(browser, address) as tab:
        yield tab


@pytest.mark.parametrize("page", PAGES)
def test_hostile_addresses_and_labels_never_run(tab, page):
    # whatever name a page may read
    names = ("site", "latent", "q", "by", "sort", "state", "with", "hub", "cosine", "show", "part", "page")
    more = ("run", "text", "prompt", "f", "label", "token", "tokens", "layer", "latents", "strength")
    alone = {"features": [{"q": HOSTILE}], "prompt": [{"text": HOSTILE}]}
    for asked in (dict.fromkeys((*names, *more), HOSTILE), {}, *alone.get(page, [])):
        tab.goto(where(page, **asked))
        settled(tab)
        # time for an onerror to fire, if there were one
        tab.wait_for_timeout(150)
        assert tab.locator("[data-testid=stMain] :is(script, img[src=x], svg[onload])").count() == 0


def test_hostile_tokens_are_shown_and_never_run(tab, folders):
    site = viewer.open(folders[0]).layer(0)
    shown = ""
    for latent in site.live().tolist()[:6]:
        tab.goto(where("feature", site=SITES[0], latent=latent))
        tab.get_by_role("heading", name=f"0 resid_post · {latent}", exact=True).wait_for()
        tab.locator(".js-ex").first.wait_for()
        settled(tab)
        tab.wait_for_timeout(100)
        assert tab.locator(":is(.js-ex, .js-logits) :is(script, img, svg)").count() == 0
        shown += tab.locator("[data-testid=stMain]").text_content()
    assert "<script>window.pwned=1</script>" in shown and "onerror" in shown and "⟨U+202E⟩" in shown
