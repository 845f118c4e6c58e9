"""The viewer: `jumpscope view RUN...`, or `streamlit run viewer/app/main.py -- RUN...`."""

from pathlib import Path
from urllib.parse import quote

import streamlit as st

from viewer.app.header import header
from viewer.app.shell import PAGES, current, follow_links

# drawn here: Streamlit would fetch a named icon for the tab from the network
ICON = "data:image/svg+xml," + quote(
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    '<rect width="32" height="32" rx="6" fill="#0b6e63"/>'
    '<circle cx="16" cy="16" r="8" fill="none" stroke="#fff" stroke-width="2.5"/>'
    '<circle cx="16" cy="16" r="3" fill="#f5a33c"/></svg>'
)
# a folder called "pages" would be Streamlit's own: until this script has run once, an address would show the
# page's script alone, without header, runs and links
FOLDER = Path(__file__).resolve().parent / "views"

pages = {
    name: st.Page(FOLDER / f"{name}.py", title=name.capitalize(), url_path=where or None, default=not where)
    for name, where in PAGES.items()
}
# the header has the links: Streamlit's own would forget the run
page = st.navigation(list(pages.values()), position="hidden")
st.set_page_config(page_title=f"{page.title} · {current()} · jumpscope", page_icon=ICON, layout="wide")
follow_links()
header(next(name for name in pages if pages[name] is page))
page.run()
