"""What axe-core finds on every page in a real browser, and a walk through the header by keyboard."""

import pytest
from browser_fakes import NEEDS_BROWSER, settled, tried, tried_until, watched
from viewer_fakes import SITES

from viewer.app.shell import PAGES

pytest_plugins = ["browser_fakes"]
pytestmark = NEEDS_BROWSER


def drawn(tab, page):
    tab.goto(f"/{PAGES[page]}?run=mine")
    tab.locator(f'nav a[aria-current="page"]:has-text("{page.capitalize()}")').wait_for()
    settled(tab)
    # what was drawn anew fades in, and is hard to read until then
    tab.wait_for_function("document.getAnimations().every(a => a.playState !== 'running')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_any_page(browser, address, scheme):
    from axe_playwright_python.sync_playwright import Axe

    found = {}
    with watched(browser, address, width=1280) as tab:
        tab.emulate_media(color_scheme=scheme)
        for page in PAGES:
            drawn(tab, page)
            for trouble in Axe().run(tab).response["violations"]:
                where = [node["html"][:200] for node in trouble["nodes"]]
                found[page, trouble["id"]] = (trouble["impact"], where)
    assert found == {}


def test_pages_and_runs_are_reached_by_keyboard(browser, address):
    with watched(browser, address, width=1280) as tab:
        drawn(tab, "overview")
        link = tab.locator("nav a", has_text="Features")

        def reached():
            link.focus()
            tab.keyboard.press("Shift+Tab")
            tab.keyboard.press("Tab")
            shown = link.evaluate("a => [document.activeElement === a, getComputedStyle(a).outlineStyle]")
            assert shown == [True, "solid"]
            tab.keyboard.press("Enter")

        tried_until(lambda: tried(reached), tab.locator("nav a[aria-current]", has_text="Features"))
        tab.wait_for_url("**/features?run=mine*")

        def other_run():
            tab.goto(f"/feature?run=mine&site={SITES[1]}&latent=5")
            settled(tab)
            tab.locator("summary", has_text="Run: mine").focus()
            for key in ("Enter", "Tab", "Tab", "Enter"):
                tab.keyboard.press(key)
            # the same latent of the other run
            tab.wait_for_url(f"**/feature?run=other&site={SITES[1]}&latent=5", timeout=6_000)

        tried(other_run)
        tab.locator("summary", has_text="Run: other").wait_for()
        tab.wait_for_function("document.title === 'Feature · other · jumpscope'")
