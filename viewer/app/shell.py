"""What the viewer's pages share: which runs are shown, how addresses name things, how trouble is told."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode

import streamlit as st
from streamlit.components.v2 import component

from sae.errors import UserError
from train.run_folder import EVAL, RUN
from viewer import markup, runs
from viewer.app import background
from viewer.index.storage import MANIFEST, TEXTS
from viewer.once import Kept

PAGES = {
    "overview": "",
    "features": "features",
    "feature": "feature",
    "prompt": "prompt",
    "steer": "steer",
    "compare": "compare",
}
"""Pages by name, as modules and in addresses: the overview is what an address without a page shows."""
_RUNS: Kept[runs.Run] = Kept()
_READY: Kept[threading.Thread] = Kept()
_STAMPED = (RUN, EVAL, f"index/{TEXTS}/{MANIFEST}", f"{TEXTS}/{MANIFEST}")

# A link has an address, so that it can be copied and opened in another tab; a plain click must not load the
# whole page anew. The browser is told the address, and Streamlit that it went there, as by the Back button:
# st.switch_page would put an entry of its own into the history, of this page with the other's parameters, and
# a page that completes its address another.
_FOLLOW = """
export default function () {
  const follow = (event) => {
    const link = event.target.closest?.("a[data-js-link]");
    if (!link || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    const turned = link.pathname !== location.pathname;
    history.pushState({}, "", link.href);
    window.dispatchEvent(new PopStateEvent("popstate"));
    if (turned) document.querySelector("[data-testid=stMain]")?.scrollTo(0, 0);
  };
  document.addEventListener("click", follow);
  return () => document.removeEventListener("click", follow);
}
"""

# the address that a link to copy leads to, in full; where the clipboard is closed to pages that are not
# served over https, the old way
_COPY = """
export default function () {
  const copy = async (event) => {
    const link = event.target.closest?.("a[data-js-copy]");
    if (!link) return;
    event.preventDefault();
    try {
      await navigator.clipboard.writeText(link.href);
    } catch {
      const box = document.body.appendChild(document.createElement("textarea"));
      box.value = link.href;
      box.select();
      document.execCommand("copy");
      box.remove();
    }
    // clicked again meanwhile, it says "Copied" still, which is not what it goes back to
    link.dataset.said ??= link.textContent;
    link.textContent = "Copied";
    clearTimeout(link.until);
    link.until = setTimeout(() => (link.textContent = link.dataset.said), 1500);
  };
  document.addEventListener("click", copy);
  return () => document.removeEventListener("click", copy);
}
"""


def run_paths() -> dict[str, Path]:
    """The folders named on the command line, by the names that addresses give them.

    A run is called as its folder; where two folders are called the same, as much of their paths as tells
    them apart.
    """
    return named([Path(argument) for argument in sys.argv[1:]] or [Path()])


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Each folder by the shortest end of its path that no other has; the same folder twice is one."""
    resolved = list(dict.fromkeys(Path(os.path.abspath(path)) for path in paths))
    names: dict[str, Path] = {}
    for path in resolved:
        for length in range(1, len(path.parts) + 1):
            end = path.parts[-length:]
            if sum(other.parts[-length:] == end for other in resolved) == 1:
                break
        names["/".join(part.strip("/") for part in end) or "/"] = path
    return names


def current() -> str:
    """The name of the run that the address asks for, else the one seen last, else the first."""
    known = run_paths()
    for name in (st.query_params.get("run"), st.session_state.get("last_run")):
        if name in known:
            st.session_state["last_run"] = name
            return name
    return next(iter(known))


def address(page: str, /, **parameters: object) -> str:
    """Where a page shows something, of the current run unless `run` is among the parameters.

    For `href` in HTML of our own, escaped by the caller, beside the attribute `data-js-link`.
    """
    return f"{PAGES[page] or '.'}?{urlencode({'run': current(), **parameters})}"


def follow_links() -> None:
    """Makes links with `data-js-link` fast. Once in a script."""
    _links()(key="links")


def copy_links() -> None:
    """Makes links with `data-js-copy` copy their address."""
    _copies()(key="copies")


def render(show: Callable[[runs.Run], None]) -> None:
    """Draws a page of the current run; what the user can put right becomes a message in the page's place."""
    st.html(markup.STYLE)
    known, asked = run_paths(), st.query_params.get("run")
    if asked is not None and asked not in known:
        st.warning(plain(f"This viewer has no run {asked[:80]!r}. It has {', '.join(known)}."))
    try:
        run = open_run(current())
        show(run)
        # loaded from the first visit on, but after the page
        background.resident(run)
        _READY.get(run.path, run, lambda: _start(run.warm))
    except UserError as error:
        st.error(plain(str(error)), icon=":material/error:")
    except OSError as error:
        # a run may be deleted between two looks at it
        st.error(plain(f"A file of the run cannot be read: {error}."), icon=":material/error:")


def open_run(name: str) -> runs.Run:
    """One of the viewer's runs, opened once and again when it was written anew."""
    return _open(run_paths()[name])


def warm(paths: Sequence[Path]) -> None:
    """Reads what the first pages of runs need, while the browser loads the viewer's own code."""
    for path in paths:
        # a run that cannot be read is told by its page
        with contextlib.suppress(UserError, OSError):
            _open(path).health()


def _start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _open(path: Path) -> runs.Run:
    files = (path / name for name in _STAMPED)
    stamp = tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files)
    return _RUNS.get(path, stamp, lambda: runs.open(path))


def plain(text: str) -> str:
    """Text for Streamlit's Markdown widgets with nothing left that Markdown would act on."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!|~<>$:&" else c for c in text)


def set_address(**parameters: object) -> None:
    """Makes the page's address say what it shows, so that it can be copied and reloaded."""
    wanted: Mapping[str, str] = {name: str(value) for name, value in {"run": current(), **parameters}.items()}
    if st.query_params.to_dict() != wanted:
        st.query_params.from_dict(wanted)


@st.cache_resource(show_spinner=False)
def _links() -> Callable:
    return component("jumpscope_links", js=_FOLLOW)


@st.cache_resource(show_spinner=False)
def _copies() -> Callable:
    return component("jumpscope_copies", js=_COPY)
