"""The viewer in a real browser: every page and every kind of link, and nothing it shows can execute."""

from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from browser_fakes import NEEDS_BROWSER, chromium, free_port, served, settled, watched
from playwright.sync_api import TimeoutError
from viewer_fakes import SITES, fake_run

import viewer
from viewer.app.shell import PAGES

pytestmark = NEEDS_BROWSER
HOSTILE = '"><img src=x onerror=window.pwned=1><script>window.pwned=1</script>'
START = {
    "features": {"site": SITES[0], "sort": "max"},
    "feature": {"site": SITES[1], "latent": "5"},
    "compare": {"with": "other", "site": SITES[0], "cosine": "0.3", "show": "matched"},
}
SESSIONS = 5


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


def where(page, /, **query):
    return f"/{PAGES[page]}?{urlencode({'run': 'mine', **START.get(page, {}), **query})}"


def kind_of(link):
    """What tells kinds of links apart: the page and which parameters it names."""
    parts = urlsplit(link)
    return parts.path, tuple(sorted(name for name, _ in parse_qsl(parts.query, keep_blank_values=True)))


def links_of(tab):
    """One visible link of each kind that leads elsewhere."""
    found = {}
    for link in tab.locator("a[data-js-link]:visible").all():
        target = link.get_attribute("href")
        if kind_of(target) not in found and link.get_attribute("aria-current") is None:
            found[kind_of(target)] = target
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
        )
    except TimeoutError:
        return False
    settled(tab)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_kind_of_link_leads_where_it_says_and_back(tab, page):
    tab.goto(where(page))
    settled(tab)
    shown = tab.url
    links = links_of(tab)
    # the other pages are in the header of each
    assert {path for path, _ in links} >= {name or "." for name in PAGES.values()} - {PAGES[page] or "."}
    for target in links.values():
        tab.wait_for_function(
            "target => { const links = [...document.querySelectorAll('a[data-js-link]')];"
            " const link = links.find(link => link.getAttribute('href') === target);"
            " link?.click(); return link !== undefined; }",
            arg=target,
        )
        assert at(tab, target), (target, tab.url)
        tab.go_back()
        # once: a link is one entry in the history
        assert at(tab, shown), (target, shown, tab.url)


def test_back_forward_and_reload_keep_what_is_shown(tab, folders):
    site = viewer.open(folders[0]).layer(1)
    live = site.live().tolist()
    tab.goto(where("feature", latent=live[0]))
    titles = [f"1 resid_post · {latent}" for latent in live[:3]]
    tab.get_by_role("heading", name=titles[0], exact=True).wait_for()
    for title in titles[1:]:
        settled(tab)
        tab.get_by_role("button", name="Next").wait_for()
        tab.keyboard.press("ArrowRight")
        tab.get_by_role("heading", name=title, exact=True).wait_for()
    settled(tab)
    tab.go_back()
    tab.get_by_role("heading", name=titles[1], exact=True).wait_for()
    tab.go_forward()
    tab.get_by_role("heading", name=titles[2], exact=True).wait_for()
    tab.reload()
    tab.get_by_role("heading", name=titles[2], exact=True).wait_for()
    tab.locator(".js-ex").first.wait_for()
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
    to("a[href^=compare]")
    tab.keyboard.press("Enter")
    assert at(tab, "compare?run=mine")
    to("[role=slider], input[type=range]")
    tab.keyboard.press("ArrowLeft")
    assert at(tab, "compare?cosine=0.65")
    to(".js-tabs a:last-child")
    tab.keyboard.press("Enter")
    assert at(tab, "compare?show=merged")
    to(".js-head a[href^=features]")
    tab.keyboard.press("Enter")
    assert at(tab, "features?run=mine")
    to("a[href^='feature?']")
    tab.keyboard.press("Enter")
    assert at(tab, "feature?run=mine")


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


def test_addresses_survive_a_restart(browser, folders, tmp_path):
    port = free_port()
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    with served(folders, tmp_path / "a", port) as url, watched(browser, url) as tab:
        tab.goto(where("feature"))
        settled(tab)
        tab.goto(where("compare", show="new", cosine="0.9"))
        tab.locator(".js-tabs [aria-current]", has_text="Only in mine").wait_for()
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
                assert tab.title().startswith("Feature")
                if not move:
                    following = live[(number + 1) % len(live)]
                    tab.goto(where("feature", site=SITES[0], latent=following), wait_until="commit")
    finally:
        for context in contexts:
            context.close()
