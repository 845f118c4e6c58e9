"""What the viewer's pages share: which run is shown, how it is opened, how trouble is told."""

import sys
from collections.abc import Callable
from pathlib import Path

import streamlit as st

from sae.errors import UserError
from train.run_folder import EVAL, RUN
from viewer import features, markup
from viewer.storage import MANIFEST


def run_path() -> Path:
    """The run folder named on the command line: `streamlit run app.py -- RUN`."""
    return Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def render(show: Callable[[features.Run], None]) -> None:
    """Draws a page of the run; whatever the user can put right becomes a message in the page's place."""
    st.html(markup.STYLE)
    try:
        show(_open(run_path()))
    except UserError as error:
        st.error(plain(str(error)), icon=":material/error:")


def plain(text: str) -> str:
    """Text for Streamlit's Markdown widgets with nothing left that Markdown would act on."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!|~<>$:&" else c for c in text)


def site_index(run: features.Run, site: str) -> features.Site:
    """A site's index, kept between reruns until its manifest changes."""
    manifest = run.folder.index_dir(site) / MANIFEST
    return _site(str(manifest), manifest.stat().st_mtime_ns if manifest.is_file() else 0, site)


def indexed(run: features.Run) -> list[str]:
    """The sites that have an index, in layer order."""
    return [site for site in run.sites if (run.folder.index_dir(site) / MANIFEST).is_file()]


def _open(path: Path) -> features.Run:
    stamp = tuple((path / name).stat().st_mtime_ns if (path / name).is_file() else 0 for name in (RUN, EVAL))
    return _run(str(path), stamp)


@st.cache_resource(max_entries=8, show_spinner=False)
def _run(path: str, stamp: tuple[int, ...]) -> features.Run:
    return features.open(path)


@st.cache_resource(max_entries=64, show_spinner=False)
def _site(manifest: str, stamp: int, name: str) -> features.Site:
    return features.Site(Path(manifest).parent, name)
