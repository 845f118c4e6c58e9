"""The viewer in a real browser: addresses outlive a restart, and visitors do not see one another's."""

import re

from browser_fakes import NEEDS_BROWSER, free_port, served, settled, watched, where
from playwright.sync_api import expect
from viewer_fakes import SITES

import viewer

pytest_plugins = ["browser_fakes"]
pytestmark = NEEDS_BROWSER
SESSIONS = 5


def test_addresses_survive_a_restart(browser, folders, tmp_path):
    port = free_port()
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    with served(folders, tmp_path / "a", port) as url, watched(browser, url) as tab:
        tab.goto(where("feature"))
        settled(tab)
        tab.goto(where("compare", show="new", cosine="0.9"))
        tab.locator(".js-tabs [aria-current]", has_text="Only in mine").wait_for()
        settled(tab)
        kept = tab.url
    # the first thing that the new server is asked for
    with served(folders, tmp_path / "b", port) as url, watched(browser, url) as tab:
        tab.goto(kept)
        tab.locator(".js-tabs [aria-current]", has_text="Only in mine").wait_for()
        settled(tab)
        assert tab.url == kept and tab.locator(".js-head").count() == 1


def test_several_at_once_each_see_their_own(browser, address, folders):
    # twenty, without the weight of a browser, are in test_viewer_sessions
    live = viewer.open(folders[0]).layer(0).live().tolist()
    contexts = [browser.new_context(base_url=address) for _ in range(SESSIONS)]
    try:
        tabs = [context.new_page() for context in contexts]
        for number, tab in enumerate(tabs):
            tab.route("**/*.{woff2,png,svg}", lambda route: route.abort())
            tab.goto(where("feature", site=SITES[0], latent=live[number % len(live)]), wait_until="commit")
        for move in range(2):
            for number, tab in enumerate(tabs):
                latent = live[(number + move) % len(live)]
                tab.get_by_role("heading", name=f"0 resid_post · {latent}", exact=True).wait_for()
                expect(tab).to_have_title(re.compile("^Feature"), timeout=30_000)
                if not move:
                    following = live[(number + 1) % len(live)]
                    tab.goto(where("feature", site=SITES[0], latent=following), wait_until="commit")
    finally:
        for context in contexts:
            context.close()
