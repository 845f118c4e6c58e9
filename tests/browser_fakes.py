"""The viewer's server and a real browser, for the tests that need one."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Error as BrowserError
from playwright.sync_api import sync_playwright
from viewer_fakes import SITES, fake_run

import viewer
from viewer.app.shell import PAGES

CHROMIUM = "/usr/bin/chromium"
NEEDS_BROWSER = pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"no {CHROMIUM} on this machine")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START = {
    "features": {"site": SITES[0], "sort": "max"},
    "feature": {"site": SITES[1], "latent": "5"},
    "compare": {"with": "other", "site": SITES[0], "cosine": "0.3", "show": "matched"},
}
"""What the addresses of pages of the fake runs `mine` and `other` ask for."""
DRAWN = """() => {
  if (!window.changed) {
    const note = () => (window.changed = performance.now());
    new MutationObserver(note).observe(document.body, { childList: true, subtree: true });
    note();
  }
  const parts = [
    "[data-testid=stApp][data-test-script-state=notRunning]", ".js-head",
    "[data-testid=stMain] :is(h1, h2, [data-testid=stAlert])",
  ];
  return parts.every((part) => document.querySelector(part)) && performance.now() - window.changed > 150;
}"""
"""Whether a page stands still: its script has ended before the last of what it says is drawn."""
ROOT = str(Path(viewer.__file__).resolve().parent.parent)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(folders, scratch, port=None):
    """The viewer of some run folders, in a process of its own: its address. `scratch` is an empty folder."""
    port = port or free_port()
    # a folder of traps: a user's own files must not stand in front of our packages
    trap = scratch / "cwd"
    trap.mkdir(exist_ok=True)
    for name in ("train.py", "html.py", "sae.py"):
        (trap / name).write_text("raise SystemExit('imported from the current folder')")
    code = (
        f"import sys; sys.path[:1] = [{ROOT!r}]; "
        f"from viewer.app.launch import launch; launch({[str(f) for f in folders]!r}, {port}, True)"
    )
    # what the machine is set to must not decide: no proxy between a test and its own server
    with (scratch / "server.txt").open("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", code], cwd=trap, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 180
            while not _answers(f"{url}/_stcore/health"):
                log.seek(0)
                assert server.poll() is None and time.monotonic() < deadline, log.read()
                time.sleep(0.1)
            yield url
        finally:
            server.terminate()
            server.wait(180)


@contextlib.contextmanager
def chromium():
    """A browser, to be shared by the tests of a file."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def watched(browser, address, *, width=390, height=844):
    """A tab in a context of its own, at a phone's size unless told otherwise.

    When it is done, nothing may have been asked of anywhere but `address`, no error may stand in the
    console, no dialog may have opened, and no text may have run as a script.
    """
    context = browser.new_context(
        base_url=address if address.startswith("http") else None, viewport={"width": width, "height": height}
    )
    # hostile texts set window.pwned; the next page would not know of it
    context.add_init_script(
        "Object.defineProperty(window, 'pwned', { set() { console.error('a text ran as a script'); } })"
    )
    tab = context.new_page()
    tab.set_default_timeout(90_000)
    trouble = []
    tab.on(
        "request",
        lambda r: None if r.url.startswith((address, "data:", "blob:")) else trouble.append(r.url),
    )
    # Streamlit looks for its server below the page's address first, and finds it at the second attempt
    ours = lambda m: m.type == "error" and "/_stcore/" not in m.location["url"]  # noqa: E731
    tab.on("console", lambda m: trouble.append(m.text) if ours(m) else None)
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.on("dialog", lambda d: (trouble.append(f"dialog {d.message}"), d.dismiss()))
    try:
        yield tab
        assert trouble == []
    finally:
        context.close()


@pytest.fixture(scope="module")
def browser():
    """A browser for the tests of a module that says `pytest_plugins = ["browser_fakes"]`."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The run folders that are served; a module may have others."""
    root = tmp_path_factory.mktemp("runs")
    return [fake_run(root / name).path for name in ("mine", "other")]


@pytest.fixture(scope="module")
def address(folders, tmp_path_factory):
    """Where they are served."""
    with served(folders, tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def tab(browser, address):
    """A tab of a phone's size."""
    with watched(browser, address) as tab:
        yield tab


def where(page, /, **query):
    """A page's address."""
    return f"/{PAGES[page]}?{urlencode({'run': 'mine', **START.get(page, {}), **query})}"


def settled(tab):
    """Waits until the page is drawn; whether all of it fits the width of the window is checked too."""
    tab.wait_for_function(DRAWN, polling=50)
    assert tab.locator("[data-testid=stException]").count() == 0
    places = "[document.documentElement, document.querySelector('[data-testid=stMain]')]"
    width = tab.viewport_size["width"]

    def fits():
        assert max(tab.evaluate(f"{places}.map(place => place.scrollWidth)")) <= width, tab.url

    tried(fits)


def tried(step):
    """Does a step, and again for a minute where it failed, as a person would; its last error counts.

    What falls between two drawings of a page is lost on a busy machine: a key, a click, the focus, the place
    of the mouse. A step acts and looks for what came of it; it must bear to be done twice.
    """
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(AssertionError, BrowserError):
            return step()
        time.sleep(0.1)
    return step()


def tried_until(do, sign):
    """Does something on a page of the viewer that is drawn, and again where it was lost, until a sign shows.

    What is only slow is not done twice: a second look at the page comes first.
    """

    def step():
        settled(sign.page)
        if not sign.is_visible():
            do()
            sign.wait_for(timeout=6_000)

    assert not sign.is_visible(), "a sign that shows before tells nothing"
    tried(step)


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
