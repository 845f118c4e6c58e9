"""What the viewer's pages share: which run is shown, how it is opened, how trouble is told."""

import sys
from collections.abc import Callable
from pathlib import Path

import streamlit as st

from sae.errors import UserError
from train.run_folder import EVAL, RUN
from viewer import markup, runs


def run_path() -> Path:
    """The run folder named on the command line: `streamlit run app.py -- RUN`."""
    return Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def render(show: Callable[[runs.Run], None]) -> None:
    """Draws a page of the run; whatever the user can put right becomes a message in the page's place."""
    st.html(markup.STYLE)
    try:
        show(_open(run_path()))
    except UserError as error:
        st.error(plain(str(error)), icon=":material/error:")


def plain(text: str) -> str:
    """Text for Streamlit's Markdown widgets with nothing left that Markdown would act on."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!|~<>$:&" else c for c in text)


def _open(path: Path) -> runs.Run:
    stamp = tuple((path / name).stat().st_mtime_ns if (path / name).is_file() else 0 for name in (RUN, EVAL))
    return _run(str(path), stamp)


@st.cache_resource(max_entries=8, show_spinner=False)
def _run(path: str, stamp: tuple[int, ...]) -> runs.Run:
    return runs.open(path)
