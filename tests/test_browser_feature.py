"""The feature and features pages in a real browser: keys, the label dialog, values, copying, search."""

import pytest
from browser_fakes import NEEDS_BROWSER, settled, tried, tried_until, watched
from playwright.sync_api import expect
from viewer_fakes import SITES, fake_run

import viewer

pytest_plugins = ["browser_fakes"]
pytestmark = NEEDS_BROWSER


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "mine").path


@pytest.fixture(scope="module")
def folders(folder):
    return [folder]


@pytest.fixture
def tab(browser, address):
    with watched(browser, address, width=1280) as tab:
        yield tab


def heading(tab, text):
    tab.get_by_role("heading", name=text, exact=True).wait_for()


def test_the_first_page_of_a_server_may_be_a_feature(tab):
    # its script alone would have no header
    tab.goto(f"/feature?site={SITES[1]}&latent=5")
    heading(tab, "1 resid_post · 5")
    tab.get_by_role("navigation", name="Main").wait_for()


def test_a_label_is_written_by_keyboard_alone(tab, folder):
    tab.goto(f"/feature?site={SITES[0]}&latent=5")
    heading(tab, "0 resid_post · 5")
    settled(tab)
    box = tab.get_by_role("dialog").get_by_label("Label", exact=True)
    tried_until(lambda: tab.keyboard.press("e"), box)

    def written():
        settled(tab)
        box.fill("", timeout=6_000)
        # d and the arrows are the page's keys, but not in a box
        tab.keyboard.type("dead leaves")
        expect(box).to_have_value("dead leaves")
        tab.keyboard.press("ArrowLeft")
        expect(box).to_have_value("dead leaves")

    tried(written)
    tried_until(lambda: tab.keyboard.press("Control+Enter"), tab.locator(".js-label", has_text="dead leaves"))
    heading(tab, "0 resid_post · 5")
    assert viewer.open(folder).layer(0)[5].label == "dead leaves"
    tab.get_by_role("dialog").wait_for(state="detached")


def test_values_show_on_hover_and_focus(tab, folder):
    feature = next(f for f in viewer.open(folder).layer(0) if len(f.examples(0)) > 2 and f.state == "live")
    tab.goto(f"/feature?site={SITES[0]}&latent={feature.latent}")
    example = tab.locator(".js-ex").first
    example.wait_for()
    settled(tab)
    said = "(s => getComputedStyle(s, '::after').content)"
    peak = example.locator(".js-on").first
    assert peak.evaluate(said) == "none"

    def hovered():
        peak.hover(timeout=6_000)
        assert peak.get_attribute("data-v") in peak.evaluate(said)

    tried(hovered)
    # all but the peak, whose value stands beside it always
    others = tab.locator(".js-ex:has(.js-on:not(.js-peak))").first

    def focused():
        others.focus()
        tab.mouse.move(0, 0)
        pairs = f"spans => spans.map(s => [{said}(s), s.dataset.v])"
        shown = others.locator(".js-on:not(.js-peak)").evaluate_all(pairs)
        assert shown and all(text == f'"{value}"' for text, value in shown)

    tried(focused)


def test_the_link_to_copy_is_copied(tab, address):
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.goto(f"/feature?site={SITES[0]}&latent=5")
    link = tab.get_by_role("link", name="Copy link")
    settled(tab)
    # twice at once: it must go back to what it said at first
    tried_until(lambda: link.dblclick(timeout=6_000), tab.get_by_role("link", name="Copied"))
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied == f"{address}/feature?run=mine&site={SITES[0]}&latent=5"
    link.wait_for()


def test_a_search_leads_to_a_feature_and_back(tab, folder):
    run = viewer.open(folder)
    read = run.index.strings.of(run.index.texts.tokens[run.index.texts.keep])
    word = next(text for text in read if text.startswith(" word")).strip()
    tab.goto("/features")
    tab.locator(".js-list tbody tr").first.wait_for()
    box = tab.get_by_label("Search", exact=True)

    def searched():
        settled(tab)
        box.fill(word)
        box.press("Enter")
        tab.wait_for_url(f"**/features?run=mine&q={word}", timeout=6_000)

    tried(searched)
    best = run.find(text=word).iloc[0]
    place = f"{best['layer']} resid_post · {best['latent']}"
    settled(tab)
    first = tab.locator(".js-list tbody tr").first.get_by_role("link", name=place)
    tried_until(lambda: first.click(timeout=6_000), tab.get_by_role("heading", name=place, exact=True))
    settled(tab)
    tab.go_back()
    tab.get_by_role("heading", name="Features").wait_for()
    first.wait_for()
    density = tab.locator(".js-list thead").get_by_role("link", name="density")
    falling = tab.locator("th[aria-sort=descending]", has_text="density")
    tried_until(lambda: density.click(timeout=6_000), falling)
