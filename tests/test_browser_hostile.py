"""The viewer in a real browser: nothing that it shows can execute."""

import pytest
from browser_fakes import NEEDS_BROWSER, settled, where
from viewer_fakes import SITES

import viewer
from viewer.app.shell import PAGES

pytest_plugins = ["browser_fakes"]
pytestmark = NEEDS_BROWSER
HOSTILE = '"><img src=x onerror=window.pwned=1><script>window.pwned=1</script>'


@pytest.fixture(scope="module")
def folders(folders):
    for folder in folders:
        for site in SITES:
            for latent in (1, 5, 6):
                viewer.open(folder).site(site)[latent].label = f"{HOSTILE} {latent}"
                viewer.open(folder).site(site)[latent].notes = HOSTILE
    return folders


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
