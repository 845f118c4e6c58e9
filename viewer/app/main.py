"""The viewer: `jumpscope view RUN`, or `streamlit run viewer/app/main.py -- RUN`."""

from pathlib import Path
from urllib.parse import quote

import streamlit as st

from viewer.app.shell import run_path

# drawn here: Streamlit would fetch a named icon for the tab from the network
ICON = "data:image/svg+xml," + quote(
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    '<rect width="32" height="32" rx="6" fill="#0b6e63"/>'
    '<circle cx="16" cy="16" r="8" fill="none" stroke="#fff" stroke-width="2.5"/>'
    '<circle cx="16" cy="16" r="3" fill="#f5a33c"/></svg>'
)
PAGES = Path(__file__).resolve().parent / "pages"

st.set_page_config(page_title=f"{run_path().resolve().name} · jumpscope", page_icon=ICON, layout="wide")
st.navigation(
    [
        st.Page(PAGES / "overview.py", title="Overview", icon=":material/layers:", default=True),
        st.Page(PAGES / "feature.py", title="Feature", icon=":material/biotech:", url_path="feature"),
    ],
    position="top",
).run()
