"""How fast the viewer's pages come, in a browser: from a click to what it asked for being drawn.

    python benchmarks/page_speed.py RUN [--times 30] [--chromium /usr/bin/chromium]

Serves RUN, opens it in Chromium and does what a user does: Next, a neighbour, a box of the strip, a random
feature, a page of the table, a sorting, a search by words, by token and by label. The clock runs in the page
(performance.now), from the event of the click or key to the animation frame after the one in which the new
heading and what belongs under it (examples, rows) stood there. The first of each is told apart: it opens
files. Features and words are drawn anew each time, so that little is seen twice. The last line is JSON.
"""

import argparse
import contextlib
import functools
import json
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import viewer
from sae.errors import UserError
from viewer.catalogue import Choice

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
# drawn is what was not there: a new heading with new text below, new rows, or the word that there are none
_WATCH = """
(kind) => {
  const heading = () => document.querySelector(".js-f h1")?.textContent ?? "";
  const list = () => document.querySelector(".js-list tbody, .js-state")?.textContent ?? "";
  const now = () => kind === "feature"
    ? [heading(), document.querySelector(".js-two")?.textContent ?? "",
       document.querySelectorAll(".js-two .js-h").length]
    : [list(), list(), document.querySelectorAll(".js-list tbody tr, .js-state").length];
  const before = now();
  window.drawn = new Promise((resolve) => {
    let start = null;
    const begin = () => { start ??= performance.now(); };
    for (const name of ["click", "keydown"])
      document.addEventListener(name, begin, { capture: true, once: true });
    const look = () => {
      const here = now();
      if (start !== null && here[0] !== before[0] && here[1] !== before[1] && here[2] > 0)
        requestAnimationFrame(() => resolve(performance.now() - start));
      else requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
    setTimeout(() => resolve(null), 20000);
  });
}
"""


def main() -> None:
    """Serves, measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"from viewer.app.launch import launch; launch([{str(arguments.run)!r}], {port}, True)"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    try:
        _wait(f"http://127.0.0.1:{port}/_stcore/health")
        found = measure(f"http://127.0.0.1:{port}", arguments)
    finally:
        server.terminate()
        server.wait()
    print(f"{'':16}{'first':>8}{'median':>8}{'95 %':>8}{'worst':>8}  ms")
    for name, row in found.items():
        print(f"{name:16}" + "".join(f"{row[key]:8.0f}" for key in ("first", "median", "p95", "worst")))
    print(json.dumps({"benchmark": "page_speed", "run": arguments.run.name, "ms": found}))


def measure(url: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{what is done: first, median, p95, worst}, in milliseconds."""
    from playwright.sync_api import sync_playwright

    run = viewer.open(arguments.run)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1440, "height": 900})
        tab.set_default_timeout(60_000)
        tab.goto(url)
        tab.locator(".js-facts").first.wait_for()
        times = _features(tab, url, run, arguments.times) | _tables(tab, url, run, arguments.times)
        browser.close()
    return {name: _summary(taken) for name, taken in times.items()}


def _features(tab: Any, url: str, run: viewer.Run, times: int) -> dict[str, list[float]]:
    site = run.indexed[len(run.indexed) // 2]
    tab.goto(f"{url}/feature?site={site}&latent={int(run.site(site).live()[0])}")
    tab.locator(".js-strip a").first.wait_for()
    acts: dict[str, Callable[[], object]] = {
        "next": lambda: tab.get_by_role("button", name="Next").click(),
        "key": lambda: tab.keyboard.press("ArrowRight"),
        "neighbour": lambda: _click_one(tab, ".js-rel a"),
        "layer": lambda: _click_one(tab, ".js-strip a"),
        "random": lambda: tab.get_by_role("button", name="Random").click(),
    }
    return {name: [_timed(tab, "feature", act) for _ in range(times)] for name, act in acts.items()}


def _tables(tab: Any, url: str, run: viewer.Run, times: int) -> dict[str, list[float]]:
    def opened(query: str) -> None:
        tab.goto(f"{url}/features?{query}")
        tab.locator(".js-list tbody tr").first.wait_for()

    texts = run.index.texts
    read = run.index.strings.of(texts.tokens[texts.keep][:20_000])
    words = list({text.strip() for text in read if text[1:].isalnum() and len(text) > 3})
    random.shuffle(words)
    # only what is found, so that every answer is a new table
    words = [word for word in words[: 10 * times] if _found(run, word)]

    def search(number: int) -> None:
        box = tab.get_by_label("Search", exact=True)
        box.fill(" ".join(random.sample(words, number)))
        box.press("Enter")

    opened("")
    following = tab.get_by_role("link", name="Next page").first
    taken = {"page": [_timed(tab, "list", following.click) for _ in range(times)]}
    # columns in which values differ, so that another order shows
    heads = ".js-list th a:is(:text('density'), :text('label'), :text('fires on'))"
    taken["sort"] = [_timed(tab, "list", lambda: _click_one(tab, heads)) for _ in range(times)]
    for by, number in {"words": 2, "token": 1, "label": 1}.items():
        opened(f"by={by}")
        act = functools.partial(search, number)
        taken[f"search {by}"] = [_timed(tab, "list", act) for _ in range(times)]
    return taken


def _found(run: viewer.Run, word: str) -> bool:
    with contextlib.suppress(UserError):
        return bool(len(run.find(token=f" {word}")) and run.browse(Choice(label=word)).total)
    return False


def _timed(tab: Any, kind: str, act: Callable[[], object]) -> float:
    tab.evaluate(_WATCH, kind)
    act()
    took = tab.evaluate("window.drawn")
    if took is None:
        raise SystemExit(f"nothing new was drawn: {tab.locator('body').inner_text()[:400]}")
    # a person looks before the next click; the strip of layers comes meanwhile
    tab.wait_for_timeout(400)
    return took


def _click_one(tab: Any, selector: str) -> None:
    tab.locator(selector).first.wait_for()
    random.choice(tab.locator(selector).all()).click()


def _summary(taken: list[float]) -> dict[str, float]:
    rest = sorted(taken[1:] or taken)
    p95 = rest[min(len(rest) - 1, int(0.95 * len(rest)))]
    summary = {"first": taken[0], "median": statistics.median(rest), "p95": p95, "worst": rest[-1]}
    return {name: round(value, 1) for name, value in summary.items()}


def _wait(address: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise SystemExit(f"the viewer must answer at {address} within 30 s")


if __name__ == "__main__":
    main()
