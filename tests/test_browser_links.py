"""The viewer in a real browser: every page and every kind of link, back and forth, and by keyboard alone."""

from urllib.parse import parse_qsl, urlsplit

import pytest
from browser_fakes import NEEDS_BROWSER, settled, tried, tried_until, where
from playwright.sync_api import TimeoutError
from viewer_fakes import SITES

import viewer
from viewer.app.shell import PAGES

pytest_plugins = ["browser_fakes"]
pytestmark = NEEDS_BROWSER


def kind_of(link):
    """What tells kinds of links apart: the page and which parameters it names."""
    parts = urlsplit(link)
    return parts.path, tuple(sorted(name for name, _ in parse_qsl(parts.query, keep_blank_values=True)))


def links_of(tab, which="a[data-js-link]:visible"):
    """One of these links for each kind that leads elsewhere."""
    found = {}
    # all at one moment: they may be drawn anew between two questions
    elsewhere = "links => links.filter(a => !a.hasAttribute('aria-current')).map(a => a.getAttribute('href'))"
    for target in tab.locator(which).evaluate_all(elsewhere):
        found.setdefault(kind_of(target), target)
    return found


def query_of(tab):
    return parse_qsl(urlsplit(tab.url).query, keep_blank_values=True)


def at(tab, target):
    """Waits until the address is that of a link, with at least what the link names; whether it came to be."""
    parts = urlsplit(target)
    path = "/" if parts.path in (".", "") else f"/{parts.path.strip('/')}"
    wanted = parse_qsl(parts.query, keep_blank_values=True)
    try:
        tab.wait_for_function(
            "([path, wanted]) => location.pathname === path && wanted.every(([name, value]) =>"
            " new URLSearchParams(location.search).get(name) === value)",
            arg=[path, wanted],
            timeout=30_000,
        )
    except TimeoutError:
        return False
    # drawn by the page's own run: until that began Streamlit may still set the address of the page before
    name = next(name for name, where in PAGES.items() if f"/{where}" == path)
    tab.locator(".js-head a[aria-current]").get_by_text(name.capitalize(), exact=True).wait_for()
    settled(tab)
    return True


def followed(tab, target):
    """Clicks a link, once it is there; whether it led where it says."""
    tab.wait_for_function(
        "target => { const links = [...document.querySelectorAll('a[data-js-link]')];"
        " const link = links.find(link => link.getAttribute('href') === target);"
        " link?.click(); return link !== undefined; }",
        arg=target,
    )
    return at(tab, target)


@pytest.mark.parametrize("page", PAGES)
def test_every_kind_of_link_leads_where_it_says_and_back(tab, page):
    tab.goto(where(page))
    settled(tab)
    shown = tab.url
    links, own = links_of(tab), links_of(tab, "a[data-js-link]:visible:not(.js-head *)")
    # the other pages are in the header of each, the same on all: followed on the first alone
    assert {path for path, _ in links} >= {name or "." for name in PAGES.values()} - {PAGES[page] or "."}
    for target in (links if page == "overview" else own).values():

        def there_and_back(target=target):
            # from the start where it was lost: when busy, Streamlit may set an address late, over a newer one
            if tab.url != shown:
                tab.goto(shown)
            settled(tab)
            assert followed(tab, target), (target, tab.url)
            tab.go_back()
            # once: a link is one entry in the history
            assert at(tab, shown), (target, shown, tab.url)

        tried(there_and_back)


def test_back_forward_and_reload_keep_what_is_shown(tab, folders):
    site = viewer.open(folders[0]).layer(1)
    live = site.live().tolist()
    tab.goto(where("feature", latent=live[0]))
    titles = [tab.get_by_role("heading", name=f"1 resid_post · {latent}", exact=True) for latent in live[:3]]
    titles[0].wait_for()
    for title in titles[1:]:
        tab.get_by_role("button", name="Next").wait_for()
        tried_until(lambda: tab.keyboard.press("ArrowRight"), title)
    settled(tab)
    tab.go_back()
    titles[1].wait_for()
    settled(tab)
    tab.go_forward()
    titles[2].wait_for()
    settled(tab)
    tab.reload()
    titles[2].wait_for()
    tab.locator(".js-ex").first.wait_for()
    settled(tab)
    assert dict(query_of(tab)) == {"run": "mine", "site": SITES[1], "latent": str(live[2])}


def test_a_walk_with_the_keyboard_alone(tab):
    def to(selector):
        """Tabs on to an element, which must show that it has the focus."""
        for _ in range(80):
            tab.keyboard.press("Tab")
            if tab.evaluate("selector => document.activeElement.matches(selector)", selector):
                break
        style = "s => { const c = getComputedStyle(document.activeElement); return c[s]; }"
        assert tab.evaluate("selector => document.activeElement.matches(selector)", selector), selector
        assert tab.evaluate(style, "outlineStyle") != "none" or tab.evaluate(style, "boxShadow") != "none"

    tab.goto(where("overview"))
    settled(tab)
    walk = [
        ("a[href^=compare]", "Enter", "compare?run=mine"),
        ("[role=slider], input[type=range]", "ArrowLeft", "compare?cosine=0.65"),
        (".js-tabs a:last-child", "Enter", "compare?show=merged"),
        (".js-head a[href^=features]", "Enter", "features?run=mine"),
        ("a[href^='feature?']", "Enter", "feature?run=mine"),
    ]
    for selector, key, target in walk:

        def step(selector=selector, key=key, target=target):
            to(selector)
            tab.keyboard.press(key)
            assert at(tab, target), (selector, tab.url)

        tried(step)
