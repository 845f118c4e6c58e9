"""The viewer in a real browser: it draws, follows clicks and keys, and nothing it shows can execute."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from viewer_fakes import SITES, fake_run

import viewer

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"no {CHROMIUM} on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "mine").path


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # a folder of traps: a user's own files must not stand in front of our packages
    trap = tmp_path_factory.mktemp("cwd")
    for name in ("train.py", "html.py", "sae.py"):
        (trap / name).write_text("raise SystemExit('imported from the current folder')")
    root = str(Path(viewer.__file__).resolve().parent.parent)
    code = (
        f"import sys; sys.path[:1] = [{root!r}]; "
        f"from viewer.app.launch import launch; launch([{str(folder)!r}], {port}, True)"
    )
    log = (tmp_path_factory.mktemp("log") / "server.txt").open("w+")
    server = subprocess.Popen([sys.executable, "-c", code], cwd=trap, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 40
        while not _answers(f"{url}/_stcore/health"):
            log.seek(0)
            assert server.poll() is None and time.monotonic() < deadline, log.read()
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, address):
    context = browser.new_context(base_url=address, viewport={"width": 390, "height": 844})
    tab = context.new_page()
    tab.set_default_timeout(30_000)
    tab.outside = []
    tab.on(
        "request",
        lambda r: None if r.url.startswith((address, "data:", "blob:")) else tab.outside.append(r.url),
    )
    yield tab
    # offline first: nothing a page does may reach for the network
    assert tab.outside == []
    context.close()


def heading(tab, text):
    tab.get_by_role("heading", name=text).wait_for()


def test_from_the_overview_to_a_feature_and_on(tab, folder):
    tab.goto("/")
    heading(tab, "mine")
    assert tab.locator(".js-plotly-plot").first.wait_for() is None
    tab.get_by_role("link", name="1 resid_post").click()
    site = viewer.open(folder).layer(1)
    live = site.live().tolist()
    heading(tab, f"1 resid_post · {live[0]}")
    tab.get_by_role("button", name="Next").click()
    heading(tab, f"1 resid_post · {live[1]}")
    tab.keyboard.press("ArrowRight")
    heading(tab, f"1 resid_post · {live[2]}")
    tab.wait_for_url(f"**/feature?run=mine&site={SITES[1]}&latent={live[2]}")
    tab.reload()
    heading(tab, f"1 resid_post · {live[2]}")
    tab.locator(".js-ex").first.wait_for()
    assert tab.locator(".js-ex").count() == len(site[live[2]].examples())
    values = tab.locator(".js-peak").evaluate_all(
        "spans => spans.map(s => getComputedStyle(s).borderBottomStyle)"
    )
    assert set(values) == {"double"}


def test_hostile_text_is_shown_and_never_runs(tab, folder):
    site = viewer.open(folder).layer(0)
    shown = ""
    for latent in site.live().tolist()[:6]:
        tab.goto(f"/feature?site={SITES[0]}&latent={latent}")
        heading(tab, f"0 resid_post · {latent}")
        tab.locator(".js-ex").first.wait_for()
        # time for an onerror to fire, if there were one
        tab.wait_for_timeout(100)
        assert tab.evaluate("window.pwned") is None
        assert (
            tab.locator(".js-ex script, .js-ex img, .js-ex svg, .js-logits script, .js-logits img").count()
            == 0
        )
        shown += tab.locator("[data-testid=stMain]").inner_text()
    assert "<script>window.pwned=1</script>" in shown and "onerror" in shown and "⟨U+202E⟩" in shown


def test_a_page_fits_a_phone(tab):
    for path in ("/", f"/feature?site={SITES[0]}"):
        tab.goto(path)
        tab.locator(".js-facts").first.wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth") <= 390
