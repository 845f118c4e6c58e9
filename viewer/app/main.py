"""The viewer: `jumpscope view RUN...`, or `streamlit run viewer/app/main.py -- RUN...`."""

from pathlib import Path
from urllib.parse import quote

import streamlit as st

from viewer.app.shell import PAGES, follow_links, run_paths

# drawn here: Streamlit would fetch a named icon for the tab from the network
ICON = "data:image/svg+xml," + quote(
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    '<rect width="32" height="32" rx="6" fill="#0b6e63"/>'
    '<circle cx="16" cy="16" r="8" fill="none" stroke="#fff" stroke-width="2.5"/>'
    '<circle cx="16" cy="16" r="3" fill="#f5a33c"/></svg>'
)
FOLDER = Path(__file__).resolve().parent / "pages"
ICONS = {"overview": "layers", "feature": "biotech", "prompt": "grid_on", "steer": "tune"}

st.set_page_config(page_title=f"{next(iter(run_paths()))} · jumpscope", page_icon=ICON, layout="wide")
pages = {
    name: st.Page(
        FOLDER / f"{name}.py",
        title=name.capitalize(),
        icon=f":material/{ICONS[name]}:",
        url_path=where or None,
        default=not where,
    )
    for name, where in PAGES.items()
}
st.session_state["pages"] = pages
page = st.navigation(list(pages.values()), position="top")
follow_links()
page.run()
